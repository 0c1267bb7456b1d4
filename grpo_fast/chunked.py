"""Hidden states and head to loss and gradients, one chunk of tokens at a time: no [N, V] tensor
ever exists.

Shapes: `N` rows, `D` hidden, `V` vocabulary. `kernels` is `grpo_kernels` or `torch_kernels`: both
have the same launchers. Costs in head GEMMs G = 2 N D V FLOP: log-probs 1G; a token-level loss 3G,
because its slope in the logits is known as soon as a chunk's logits are; a sequence-level loss 4G,
because it is not.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from .config import LossConfig
from .inputs import LossRows
from .objective import PolicyTerms, policy_terms

# One float32 tile of logits: large enough to keep GEMMs busy, small beside the model.
WORKSPACE_BYTES = {"cpu": 128 * 2**20, "cuda": 1024 * 2**20}


@dataclass(frozen=True, slots=True)
class Head:
    """`logits = softcap(logit_scale * (hidden @ weight.T + bias))` of one language-model head."""

    weight: Tensor
    """[V, D]."""
    bias: Tensor | None = None
    """[V]."""
    logit_scale: float = 1.0
    softcap: float | None = None

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """float32 (float64) logits of a chunk [n, D]; `weight` is `self.weight` as `operand` made
        it."""
        if on_tensor_cores(hidden):
            tile = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
        else:
            tile = torch.mm(hidden.to(weight.dtype), weight.t())
        if self.bias is not None:
            tile.add_(self.bias.to(tile.dtype))
        if self.logit_scale != 1.0:
            tile.mul_(self.logit_scale)
        if self.softcap is not None:
            tile.div_(self.softcap).tanh_().mul_(self.softcap)
        return tile

    def backward_(self, dlogits: Tensor, logits: Tensor) -> Tensor:
        """Gradient past softcap and scale, in place."""
        if self.softcap is not None:
            dlogits.mul_(1 - (logits / self.softcap).square())
        return dlogits.mul_(self.logit_scale) if self.logit_scale != 1.0 else dlogits


class Gradients(NamedTuple):
    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def on_tensor_cores(hidden: Tensor) -> bool:
    """Whether the GEMMs take half-precision operands and accumulate in float32."""
    return hidden.is_cuda and hidden.dtype in (torch.bfloat16, torch.float16)


def operand(hidden: Tensor, weight: Tensor) -> Tensor:
    """The head as GEMM operand: in hidden's dtype on tensor cores (as autocast would), widened once
    elsewhere."""
    return weight.to(hidden.dtype if on_tensor_cores(hidden) else exact_dtype(hidden))


def exact_dtype(tensor: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything else: the dtype of log-probs, losses and
    accumulators."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def chunks(rows: int, vocabulary: int, device: torch.device) -> list[slice]:
    """Rows cut so that one float32 tile of logits fits the workspace."""
    size = WORKSPACE_BYTES.get(device.type, WORKSPACE_BYTES["cpu"]) // (4 * vocabulary)
    size = max(size, 1)
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _masked(hidden: Tensor, mask: Tensor | None) -> Tensor:
    # 0 x NaN is NaN: what lies under the mask must not reach a GEMM.
    return hidden if mask is None else hidden.masked_fill(~mask[:, None], 0.0)


class _Accumulator:
    """d(hidden), d(weight), d(bias) of a head, in the exact dtype, summed over chunks; only those
    `needed`."""

    def __init__(self, hidden: Tensor, head: Head, weight: Tensor, needed: tuple[bool, bool, bool]):
        exact = exact_dtype(hidden)
        self.operand = weight
        self.hidden = torch.empty_like(hidden, dtype=exact) if needed[0] else None
        self.weight = torch.zeros_like(head.weight, dtype=exact) if needed[1] else None
        self.bias = torch.zeros_like(head.bias, dtype=exact) if needed[2] else None

    def add(self, rows: slice, hidden: Tensor, dlogits: Tensor) -> None:
        """dlogits [n, V] in the exact dtype, of rows `rows` whose hidden states are `hidden` [n,
        D]."""
        if self.bias is not None:
            self.bias += dlogits.sum(0)
        if not on_tensor_cores(hidden):
            if self.hidden is not None:
                torch.mm(dlogits, self.operand, out=self.hidden[rows])
            if self.weight is not None:
                self.weight.addmm_(dlogits.t(), hidden.to(dlogits.dtype))
            return
        # Gradients span decades: a power of two keeps them in float16's range and costs no digit.
        scale = None
        if hidden.dtype == torch.float16:
            peak = dlogits.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
            scale = torch.exp2(torch.floor(torch.log2(peak)))
            dlogits = dlogits / scale
        low = dlogits.to(hidden.dtype)
        scale = 1.0 if scale is None else scale
        if self.hidden is not None:
            self.hidden[rows] = torch.mm(low, self.operand, out_dtype=torch.float32) * scale
        if self.weight is not None:
            self.weight += torch.mm(low.t(), hidden, out_dtype=torch.float32) * scale

    def result(self) -> Gradients:
        return Gradients(self.hidden, self.weight, self.bias)


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
    weight = operand(hidden, head.weight)
    for part in chunks(rows, weight.shape[0], hidden.device):
        chunk = _masked(hidden[part], None if mask is None else mask[part])
        result = kernels.token_logprob_fwd(
            head.logits(chunk, weight),
            targets[part],
            temperature=_rows(temperature, part),
            return_entropy=return_entropy,
        )
        for whole, piece in zip(out, result, strict=True):
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
    weight = operand(hidden, head.weight)
    accumulator = _Accumulator(hidden, head, weight, needed)
    for part in chunks(hidden.shape[0], weight.shape[0], hidden.device):
        chunk = _masked(hidden[part], None if mask is None else mask[part])
        logits = head.logits(chunk, weight)
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
        accumulator.add(part, chunk, head.backward_(dlogits, logits))
    return accumulator.result()


class LossResult(NamedTuple):
    """Per-token results [N] and the gradients of the summed loss."""

    loss: Tensor
    logp: Tensor
    entropy: Tensor
    ratio: Tensor
    kl: Tensor | None
    gradients: Gradients


def policy_options(config: LossConfig) -> dict:
    """The keywords of the `policy_loss` launchers."""
    return {
        "temperature": config.temperature,
        "epsilon": config.epsilon,
        "epsilon_high": config.clip_high,
        "delta": config.delta,
        "beta": config.beta,
        "kl_estimator": config.kl_estimator,
        "log_ratio_clamp": config.log_ratio_clamp,
    }


def linear_loss(
    hidden: Tensor,
    head: Head,
    rows: LossRows,
    config: LossConfig,
    *,
    needed: tuple[bool, bool, bool],
    kernels: ModuleType,
) -> LossResult:
    """Loss rows of `head(hidden)` and, where `needed`, gradients in (hidden, weight, bias)."""
    if config.importance_sampling_level == "sequence":
        return _sequence_level(hidden, head, rows, config, needed=needed, kernels=kernels)
    exact, count = exact_dtype(hidden), hidden.shape[0]
    names = ("loss", "logp", "entropy", "ratio") + (() if rows.ref_logp is None else ("kl",))
    out = {name: hidden.new_empty(count, dtype=exact) for name in names}
    weight = operand(hidden, head.weight)
    accumulator = _Accumulator(hidden, head, weight, needed)
    for part in chunks(count, weight.shape[0], hidden.device):
        chunk = _masked(hidden[part], rows.mask[part])
        logits = head.logits(chunk, weight)
        result = kernels.policy_loss(
            logits,
            rows.targets[part],
            rows.advantages[part],
            rows.weights[part],
            old_logp=None if rows.old_logp is None else rows.old_logp[part],
            ref_logp=None if rows.ref_logp is None else rows.ref_logp[part],
            dlogits=logits if any(needed) else None,
            **policy_options(config),
        )
        for name, whole in out.items():
            whole[part] = getattr(result, name)
        if any(needed):
            accumulator.add(part, chunk, logits)
    return LossResult(gradients=accumulator.result(), **{"kl": None, **out})


def sequence_terms(
    logp: Tensor, rows: LossRows, config: LossConfig, kernels: ModuleType
) -> PolicyTerms:
    """Loss and slope of live rows whose ratio is one per sequence."""
    return policy_terms(
        logp,
        rows.advantages,
        rows.weights,
        old_logp=rows.old_logp,
        ref_logp=rows.ref_logp,
        config=config,
        segments=rows.segments,
        segment_reduce=kernels.segment_reduce,
    )


def _sequence_level(
    hidden: Tensor,
    head: Head,
    rows: LossRows,
    config: LossConfig,
    *,
    needed: tuple[bool, bool, bool],
    kernels: ModuleType,
) -> LossResult:
    """A sequence's ratio waits for its last token: log-probs first, then the logits once more for
    the gradient."""
    common = {"temperature": config.temperature, "mask": rows.mask, "kernels": kernels}
    tokens = logprob_forward(hidden, head, rows.targets, return_entropy=True, **common)
    logp = torch.where(rows.mask, tokens.logp, 0.0)
    terms = sequence_terms(logp, rows, config, kernels)
    gradients = Gradients(None, None, None)
    if any(needed):
        slope = torch.where(rows.mask, terms.slope, 0.0)
        gradients = logprob_backward(
            slope, None, hidden, head, rows.targets, tokens, needed=needed, **common
        )
    entropy = torch.where(rows.mask, tokens.entropy, 0.0)
    return LossResult(terms.loss, logp, entropy, terms.ratio, terms.kl, gradients)


def _rows(temperature: float | Tensor, part: slice) -> float | Tensor:
    return temperature[part] if isinstance(temperature, Tensor) else temperature
