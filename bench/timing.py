"""Measuring: the columns of a case run in turns, and no number comes from a kernel that is wrong.

Letters: `N` rows, `D` hidden, `V` vocabulary. A *case* is one op at one size; its *columns* are
`ours`, `eager` and `ceiling`, the last being the bare copy or matrix products that the work cannot
do without. All columns of a case run in one process, interleaved, so that their ratios hold on a
machine that is shared or changes its clock.
"""

import contextlib
import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from grpo_fast.testing import assert_close_to_oracle

Column = Callable[[int], object]

WARM_UP = 3
ROUNDS = (5, 100)
# A copy in pieces: large enough for full bandwidth, small beside the tensors that are measured.
COPY_BYTES = 2**29
# Rows held against float64: the first, the last and evenly between.
CHECKED_ROWS = 48
# Times the eager error: wide enough for the largest of a billion roundings, and no wrong kernel
# gets through. The tests hold the tight rule.
CHECK_FACTOR = 4.0


@dataclass(frozen=True, kw_only=True)
class Size:
    """What one case is run at."""

    label: str
    """`forward`, `forward + gradient`, ...: which part of the op."""
    shape: dict[str, int]
    """By house letter, as `{"N": 8192, "V": 151936}`."""
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        shape = " ".join(f"{letter}={value}" for letter, value in self.shape.items())
        return f"{self.label} {shape} {dtype_name(self.dtype)}"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one size, ready to run."""

    op: str
    size: Size
    columns: dict[str, Column]
    """Each takes the number of the call, by which it picks one of several input sets."""
    check: Callable[[], None]
    """Raises AssertionError when `ours` is further from float64 than eager arithmetic allows."""
    bytes: int
    """Fewest bytes through device memory, read plus written."""
    flops: int
    """Fewest floating-point operations; an exponential counts as one."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def pick_device(name: str) -> torch.device:
    """`auto` is `cuda` where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def implementation_on(device: torch.device) -> str:
    """The one that `impl="auto"` means for tensors of `device`."""
    return "triton" if device.type == "cuda" else "torch"


def cache_bytes(device: torch.device) -> int:
    """Bytes that a second run could find cached: the GPU's L2; 0 on a CPU, where cases stay small
    on purpose."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).L2_cache_size


