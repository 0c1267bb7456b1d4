"""Groups of token ids to micro-batches under a token budget, and back to one tensor a completion.

Shapes: `B` rows of a micro-batch, `L` its padded length, `T` its completion tokens, `G` completions
of a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .advantages import group_advantages
from .errors import ConfigError, InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One prompt, its G completions and what is known of each: the unit that is trained on."""

    prompt_ids: Sequence[int]
    """Token ids of the prompt, at least one."""
    completion_ids: Sequence[Sequence[int]]
    """Token ids of each completion, end-of-sequence token included."""
    advantages: Sequence[float] | Tensor | None = None
    """[G]; made from `rewards` when not given."""
    rewards: Sequence[float] | Tensor | None = None
    """[G], NaN where a completion could not be scored."""
    old_logprobs: Sequence[Tensor] | None = None
    """One tensor a completion; without them the policy is its own (ratio 1)."""
    ref_logprobs: Sequence[Tensor] | None = None
    """One tensor a completion, of the reference policy."""
    sampler_logprobs: Sequence[Tensor] | None = None
    """One tensor a completion, as the sampler gave them."""
    completion_masks: Sequence[Sequence[int]] | None = None
    """1 = in the loss, 0 = not, per completion token; all 1 when not given."""

    def __post_init__(self) -> None:
        if len(self.prompt_ids) == 0:
            raise InputError(
                "Group.prompt_ids is empty, expected at least one token: nothing predicts the "
                "completion"
            )
        if (self.advantages is None) == (self.rewards is None):
            raise InputError(
                "Group needs either advantages or rewards [G], not both and not neither"
            )
        count = len(self.completion_ids)
        for name in (
            "advantages",
            "rewards",
            "old_logprobs",
            "ref_logprobs",
            "sampler_logprobs",
            "completion_masks",
        ):
            values = getattr(self, name)
            if values is not None and len(values) != count:
                raise InputError(
                    f"Group.{name} has {len(values)} entries, expected {count}, one a completion"
                )
        for name in ("old_logprobs", "ref_logprobs", "sampler_logprobs", "completion_masks"):
            for k, values in enumerate(getattr(self, name) or ()):
                if len(values) != len(self.completion_ids[k]):
                    raise InputError(
                        f"Group.{name}[{k}] has {len(values)} entries for "
                        f"{len(self.completion_ids[k])} tokens"
                    )

    def advantage_values(self) -> list[float]:
        """`advantages`, or `group_advantages(rewards)`."""
        if self.advantages is not None:
            return torch.as_tensor(self.advantages, dtype=torch.float32).tolist()
        size = len(self.completion_ids)
        return group_advantages(torch.as_tensor(self.rewards), group_size=size).advantages.tolist()


class Member(NamedTuple):
    """One completion of one group."""

    group: int
    index: int
    length: int
    """Prompt and completion tokens."""


def members(groups: Sequence[Group]) -> list[Member]:
    """Every completion, in group order."""
    return [
        Member(g, k, len(group.prompt_ids) + len(completion))
        for g, group in enumerate(groups)
        for k, completion in enumerate(group.completion_ids)
    ]


def micro_batches(groups: Sequence[Group], token_budget: int) -> list[list[Member]]:
    """Rows of similar length together, so that rows x longest row never exceeds `token_budget`.

    Longest first: the first micro-batch is the largest there will be, and dies at once if it must.
    """
    rows = sorted(members(groups), key=lambda member: -member.length)
    if rows and rows[0].length > token_budget:
        raise ConfigError(
            f"token_budget = {token_budget} is below the longest sequence, {rows[0].length} tokens "
            "(group "
            f"{rows[0].group}, completion {rows[0].index}): raise it, or lower "
            "max_completion_length"
        )
    batches: list[list[Member]] = []
    for row in rows:
        if batches and (len(batches[-1]) + 1) * batches[-1][0].length <= token_budget:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


@dataclass(frozen=True, slots=True)
class Batch:
    """Tensors of one micro-batch. Padding stands on the right, where no causal state looks."""

    rows: list[Member]
    input_ids: Tensor
    """[B, L]."""
    predictors: Tensor
    """[T] rows of the flattened hidden states that predict a completion token."""
    targets: Tensor
    """[T]."""
    mask: Tensor
    """[T] bool."""
    cu_seqlens: Tensor
    """[B+1]."""
    advantages: Tensor
    """[B]."""
    group_ids: Tensor
    """[B]."""
    old_logprobs: Tensor | None
    """[T], like the two below."""
    ref_logprobs: Tensor | None
    sampler_logprobs: Tensor | None

    @property
    def padded_tokens(self) -> int:
        return self.input_ids.numel()

    def split(self, per_token: Tensor) -> list[Tensor]:
        """[T] -> one tensor a row."""
        return list(per_token.split(torch.diff(self.cu_seqlens).tolist()))


def collate(groups: Sequence[Group], rows: list[Member], device: torch.device | str) -> Batch:
    """The tensors of the completions `rows` of `groups`."""
    longest = max(row.length for row in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    predictors, targets, masks, offsets = [], [], [], [0]
    for b, row in enumerate(rows):
        group = groups[row.group]
        prompt, completion = list(group.prompt_ids), list(group.completion_ids[row.index])
        input_ids[b, : row.length] = torch.tensor(prompt + completion)
        # the state at position i predicts the token at i + 1
        first = b * longest + len(prompt) - 1
        predictors.append(torch.arange(first, first + len(completion)))
        targets.append(torch.tensor(completion, dtype=torch.long))
        mask = None if group.completion_masks is None else group.completion_masks[row.index]
        live = torch.ones(len(completion)) if mask is None else torch.as_tensor(mask)
        masks.append(live.bool())
        offsets.append(offsets[-1] + len(completion))
    advantages = {g: groups[g].advantage_values() for g in {row.group for row in rows}}

    def gather(name: str) -> Tensor | None:
        parts = [getattr(groups[row.group], name) for row in rows]
        if all(part is None for part in parts):
            return None
        if any(part is None for part in parts):
            raise InputError(
                f"Group.{name} is given for some groups and not for others: give it for all or none"
            )
        values = [torch.as_tensor(part[row.index]) for part, row in zip(parts, rows, strict=True)]
        return torch.cat(values).float().to(device)

    return Batch(
        rows=rows,
        input_ids=input_ids.to(device),
        predictors=torch.cat(predictors).to(device),
        targets=torch.cat(targets).to(device),
        mask=torch.cat(masks).to(device),
        cu_seqlens=torch.tensor(offsets, device=device),
        advantages=torch.tensor([advantages[row.group][row.index] for row in rows], device=device),
        group_ids=torch.tensor([row.group for row in rows], device=device),
        old_logprobs=gather("old_logprobs"),
        ref_logprobs=gather("ref_logprobs"),
        sampler_logprobs=gather("sampler_logprobs"),
    )


def per_completion(
    groups: Sequence[Group], batches: list[Batch], values: list[Tensor]
) -> list[Tensor]:
    """[T] of each micro-batch -> one tensor a completion, in group order."""
    found = {
        (row.group, row.index): part
        for batch, per_token in zip(batches, values, strict=True)
        for row, part in zip(batch.rows, batch.split(per_token), strict=True)
    }
    return [found[member.group, member.index] for member in members(groups)]
