"""TRL's head under its SFT, DPO, KTO, RLOO and GRPO trainers, computed here: `register()`.

TRL scores every token by one autograd function, `trl.trainer.utils._ChunkedLogProbFunction`. Ours
has the same arguments and results, and the sums of `linear_logprob`: products of a bfloat16 head
are summed and read in float32, a row without a gradient enters no product of the backward.

Shapes: `N` rows, `D` hidden, `V` vocabulary.
"""

import contextlib
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..autograd import once
from ..chunked import Head, LogProbRows, chunks, head_products, logprob_backward
from ..errors import ConfigError
from ..implementation import launchers, resolve_impl
from ..products import Gradients, exact_dtype
from .hosts import Exchange, host_module

NAME = "_ChunkedLogProbFunction"
INSTALL = "pip install 'trl>=1.16,<1.17'"
OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")

_exchange = Exchange("trl")


def register() -> None:
    """Every trainer of TRL scores its tokens here, until `unregister()`."""
    utils = _module()
    _check_theirs(utils)
    _exchange.apply((utils, NAME, ChunkedLogProb))


def unregister() -> None:
    """TRL has its own head again."""
    _exchange.undo()


@contextlib.contextmanager
def exchanged() -> Iterator[None]:
    """TRL's forwards of this block score their tokens here, unless there is a `why_not`."""
    if why_not() is not None:
        yield
        return
    utils = _module()
    before = getattr(utils, NAME)
    setattr(utils, NAME, ChunkedLogProb)
    try:
        yield
    finally:
        setattr(utils, NAME, before)


def why_not() -> str | None:
    """Why the head of the installed TRL cannot be exchanged, if so."""
    try:
        _check_theirs(_module())
    except ConfigError as error:
        return str(error)
    return None


def _module() -> ModuleType:
    utils = host_module("trl.trainer.utils", install=INSTALL)
    if not hasattr(utils, NAME):
        raise ConfigError(f"this trl has no {NAME}, whose place ours takes: {INSTALL}")
    return utils


def _check_theirs(utils: ModuleType) -> None:
    """What is replaced is TRL's and has ours' arguments, or is ours already."""
    found = getattr(utils, NAME)
    if found is ChunkedLogProb:
        return
    if not found.__module__.startswith("trl."):
        raise ConfigError(
            f"{NAME} of trl is already that of {found.__module__}: undo that integration, or leave "
            "out grpo_fast.integrations.trl_head"
        )
    _exchange.check(found, ChunkedLogProb, NAME)


class Scored(NamedTuple):
    """[N] each, as TRL reads them; None where nobody asked."""

    logp: Tensor
    entropy: Tensor | None
    log_sum_sq_probs: Tensor | None
    """log sum_v p_v^2."""
    mean_logits: Tensor | None
    """Over temperature, scale and softcap applied."""
    is_top1: Tensor | None
    """bool: the target is the first of the largest logits."""


class ChunkedLogProb(torch.autograd.Function):
    """`log_softmax(softcap(logit_scale * (hidden @ weight.T + bias)) / temperature)` at the targets
    and what `outputs` names besides: TRL's `ChunkedLogProbFunction`.

    hidden [N, D], weight [V, D], bias [V] or None, targets [N]; results are `Scored` in float32,
    log-probs and entropy differentiable in all three. Autocast rounds hidden states as it does
    for a product. chunk_size changes nothing: `chunked.chunks` says how rows are cut.
    """

    @staticmethod
    @torch.compiler.disable  # rows are cut by their number: a graph would be of that many
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
        outputs=OUTPUTS,
    ):
        _check_weight(weight)
        device, dtype = hidden.device.type, hidden.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        head = Head(weight, bias, logit_scale, final_logit_softcapping)
        kernels = launchers(resolve_impl("auto", hidden))
        with torch.autocast(device, enabled=False):
            rows, scored = _score(hidden.to(dtype), head, targets, temperature, outputs, kernels)
        ctx.save_for_backward(hidden, weight, bias, targets, *rows)
        ctx.options = (logit_scale, final_logit_softcapping, temperature, dtype, kernels)
        ctx.mark_non_differentiable(*(x for x in scored[2:] if x is not None))
        ctx.set_materialize_grads(False)
        return tuple(scored)

    @staticmethod
    @once
    def backward(ctx, dlogp, dentropy, *_):
        hidden, weight, bias, targets, *rows = ctx.saved_tensors
        logit_scale, softcap, temperature, dtype, kernels = ctx.options
        needed = tuple(ctx.needs_input_grad[:3])
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = _gradients(
                dlogp,
                dentropy,
                hidden.to(dtype),
                Head(weight, bias, logit_scale, softcap),
                targets,
                LogProbRows(*rows),
                temperature=temperature,
                needed=needed,
                kernels=kernels,
            )
        given = (hidden, weight, bias)
        return (
            *(None if g is None else g.to(x.dtype) for g, x in zip(gradients, given, strict=True)),
            *(None,) * 6,
        )


