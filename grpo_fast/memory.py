"""Bytes: what is free, what a step took, and what one will take.

Shapes: `T` tokens of a row, `D` hidden, `L` layers, `V` vocabulary.
"""

import contextlib
import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from .activation_checkpointing import layers
from .config import Checkpointing

MODES: tuple[Checkpointing, ...] = ("off", "on", "offload")
"""From the fastest to the smallest."""
# Allocators round up, and leave holes.
USABLE = 0.9
_SELF = Path("/proc/self")
_GROUP = Path("/sys/fs/cgroup")


class Meter:
    """Most memory held at once since the meter was made, beyond what was held then: of the CUDA
    allocator, or on a CPU of this process, which Linux alone tells (see `measurable`)."""

    def __init__(self, device: torch.device):
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
            return
        # Free heap goes back first: memory that lies ready would not be seen when it is used.
        ctypes.CDLL(None).malloc_trim(0)
        (_SELF / "clear_refs").write_text("5")  # the high-water mark starts again
        self.before = _status("VmRSS")

    def bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return _status("VmHWM") - self.before


def measurable(device: torch.device) -> bool:
    """Whether a `Meter` works here."""
    try:
        Meter(device)
    except (OSError, AttributeError):  # no such file, no malloc_trim
        return False
    return True


def _status(name: str) -> int:
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", (_SELF / "status").read_text())[1])


def free_bytes(device: torch.device) -> int | None:
    """What can still be allocated on `device`; None where nobody tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        limit = torch.cuda.get_per_process_memory_fraction(device) * torch.cuda.mem_get_info()[1]
        return min(free + reserved, int(limit) - torch.cuda.memory_allocated(device))
    try:
        found = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
        free = 1024 * int(found[1])
    except (OSError, TypeError):  # no such file, no such line
        return None
    # A container may be given less than the machine has.
    with contextlib.suppress(OSError, ValueError):  # no such group, "max"
        limit, used = (int((_GROUP / f"memory.{x}").read_text()) for x in ("max", "current"))
        free = min(free, limit - used)
    return free


class Need(NamedTuple):
    """Bytes of one forward and backward beyond the weights, linear in the tokens of a row."""

    fixed: float
    per_token: float

    def at(self, tokens: int) -> int:
        return int(self.fixed + self.per_token * tokens)

    def most_tokens(self, free: int) -> int:
        """The longest row for which `free` bytes are enough."""
        return int(max(USABLE * free - self.fixed, 0) / max(self.per_token, 1e-9))


class RowBytes(NamedTuple):
    """What the memory of a row follows from."""

    layers: int
    state: float
    """A token's hidden state."""
    kept: float
    """What a token leaves in all layers for the backward."""
    backward: float
    """What it takes in the backward of one layer besides."""
    fixed: float
    """Gradients of weights, and what the head takes."""

    def need(self, mode: Checkpointing) -> Need:
        if mode == "off":
            return Need(self.fixed, self.kept + self.backward)
        # One layer at a time is whole; what enters the others waits here, or elsewhere.
        waiting = self.layers * self.state if mode == "on" else 0
        return Need(self.fixed, waiting + self.kept / self.layers + self.backward)


def estimated_need(model, mode: Checkpointing) -> Need:
    """From the shapes of the weights alone, and rather too much: a token keeps what enters and
    leaves every matrix, twice (norms, rotations and activation functions keep as much again)."""
    decoder, weight = model.get_decoder(), next(model.parameters())
    size = max(weight.element_size(), 4 if torch.is_autocast_enabled(weight.device.type) else 0)
    # A token goes through some of the experts, [experts, out, in].
    experts = getattr(decoder.config, "num_experts_per_tok", None) or 1
    sides = sum(
        sum(p.shape[-2:]) * (experts if p.dim() == 3 else 1)
        for p in decoder.parameters()
        if p.dim() >= 2
    )
    embedding = model.get_input_embeddings().weight
    vocabulary, hidden = embedding.shape
    whole = 2 * size * (sides - vocabulary)  # a lookup keeps the ids
    # Without checkpointing nobody asks where the layers are.
    count = len(layers(model)) if mode != "off" else decoder.config.num_hidden_layers
    gradients = sum(
        p.numel() * p.element_size()
        for p in model.parameters()
        if p.requires_grad and p.grad is None
    )
    head = head_bytes(vocabulary, hidden, 2**28)
    return RowBytes(count, size * hidden, whole, whole / count, gradients + head).need(mode)


def head_bytes(vocabulary: int, hidden: int, workspace: int) -> int:
    """The head's gradient in float32, and blocks of logits."""
    return 4 * vocabulary * hidden + workspace


def fastest_mode(
    device: torch.device, need: Callable[[Checkpointing], Need], tokens: int
) -> Checkpointing:
    """The first of MODES with which a row of `tokens` fits into what is free, or the smallest."""
    free = free_bytes(device)
    modes = modes_of(device)
    if free is None:
        return modes[0]
    for mode in modes:
        if need(mode).most_tokens(free) >= tokens:
            return mode
    return modes[-1]


def modes_of(device: torch.device) -> tuple[Checkpointing, ...]:
    """MODES that save memory on `device`: there is nowhere to offload to from a CPU."""
    return MODES if device.type == "cuda" else MODES[:2]


def gigabytes(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.0f} MB"
