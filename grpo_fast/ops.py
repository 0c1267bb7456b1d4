"""Public differentiable ops: check the arguments, pick the implementation, one small
autograd.Function each; in a compiled graph `compiled.py` takes their place.

Shapes: padded `[S, L]` or packed `[T]` tokens, `D` hidden, `V` vocabulary. Row t of `hidden` or
`logits` is the one that *predicts* `targets[t]`: nothing is shifted in here.
"""

from typing import Any

import torch
from torch import Tensor, nn

from . import compiled, reference
from .autograd import LinearLogProb, LinearLoss, LogitsLoss, TokenLogProb
from .chunked import Head
from .errors import InputError
from .implementation import launchers, resolve_impl
from .inputs import (
    check_ids,
    check_linear,
    check_logits,
    check_temperature,
    flat_rows,
    loss_rows,
)
from .live import Live, live_rows
from .loss_config import LossConfig
from .loss_metrics import Measured, loss_metrics
from .outputs import LogProbOutput, LossOutput, TokenOutput
from .products import exact_dtype
from .rows import LossRows
from .vocab_parallel import Shard, is_dtensor, local_shard


def _as_given(values: Tensor, rows: LossRows, index: Tensor | None, skipped: Tensor | None):
    """[M] of the rows that were computed -> [N]: 0 where masked, NaN where skipped."""
    if index is None:
        return values
    whole = torch.zeros_like(rows.weights)
    if skipped is not None:
        whole = torch.where(skipped, torch.nan, whole)
    return whole.index_copy(0, index, values)


def _loss_output(
    loss: Tensor,
    result,
    rows: LossRows,
    config: LossConfig,
    shape: torch.Size,
    live: Live = Live(None, None),  # noqa: B008 - frozen
) -> LossOutput:
    """Everything but the loss, detached, shaped like `targets`."""
    names = ("logp", "entropy", "ratio", "mass") + (() if result.kl is None else ("kl",))
    full = {name: _as_given(getattr(result, name).detach(), rows, *live) for name in names} | (
        {"kl": None} if result.kl is None else {}
    )
    # Known to be 0 where a row was skipped: that is why it was.
    slope = _as_given(result.slope.detach(), rows, live.index, None)
    measured = rows.mask if live.skipped is None else rows.mask & ~live.skipped
    metrics = loss_metrics(
        Measured(
            measured=measured,
            n_tokens=rows.mask.sum().float(),
            advantages=rows.advantages,
            old_logp=rows.old_logp,
            ref_logp=rows.ref_logp,
            sampler_logp=rows.sampler_logp,
            config=config,
            **full,
        )
    )
    bad = measured & ~full["logp"].isfinite()
    count = bad.numel()
    places = torch.where(bad, torch.arange(count, device=bad.device), count)
    # A token more than there are, so that an empty call has a minimum too.
    first = torch.nn.functional.pad(places, (0, 1), value=count).min()
    shaped = {k: None if v is None else v.view(shape) for k, v in full.items()}
    output = LossOutput(loss, shaped["logp"], shaped["entropy"], metrics)
    output.tokens = TokenOutput(
        shaped["ratio"],
        shaped["kl"],
        shaped["mass"],
        slope.view(shape),
        torch.where(first == count, -1, first),
    )
    return output


