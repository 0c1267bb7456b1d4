"""`grpo-fast bench --memory`: the most memory of one GRPO step against the size of the group.

One prompt of P tokens with G = 8, 16, ... completions of C tokens. A group repeats its first 8
completions, so that loss and gradients are the same at every G: each step is held against float64
at G = 8, and a wrong one has no number.

  extra      most memory at once beyond what was there before and beyond the gradients
  s          seconds of the step, to tell what the memory was bought with: process time of one
             thread, or wall clock with more

A layout whose next step would not fit into half of what is free is not run; under --limit it runs
until it does not fit. The last size that a layout has a figure for is then its largest group."""

import dataclasses
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from grpo_fast import Group, grpo_backward
from grpo_fast.memory import Meter, free_bytes, gigabytes
from grpo_fast.model_shapes import MODELS

from .bench_step import TOLERANCE
from .charts import draw
from .isolated import Worker, by_process_time
from .options import Parser
from .provider import DTYPES, Gap
from .record import about, written
from .steps import (
    LOSS,
    Prepare,
    Step,
    StepMatch,
    StepProvider,
    exact_step,
    gradient_error,
    gradients,
    loss_error,
    padded,
)
from .timing import align

BASE_SIZE = 8
SHAPE, LARGEST, BUDGET = (128, 32), 4096, 2048
# Read by glibc when a process starts: tensors lie in maps of their own and go back when freed.
# Holes of the heap would count as memory of the step, and be worth more than all of it.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def ours(budget: int, **options: str) -> Prepare:
    """`grpo_backward` under a token budget."""

    def prepare(model, group: Group) -> Step:
        def step() -> torch.Tensor:
            return grpo_backward(model, [group], loss=LOSS, token_budget=budget, **options).loss

        return step

    return prepare


def providers(budget: int) -> list[StepProvider]:
    shared = {"share_prompts": "on", "checkpointing": "off"}
    return [
        StepProvider(
            name="padded",
            computes="all completions in one batch, transformers' attention, our loss",
            load=padded,
            layout="padded",
        ),
        StepProvider(
            name="one row",
            computes="grpo_backward without a budget: the prompt once, all completions in one row",
            load=partial(ours, 10**9, **shared),
            layout="shared",
        ),
        StepProvider(
            name="budget",
            computes=f"grpo_backward(token_budget={budget}): rows behind a prompt that waits",
            load=partial(ours, budget, **shared),
            layout="shared",
        ),
        StepProvider(
            name="recomputed",
            computes="the same with checkpointing='on'",
            load=partial(ours, budget, **shared | {"checkpointing": "on"}),
            layout="shared",
        ),
    ]


class Taken(NamedTuple):
    """What one right step took."""

    extra: int
    """Bytes beyond what was held before and beyond the gradients."""
    seconds: float
    loss_error: float
    gradient_error: float


def repeated(match: StepMatch) -> Group:
    """The first BASE_SIZE completions again and again, up to G."""
    base = dataclasses.replace(match, shape=(*match.shape[:2], BASE_SIZE)).group()
    times = match.shape[2] // BASE_SIZE
    return Group(
        prompt_ids=base.prompt_ids,
        completion_ids=list(base.completion_ids) * times,
        advantages=list(base.advantages) * times,
    )


class MemorySeat:
    """One provider in its own process: what it can be asked."""

    def __init__(self, provider: StepProvider):
        self.prepare = provider.calls()
        self.model = None

    def limit(self, gigabytes: float) -> None:
        """As if the GPU had no more memory than this."""
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gigabytes * 1e9 / whole))

    def measure(self, match: StepMatch, truth: Path) -> Taken:
        """One step; Gap when it is wrong or does not fit."""
        if self.model is None:
            self.model = match.network()
            # What stays is allocated by the first step: tables, workspaces, the self-check.
            self._step(dataclasses.replace(match, shape=(*match.shape[:2], BASE_SIZE)))
        self.model.zero_grad()
        clock = time.process_time if by_process_time(match.device) else time.perf_counter
        meter, started = Meter(match.device), clock()
        loss = self._step(match)
        if match.device.type == "cuda":
            torch.cuda.synchronize(match.device)
        seconds, extra = clock() - started, meter.bytes()
        exact, found = torch.load(truth), gradients(self.model)
        errors = loss_error(loss, exact["loss"]), gradient_error(found, exact["gradients"])
        if not max(errors) <= TOLERANCE[match.dtype]:
            raise Gap(f"wrong result: loss off by {errors[0]:.1e}, gradients by {errors[1]:.1e}")
        return Taken(extra - sum(x.nbytes for x in found.values()), seconds, *errors)

    def _step(self, match: StepMatch) -> torch.Tensor:
        return self.prepare(self.model, repeated(match))()


