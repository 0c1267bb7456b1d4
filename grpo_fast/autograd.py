"""One autograd.Function an op. Losses make their gradient in the forward and only scale it in the
backward.

Shapes: `N` rows, `D` hidden, `V` vocabulary. `kernels` are the launchers of one implementation.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

from .chunked import Head, LogProbRows, logprob_backward, logprob_forward
from .errors import InputError
from .linear_loss import linear_loss, logits_loss


def _scaled(
    grads: Sequence[Tensor | None], dloss: Tensor, dtypes: Sequence[torch.dtype | None]
) -> list[Tensor | None]:
    """`(grad * dloss).to(dtype)`, without the product where dloss is seen to be 1: a GPU would have
    to be waited for."""
    if dloss.is_cuda or dloss != 1:
        grads = [None if grad is None else grad * dloss for grad in grads]
    return [
        None if grad is None else grad.to(dtype) for grad, dtype in zip(grads, dtypes, strict=True)
    ]


def once(backward: Callable) -> Callable:
    """`once_differentiable`, which says so before it gives a gradient that counts as a constant."""

    @functools.wraps(backward)
    def checked(ctx, *gradients):
        if torch.is_grad_enabled():
            raise InputError(
                "create_graph is set, expected no second derivative of this op: its gradient is "
                "made by hand; leave create_graph out, or choose impl='reference'"
            )
        return backward(ctx, *gradients)

    return checked


def gradients_of(loss: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """d(loss) / d(leaves): those that the forward of a loss made, before a backward scales them."""
    if not leaves:
        return ()
    node = loss.grad_fn
    if node.name() == "LinearLossBackward":
        return tuple(made for made in node.saved_tensors if made is not None)
    if node.name() == "LogitsLossBackward":
        return (node.dlogits,)
    return torch.autograd.grad(loss, leaves)


class LinearLoss(torch.autograd.Function):
    """Loss and gradients in one sweep; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, head, rows, config, index, kernels, shard, grad):
        needed = tuple(grad and need for need in ctx.needs_input_grad[:3])
        result = linear_loss(
            hidden,
            dataclasses.replace(head, weight=weight, bias=bias),
            rows,
            config,
            index=index,
            needed=needed,
            kernels=kernels,
            shard=shard,
        )
        ctx.save_for_backward(*result.gradients)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.set_materialize_grads(False)
        return result.loss.sum(), result._replace(gradients=None)

    @staticmethod
    @once
    def backward(ctx, dloss, _):
        return (*_scaled(ctx.saved_tensors, dloss, ctx.dtypes), *(None,) * 7)


class LogitsLoss(torch.autograd.Function):
    """The same from logits [N, V]; the gradient has the logits' dtype, or their place."""

    @staticmethod
    def forward(ctx, logits, rows, config, kernels, inplace, grad):
        needed = grad and ctx.needs_input_grad[0]
        out = (logits.detach() if inplace else torch.empty_like(logits)) if needed else None
        result = logits_loss(logits, rows, config, kernels=kernels, out=out)
        if inplace and needed:
            # Whoever saved these logits for a backward of his own gets an error, not garbage.
            torch.autograd.graph.increment_version(logits)
        ctx.dlogits = out
        ctx.set_materialize_grads(False)
        return result.loss.sum(), result

    @staticmethod
    @once
    def backward(ctx, dloss, _):
        dtype = None if ctx.dlogits is None else ctx.dlogits.dtype
        return (*_scaled((ctx.dlogits,), dloss, (dtype,)), *(None,) * 5)


def linear_logprob_gradients(
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    rows: LogProbRows,
    *,
    temperature: float | Tensor,
    needed: Sequence[bool],
    kernels: ModuleType,
) -> tuple[Tensor | None, ...]:
    """Of hidden, weight and bias, in their dtypes, where `needed`."""
    # A backward is outside of the forward, and may be inside of an autocast.
    with torch.autocast(hidden.device.type, enabled=False):
        gradients = logprob_backward(
            torch.zeros_like(rows.logp) if dlogp is None else dlogp.contiguous(),
            None if dentropy is None else dentropy.contiguous(),
            hidden,
            head,
            targets,
            rows,
            temperature=temperature,
            mask=None,
            needed=tuple(needed),
            kernels=kernels,
        )
    given = (hidden, head.weight, head.bias)
    return tuple(
        None if g is None else g.to(x.dtype) for g, x in zip(gradients, given, strict=True)
    )


class LinearLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, head, targets, temperature, return_entropy, kernels):
        rows = logprob_forward(
            hidden,
            head,
            targets,
            temperature=temperature,
            mask=None,
            return_entropy=return_entropy,
            kernels=kernels,
        )
        ctx.save_for_backward(hidden, weight, bias, targets, *rows)
        ctx.options = (head.logit_scale, head.softcap, temperature, kernels)
        ctx.mark_non_differentiable(rows.lse)
        ctx.set_materialize_grads(False)
        return tuple(rows)

    @staticmethod
    @once
    def backward(ctx, dlogp, _, dentropy):
        hidden, weight, bias, targets, *rows = ctx.saved_tensors
        logit_scale, softcap, temperature, kernels = ctx.options
        gradients = linear_logprob_gradients(
            dlogp,
            dentropy,
            hidden,
            Head(weight, bias, logit_scale, softcap),
            targets,
            LogProbRows(*rows),
            temperature=temperature,
            needed=ctx.needs_input_grad[:3],
            kernels=kernels,
        )
        return *gradients, *(None,) * 5


def token_logprob_gradient(
    dlogp: Tensor | None,
    dentropy: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    rows: LogProbRows,
    *,
    temperature: float | Tensor,
    kernels: ModuleType,
) -> Tensor:
    """Of the logits, in their dtype."""
    return kernels.token_logprob_bwd(
        torch.zeros_like(rows.lse) if dlogp is None else dlogp.contiguous(),
        None if dentropy is None else dentropy.contiguous(),
        logits,
        targets,
        rows.lse,
        rows.entropy,
        temperature=temperature,
    )


class TokenLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature, return_entropy, kernels):
        rows = kernels.token_logprob_fwd(
            logits, targets, temperature=temperature, return_entropy=return_entropy
        )
        rows = LogProbRows(rows.logp, rows.lse, rows.entropy)
        ctx.save_for_backward(logits, targets, *rows)
        ctx.options = (temperature, kernels)
        ctx.mark_non_differentiable(rows.lse)
        ctx.set_materialize_grads(False)
        return tuple(rows)

    @staticmethod
    @once
    def backward(ctx, dlogp, _, dentropy):
        logits, targets, *rows = ctx.saved_tensors
        temperature, kernels = ctx.options
        gradient = token_logprob_gradient(
            dlogp,
            dentropy,
            logits,
            targets,
            LogProbRows(*rows),
            temperature=temperature,
            kernels=kernels,
        )
        return gradient, *(None,) * 4
