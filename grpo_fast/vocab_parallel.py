"""A head sharded over the vocabulary: what ranks tell each other is a few [N] vectors a chunk.

Shapes: `N` rows, `R` ranks. Rank r holds the entries [start, start + size) of the vocabulary;
hidden states, targets and everything per token are the same on all ranks, and so is the loss.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .errors import InputError


def is_dtensor(tensor: Tensor) -> bool:
    """Whether it is a `torch.distributed.tensor.DTensor`, without importing that."""
    # An attribute that torch.compile sees too; `to_local` is none.
    return hasattr(tensor, "device_mesh")


def group_called(name: str | None) -> dist.ProcessGroup | None:
    """The process group of this name, which is what a compiled graph knows it by."""
    return None if name is None else dist.distributed_c10d._resolve_process_group(name)


def local_shard(
    weight: Tensor, bias: Tensor | None, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor | None, dist.ProcessGroup]:
    """(weight, bias, group) of this rank; DTensors, sharded over their first dimension, become
    local."""
    if not is_dtensor(weight):
        return weight, bias, group
    from torch.distributed.tensor import Shard as Sharded

    if tuple(weight.placements) != (Sharded(0),):
        raise InputError(
            f"weight has placements {tuple(weight.placements)}, expected (Shard(dim=0),): shard "
            "the head over the vocabulary, or gather it with weight.full_tensor()"
        )
    mesh = weight.device_mesh.get_group()
    if group is not None and group != mesh:
        raise InputError("process_group is not the group of weight's mesh: leave it out")
    bias = bias.to_local() if bias is not None and is_dtensor(bias) else bias
    return weight.to_local(), bias, mesh


class RowStatistics(NamedTuple):
    """As `token_logprob_fwd` gives them, over the whole vocabulary."""

    logp: Tensor
    lse: Tensor
    entropy: Tensor
    other_squares: Tensor


@dataclass(frozen=True, slots=True)
class Shard:
    """This rank's part of the vocabulary."""

    group: dist.ProcessGroup
    start: int
    size: int
    vocabulary: int
    """Of all ranks together."""

    @staticmethod
    def of(weight: Tensor, group: dist.ProcessGroup) -> "Shard":
        """Where `weight` [V_r, D] stands among the shards of `group`, which follow the ranks."""
        sizes = torch.zeros(dist.get_world_size(group), dtype=torch.long, device=weight.device)
        sizes[dist.get_rank(group)] = weight.shape[0]
        dist.all_reduce(sizes, group=group)
        sizes = sizes.tolist()
        start = sum(sizes[: dist.get_rank(group)])
        return Shard(group, start, weight.shape[0], sum(sizes))

    def local(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(targets as local ids, 0 where another rank has it; whether this one has it)."""
        place = targets - self.start
        here = (place >= 0) & (place < self.size)
        return torch.where(here, place, 0), here

    def statistics(self, local: NamedTuple, here: Tensor) -> RowStatistics:
        """Statistics of the shards to those of the whole rows: one maximum and one sum over ranks.

        `local` is `token_logprob_fwd` of this shard. The target's own term stays out of a sum of
        its own, so that a likely target's log-prob keeps its digits.
        """
        peak = local.lse.clone()
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=self.group)
        lead = local.lse - peak
        mass = lead.exp()
        # A shard of probability 0 has no mean: 0 x inf would be NaN.
        spread = torch.where(mass == 0, 0.0, mass * (local.entropy - lead))
        own = local.logp.exp()
        squares = local.other_squares + torch.where(here, 0.0, own.square())
        terms = torch.stack(
            [
                mass,
                spread,
                mass.square() * squares,
                torch.where(here, mass * -torch.expm1(local.logp), mass),
                torch.where(here, local.logp + lead, 0.0),
            ]
        )
        dist.all_reduce(terms, group=self.group)
        total, spread, squares, others, target = terms
        log_total, others = total.log(), others / total
        logp = torch.where(others < 0.5, torch.log1p(-others), target - log_total)
        return RowStatistics(
            logp, peak + log_total, spread / total + log_total, squares / total.square()
        )

    def gradient_(
        self,
        slope: Tensor,
        entropy_slope: Tensor | None,
        logits: Tensor,
        targets: Tensor,
        rows: RowStatistics,
        *,
        temperature: float | Tensor,
        kernels: ModuleType,
    ) -> Tensor:
        """`token_logprob_bwd` of this shard, in place of its logits."""
        place, here = self.local(targets)
        index = place[:, None]
        column = logits.gather(1, index)[:, 0]
        kernels.token_logprob_bwd(
            slope,
            entropy_slope,
            logits,
            place,
            rows.lse,
            rows.entropy,
            temperature=temperature,
            out=logits,
        )
        # The kernel takes 1 - p of the target as the sum of the others, which are on all ranks.
        logp = torch.where(here, rows.logp, column / temperature - rows.lse)
        value = slope * torch.where(here, -torch.expm1(logp), -logp.exp())
        if entropy_slope is not None:
            value = value - entropy_slope * logp.exp() * (logp + rows.entropy)
        return logits.scatter_(1, index, (value / temperature)[:, None].to(logits.dtype))

    def sum_(self, gradient: Tensor) -> Tensor:
        """d(hidden), of which every rank has its shard's part."""
        dist.all_reduce(gradient, group=self.group)
        return gradient
