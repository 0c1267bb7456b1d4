"""KL to the reference as a part of the reward, in place of a term of the loss.

Shapes: `S` sequences of up to `L` tokens, padded [S, L], or packed [T].
"""

import math
import typing
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from . import reference
from .errors import InputError, nearest
from .implementation import launchers, resolve_impl
from .inputs import check_cu_seqlens, check_device, check_float, read_mask, shape_error
from .loss_config import DEFAULT_LOG_RATIO_CLAMP
from .objective import kl_divergence

# A reward has no gradient, so the estimators that differ in nothing else are left out.
Estimator = Literal["k1", "k2", "k3", "abs"]


@torch.no_grad()
def kl_in_reward(
    rewards: Tensor | Sequence[float],
    logprobs: Tensor,
    ref_logprobs: Tensor,
    *,
    beta: float,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    kl_estimator: Estimator = "k1",
    log_ratio_clamp: float = DEFAULT_LOG_RATIO_CLAMP,
    impl: str = "auto",
) -> Tensor:
    """`rewards - beta * (kl(logprobs, ref_logprobs) * mask).sum(-1)`: what `group_advantages` is
    given where the KL belongs to the reward (RLHF's PPO, 2203.02155; RLOO, 2402.14740).

    rewards [S], NaN = not scored, which stays; logprobs of the policy that sampled and ref_logprobs
    [S, L], or packed [T] with cu_seqlens [S+1]; mask like logprobs, 0 = not counted. kl_estimator
    and log_ratio_clamp as in LossConfig. Returns [S] float32 (float64 for float64), a constant.
    Raises InputError for shapes that do not fit, and for log-probs of a counted token that are not
    finite: as a NaN reward they would count as not scored.
    """
    if kl_estimator not in typing.get_args(Estimator):
        raise InputError(
            f"kl_estimator = {kl_estimator!r} is not available for rewards: "
            f"{nearest(str(kl_estimator), typing.get_args(Estimator))}choose one of "
            f"{', '.join(typing.get_args(Estimator))}"
        )
    for name, value in (("beta", beta), ("log_ratio_clamp", log_ratio_clamp)):
        if not (math.isfinite(value) and value >= 0):
            raise InputError(f"{name} = {value}, expected a finite number >= 0")
    cu_seqlens = _check_tokens(logprobs, ref_logprobs, mask, cu_seqlens)
    dtype = torch.float64 if logprobs.dtype == torch.float64 else torch.float32
    rewards = torch.as_tensor(rewards, device=logprobs.device).to(dtype)
    if rewards.shape != (len(cu_seqlens) - 1,):
        raise shape_error("rewards", rewards, f"({len(cu_seqlens) - 1},), one a sequence")
    live = read_mask(mask, logprobs).reshape(-1)
    logp, ref = (torch.where(live, x.reshape(-1).to(dtype), 0) for x in (logprobs, ref_logprobs))
    kl = kl_divergence(logp, ref, estimator=kl_estimator, limit=log_ratio_clamp)
    impl = resolve_impl(impl, logp)
    ops = reference if impl == "reference" else launchers(impl)
    per_sequence = ops.segment_reduce(kl, cu_seqlens)
    bad = ~per_sequence.isfinite()
    if bad.any():
        raise InputError(
            f"logprobs or ref_logprobs of sequence {int(bad.nonzero()[0])} are not finite at a "
            "token that counts: mask it, or repair the model that gave them"
        )
    return rewards - beta * per_sequence


def _check_tokens(
    logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None
) -> Tensor:
    """Bounds of the sequences in the flat tokens."""
    check_float("logprobs", logprobs)
    check_float("ref_logprobs", ref_logprobs)
    if logprobs.dim() not in (1, 2):
        raise shape_error("logprobs", logprobs, "[S, L] padded or [T] packed")
    for name, tensor in (("ref_logprobs", ref_logprobs), ("mask", mask)):
        if isinstance(tensor, Tensor) and tensor.shape != logprobs.shape:
            raise shape_error(name, tensor, f"{tuple(logprobs.shape)} like logprobs")
    check_device("ref_logprobs", ref_logprobs, logprobs.device)
    if (logprobs.dim() == 1) != (cu_seqlens is not None):
        raise InputError(
            "packed logprobs [T] need cu_seqlens [S+1], and padded ones [S, L] must not have them: "
            f"found logprobs {tuple(logprobs.shape)} {'with' if logprobs.dim() == 2 else 'without'}"
        )
    if cu_seqlens is not None:
        check_cu_seqlens(cu_seqlens, logprobs.numel(), logprobs.device)
        return cu_seqlens
    sequences, length = logprobs.shape
    return torch.arange(sequences + 1, device=logprobs.device) * length