def input_sets(bytes_each: int, device: torch.device) -> int:
    """How many input sets of `bytes_each` push each other out of the cache before they come round
    again."""
    return max(2, min(512, -(-2 * cache_bytes(device) // max(bytes_each, 1))))


def copy_ceiling(total: int, device: torch.device) -> Column:
    """A device-to-device copy that reads and writes `total` bytes together."""
    half = max(total // 2, 1)
    piece = min(half, COPY_BYTES)
    source = torch.randint(0, 255, (piece,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def run(_: int) -> None:
        for start in range(0, half, piece):
            count = min(piece, half - start)
            target[:count].copy_(source[:count])

    return run


def matmul_ceiling(products: list[tuple[Tensor, Tensor]]) -> Column:
    """The bare matrix products, into memory that is already there."""
    outs: dict[tuple[int, int], Tensor] = {}
    for a, b in products:
        shape = (a.shape[0], b.shape[1])
        outs.setdefault(shape, torch.empty(shape, dtype=a.dtype, device=a.device))

    def run(_: int) -> None:
        for a, b in products:
            torch.mm(a, b, out=outs[a.shape[0], b.shape[1]])

    return run


def matmul_rate(dtype: torch.dtype, device: torch.device, *, threads: int) -> float:
    """Operations a second of a large matrix product: the rate that a step cannot exceed."""
    side = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = matmul_ceiling([(a, b)])
    with limited_threads(threads):
        times = interleaved({"product": product}, device, seconds=0.5)["product"]
    return 2 * side**3 / statistics.median(times) * (threads if device.type == "cpu" else 1)


def assert_right(actual: Tensor, eager: Tensor, oracle: Tensor, *, name: str) -> None:
    """`actual` and the same-dtype `eager` result against the float64 `oracle`."""
    assert_close_to_oracle(actual, eager, oracle, name=name, factor=CHECK_FACTOR)


def checked_rows(rows: int, device: torch.device) -> Tensor:
    return torch.linspace(0, rows - 1, min(rows, CHECKED_ROWS), device=device).round().long()


@contextlib.contextmanager
def limited_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def one_thread() -> contextlib.AbstractContextManager[None]:
    """A CPU column's process time is its work, not how long the other threads waited."""
    return limited_threads(1)


def _once(run: Column, call: int, device: torch.device) -> float:
    """Seconds of one call, waited for."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    start = clock()
    run(call)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - start


def _events(columns: dict[str, Column], rounds: int) -> dict[str, list[float]]:
    marks: dict[str, list[tuple]] = {name: [] for name in columns}
    for call in range(rounds):
        for name, run in columns.items():
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            run(call)
            pair[1].record()
            marks[name].append(pair)
    torch.cuda.synchronize()
    return {name: [a.elapsed_time(b) / 1e3 for a, b in pairs] for name, pairs in marks.items()}


def interleaved(
    columns: dict[str, Column], device: torch.device, *, seconds: float
) -> dict[str, list[float]]:
    """Seconds of every call, columns in turns, for about `seconds` in all: CUDA events on a GPU,
    process time on a CPU."""
    for call in range(WARM_UP - 1):
        for run in columns.values():
            run(call)
    one_round = sum(_once(run, 0, device) for run in columns.values())
    rounds = max(ROUNDS[0], min(ROUNDS[1], int(seconds / max(one_round, 1e-9))))
    if device.type == "cuda":
        return _events(columns, rounds)
    times: dict[str, list[float]] = {name: [] for name in columns}
    for call in range(rounds):
        for name, run in columns.items():
            times[name].append(_once(run, call, device))
    return times


def peak_bytes(run: Column, device: torch.device) -> int | None:
    """Largest memory held at once by one call, beyond what was held before it; results and
    gradients count. None on a CPU: not measured."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run(0)
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def summary(times: list[float]) -> dict[str, float | int]:
    """Median, spread (the middle three fifths over the median) and number of runs."""
    median = statistics.median(times)
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    spread = (fifths[3] - fifths[0]) / median if median else 0.0
    return {"seconds": median, "spread": spread, "rounds": len(times)}


def row(case: Case, columns: dict[str, dict], error: str | None = None) -> dict:
    """One line of a results file. `columns` are the summaries; empty with an `error`."""

    def ratio(above: str, below: str) -> float | None:
        if above not in columns or below not in columns or not columns[below]["seconds"]:
            return None
        return columns[above]["seconds"] / columns[below]["seconds"]

    seconds = columns["ours"]["seconds"] if "ours" in columns else None
    return {
        "op": case.op,
        "label": case.size.label,
        **case.size.shape,
        "dtype": dtype_name(case.size.dtype),
        "bytes": case.bytes,
        "flops": case.flops,
        "columns": columns,
        "speedup_over_eager": ratio("eager", "ours"),
        "fraction_of_ceiling": ratio("ceiling", "ours"),
        "gigabytes_per_second": case.bytes / seconds / 1e9 if seconds and case.bytes else None,
        "teraflops": case.flops / seconds / 1e12 if seconds and case.flops else None,
        "error": error,
    }


def measure(case: Case, device: torch.device, *, seconds: float = 2.0) -> dict:
    """Check a case, then time it: its row, with an `error` and no number where the check fails."""
    try:
        case.check()
    except AssertionError as error:
        return row(case, {}, f"wrong result, not timed: {' '.join(str(error).split())}")
    columns, lost = {}, []
    for name, run in case.columns.items():
        # Eager may need more memory than there is, which is a result and not a failure.
        try:
            run(0)
            columns[name] = {"peak_bytes": peak_bytes(run, device)}
        except torch.cuda.OutOfMemoryError:
            lost.append(f"{name} runs out of memory")
    with one_thread() if device.type == "cpu" else contextlib.nullcontext():
        times = interleaved({name: case.columns[name] for name in columns}, device, seconds=seconds)
    for name, values in times.items():
        columns[name] = summary(values) | columns[name]
    return row(case, columns, "; ".join(lost) or None)


def benchmark_column(benchmark, case: Case, column: str, device: torch.device) -> None:
    """Hand one column to pytest-benchmark, after the check."""
    case.check()
    run = case.columns[column]
    run(0)

    def waited() -> None:
        run(0)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    benchmark(waited)


def _output(*words: str) -> str | None:
    """What a program prints; None where it is missing or fails."""
    if shutil.which(words[0]) is None:
        return None
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_name() -> str:
    """`AMD EPYC, 2 cores`: the kind of machine, and nothing that tells one from another."""
    found = re.search(r"^model name\s*: (.+)$", _text("/proc/cpuinfo"), re.MULTILINE)
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _text(path: str) -> str:
    """A file of /proc; empty where the system has none."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def header(device: torch.device, root: Path) -> dict:
    """What a number depends on: device, driver, versions, commit of the checkout at `root`, date
    (UTC). What cannot be found out is `unknown`."""
    # Installed packages may lie inside somebody else's repository.
    checkout = (root / ".git").exists()
    commit = (checkout and _output("git", "-C", str(root), "rev-parse", "HEAD")) or "unknown"
    if checkout and _output("git", "-C", str(root), "status", "--short"):
        commit += " with uncommitted changes"
    found = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "device": cpu_name(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "clock": "process time, one thread",
        "python": platform.python_version(),
    }
    for name in ("torch", "triton", "transformers"):
        found[name] = importlib.metadata.version(name)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {
            "device": properties.name,
            "clock": "CUDA events",
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": properties.L2_cache_size,
            "driver": driver.splitlines()[0] if driver else "unknown",
            "cuda": torch.version.cuda,
        }
    return found


def seconds_text(value: float | None) -> str:
    if value is None:
        return "-"
    scale, unit = next(
        (pair for pair in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")) if value >= pair[0]),
        (1e-6, "us"),
    )
    return f"{value / scale:.3g} {unit}"


def _times(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def align(table: list[list[str]]) -> list[str]:
    """Lines of a table: words to the left, numbers to the right."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    numeric = [all(line[i][:1] in "-0123456789" for line in table[1:]) for i in range(len(widths))]
    return [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in table
    ]


def timing_table(rows: list[dict]) -> list[str]:
    """Rows of `measure` as lines to print."""
    titles = ["op", "what", "dtype", "ours", "eager", "ceiling", "x eager", "of ceiling", "spread"]
    titles += ["peak", "eager peak"]
    table = [titles]
    for r in rows:
        shape = " ".join(f"{key}={r[key]}" for key in ("N", "D", "V", "S", "G", "T") if key in r)
        of = {name: r["columns"].get(name, {}) for name in ("ours", "eager", "ceiling")}
        table.append(
            [r["op"], f"{r['label']} {shape}", r["dtype"]]
            + [seconds_text(of[name].get("seconds")) for name in of]
            + [
                _times(r["speedup_over_eager"], "{:.2f}"),
                _times(r["fraction_of_ceiling"], "{:.2f}"),
                _times(of["ours"].get("spread"), "{:.0%}"),
            ]
            + [
                _times((of[name].get("peak_bytes") or 0) / 2**20 or None, "{:.0f} MiB")
                for name in ("ours", "eager")
            ]
        )
    return align(table) + [f"{r['op']} {r['label']}: {r['error']}" for r in rows if r["error"]]
