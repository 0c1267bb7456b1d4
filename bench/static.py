"""`grpo-fast bench --static`: every kernel cross-compiled, and what came out of the assembler.

No GPU is needed: Triton carries the compilers, NVIDIA's disassembler among them. One row a kernel,
variant (dtypes and flags), configuration (tile, warps) and target. On sm_90 a spill, local memory
or an fp64 instruction is a failure, and so is a kernel that does not compile anywhere, or one that
has become worse than the committed table (--baseline): fewer warps a multiprocessor, more spills,
no more 16-byte loads or matrix instructions.

  occupancy    warps that fit a multiprocessor over the places there are, an estimate
  matrix       instructions of the matrix units: HMMA, HGMMA, tcgen05, MFMA
  16 B loads   widest loads from device memory
"""

import functools
import importlib
import itertools
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from .occupancy import occupancy
from .options import Parser
from .record import ROOT, about, written
from .signatures import TABLE, Variant
from .timing import align

# Triton's names: backend, architecture, threads of a warp.
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}
GATE = "sm_90"
BASELINE = ROOT / "bench/results/static.json"
LAUNCH_OPTIONS = {"num_warps", "num_stages", "maxnreg"}
PACKAGE = "grpo_kernels"
SASS_OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)
SASS_FP64 = re.compile(r"D(ADD|MUL|FMA|SETP|MNMX|MMA)\b|.*\.F64|MUFU\.\w*64H")
# cp.async reads global memory too.
SASS_WIDE_LOAD = re.compile(r"(LDG|LDGSTS)\b.*\.128")
SASS_MATRIX = re.compile(r"(HMMA|HGMMA|QGMMA|IGMMA|OMMA|QMMA|UTC\w*MMA)\b")
SASS_LOCAL = re.compile(r"(LDL|STL)\b")
GCN_OPCODE = re.compile(r"^\s+([sv]_\w+|(?:global|buffer|ds|flat|scratch)_\w+)", re.M)
GCN_FP64 = re.compile(r"v_\w*f64")
GCN_WIDE_LOAD = re.compile(r"(global|buffer)_load_dwordx4")
GCN_MATRIX = re.compile(r"v_s?mfma")
GCN_LOCAL = re.compile(r"scratch_")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One compilation."""

    kernel: str
    function: object
    """The kernel as `triton.jit` made it."""
    variant: Variant
    config: dict[str, int]
    target: str


def kernels_of(package: str) -> dict[str, object]:
    """Every `@triton.jit` function called `..._kernel` of a package; others are their helpers."""
    from triton.runtime import JITFunction

    found = {}
    for info in pkgutil.iter_modules(importlib.import_module(package).__path__):
        module = importlib.import_module(f"{package}.{info.name}")
        for name, value in vars(module).items():
            value = getattr(value, "fn", value) if not isinstance(value, JITFunction) else value
            if isinstance(value, JITFunction) and name.endswith("_kernel"):
                found[name] = value
    return found


def check_table(kernels: dict[str, object]) -> None:
    """Table and package must name the same kernels; ValueError says which do not."""
    missing, stale = kernels.keys() - TABLE.keys(), TABLE.keys() - kernels.keys()
    if missing:
        raise ValueError(
            f"no signature for {', '.join(sorted(missing))}: describe each in bench/signatures.py"
        )
    if stale:
        raise ValueError(
            f"{', '.join(sorted(stale))} in bench/signatures.py is no kernel: remove the entry"
        )


def jobs(kernels: dict[str, object], targets: list[str], names: list[str]) -> list[Job]:
    """ValueError where a signature does not fit its kernel."""
    work = [
        Job(kernel=name, function=kernels[name], variant=variant, config=config, target=target)
        for name in names
        for variant in TABLE[name]
        for config, target in itertools.product(variant.configs, targets)
    ]
    for job in work:
        source(job)
    return work


def source(job: Job):
    """What Triton compiles: types, constants, and the alignment that real calls have."""
    from triton.compiler import ASTSource

    constants = job.variant.constants | {
        name: value for name, value in job.config.items() if name not in LAUNCH_OPTIONS
    }
    signature, attributes = {}, {}
    for index, parameter in enumerate(job.function.params):
        name = parameter.name
        if name in constants:
            signature[name] = "constexpr"
            continue
        if name not in job.variant.types:
            raise ValueError(
                f"{job.kernel}: argument {name} has no type: add it to bench/signatures.py"
            )
        signature[name] = kind = job.variant.types[name]
        # PyTorch aligns its tensors; real vocabularies, and so strides, are multiples of 16.
        pointer_or_integer = kind[0] in "*i"
        fixed = parameter.do_not_specialize or parameter.do_not_specialize_on_alignment
        if pointer_or_integer and not fixed:
            attributes[(index,)] = [["tt.divisibility", 16]]
    unknown = (job.variant.types.keys() | constants.keys()) - signature.keys()
    if unknown:
        raise ValueError(
            f"{job.kernel} has no argument {', '.join(sorted(unknown))}: fix bench/signatures.py"
        )
    return ASTSource(job.function, signature=signature, constexprs=constants, attrs=attributes)


@functools.cache
def disassembler() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def nvidia_facts(cubin: bytes) -> dict[str, int]:
    """Resources and instruction counts of a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [disassembler(), "--dump-resource-usage", "--dump-sass", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    used = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    opcodes = [word for word in SASS_OPCODE.findall(report) if word != "NOP"]
    return {
        "registers": used["REG"],
        "spill_bytes": used["STACK"] + used["LOCAL"],
        **_counts(opcodes, SASS_LOCAL, SASS_FP64, SASS_WIDE_LOAD, SASS_MATRIX),
    }


def amd_facts(assembly: str) -> dict[str, int]:
    """The same from AMD's assembly text; registers are the vector ones, a spilled one is 4 bytes a
    lane."""
    used = {
        name: int(value)
        for name, value in re.findall(
            r"^\s+\.(vgpr_count|vgpr_spill_count|sgpr_spill_count|private_segment_fixed_size):"
            r"\s+(\d+)",
            assembly,
            re.M,
        )
    }
    spilled = 4 * (used["vgpr_spill_count"] + used["sgpr_spill_count"])
    return {
        "registers": used["vgpr_count"],
        "spill_bytes": max(used["private_segment_fixed_size"], spilled),
        **_counts(GCN_OPCODE.findall(assembly), GCN_LOCAL, GCN_FP64, GCN_WIDE_LOAD, GCN_MATRIX),
    }


def _counts(opcodes: list[str], *patterns: re.Pattern) -> dict[str, int]:
    names = ("local", "fp64", "loads_16_byte", "matrix")
    counts = [sum(bool(pattern.match(word)) for word in opcodes) for pattern in patterns]
    return dict(zip(names, counts, strict=True)) | {"instructions": len(opcodes)}


def compile_row(job: Job) -> dict:
    """Compile and measure; `error` holds the compiler's last line where it refuses."""
    import triton
    from triton.backends.compiler import GPUTarget

    place = {
        "kernel": job.kernel,
        "variant": job.variant.label,
        "config": " ".join(f"{name}={value}" for name, value in job.config.items()),
        "target": job.target,
    }
    options = {name: value for name, value in job.config.items() if name in LAUNCH_OPTIONS}
    described, target = source(job), GPUTarget(*TARGETS[job.target])
    start = time.perf_counter()
    try:
        built = triton.compile(described, target=target, options=options)
    # A compiler has no family of errors of its own; whatever it raises is the row's result.
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return place | {"error": f"{type(error).__name__}: {lines[-1]}"}
    seconds = time.perf_counter() - start
    cubin = built.asm.get("cubin")
    facts = nvidia_facts(cubin) if cubin else amd_facts(built.asm["amdgcn"])
    shared = built.metadata.shared
    fits = occupancy(
        job.target,
        registers=facts["registers"],
        shared_bytes=shared,
        warps=built.metadata.num_warps,
    )
    return (
        place
        | facts
        | {
            "shared_bytes": shared,
            "occupancy": fits,
            "seconds": round(seconds, 2),
            "error": None,
        }
    )


def key_of(row: dict) -> tuple[str, ...]:
    return tuple(row[name] for name in ("kernel", "variant", "config", "target"))


def violations(rows: list[dict]) -> list[str]:
    """What the gate objects to, one line each."""
    found = []
    for row in rows:
        where = " ".join(key_of(row))
        if row["error"]:
            found.append(f"{where}: does not compile: {row['error']}")
        elif row["target"] == GATE:
            wrong = {
                "bytes of spill or local memory": row["spill_bytes"],
                "local-memory instructions": row["local"],
                "fp64 instructions": row["fp64"],
            }
            found += [f"{where}: {count} {what}" for what, count in wrong.items() if count]
    return found


def regressions(rows: list[dict], before: list[dict]) -> list[str]:
    """Where a row is worse than the same one of `before`, one line each."""
    found, known = [], {key_of(row): row for row in before if not row["error"]}
    for row in rows:
        old = known.get(key_of(row))
        if old is None or row["error"]:
            continue
        where = " ".join(key_of(row))
        if row["occupancy"] < old["occupancy"]:
            found.append(f"{where}: occupancy {old['occupancy']:.2f} -> {row['occupancy']:.2f}")
        if row["spill_bytes"] > old["spill_bytes"]:
            found.append(f"{where}: spills {old['spill_bytes']} -> {row['spill_bytes']} bytes")
        for name, what in (("loads_16_byte", "16-byte loads"), ("matrix", "matrix instructions")):
            if old[name] and not row[name]:
                found.append(f"{where}: {what} {old[name]} -> 0")
    return found


def against_baseline(rows: list[dict], path: Path) -> list[str]:
    """`regressions` against a file; another Triton's figures are not comparable, which is said."""
    import triton

    if not path.is_file():
        print(f"no baseline: {path} is not there")
        return []
    before = json.loads(path.read_text())
    if before["about"]["triton"] != triton.__version__:
        print(
            f"not compared: the baseline is of triton {before['about']['triton']}, "
            f"this is {triton.__version__}"
        )
        return []
    known = {key_of(row) for row in before["rows"]}
    print(f"{sum(key_of(row) in known for row in rows)} of {len(rows)} rows are in the baseline")
    return regressions(rows, before["rows"])


COLUMNS = {
    "kernel": "kernel",
    "variant": "variant",
    "config": "config",
    "target": "target",
    "registers": "registers",
    "spill_bytes": "spill B",
    "shared_bytes": "shared B",
    "occupancy": "occupancy",
    "fp64": "fp64",
    "loads_16_byte": "16 B loads",
    "matrix": "matrix",
    "instructions": "instructions",
    "seconds": "seconds",
}


def static_table(rows: list[dict]) -> list[str]:
    def cell(value: object) -> str:
        return f"{value:.2f}" if isinstance(value, float) else str(value)

    cells = [[cell(row.get(key, "-")) for key in COLUMNS] for row in rows]
    return align([list(COLUMNS.values()), *cells])


def rows_of(work: list[Job]) -> Iterator[dict]:
    """Compile in order; a line of progress where a person watches."""
    import triton

    watched = sys.stderr.isatty()
    # A cached binary would make `seconds` a lie and keep what an older compiler made.
    with tempfile.TemporaryDirectory() as cache, triton.knobs.cache.scope():
        triton.knobs.cache.dir = cache
        for done, job in enumerate(work, 1):
            if watched:
                line = f"{done}/{len(work)} {job.kernel} {job.target}"
                print(f"\r\033[K{line}", end="", file=sys.stderr, flush=True)
            yield compile_row(job)
    if watched:
        print("\r\033[K", end="", file=sys.stderr)


def parser() -> Parser:
    parsed = Parser("grpo-fast bench --static", __doc__)
    parsed.add_argument(
        "--target", choices=TARGETS, action="append", help="only this target; may be given again"
    )
    parsed.add_argument(
        "--kernel", metavar="NAME", action="append", help="only kernels whose name contains NAME"
    )
    parsed.add_argument("--json", type=Path, metavar="FILE", help="write header and rows to FILE")
    parsed.add_argument(
        "--baseline",
        type=Path,
        metavar="FILE",
        default=BASELINE,
        help=f"a table that must not get worse (default: {BASELINE.relative_to(ROOT)})",
    )
    return parsed


def main(argv: list[str], package: str = PACKAGE) -> int:
    """Exit code 0; 1 on a violation or a kernel without a signature; 2 for a wrong option."""
    options = parser().parse_args(argv)
    if "TRITON_INTERPRET" in os.environ:
        # Interpreted kernels cannot be compiled, and the choice is made when they are defined.
        clean = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        again = [sys.executable, "-P", "-m", "grpo_bench.static", *argv]
        return subprocess.run(again, env=clean, check=False).returncode
    kernels = kernels_of(package)
    names = [name for name in kernels if any(part in name for part in options.kernel or [""])]
    if not names:
        parser().error(f"no kernel is called {options.kernel}: there are {', '.join(kernels)}")
    try:
        check_table(kernels)
        work = jobs(kernels, options.target or list(TARGETS), names)
    except ValueError as error:
        print(f"grpo-fast bench --static: {error}", file=sys.stderr)
        return 1
    rows = list(rows_of(work))
    print("\n".join(static_table(rows)))
    # Before the baseline itself is written over.
    found = violations(rows) + against_baseline(rows, options.baseline)
    written(options.json, "static", about(torch.device("cpu"), "--static", argv), rows)
    for line in found:
        print(f"violation: {line}")
    total = sum(row.get("seconds", 0.0) for row in rows)
    print(f"{len(rows)} rows, {len(found)} violations, {total:.0f} s of compiling")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