@compiled.loss_op("hidden", "weight", "bias")
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
    group_ids: Tensor | None = None,
    group_lengths: Tensor | None = None,
    temperature: float | Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    denominator: float | Tensor | None = None,
    entropy_denominator: float | Tensor | None = None,
    process_group: Any = None,
    config: LossConfig = LossConfig(),  # noqa: B008 - frozen
    impl: str = "auto",
) -> LossOutput:
    """`grpo_loss(softcap(logit_scale * (hidden @ weight.T + bias)), targets, advantages, ...)`
    without ever holding the logits.

    hidden [S, L, D] with targets [S, L], or packed [T, D] with targets [T] and cu_seqlens [S+1];
    weight [V, D], bias [V]. advantages [S] or shaped like targets, which is what [T] with T = S is
    taken for; mask, old_logprobs, ref_logprobs, sampler_logprobs like targets; group_ids [S], the
    prompt of each sequence, for `prompt_mean`, and group_lengths [S], the tokens in the loss of
    its whole group where the call holds only a part; temperature in place of the config's, a number
    or shaped like targets. Without old_logprobs the policy is its own: the ratio is exactly 1.
    `denominator` replaces the normaliser (`aggregation.token_weights`), `entropy_denominator` the
    number of tokens of the entropy bonus, so that losses of micro-batches add up to the loss of
    the step. hidden and weight float32, bfloat16, float16 or float64; arithmetic, logprobs and
    entropy float32 (float64 for float64). The gradient is made in the forward and can be taken any
    number of times, but not differentiated again (create_graph is an error); `linear_loss.py` says
    what it costs. Rows that are masked or carry no gradient (`skip_zero_advantage`) enter no
    product. process_group: weight
    and bias are this rank's rows of a head sharded over the vocabulary (or DTensors), everything
    else and the result are the same on all ranks.

    Raises InputError naming argument, found and expected. Sources: 2402.03300 (GRPO), and those of
    `objective.py`.
    """
    shard = None
    if process_group is not None or is_dtensor(weight):
        weight, bias, process_group = local_shard(weight, bias, process_group)
        check_linear(hidden, weight, bias, targets)
        shard = Shard.of(weight, process_group)
    check_linear(hidden, weight, bias, targets)
    impl = resolve_impl(impl, hidden)
    rows = loss_rows(
        targets,
        advantages,
        mask=mask,
        cu_seqlens=cu_seqlens,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampler_logprobs=sampler_logprobs,
        group_ids=group_ids,
        group_lengths=group_lengths,
        temperature=temperature,
        denominator=denominator,
        entropy_denominator=entropy_denominator,
        config=config,
        vocabulary=weight.shape[0] if shard is None else shard.vocabulary,
        dtype=exact_dtype(hidden),
    )
    head = Head(weight, bias, logit_scale, softcap)
    flat = flat_rows(hidden)
    if impl == "reference":
        if shard is not None:
            raise InputError("impl = 'reference' knows no process_group: choose 'torch'")
        return _reference_loss(_eager_logits(flat, head, rows.mask), rows, config, targets.shape)
    grad = torch.is_grad_enabled()
    trained = grad and any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    live = live_rows(rows, config, trained=trained)
    kept = rows if live.index is None else rows.select(live.index)
    loss, result = LinearLoss.apply(
        flat, weight, bias, head, kept, config, live.index, launchers(impl), shard, grad
    )
    return _loss_output(loss, result, rows, config, targets.shape, live)


@compiled.loss_op("logits")
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
    group_ids: Tensor | None = None,
    group_lengths: Tensor | None = None,
    temperature: float | Tensor | None = None,
    denominator: float | Tensor | None = None,
    entropy_denominator: float | Tensor | None = None,
    inplace: bool = False,
    config: LossConfig = LossConfig(),  # noqa: B008 - frozen
    impl: str = "auto",
) -> LossOutput:
    """`policy_loss(log_softmax(logits / temperature).gather(targets))`, from logits [S, L, V] or
    packed [T, V].

    Everything else as in `linear_grpo_loss`. The gradient is made in the forward, in a tensor of
    its own, or with `inplace` in that of the logits, which are lost. One launch, one read and one
    write of the logits, for objectives at token level.
    """
    check_logits(logits, targets)
    impl = resolve_impl(impl, logits)
    rows = loss_rows(
        targets,
        advantages,
        mask=mask,
        cu_seqlens=cu_seqlens,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        sampler_logprobs=sampler_logprobs,
        group_ids=group_ids,
        group_lengths=group_lengths,
        temperature=temperature,
        denominator=denominator,
        entropy_denominator=entropy_denominator,
        config=config,
        vocabulary=logits.shape[-1],
        dtype=exact_dtype(logits),
    )
    flat = flat_rows(logits)
    if impl == "reference":
        return _reference_loss(flat, rows, config, targets.shape)
    if inplace and flat.data_ptr() != logits.data_ptr():
        raise InputError(
            f"inplace needs logits whose rows are neighbours in memory, found strides "
            f"{logits.stride()}: pass logits.contiguous(), or leave inplace out"
        )
    grad = torch.is_grad_enabled()
    loss, result = LogitsLoss.apply(flat, rows, config, launchers(impl), inplace, grad)
    return _loss_output(loss, result, rows, config, targets.shape)


