"""How many threads of a kernel a multiprocessor can hold at once, from what the assembler says.

An estimate from the limits of each architecture as its maker documents them: registers are handed
out a warp at a time, shared memory a program at a time. What a kernel does with its threads is not
in it.
"""

from typing import NamedTuple


class Limits(NamedTuple):
    """Of one multiprocessor (AMD: compute unit)."""

    warps: int
    programs: int
    registers: int
    """Of 32 bits."""
    register_unit: int
    """A warp's registers are rounded up to a multiple of this."""
    shared_bytes: int
    reserved_bytes: int = 1024
    """Of shared memory, taken by the system for each program."""
    warp: int = 32


LIMITS = {
    "sm_80": Limits(64, 32, 65536, 256, 164 * 1024),
    "sm_90": Limits(64, 32, 65536, 256, 228 * 1024),
    "sm_100": Limits(64, 32, 65536, 256, 228 * 1024),
    "sm_120": Limits(48, 24, 65536, 256, 100 * 1024),
    # Four units of 512 registers a lane and at most eight waves each.
    "gfx942": Limits(32, 32, 4 * 512 * 64, 8 * 64, 64 * 1024, 0, 64),
}


def occupancy(target: str, *, registers: int, shared_bytes: int, warps: int) -> float:
    """Warps that fit over the warps there are places for; `warps` are those of one program."""
    limits = LIMITS[target]
    unit = limits.register_unit
    a_warp = -(-registers * limits.warp // unit) * unit
    programs = min(
        limits.warps // warps,
        limits.programs,
        limits.registers // max(a_warp * warps, 1),
        limits.shared_bytes // max(shared_bytes + limits.reserved_bytes, 1),
    )
    return programs * warps / limits.warps