def _check_weight(weight: Tensor) -> None:
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        raise ConfigError(
            f"the output head is quantised ({type(weight).__name__}, {weight.dtype}): leave it out,"
            " llm_int8_skip_modules=['lm_head'], or call unregister()"
        )
    if hasattr(weight, "ds_id"):
        raise ConfigError(
            "the output head is gathered by ZeRO stage 3, and is gone in the backward: use stage 2 "
            "or less, or call unregister()"
        )


def _score(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    temperature: float,
    outputs: tuple[str, ...],
    kernels: ModuleType,
) -> tuple[LogProbRows, Scored]:
    """(what the backward needs, what TRL asked for), a chunk of logits at a time: 1G."""
    n, v = hidden.shape[0], head.weight.shape[0]
    asked = {name: name in outputs for name in OUTPUTS}
    wide = [hidden.new_empty(n, dtype=exact_dtype(hidden)) for _ in range(5)]
    logp, lse, entropy, squares, means = wide
    top1 = hidden.new_empty(n, dtype=torch.bool)
    products = head_products(hidden, head, (False, False, False), kernels)
    for part in chunks(n, v, hidden.device):
        logits = head.logits_(products.logits(hidden[part]))
        found = kernels.token_logprob_fwd(
            logits,
            targets[part],
            temperature=temperature,
            return_entropy=asked["entropy"],
            return_squares=asked["log_sum_sq_probs"],
        )
        logp[part], lse[part] = found.logp, found.lse
        if asked["entropy"]:
            entropy[part] = found.entropy
        if asked["log_sum_sq_probs"]:
            squares[part] = torch.log(found.other_squares + torch.exp(2 * found.logp))
        if asked["mean_logits"]:
            means[part] = logits.mean(-1) / temperature
        if asked["is_top1"]:
            top1[part] = logits.argmax(-1) == targets[part]
    given = (entropy, squares, means, top1)
    kept = [x if asked[name] else None for name, x in zip(OUTPUTS, given, strict=True)]
    scored = [x if x is None or x.dtype == torch.bool else x.float() for x in (logp, *kept)]
    return LogProbRows(logp, lse, kept[0]), Scored(*scored)


def _gradients(
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    rows: LogProbRows,
    *,
    temperature: float,
    needed: tuple[bool, bool, bool],
    kernels: ModuleType,
) -> Gradients:
    """3G of the rows with a gradient; TRL hands over masked ones too where there is no Triton."""
    exact = rows.lse.dtype
    dlogp = torch.zeros_like(rows.lse) if dlogp is None else dlogp.to(exact).contiguous()
    dentropy = None if dentropy is None else dentropy.to(exact).contiguous()
    live = None
    if not hidden.is_cuda:  # where to count rows costs no wait
        live = dlogp != 0 if dentropy is None else (dlogp != 0) | (dentropy != 0)
        live = None if live.all() else live.nonzero()[:, 0]

    def of(x: Tensor | None) -> Tensor | None:
        return x if x is None or live is None else x[live]

    gradients = logprob_backward(
        of(dlogp),
        of(dentropy),
        of(hidden),
        head,
        of(targets),
        LogProbRows(*map(of, rows)),
        temperature=temperature,
        mask=None,
        needed=needed,
        kernels=kernels,
    )
    if live is None or gradients.hidden is None:
        return gradients
    whole = torch.zeros_like(hidden, dtype=gradients.hidden.dtype)
    return gradients._replace(hidden=whole.index_copy_(0, live, gradients.hidden))