def climb(
    worker: Worker, match: StepMatch, largest: int, truth: Path, *, until_full: bool = False
) -> list[dict]:
    """Rows of one provider, from 8 completions up; `until_full`: until memory runs out."""
    rows, size = [], BASE_SIZE
    while size <= largest:
        at = dataclasses.replace(match, shape=(*match.shape[:2], size))
        row = {"provider": worker.provider.name, "computes": worker.provider.computes, "G": size}
        row |= dict.fromkeys((*Taken._fields, "error"))
        print(f"{row['provider']}: {at} ...", file=sys.stderr, flush=True)
        free = free_bytes(match.device)
        expected = 2 * rows[-1]["extra"] if rows else 0
        try:
            # What grew little has a ceiling, and will not double.
            if not until_full and free is not None and expected > free / 2 and grows(rows):
                raise Gap(f"about {gigabytes(expected)} needed, not run")
            row |= worker.ask("measure", at, truth)._asdict()
        except Gap as gap:
            rows.append(row | {"error": f"G={size}: {gap}"})
            break
        rows.append(row)
        size *= 2
    return rows


def grows(rows: list[dict]) -> bool:
    return len(rows) < 2 or rows[-1]["extra"] > 1.5 * rows[-2]["extra"]


def memory_table(rows: list[dict]) -> list[str]:
    """A line for each G, two columns for each provider; what is missing is named below."""
    names = list(dict.fromkeys(row["provider"] for row in rows))
    table = [["G", *(cell for name in names for cell in (name, "s"))]]
    for size in sorted({row["G"] for row in rows}):
        line = [str(size)]
        for name in names:
            found = [r for r in rows if (r["provider"], r["G"]) == (name, size) and not r["error"]]
            line += (
                [f"{r['extra'] / 2**20:,.0f} MiB", f"{r['seconds']:.1f}"]
                if (r := next(iter(found), None))
                else ["-", "-"]
            )
        table.append(line)
    return align(table) + [f"{r['provider']}: {r['error']}" for r in rows if r["error"]]


def parser() -> Parser:
    epilog = "\n".join(
        ["who is asked:"] + [f"  {p.name:10}  {p.computes}" for p in providers(BUDGET)]
    )
    parsed = Parser("grpo-fast bench --memory", __doc__, epilog)
    parsed.add_argument(
        "--shape", type=int, nargs=2, metavar=("P", "C"), default=SHAPE, help="(default: 128 32)"
    )
    parsed.add_argument("--largest", type=int, default=LARGEST, metavar="G", help="(default: 4096)")
    parsed.add_argument("--budget", type=int, default=BUDGET, help="tokens of a row (2048)")
    parsed.add_argument(
        "--limit",
        type=float,
        metavar="GB",
        help="as on a GPU of this memory; sizes go up until it is full",
    )
    parsed.add_step()
    parsed.add_place()
    return parsed


def main(argv: list[str]) -> int:
    """Exit code 0; 1 when ours has no number; 2 for a wrong option."""
    command = parser()
    options = command.parse_args(argv)
    device = command.device(options.device)
    prompt, completion = options.shape
    if min(prompt, completion, options.threads) < 1 or options.budget < prompt + completion:
        command.error("--shape and --threads from 1, --budget of at least one sequence")
    if options.limit and (device.type != "cuda" or options.limit <= 0):
        command.error("--limit: a positive number of GB, of a GPU's memory")
    if options.largest < BASE_SIZE:
        command.error(f"--largest {options.largest}: from {BASE_SIZE}")
    facts = about(
        device,
        "--memory",
        argv,
        P=prompt,
        C=completion,
        token_budget=options.budget,
        limit_gigabytes=options.limit,
        model=MODELS[options.model]._asdict(),
        dtype=options.dtype,
        threads=options.threads,
    )
    print(f"{facts['device']}, torch {facts['torch']}, commit {facts['commit']}")
    match = StepMatch(
        shape=(prompt, completion, BASE_SIZE),
        model=options.model,
        dtype=DTYPES[options.dtype],
        device=device,
    )
    rows = []
    os.environ.update(ALLOCATOR)
    with tempfile.TemporaryDirectory() as scratch:
        truth = Path(scratch) / "truth.pt"
        torch.save(exact_step(match)._asdict(), truth)
        for provider in providers(options.budget):
            worker = Worker(provider, options.threads, MemorySeat)
            try:
                if options.limit:
                    worker.ask("limit", options.limit)
                rows += climb(worker, match, options.largest, truth, until_full=bool(options.limit))
            finally:
                worker.close()
    print("\n".join(memory_table(rows)))
    result = written(options.json, "memory", facts, rows)
    if options.plot:
        draw(result, options.plot)
    ours_end = {row["provider"]: row["error"] for row in rows}
    return 1 if ours_end["budget"] or ours_end["recomputed"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
