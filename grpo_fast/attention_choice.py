"""Which backend computes the attention of a model: chosen once for what it needs, and logged with
what was passed over."""

import functools
import logging
from collections.abc import Callable
from typing import NamedTuple

import torch

from .attention_backends import Backend, CPUFlash, CUDAFlash, Efficient, Tiles
from .attention_flex import Flex
from .attention_packages import FlashAttn2, FlashAttn3, FlashAttn4
from .errors import ConfigError, nearest

log = logging.getLogger("grpo_fast")


class Needs(NamedTuple):
    """What a model asks of an attention backend."""

    device: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    softcap: bool = False
    window: int | None = None
    """Of a layer that sees fewer tokens than the longest sequence has."""


class Candidate(NamedTuple):
    """A backend, and what it cannot do."""

    make: Callable[[], Backend]
    device: str | None
    """That it runs on; None is any."""
    why_not: Callable[[Needs], str | None]
    auto: bool = True


def _equal_heads(needs: Needs) -> str | None:
    if needs.head_dim == needs.value_dim:
        return None
    return f"its values are as wide as its keys, not {needs.value_dim} and {needs.head_dim}"


def _plain(needs: Needs) -> str | None:
    if needs.softcap or needs.window is not None:
        return "it has no softcap and no window"
    return None


def _flash(needs: Needs, gpus: range, largest: int = 256) -> str | None:
    """Of flash kernels on CUDA, `gpus`: major compute capabilities."""
    if needs.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, not {needs.dtype}"
    if needs.head_dim % 8 or needs.head_dim > largest:
        return f"it takes heads of at most {largest}, a multiple of 8, not {needs.head_dim}"
    return _wrong_gpu(gpus) or _equal_heads(needs)


def _wrong_gpu(gpus: range) -> str | None:
    # Where no GPU is, the choice is that of one that is fit.
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if major not in gpus:
            return f"it has no kernels for compute capability {major}.{minor}"
    return None


def _efficient(needs: Needs) -> str | None:
    if needs.dtype == torch.float64:
        return "it takes at most 32 bits, not torch.float64"
    if needs.dtype == torch.bfloat16 and (problem := _wrong_gpu(AMPERE)):
        return problem
    step = 4 if needs.dtype == torch.float32 else 8
    if needs.head_dim % step or needs.value_dim % step:
        return f"it takes heads of a multiple of {step}, not {needs.head_dim} and {needs.value_dim}"
    return _plain(needs)


def _flex(needs: Needs) -> str | None:
    if needs.dtype == torch.float64:
        return "it takes at most 32 bits, not torch.float64"
    if min(needs.head_dim, needs.value_dim) < 16:
        return f"it takes heads of at least 16, not {needs.head_dim} and {needs.value_dim}"
    return None


HOPPER, AMPERE = range(9, 10), range(8, 100)
# In the order of preference. None of the packages was measured here, so that `auto` takes one only
# for a softcap, which PyTorch's kernels lack. flash-attn 4 and flex compile when first called, and
# must be asked for by name.
BACKENDS = {
    "flash": Candidate(
        CUDAFlash,
        "cuda",
        lambda needs: "it has no softcap" if needs.softcap else _flash(needs, AMPERE),
    ),
    "flash_attn_2": Candidate(
        FlashAttn2, "cuda", lambda needs: _flash(needs, AMPERE) or FlashAttn2.problem()
    ),
    "flash_attn_3": Candidate(
        FlashAttn3, "cuda", lambda needs: _flash(needs, HOPPER) or FlashAttn3.problem()
    ),
    "flash_attn_4": Candidate(
        FlashAttn4,
        "cuda",
        lambda needs: _flash(needs, range(9, 100), largest=128) or FlashAttn4.problem(),
        auto=False,
    ),
    "flex": Candidate(Flex, "cuda", _flex, auto=False),
    "efficient": Candidate(Efficient, "cuda", _efficient),
    "cpu_flash": Candidate(CPUFlash, "cpu", lambda needs: _plain(needs) or _equal_heads(needs)),
    "tiles": Candidate(Tiles, None, lambda needs: None),
}
NAMES = ("auto", *BACKENDS)


@functools.cache
def pick_backend(name: str, needs: Needs) -> Backend:
    """The first backend that can do what is needed, or the named one; logged once a choice."""
    if name not in NAMES:
        raise ConfigError(
            f"attention = {name!r} is not available: {nearest(name, NAMES)}choose one of "
            f"{', '.join(NAMES)}"
        )
    if name != "auto":
        problem = _problem(BACKENDS[name], needs)
        if problem is not None:
            raise ConfigError(
                f"attention = {name!r} cannot serve this model: {problem}; use attention='auto'"
            )
        log.info("attention='%s' for %s on %s", name, needs.dtype, needs.device)
        return BACKENDS[name].make()
    passed = []
    for found, candidate in BACKENDS.items():
        if not candidate.auto or candidate.device not in (None, needs.device):
            continue
        problem = candidate.why_not(needs)
        if problem is None:
            reasons = f" (not {'; not '.join(passed)})" if passed else ""
            log.info(
                "attention='auto' is '%s' for %s on %s%s", found, needs.dtype, needs.device, reasons
            )
            return candidate.make()
        passed.append(f"'{found}': {problem}")
    raise AssertionError("tiles can do everything")


def _problem(candidate: Candidate, needs: Needs) -> str | None:
    if candidate.device not in (None, needs.device):
        return f"it runs on {candidate.device}, not on {needs.device}"
    return candidate.why_not(needs)
