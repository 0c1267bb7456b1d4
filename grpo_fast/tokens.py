"""What an objective sees of a call's tokens: log-probs, ratio, sums over the sequence.

Shapes: `N` rows (tokens), `S` sequences. Every vector is [N]; nothing here sees the vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .errors import InputError
from .rows import LossRows, Segments


def clamped(log_ratio: Tensor, limit: float) -> Tensor:
    """`log_ratio.clamp(-limit, limit)` with slope 1 everywhere; NaN stays NaN, inf becomes NaN."""
    # x - x is exactly 0: adding the difference of clamp and x instead would round.
    return log_ratio.detach().clamp(-limit, limit) + (log_ratio - log_ratio.detach())


class _SequenceSum(torch.autograd.Function):
    """`x -> sum over the sequence, at each of its rows`, which is its own transpose."""

    @staticmethod
    def forward(ctx, x, segments, reduce):
        ctx.sequences = segments, reduce
        return segments.spread(reduce(x, segments.cu_seqlens).to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        segments, reduce = ctx.sequences
        total = reduce(grad.contiguous(), segments.cu_seqlens).to(grad.dtype)
        return segments.spread(total), None, None


@dataclass(eq=False)
class Tokens:
    """What an objective sees, flat [N]; where `mask` is False every vector holds 0."""

    logprobs: Tensor
    """Of the policy; the only one with a gradient, beside `entropy`."""
    old_logprobs: Tensor
    """At the start of the step: the policy's own, detached, where none were given."""
    advantages: Tensor
    mask: Tensor
    entropy: Tensor
    """Nats."""
    ref_logprobs: Tensor | None
    sampler_logprobs: Tensor | None
    correction: Tensor | None
    """Importance weight of the sampler."""
    level: str
    log_ratio_clamp: float
    segments: Segments | None
    reduce: Callable[[Tensor, Tensor], Tensor]
    """`segment_reduce` of the implementation."""

    def sequence_sum(self, x: Tensor) -> Tensor:
        """Sum of x over the live tokens of its sequence, at each of its tokens: [N] -> [N]."""
        if self.segments is None:
            raise InputError(
                "the objective works per sequence: set importance_sampling_level = 'sequence' or "
                "'sequence_token', and with packed targets [T] pass cu_seqlens [S+1]"
            )
        return _SequenceSum.apply(torch.where(self.mask, x, 0.0), self.segments, self.reduce)

    def sequence_mean(self, x: Tensor) -> Tensor:
        """Likewise the mean; 0 for a sequence without a live token."""
        return self.sequence_sum(x) / self.segments.spread(self.segments.lengths).clamp(min=1)

    @cached_property
    def log_ratio(self) -> Tensor:
        """`logprobs - old_logprobs`; on policy exactly 0."""
        # Whoever looks first may do so under no_grad, and others need the gradient.
        with torch.enable_grad():
            return self.logprobs - self.old_logprobs

    @cached_property
    def ratio(self) -> Tensor:
        """Importance ratio at `level`: of the token, exp of the sequence's mean log-ratio (GSPO,
        2507.18071), or that value with the token's own slope (GSPO-token)."""
        with torch.enable_grad():
            if self.level == "token":
                return clamped(self.log_ratio, self.log_ratio_clamp).exp()
            mean = clamped(self.sequence_mean(self.log_ratio), self.log_ratio_clamp)
            if self.level == "sequence_token":
                mean = mean.detach() + (self.logprobs - self.logprobs.detach())
            return mean.exp()


def tokens_of(
    logp: Tensor, entropy: Tensor, rows: LossRows, *, level: str, limit: float, reduce
) -> Tokens:
    """The tokens of these rows, `limit` being the log_ratio_clamp."""
    return Tokens(
        logprobs=logp,
        old_logprobs=logp.detach() if rows.old_logp is None else rows.old_logp,
        advantages=rows.advantages,
        mask=rows.mask,
        entropy=entropy,
        ref_logprobs=rows.ref_logp,
        sampler_logprobs=rows.sampler_logp,
        correction=rows.correction,
        level=level,
        log_ratio_clamp=limit,
        segments=rows.segments,
        reduce=reduce,
    )
