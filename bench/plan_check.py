"""`grpo-fast bench --plan`: steps beside what `grpo-fast plan` predicts for this machine.

One prompt of P tokens with G completions of C tokens, forward and backward, no optimizer. The
machine is measured first as `grpo-fast plan --gpu here` does it; every step is held against float64
before it is timed, and a wrong one has no number.

  predicted  seconds from FLOPs, bytes of the layers and the two measured rates
  time       median of one step: process time of one thread, or wall clock with more
  x padded   the padded step's time over this one's, predicted and measured
  extra      most memory at once beyond what was there before and beyond the gradients, in a
             process of its own whose allocator gives back what is freed
  error      predicted over measured, less 1"""

import os
import sys
import tempfile
from pathlib import Path

import torch

from grpo_fast.estimate import Estimate, Job, logit_bytes, ours, padded
from grpo_fast.gpus import Machine, measured
from grpo_fast.model_shapes import MODELS

from .bench_step import StepSeat, play
from .isolated import Worker
from .memory import ALLOCATOR
from .options import Parser
from .provider import DTYPES, Gap
from .record import about, written
from .steps import PROVIDERS, StepMatch
from .timing import align, dtype_name, seconds_text

SHAPES = [(256, 256, 16), (512, 64, 16), (64, 64, 64)]
NAMES = ("padded", "shared", "one row")


def predicted(match: StepMatch, on: Machine, provider: str) -> Estimate:
    """Of one of NAMES. The padded step has our loss: 3 head products, and our blocks of logits."""
    prompt, completion, size = match.shape
    job = Job(
        model=MODELS[match.model],
        prompt=prompt,
        completion=completion,
        group_size=size,
        dtype=match.dtype,
    )
    if provider == "padded":
        return padded(job, on, 3, logit_bytes(job.model, size * completion, match.device))
    whole = prompt + size * completion
    return ours(job, on, whole if provider == "one row" else None, "off")


def measure(
    match: StepMatch, threads: int, scratch: Path, *, matmul_rate: float, **rounds
) -> dict[str, dict]:
    """Of each provider `seconds`, `extra_bytes` and `error`: time and memory apart, since an
    allocator that gives memory back takes time for it."""
    found = {}
    chosen = [provider for provider in PROVIDERS if provider.name in NAMES]
    workers = [Worker(provider, threads, StepSeat) for provider in chosen]
    try:
        for row in play(match, workers, scratch, matmul_rate=matmul_rate, **rounds):
            found[row["provider"]] = {"seconds": row["seconds"], "error": row["error"]}
    finally:
        for worker in workers:
            worker.close()
    before = {name: os.environ.get(name) for name in ALLOCATOR}
    os.environ.update(ALLOCATOR)
    for provider in chosen:
        worker = Worker(provider, threads, StepSeat)
        line = found[provider.name]
        try:
            # What stays is allocated by the first group: the second finds it there.
            worker.ask("open", match, scratch / "truth.pt")
            line["extra_bytes"] = worker.ask("open", match, scratch / "truth.pt").extra
        except Gap as gap:
            line |= {"extra_bytes": None, "error": line["error"] or str(gap)}
        finally:
            worker.close()
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})
    return found


def rows_of(match: StepMatch, on: Machine, found: dict[str, dict]) -> list[dict]:
    """Lines of a results file: what was predicted beside what was measured."""
    prompt, completion, size = match.shape
    rows = []
    for name in NAMES:
        estimate, line = predicted(match, on, name), found[name]
        rows.append(
            {
                "provider": name,
                **{"P": prompt, "C": completion, "G": size, "model": match.model},
                "machine": on._asdict(),
                "dtype": dtype_name(match.dtype),
                "predicted_seconds": estimate.backward_seconds,
                "predicted_bytes": estimate.memory.activations + estimate.memory.head,
                **line,
            }
        )
    base = rows[0]
    for row in rows:
        row["predicted_over_padded"] = base["predicted_seconds"] / row["predicted_seconds"]
        both = base["seconds"] and row["seconds"]
        row["over_padded"] = base["seconds"] / row["seconds"] if both else None
    return rows


