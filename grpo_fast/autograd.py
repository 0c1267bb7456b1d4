"""One autograd.Function an op. Losses make their gradient in the forward and only scale it in the
backward.

Shapes: `N` rows, `D` hidden, `V` vocabulary. `kernels` are the launchers of one implementation.
"""

import torch
from torch import Tensor

from .chunked import (
    Head,
    LogProbRows,
    linear_loss,
    logprob_backward,
    logprob_forward,
    policy_options,
    sequence_terms,
)
from .config import LossConfig
from .inputs import LossRows
from .torch_kernels import PolicyRows


class LinearLoss(torch.autograd.Function):
    """Loss and gradients in one sweep; backward only scales them."""

    @staticmethod
    def forward(ctx, hidden, weight, bias, rows, config, kernels, grad):
        needed = tuple(grad and need for need in ctx.needs_input_grad[:3])
        result = linear_loss(
            hidden, Head(weight, bias), rows, config, needed=needed, kernels=kernels
        )
        ctx.save_for_backward(*result.gradients)
        ctx.dtypes = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        ctx.set_materialize_grads(False)
        return result.loss.sum(), result._replace(gradients=None)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss, _):
        grads = (
            None if grad is None else (grad * dloss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return (*grads, None, None, None, None)


class LogitsLoss(torch.autograd.Function):
    """The same from logits [N, V]; the gradient has the logits' dtype."""

    @staticmethod
    def forward(ctx, logits, rows, config, kernels, grad):
        needed = grad and ctx.needs_input_grad[0]
        dlogits = torch.empty_like(logits) if needed else None
        if config.importance_sampling_level == "sequence":
            result = _logits_sequence_level(logits, rows, config, kernels, dlogits)
        else:
            result = kernels.policy_loss(
                logits,
                rows.targets,
                rows.advantages,
                rows.weights,
                old_logp=rows.old_logp,
                ref_logp=rows.ref_logp,
                dlogits=dlogits,
                **policy_options(config),
            )
        ctx.save_for_backward(dlogits)
        ctx.set_materialize_grads(False)
        return result.loss.sum(), result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss, _):
        (dlogits,) = ctx.saved_tensors
        return (
            (None if dlogits is None else (dlogits * dloss).to(dlogits.dtype)),
            None,
            None,
            None,
            None,
        )


def _logits_sequence_level(
    logits, rows: LossRows, config: LossConfig, kernels, dlogits: Tensor | None
):
    live = logits.masked_fill(~rows.mask[:, None], 0.0)
    tokens = kernels.token_logprob_fwd(live, rows.targets, temperature=config.temperature)
    logp = torch.where(rows.mask, tokens.logp, 0.0)
    terms = sequence_terms(logp, rows, config, kernels)
    if dlogits is not None:
        slope = torch.where(rows.mask, terms.slope, 0.0)
        kernels.token_logprob_bwd(
            slope,
            None,
            live,
            rows.targets,
            tokens.lse,
            None,
            temperature=config.temperature,
            out=dlogits,
        )
    entropy = torch.where(rows.mask, tokens.entropy, 0.0)
    return PolicyRows(terms.loss, logp, entropy, terms.ratio, terms.kl)


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
        ctx.save_for_backward(hidden, weight, bias, targets, rows.logp, rows.lse, rows.entropy)
        ctx.options = (head.logit_scale, head.softcap, temperature, kernels)
        ctx.set_materialize_grads(False)
        return rows.logp, rows.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogp, dentropy):
        hidden, weight, bias, targets, logp, lse, entropy = ctx.saved_tensors
        logit_scale, softcap, temperature, kernels = ctx.options
        grads = logprob_backward(
            torch.zeros_like(logp) if dlogp is None else dlogp.contiguous(),
            None if dentropy is None else dentropy.contiguous(),
            hidden,
            Head(weight, bias, logit_scale, softcap),
            targets,
            LogProbRows(logp, lse, entropy),
            temperature=temperature,
            mask=None,
            needed=ctx.needs_input_grad[:3],
            kernels=kernels,
        )
        kinds = (hidden.dtype, weight.dtype, None if bias is None else bias.dtype)
        grads = (None if g is None else g.to(kind) for g, kind in zip(grads, kinds, strict=True))
        return (*grads, None, None, None, None, None)


class TokenLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, targets, temperature, return_entropy, kernels):
        rows = kernels.token_logprob_fwd(
            logits, targets, temperature=temperature, return_entropy=return_entropy
        )
        ctx.save_for_backward(logits, targets, rows.lse, rows.entropy)
        ctx.options = (temperature, kernels)
        ctx.set_materialize_grads(False)
        return rows.logp, rows.entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogp, dentropy):
        logits, targets, lse, entropy = ctx.saved_tensors
        temperature, kernels = ctx.options
        dlogp = torch.zeros_like(lse) if dlogp is None else dlogp.contiguous()
        dentropy = None if dentropy is None else dentropy.contiguous()
        grad = kernels.token_logprob_bwd(
            dlogp, dentropy, logits, targets, lse, entropy, temperature=temperature
        )
        return grad, None, None, None, None
