"""How fast a machine is, and how much it holds: GPUs as their makers publish them, or this one
measured."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention

from .errors import ConfigError, nearest
from .memory import free_bytes

# Of both published peaks: what large products and copies of a long run reach. Of the rate of
# products: what attention reaches, forward and backward.
OF_PEAK, OF_PRODUCTS = 0.7, 0.7
# The C library keeps what is smaller, and gives it out again.
KEPT = 32 * 2**20


class Machine(NamedTuple):
    name: str
    memory: int
    """Bytes; a published GB is 1e9."""
    flops: float
    """A second, dense, in bfloat16 with float32 sums; or in the dtype that was measured."""
    attention: float
    """Operations a second of attention, forward and backward."""
    bandwidth: float
    """Bytes a second, read and written ones together."""
    anew: float
    """Likewise into results of KEPT bytes or more: a CPU's allocator gets their pages from the
    system every time."""
    reached: float
    """The part of both rates that work is predicted with."""
    device: str = "cuda"


# The maker's published peak: (memory GB, bfloat16 TFLOP/s without sparsity, GB/s). A100 and H100
# are the SXM ones.
PUBLISHED = {
    "b200": (180, 2250, 8000),
    "h200": (141, 989, 4800),
    "h100": (80, 989, 3350),
    "a100-80gb": (80, 312, 2039),
    "l40s": (48, 362, 864),
    "rtx-5090": (32, 209, 1792),
    "rtx-4090": (24, 165, 1008),
    "rtx-3090": (24, 71, 936),
}


def machine(name: str, dtype: torch.dtype) -> Machine:
    """One of PUBLISHED, or `here`. Raises ConfigError for another name, and where `here` does not
    say how much memory is free."""
    if name == "here":
        return measured(torch.device("cuda" if torch.cuda.is_available() else "cpu"), dtype)
    if name not in PUBLISHED:
        raise ConfigError(
            f"gpu '{name}' is not known: {nearest(name, PUBLISHED)}expected here, which measures "
            f"this machine, or one of {', '.join(PUBLISHED)}"
        )
    memory, teraflops, gigabytes = PUBLISHED[name]
    flops, bandwidth = teraflops * 1e12, gigabytes * 1e9
    attention = OF_PRODUCTS * flops
    return Machine(name, int(memory * 1e9), flops, attention, bandwidth, bandwidth, OF_PEAK)


def measured(device: torch.device, dtype: torch.dtype) -> Machine:
    """`device` in a few seconds: a product of a layer's proportions, causal attention, numbers
    times two, what is free."""
    free = free_bytes(device)
    if free is None:
        raise ConfigError("this machine does not say how much memory is free: name a GPU instead")
    gpu = device.type == "cuda"
    # Float32 parameters are multiplied in bfloat16 on a GPU, as the trainer does it.
    kind = torch.bfloat16 if gpu else dtype
    tokens, inner, outer = (8192, 4096, 12288) if gpu else (1024, 512, 2048)
    left = torch.randn(tokens, inner, device=device).to(kind)
    right = torch.randn(inner, outer, device=device).to(kind)
    product = _seconds(lambda: left @ right, device)

    shape = (16, 16, 2048, 128) if gpu else (4, 8, 512, 64)
    heads = [torch.randn(shape, device=device).to(kind).requires_grad_() for _ in range(3)]
    gradient = torch.ones_like(heads[0])

    def attention() -> None:
        scaled_dot_product_attention(*heads, is_causal=True).backward(gradient)

    batch, count, length, width = shape
    scores = 3.5 * 4 * width * batch * count * length**2 / 2

    def bandwidth(size: int) -> float:
        source = torch.zeros(size // 4, device=device)
        return 2 * source.nbytes / _seconds(lambda: source * 2, device)

    below, above = (2**30, 2**30) if gpu else (KEPT // 2, 2 * KEPT)
    return Machine(
        torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads",
        free,
        2 * tokens * inner * outer / product,
        scores / _seconds(attention, device),
        bandwidth(below),
        bandwidth(above),
        1.0,
        device.type,
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median of the runs of half a second, waited for."""
    # One thread's process time is its work, whatever else the machine does.
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    clock = time.process_time if alone else time.perf_counter
    times: list[float] = []
    work()
    while sum(times) < 0.5 or len(times) < 3:
        start = clock()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - start)
    return statistics.median(times)