def off(predicted: float, measured: float | None) -> float | None:
    return None if measured is None else predicted / measured - 1


def plan_table(rows: list[dict]) -> list[str]:
    """Rows of one match as lines to print, what is missing or wrong named below."""

    def form(value: float | None, text: str) -> str:
        return "-" if value is None else text.format(value)

    table = [["provider", "time", "predicted", "error", "x padded", "predicted", "error"]]
    table[0] += ["extra", "predicted", "error"]
    for r in rows:
        line = [r["provider"], seconds_text(r["seconds"]), seconds_text(r["predicted_seconds"])]
        line += [form(off(r["predicted_seconds"], r["seconds"]), "{:+.0%}")]
        line += [form(r["over_padded"], "{:.2f}"), form(r["predicted_over_padded"], "{:.2f}")]
        line += [form(off(r["predicted_over_padded"], r["over_padded"]), "{:+.0%}")]
        mebibytes = [x and x / 2**20 for x in (r["extra_bytes"], r["predicted_bytes"])]
        line += [form(x, "{:,.0f} MiB") for x in mebibytes]
        table.append([*line, form(off(r["predicted_bytes"], r["extra_bytes"]), "{:+.0%}")])
    return align(table) + [f"{r['provider']}: {r['error']}" for r in rows if r["error"]]


def parser() -> Parser:
    parsed = Parser("grpo-fast bench --plan", __doc__)
    shapes = ", ".join(" ".join(map(str, shape)) for shape in SHAPES)
    parsed.add_argument(
        "--shape",
        type=int,
        nargs=3,
        metavar=("P", "C", "G"),
        action="append",
        help=f"may be given again (default: {shapes})",
    )
    parsed.add_argument("--rounds", type=int, default=3, help="steps of each provider (default: 3)")
    parsed.add_model()
    parsed.add_place()
    return parsed


def main(argv: list[str]) -> int:
    """Exit code 0; 1 when a step has no number; 2 for a wrong option."""
    command = parser()
    options = command.parse_args(argv)
    device, dtype = command.device(options.device), DTYPES[options.dtype]
    if options.rounds < 2 or options.threads < 1:
        command.error("--rounds from 2, --threads from 1")
    shapes = [tuple(shape) for shape in options.shape or SHAPES]
    for shape in shapes:
        if min(shape) < 1 or shape[2] < 2:
            command.error(f"--shape {' '.join(map(str, shape))}: sizes from 1, G from 2")
    model = MODELS[options.model]._asdict()
    facts = about(device, "--plan", argv, threads=options.threads, model=model)
    torch.set_num_threads(options.threads)
    print(f"{facts['device']}, torch {facts['torch']}, commit {facts['commit']}")
    rows: list[dict] = []
    for shape in shapes:
        match = StepMatch(shape=shape, model=options.model, dtype=dtype, device=device)
        # A shared machine is another one every minute.
        on = measured(device, dtype)
        with tempfile.TemporaryDirectory() as scratch:
            found = measure(
                match,
                options.threads,
                Path(scratch),
                matmul_rate=on.flops,
                least=options.rounds,
                seconds=0.0,
            )
        rows += (fresh := rows_of(match, on, found))
        rates = [f"{x / 1e9:,.0f}" for x in (on.flops, on.attention, on.bandwidth, on.anew)]
        print(
            f"\n{match}; measured {rates[0]} GFLOP/s, {rates[1]} in attention, {rates[2]} GB/s, "
            f"{rates[3]} into new pages"
        )
        print("\n".join(plan_table(fresh)), flush=True)
    written(options.json, "plan", facts, rows)
    print(f"\nload of the machine {facts['load_before']:.1f} to {facts['load_after']:.1f}")
    return 1 if any(row["error"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
