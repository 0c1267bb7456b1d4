"""Who computes: Triton kernels, chunked PyTorch, or the eager reference. Chosen per call, never
changed silently."""

import functools
import logging
import os
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from .errors import InputError, nearest

log = logging.getLogger("grpo_fast")
IMPLEMENTATIONS = ("auto", "triton", "torch", "reference")


def resolve_impl(impl: str, tensor: Tensor) -> str:
    """`auto` -> `triton` for a CUDA tensor of at most 32 bits, else `torch`; checks that the choice
    can run."""
    if impl not in IMPLEMENTATIONS:
        raise InputError(
            f"impl = {impl!r} is not available: {nearest(str(impl), IMPLEMENTATIONS)}"
            f"choose one of {', '.join(IMPLEMENTATIONS)}"
        )
    if impl == "auto":
        impl = "triton" if tensor.is_cuda and tensor.dtype != torch.float64 else "torch"
        _log_choice(impl, tensor.device.type, str(tensor.dtype))
    if impl == "triton":
        if tensor.dtype == torch.float64:
            raise InputError(
                "impl = 'triton' computes in float32, found float64: use impl='torch' or "
                "'reference'"
            )
        if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
            raise InputError(
                f"impl = 'triton' needs a CUDA tensor, found one on {tensor.device}: use "
                "impl='torch', or set "
                "TRITON_INTERPRET=1 before the first import of triton to run the kernels in its "
                "interpreter"
            )
    return impl


@functools.cache
def _log_choice(impl: str, device: str, dtype: str) -> None:
    log.info("impl='auto' is '%s' for %s tensors on %s", impl, dtype, device)


def launchers(impl: str) -> ModuleType | SimpleNamespace:
    """The launchers of an implementation; Triton is imported when first asked for."""
    if impl == "torch":
        from . import torch_kernels

        return torch_kernels
    return _triton_kernels()


@functools.cache
def _triton_kernels() -> SimpleNamespace:
    from grpo_kernels.group_advantage import group_advantage
    from grpo_kernels.policy_loss import policy_loss
    from grpo_kernels.segment_reduce import segment_reduce
    from grpo_kernels.token_logprob import token_logprob_bwd, token_logprob_fwd

    return SimpleNamespace(
        group_advantage=group_advantage,
        policy_loss=policy_loss,
        segment_reduce=segment_reduce,
        token_logprob_bwd=token_logprob_bwd,
        token_logprob_fwd=token_logprob_fwd,
    )
