"""Hidden states and head to loss and gradients, one chunk of tokens at a time: no [N, V] tensor
ever exists.

Shapes: `N` rows, `D` hidden, `V` vocabulary. `kernels` is `grpo_kernels` or `torch_kernels`: both
have the same launchers. Costs in head GEMMs G = 2 N D V FLOP: log-probs 1G, their gradient 3G; the
loss is `linear_loss.py`.
"""

import math
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from . import torch_kernels
from .products import Gradients, HeadProducts, exact_dtype

# One float32 tile of logits: large enough to keep GEMMs busy, small beside the model.
WORKSPACE_BYTES = {"cpu": 128 * 2**20, "cuda": 1024 * 2**20}
# A tile whose rows are no multiple of the vector units' width costs a CPU a third of its speed.
ROW_MULTIPLE = 16


@dataclass(frozen=True, slots=True)
class Head:
    """`logits = softcap(logit_scale * (hidden @ weight.T + bias))` of one language-model head."""

    weight: Tensor
    """[V, D]."""
    bias: Tensor | None = None
    """[V]."""
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits_(self, products: Tensor) -> Tensor:
        """Scale and softcap of `hidden @ weight.T + bias`, in place."""
        if self.logit_scale != 1.0:
            products.mul_(self.logit_scale)
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products

    def backward_(self, dlogits: Tensor, logits: Tensor) -> Tensor:
        """Gradient past softcap and scale, in place."""
        if self.softcap is not None:
            dlogits.mul_(1 - (logits / self.softcap).square())
        return dlogits.mul_(self.logit_scale) if self.logit_scale != 1.0 else dlogits


def chunk_rows(vocabulary: int, device: torch.device) -> int:
    """Rows whose float32 logits fit the workspace, at least one."""
    limit = WORKSPACE_BYTES.get(device.type, WORKSPACE_BYTES["cpu"]) // (4 * vocabulary)
    return max(limit - limit % ROW_MULTIPLE if limit > ROW_MULTIPLE else limit, 1)


def chunks(rows: int, vocabulary: int, device: torch.device) -> list[slice]:
    """Rows cut evenly, so that one float32 tile of logits fits the workspace."""
    limit = chunk_rows(vocabulary, device)
    even = math.ceil(rows / max(math.ceil(rows / limit), 1))
    size = max(min(math.ceil(even / ROW_MULTIPLE) * ROW_MULTIPLE, limit), 1)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def masked(hidden: Tensor, mask: Tensor | None) -> Tensor:
    # 0 x NaN is NaN: what lies under the mask must not reach a GEMM.
    return hidden if mask is None else hidden.masked_fill(~mask[:, None], 0.0)


def head_products(
    hidden: Tensor,
    head: Head,
    needed: tuple[bool, bool, bool],
    kernels: ModuleType,
    *,
    every_row: bool = True,
    summed: bool = False,
) -> HeadProducts:
    """Triton reads rows; PyTorch on a CPU works in whatever layout multiplies fastest."""
    return HeadProducts(
        hidden,
        head.weight,
        head.bias,
        needed,
        row_major=hidden.is_cuda or kernels is not torch_kernels,
        every_row=every_row,
        summed=summed,
    )


class LogProbRows(NamedTuple):
    logp: Tensor
    lse: Tensor
    entropy: Tensor | None


def logprob_forward(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    *,
    temperature: float | Tensor,
    mask: Tensor | None,
    return_entropy: bool,
    kernels: ModuleType,
) -> LogProbRows:
    """`log_softmax(head(hidden) / temperature)` at the targets, log-sum-exp and entropy: 1G. All
    [N]."""
    exact, rows = exact_dtype(hidden), hidden.shape[0]
    out = LogProbRows(*(hidden.new_empty(rows, dtype=exact) for _ in range(3)))
    products = head_products(hidden, head, (False, False, False), kernels)
    for part in chunks(rows, head.weight.shape[0], hidden.device):
        chunk = masked(hidden[part], None if mask is None else mask[part])
        result = kernels.token_logprob_fwd(
            head.logits_(products.logits(chunk)),
            targets[part],
            temperature=_rows(temperature, part),
            return_entropy=return_entropy,
        )
        for whole, piece in zip(out, result[:3], strict=True):
            if piece is not None:
                whole[part] = piece
    return out if return_entropy else out._replace(entropy=None)


def logprob_backward(
    dlogp: Tensor,
    dentropy: Tensor | None,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    rows: LogProbRows,
    *,
    temperature: float | Tensor,
    mask: Tensor | None,
    needed: tuple[bool, bool, bool],
    kernels: ModuleType,
) -> Gradients:
    """The gradient of `logprob_forward`, logits recomputed: 3G."""
    products = head_products(hidden, head, needed, kernels)
    for part in chunks(hidden.shape[0], head.weight.shape[0], hidden.device):
        chunk = masked(hidden[part], None if mask is None else mask[part])
        logits = head.logits_(products.logits(chunk))
        dlogits = kernels.token_logprob_bwd(
            dlogp[part],
            None if dentropy is None else dentropy[part],
            logits,
            targets[part],
            rows.lse[part],
            None if rows.entropy is None else rows.entropy[part],
            temperature=_rows(temperature, part),
            out=logits if head.softcap is None else None,
        )
        products.add(part, chunk, head.backward_(dlogits, logits))
    return products.gradients()


def _rows(temperature: float | Tensor, part: slice) -> float | Tensor:
    return temperature[part] if isinstance(temperature, Tensor) else temperature