def _eager_logits(hidden: Tensor, head: Head, mask: Tensor | None = None) -> Tensor:
    """Logits as a model makes them, in the inputs' dtype."""
    hidden = hidden if mask is None else hidden.masked_fill(~mask[:, None], 0.0)
    logits = nn.functional.linear(hidden, head.weight, head.bias) * head.logit_scale
    return logits if head.softcap is None else head.softcap * (logits / head.softcap).tanh()


def _reference_loss(
    logits: Tensor, rows: LossRows, config: LossConfig, shape: torch.Size
) -> LossOutput:
    result = reference.policy_rows(
        logits.to(rows.weights.dtype),
        rows.targets,
        rows.advantages,
        rows.weights,
        mask=rows.mask,
        cu_seqlens=None if rows.segments is None else rows.segments.cu_seqlens,
        old_logp=rows.old_logp,
        ref_logp=rows.ref_logp,
        sampler_logp=rows.sampler_logp,
        entropy_weights=rows.entropy_weights,
        entropy_denominator=rows.entropy_denominator,
        temperature=rows.temperature,
        config=config,
    )
    return _loss_output(result.loss.sum(), result, rows, config, shape)


def _logprob_output(logp: Tensor, lse: Tensor, entropy: Tensor | None, shape: torch.Size):
    entropy = None if entropy is None else entropy.view(shape)
    output = LogProbOutput(logp.view(shape), entropy)
    output.lse = lse.detach().view(shape)
    return output


@compiled.logprob_op("hidden", "weight", "bias")
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
    check_linear(hidden, weight, bias, targets)
    impl = resolve_impl(impl, hidden)
    check_ids(targets, None, weight.shape[0])
    temperature = check_temperature(temperature, targets)
    head = Head(weight, bias, logit_scale, softcap)
    flat = flat_rows(hidden)
    if impl == "reference":
        return _reference_logprob(_eager_logits(flat, head), targets, temperature, return_entropy)
    rows = LinearLogProb.apply(
        flat, weight, bias, head, targets.reshape(-1), temperature, return_entropy, launchers(impl)
    )
    return _logprob_output(*rows, targets.shape)


@compiled.logprob_op("logits")
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
    check_logits(logits, targets)
    impl = resolve_impl(impl, logits)
    check_ids(targets, None, logits.shape[-1])
    temperature = check_temperature(temperature, targets)
    flat = flat_rows(logits)
    if impl == "reference":
        return _reference_logprob(flat, targets, temperature, return_entropy)
    rows = TokenLogProb.apply(
        flat, targets.reshape(-1), temperature, return_entropy, launchers(impl)
    )
    return _logprob_output(*rows, targets.shape)


def _reference_logprob(
    logits: Tensor, targets: Tensor, temperature, return_entropy: bool
) -> LogProbOutput:
    exact = exact_dtype(logits)
    rows = reference.token_logprob(logits.to(exact), targets.reshape(-1), temperature=temperature)
    entropy = rows.entropy if return_entropy else None
    return _logprob_output(rows.logp, rows.lse, entropy, targets.shape)


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
