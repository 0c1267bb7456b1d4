"""What launchers share: argument checks, the tile for a vocabulary, the grid.

Shapes: `N` rows, `V` vocabulary. A wrong argument is a ValueError: name, what it is, what was
expected.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from triton.runtime import JITFunction

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)
# CUDA's limit on the first grid dimension; the other two end at 65,535.
MAX_PROGRAMS = 2**31 - 1
# Offsets within a row are int32, and the last tile reaches past the end.
MAX_VOCABULARY = 2**30
# Tiles of the kernels that take a row's statistics. One list for all of them: sums in one order
# give log-probs equal to the bit, and so a ratio of exactly 1 between them. 8 entries a thread: one
# 16-byte load of half precision, and no spills. Wide programs keep few rows in flight, so that a
# second sweep still finds some of its row in L2.
STATISTICS_CONFIGS = [
    {"BV": 4096, "num_warps": 16},
    {"BV": 1024, "num_warps": 4},
    {"BV": 256, "num_warps": 1},
]
# A mask that changes only every 16 entries keeps loads and stores 16 bytes wide.
ALIGNED_ENTRIES = 16


def check_kernel_runs(name: str, tensor: Tensor, kernel: object) -> None:
    """A CPU tensor needs the interpreter, which takes over kernels when they are defined."""
    if tensor.device.type == "cpu" and isinstance(kernel, JITFunction):
        raise ValueError(
            f"{name} is on cpu, expected a CUDA tensor: move it, use impl='torch', or set "
            "TRITON_INTERPRET=1 before triton is first imported"
        )


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: Sequence[int],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
) -> None:
    """Shape, dtype, device, and neighbours in the last dimension that are neighbours in memory."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} is {type(tensor).__name__}, expected a torch.Tensor")
    if tensor.shape != torch.Size(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if tensor.dtype not in dtypes or tensor.layout != torch.strided:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(
            f"{name} is {tensor.layout} {tensor.dtype}, expected a dense tensor of {kinds}"
        )
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} has strides {tensor.stride()}, expected 1 in the last dimension: "
            f"pass {name}.contiguous()"
        )


def length_of(name: str, tensor: Tensor, expected: str, least: int = 0) -> int:
    """Entries of a one-dimensional tensor of any length from `least` on, `expected` in words."""
    if not isinstance(tensor, Tensor) or tensor.dim() != 1 or len(tensor) < least:
        found = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"{name} has shape {found}, expected {expected}")
    return len(tensor)


def check_logits(logits: Tensor, kernel: object) -> tuple[int, int]:
    """(N, V) of logits [N, V]: any row stride, neighbouring entries in V."""
    if not isinstance(logits, Tensor) or logits.dim() != 2 or logits.shape[1] < 1:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"logits has shape {found}, expected [N, V] with V >= 1")
    check_tensor("logits", logits, logits.shape, FLOATS, logits.device)
    check_kernel_runs("logits", logits, kernel)
    n, v = logits.shape
    if v > MAX_VOCABULARY:
        raise ValueError(f"logits has V = {v}, expected at most {MAX_VOCABULARY}")
    return n, v


def check_written_rows(name: str, tensor: Tensor, logits: Tensor) -> None:
    """`tensor` takes the gradient of `logits`: logits itself, or other memory, rows apart."""
    check_tensor(name, tensor, logits.shape, FLOATS, logits.device)
    n, v = tensor.shape
    if n > 1 and tensor.stride(0) < v:
        raise ValueError(
            f"{name} has row stride {tensor.stride(0)}, expected at least {v}: its rows overlap"
        )


def temperature_arguments(
    temperature: float | Tensor, n: int, device: torch.device
) -> dict[str, float | Tensor | None]:
    """`p_temperature` and `temperature` of a kernel: one [N] tensor, or one number for all rows."""
    if isinstance(temperature, Tensor):
        check_tensor("temperature", temperature, (n,), (torch.float32,), device)
        return {"p_temperature": temperature, "temperature": 1.0}
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature is {temperature}, expected a finite number > 0")
    return {"p_temperature": None, "temperature": float(temperature)}


def vocabulary_arguments(configs: Sequence[dict[str, int]], v: int) -> dict[str, int]:
    """`v_units`, `UNIT` (V is their product), tile and warps for rows of V entries.

    The first configuration whose tile a row fills, else the last: one compilation a bucket of V.
    """
    config = next((config for config in configs if config["BV"] <= v), configs[-1])
    unit = ALIGNED_ENTRIES if v % ALIGNED_ENTRIES == 0 else 1
    return {"v_units": v // unit, "UNIT": unit, **config}


def grid_of(programs: int) -> tuple[int]:
    """All programs on the first grid dimension."""
    assert 0 < programs <= MAX_PROGRAMS, programs
    return (programs,)
