"""`grpo-fast bench --all`: every table on this machine, into one folder, with pictures and a page.

Each table runs in a process of its own, as its own command would, and leaves NAME.json and what it
printed in NAME.txt; one that fails leaves the others. With --quick the sizes are those of a test:
right and wrong show, times mean little. `grpo-fast bench --report` of the folder comes last."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from .options import Parser
from .report import RESULTS, report


class Part(NamedTuple):
    full: str
    quick: str
    """Options of `grpo-fast bench`."""
    names_device: bool = True
    """The static table is the same on every machine."""


PARTS = {
    "static": Part("--static", "--static --target sm_90", names_device=False),
    "timing": Part("--seconds 2", "--seconds 0.2"),
    "accuracy": Part("--accuracy", "--accuracy --shape 32 64 1024"),
    "peers": Part(
        "--peers --shape 512 896 151936 --threads 1 --rounds 3 --seconds 0 "
        "--only 'grpo-fast torch' --only eager --only 'eager float32' --only TRL --only Liger",
        "--peers --quick",
    ),
    "peers-tokens": Part(
        "--peers --shape 256 256 16384 --shape 512 256 16384 --shape 1024 256 16384 "
        "--shape 2048 256 16384 --dtype float32 --head trained --threads 1 --rounds 3 "
        "--seconds 0",
        "",
    ),
    "logits": Part("--peers --logits --threads 1", "--peers --logits --quick"),
    "step": Part(
        "--step --rounds 5 --seconds 0",
        "--step --shape 64 32 8 --shape 32 64 8 --rounds 2 --seconds 0",
    ),
    "memory": Part("--memory", "--memory --shape 64 16 --largest 128 --budget 512"),
    "rollout": Part("--rollout", "--rollout --shape 32 8 4 --rounds 2 --seconds 0"),
    "drop-in": Part(
        "--drop-in --shape 512 64 16 --shape 64 128 16 --rounds 3 --seconds 0",
        "--drop-in --model tiny --shape 64 16 8 --rounds 2 --seconds 0",
    ),
    "plan": Part("--plan", "--plan --shape 32 32 8 --rounds 2"),
}


def run_part(words: list[str], out: Path, name: str) -> bool:
    """The table in a process of its own; whether it ended well."""
    # Interpreted kernels cannot be compiled.
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-m", "grpo_bench.main", *words]
    command += ["--json", str(out / f"{name}.json")]
    started = time.perf_counter()
    print(f"{name}: grpo-fast bench {' '.join(words)}", file=sys.stderr, flush=True)
    with (out / f"{name}.txt").open("w") as printed:
        done = subprocess.run(
            command, env=environment, stdout=printed, stderr=subprocess.STDOUT, check=False
        )
    seconds = time.perf_counter() - started
    said = "ok" if done.returncode == 0 else f"FAILED, exit code {done.returncode}"
    print(f"{name}: {said} in {seconds:.0f} s", flush=True)
    if done.returncode:
        print("".join((out / f"{name}.txt").read_text().splitlines(keepends=True)[-15:]))
    return done.returncode == 0


def parser() -> Parser:
    listed = [f"  {name:13} grpo-fast bench {part.full}" for name, part in PARTS.items()]
    parsed = Parser("grpo-fast bench --all", __doc__, "\n".join(["the tables:", *listed]))
    parsed.add_argument("--quick", action="store_true", help="sizes of a test: under six minutes")
    parsed.add_argument(
        "--out", type=Path, metavar="DIR", help="(default: bench/results, with --quick bench/quick)"
    )
    parsed.add_argument(
        "--only", choices=PARTS, action="append", help="this table; may be given again"
    )
    return parsed


def main(argv: list[str]) -> int:
    """Exit code 0; 1 when a table failed; 2 for a wrong option."""
    options = parser().parse_args(argv)
    out = options.out or (RESULTS.with_name("quick") if options.quick else RESULTS)
    out.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started, right = time.perf_counter(), []
    for name in options.only or PARTS:
        part = PARTS[name]
        words = shlex.split(part.quick if options.quick else part.full)
        if words:
            right.append(run_part(words, out, f"{device}-{name}" if part.names_device else name))
    for path, text in report(out).items():
        path.write_text(text)
        print(path)
    minutes, seconds = divmod(round(time.perf_counter() - started), 60)
    print(f"{sum(right)} of {len(right)} tables in {minutes}:{seconds:02}: {out / 'README.md'}")
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
