"""Public differentiable ops: check the arguments, pick the implementation, one small
autograd.Function each.

Shapes: padded `[S, L]` or packed `[T]` tokens, `D` hidden, `V` vocabulary. Row t of `hidden` or
`logits` is the one that *predicts* `targets[t]`: nothing is shifted in here.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import reference
from .autograd import LinearLogProb, LinearLoss, LogitsLoss, TokenLogProb
from .chunked import Head, exact_dtype
from .config import LossConfig
from .implementation import launchers, resolve_impl
from .inputs import (
    LossRows,
    check_device,
    check_float,
    check_ids,
    check_targets,
    check_temperature,
    loss_rows,
    shape_error,
)
from .objective import loss_metrics


class LossOutput(NamedTuple):
    """What a loss call gives back; only `loss` carries a gradient."""

    loss: Tensor
    """0-d, float32."""
    logprobs: Tensor
    """Shaped like `targets`, float32, 0 where masked."""
    entropy: Tensor
    """Shaped like `targets`, float32, nats, 0 where masked."""
    metrics: dict[str, Tensor]
    """0-d tensors on the device; what was not measured has no entry."""


class LogProbOutput(NamedTuple):
    logprobs: Tensor
    """Shaped like `targets`, float32."""
    entropy: Tensor | None
    """Shaped like `targets`, float32, nats; None unless asked for."""


def _check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> None:
    check_float("hidden", hidden)
    check_float("weight", weight)
    if hidden.dim() not in (2, 3):
        raise shape_error("hidden", hidden, "[S, L, D] padded or [T, D] packed")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise shape_error(
            "weight", weight, f"(V, {hidden.shape[-1]}) for hidden {tuple(hidden.shape)}"
        )
    check_device("weight", weight, hidden.device)
    if bias is not None:
        check_float("bias", bias)
        check_device("bias", bias, hidden.device)
        if bias.shape != weight.shape[:1]:
            raise shape_error("bias", bias, f"({weight.shape[0]},) like the rows of weight")
    check_targets(targets, hidden.shape[:-1], hidden.device, "hidden without its last dimension")


def _check_logits(logits: Tensor, targets: Tensor) -> None:
    check_float("logits", logits)
    if logits.dim() not in (2, 3):
        raise shape_error("logits", logits, "[S, L, V] padded or [T, V] packed")
    check_targets(targets, logits.shape[:-1], logits.device, "logits without the last dimension")


def _flat(rows: Tensor) -> Tensor:
    """[..., V] -> [N, V] with neighbours in V side by side, as every kernel reads them."""
    flat = rows.reshape(-1, rows.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _loss_output(loss: Tensor, result, rows: LossRows, config: LossConfig) -> LossOutput:
    logp, entropy = result.logp.detach(), result.entropy.detach()
    metrics = loss_metrics(
        mask=rows.mask,
        entropy=entropy,
        ratio=result.ratio.detach(),
        kl=None if result.kl is None else result.kl.detach(),
        advantages=rows.advantages,
        logp=logp,
        old_logp=rows.old_logp,
        sampler_logp=rows.sampler_logp,
        config=config,
    )
    return LossOutput(loss, logp.view(rows.shape), entropy.view(rows.shape), metrics)


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    bias: Tensor | None = None,
    denominator: float | Tensor | None = None,
    config: LossConfig = LossConfig(),  # noqa: B008 - frozen
    impl: str = "auto",
) -> LossOutput:
    """`grpo_loss(hidden @ weight.T + bias, targets, advantages, ...)` without ever holding the
    logits.

    hidden [S, L, D] with targets [S, L], or packed [T, D] with targets [T] and cu_seqlens [S+1];
    weight [V, D], bias [V]. advantages [S] or shaped like targets; mask, old_logprobs,
    ref_logprobs, sampler_logprobs like targets. Without old_logprobs the policy is its own: the
    ratio is exactly 1. `denominator` replaces the normaliser (number of sequences for `grpo`, of
    tokens for `bnpo` and `dapo`, sequences x max_completion_length for `dr_grpo`), so that losses
    of micro-batches add up to the loss of the step. hidden and weight float32, bfloat16, float16 or
    float64; arithmetic, logprobs and entropy float32 (float64 for float64). The gradient is made in
    the forward (3 head GEMMs, 4 at sequence level) and can be taken any number of times, but not
    differentiated again.

    Raises InputError naming argument, found and expected. Sources: 2402.03300 (GRPO), 2503.14476
    (DAPO), 2503.20783 (Dr. GRPO), 2507.18071 (GSPO).
    """
    _check_linear(hidden, weight, bias, targets)
    impl = resolve_impl(impl, hidden)
    rows = loss_rows(
        targets,
        advantages,
        mask=mask,
        cu_seqlens=cu_seqlens,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampler_logprobs=sampler_logprobs,
        denominator=denominator,
        config=config,
        vocabulary=weight.shape[0],
        dtype=exact_dtype(hidden),
    )
    flat = _flat(hidden)
    if impl == "reference":
        logits = nn.functional.linear(flat.masked_fill(~rows.mask[:, None], 0.0), weight, bias)
        return _reference_loss(logits, rows, config)
    grad = torch.is_grad_enabled()
    loss, result = LinearLoss.apply(flat, weight, bias, rows, config, launchers(impl), grad)
    return _loss_output(loss, result, rows, config)


def grpo_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    sampler_logprobs: Tensor | None = None,
    denominator: float | Tensor | None = None,
    config: LossConfig = LossConfig(),  # noqa: B008 - frozen
    impl: str = "auto",
) -> LossOutput:
    """`policy_loss(log_softmax(logits / temperature).gather(targets))`, from logits [S, L, V] or
    packed [T, V].

    Everything else as in `linear_grpo_loss`. The gradient is made in the forward, in a tensor of
    its own; `logits` are left as they are.
    """
    _check_logits(logits, targets)
    impl = resolve_impl(impl, logits)
    rows = loss_rows(
        targets,
        advantages,
        mask=mask,
        cu_seqlens=cu_seqlens,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampler_logprobs=sampler_logprobs,
        denominator=denominator,
        config=config,
        vocabulary=logits.shape[-1],
        dtype=exact_dtype(logits),
    )
    flat = _flat(logits)
    if impl == "reference":
        return _reference_loss(flat, rows, config)
    loss, result = LogitsLoss.apply(flat, rows, config, launchers(impl), torch.is_grad_enabled())
    return _loss_output(loss, result, rows, config)


def _reference_loss(logits: Tensor, rows: LossRows, config: LossConfig) -> LossOutput:
    result = reference.policy_rows(
        logits.to(rows.weights.dtype),
        rows.targets,
        rows.advantages,
        rows.weights,
        cu_seqlens=None if rows.segments is None else rows.segments.cu_seqlens,
        old_logp=rows.old_logp,
        ref_logp=rows.ref_logp,
        config=config,
    )
    return _loss_output(result.loss.sum(), result, rows, config)


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    return_entropy: bool = False,
    impl: str = "auto",
) -> LogProbOutput:
    """`log_softmax(cap(logit_scale * (hidden @ weight.T + bias)) / temperature).gather(targets)`,
    logits never held.

    `cap(x) = softcap * tanh(x / softcap)`, or x without softcap. hidden [S, L, D] or [T, D], weight
    [V, D], targets [S, L] or [T]; temperature a number or a tensor shaped like targets. Results
    float32, shaped like targets, differentiable in hidden, weight and bias (logits are recomputed:
    1 head GEMM forward, 3 backward).
    """
    _check_linear(hidden, weight, bias, targets)
    impl = resolve_impl(impl, hidden)
    check_ids(targets, None, weight.shape[0])
    temperature = check_temperature(temperature, targets)
    head = Head(weight, bias, logit_scale, softcap)
    flat = _flat(hidden)
    if impl == "reference":
        logits = nn.functional.linear(flat, weight, bias) * logit_scale
        logits = logits if softcap is None else softcap * (logits / softcap).tanh()
        return _reference_logprob(logits, targets, temperature, return_entropy)
    logp, entropy = LinearLogProb.apply(
        flat, weight, bias, head, targets.reshape(-1), temperature, return_entropy, launchers(impl)
    )
    return LogProbOutput(
        logp.view(targets.shape), None if entropy is None else entropy.view(targets.shape)
    )


def token_logprob(
    logits: Tensor,
    targets: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    return_entropy: bool = False,
    impl: str = "auto",
) -> LogProbOutput:
    """`log_softmax(logits / temperature, -1).gather(-1, targets)` and the entropy, differentiable
    in the logits.

    logits [S, L, V] or [T, V], targets [S, L] or [T]; temperature a number or a tensor shaped like
    targets. Results float32 (float64 for float64), shaped like targets; the gradient has the
    logits' dtype.
    """
    _check_logits(logits, targets)
    impl = resolve_impl(impl, logits)
    check_ids(targets, None, logits.shape[-1])
    temperature = check_temperature(temperature, targets)
    flat = _flat(logits)
    if impl == "reference":
        return _reference_logprob(flat, targets, temperature, return_entropy)
    logp, entropy = TokenLogProb.apply(
        flat, targets.reshape(-1), temperature, return_entropy, launchers(impl)
    )
    return LogProbOutput(
        logp.view(targets.shape), None if entropy is None else entropy.view(targets.shape)
    )


def _reference_logprob(
    logits: Tensor, targets: Tensor, temperature, return_entropy: bool
) -> LogProbOutput:
    exact = exact_dtype(logits)
    rows = reference.token_logprob(logits.to(exact), targets.reshape(-1), temperature=temperature)
    entropy = rows.entropy.view(targets.shape) if return_entropy else None
    return LogProbOutput(rows.logp.view(targets.shape), entropy)


class GRPOLoss(nn.Module):
    """`linear_grpo_loss(..., config=config, impl=impl)` as a module, for loops that build their
    loss once."""

    def __init__(self, config: LossConfig = LossConfig(), *, impl: str = "auto"):  # noqa: B008 - frozen
        super().__init__()
        self.config = config
        self.impl = impl

    def forward(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, advantages: Tensor, **rows
    ) -> LossOutput:
        """Arguments as in `linear_grpo_loss`, without config and impl."""
        return linear_grpo_loss(
            hidden, weight, targets, advantages, config=self.config, impl=self.impl, **rows
        )

    def extra_repr(self) -> str:
        return f"{self.config}, impl={self.impl!r}"
