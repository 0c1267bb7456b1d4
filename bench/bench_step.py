"""`grpo-fast bench --step`: forward and backward of one GRPO step beside what its FLOPs predict.

One prompt of P tokens with G completions of C tokens, a random model whose trunk is most of the
work. Every provider works in a process of its own and they take turns, one step each a round. Loss
and gradients are held against float64 first; what is wrong or missing has no number.

  time       median of one step: process time of one thread, or wall clock with more (CUDA: waited
             for)
  x padded   median over rounds of the padded step's time over this one's: above 1 is faster
  predicted  the same by counting operations (grpo_fast/cost.py)
  of gain    (x padded - 1) / (predicted - 1)
  GFLOP/s    counted operations over time: where a layout has less than `padded`, work is done
             slower there, or is not counted
  of rate    the same over what a large matrix product reaches here, in the same dtype
  off by     largest relative error of a parameter's gradient against float64
  extra      most memory at once beyond what was there before and beyond the gradients"""

import statistics
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple, get_args

import torch

from grpo_fast.cost import StepCost
from grpo_fast.memory import Meter
from grpo_fast.model_shapes import MODELS

from .charts import draw
from .compare import Times, rounds_of
from .isolated import Call, Inline, Worker, measured
from .options import Parser
from .provider import DTYPES, Gap
from .record import about, written
from .steps import (
    PIECES,
    PROVIDERS,
    Lengths,
    StepMatch,
    StepProvider,
    exact_step,
    gradient_error,
    gradients,
    loss_error,
)
from .timing import align, dtype_name, matmul_rate, seconds_text, summary

SHAPES = [(256, 256, 16), (1024, 128, 16), (64, 512, 16)]
BASE = "padded"
# Loss and gradients against float64, relative: what the sums of a step round to, with a margin.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
# A gain of less is noise divided by little.
LEAST_GAIN = 0.02


class Check(NamedTuple):
    """What one right step says about itself."""

    loss_error: float
    gradient_error: float
    extra: int
    """Bytes beyond what was held before and beyond the gradients."""


class StepSeat:
    """One provider in its own process: what it can be asked."""

    def __init__(self, provider: StepProvider):
        warnings.simplefilter("ignore")
        self.prepare = provider.calls()

    def open(self, match: StepMatch, truth: Path) -> Check:
        """Make model and group, and hold a step against the truth; Gap when it is wrong."""
        self.match, self.model = match, match.network()
        self.step = self.prepare(self.model, match.group(), match.pieces)
        exact = torch.load(truth)
        found = self._run()
        errors = (
            loss_error(found, exact["loss"]),
            gradient_error(gradients(self.model), exact["gradients"]),
        )
        if not max(errors) <= TOLERANCE[match.dtype]:
            raise Gap(
                f"wrong result, not timed: loss off by {errors[0]:.1e}, gradients by "
                f"{errors[1]:.1e}, allowed {TOLERANCE[match.dtype]:.0e}"
            )
        self.model.zero_grad()
        meter = Meter(match.device)
        self._run()
        kept = sum(x.nbytes for x in gradients(self.model).values())
        return Check(*errors, meter.bytes() - kept)

    def _run(self) -> torch.Tensor:
        self.model.zero_grad()
        return self.step()

    def time(self) -> Call:
        """One step."""
        return measured(self._run, self.match.device)[0]


def step_cost(match: StepMatch) -> StepCost:
    return StepCost(
        model=MODELS[match.model], prompt=match.shape[0], completions=match.completions()
    )


def row(
    match: StepMatch,
    provider: StepProvider,
    found: Check | str,
    times: dict[str, list[float]],
    matmul_rate: float,
) -> dict:
    """One line of a results file; `found` is a text when there is no number."""
    p, c, g = match.shape
    cost, layout = step_cost(match), provider.layout
    line = {
        "provider": provider.name,
        "version": provider.version,
        "computes": provider.computes,
        **{"P": p, "C": c, "G": g, "lengths": match.lengths, "model": match.model},
        "completions": list(cost.completions),
        "dtype": dtype_name(match.dtype),
        "layout": layout,
        "tokens": cost.work(layout).tokens,
        "flops": cost.training(layout)._asdict(),
        "predicted": cost.speedup(layout),
        **dict.fromkeys(("seconds", "fastest", "spread", "rounds", "over_padded", "of_gain")),
        "of_rate": None,
        **dict.fromkeys((*Check._fields, "error")),
    }
    if isinstance(found, str):
        return line | {"error": found}
    mine, base = times[provider.name], times.get(BASE)
    line |= found._asdict() | summary(mine) | {"fastest": min(mine)}
    line["of_rate"] = sum(line["flops"].values()) / line["seconds"] / matmul_rate
    if base:
        line["over_padded"] = statistics.median(b / m for b, m in zip(base, mine, strict=True))
        if line["predicted"] >= 1 + LEAST_GAIN:
            line["of_gain"] = (line["over_padded"] - 1) / (line["predicted"] - 1)
    return line


def play(
    match: StepMatch,
    workers: list[Worker],
    scratch: Path,
    *,
    matmul_rate: float,
    **rounds,
) -> list[dict]:
    """The rows of one match; `rounds` are `least` and `seconds`."""
    truth = scratch / "truth.pt"
    print(f"{match}: the oracle ...", file=sys.stderr, flush=True)
    torch.save(exact_step(match)._asdict(), truth)
    found: dict[str, Check | str] = {}
    for worker in workers:
        name = worker.provider.name
        print(f"{match}: {name} ...", file=sys.stderr, flush=True)
        try:
            found[name] = worker.ask("open", match, truth)
        except Gap as gap:
            found[name] = str(gap)
    right = [worker for worker in workers if isinstance(found[worker.provider.name], Check)]
    calls: Times
    calls, lost = rounds_of(right, label=str(match), **rounds)
    times = {name: [call.seconds for call in made] for name, made in calls.items()}
    found |= lost
    return [row(match, w.provider, found[w.provider.name], times, matmul_rate) for w in workers]


def step_table(rows: list[dict]) -> list[str]:
    """Rows of one match as lines to print, what is missing or wrong named below."""

    def form(value: float | None, text: str) -> str:
        return "-" if value is None else text.format(value)

    table = [["provider", "version", "time", "spread", "x padded", "predicted", "of gain"]]
    table[0] += ["tokens", "GFLOP/s", "of rate", "off by", "extra"]
    for r in rows:
        total = sum(r["flops"].values())
        rate = None if r["seconds"] is None else total / r["seconds"] / 1e9
        extra = None if r["extra"] is None else r["extra"] / 2**20
        line = [r["provider"], r["version"] or "-", seconds_text(r["seconds"])]
        line += [form(r["spread"], "{:.0%}"), form(r["over_padded"], "{:.2f}")]
        line += [form(r["predicted"], "{:.2f}"), form(r["of_gain"], "{:.0%}"), f"{r['tokens']}"]
        line += [form(rate, "{:.0f}"), form(r["of_rate"], "{:.0%}")]
        line += [form(r["gradient_error"], "{:.1e}")]
        table.append([*line, form(extra, "{:.0f} MiB")])
    return align(table) + [f"{r['provider']}: {r['error']}" for r in rows if r["error"]]


def parser() -> Parser:
    epilog = "\n".join(["who is asked:"] + [f"  {p.name:11}  {p.computes}" for p in PROVIDERS])
    parsed = Parser("grpo-fast bench --step", __doc__, epilog)
    shapes = ", ".join(" ".join(map(str, shape)) for shape in SHAPES)
    parsed.add_argument(
        "--shape",
        type=int,
        nargs=3,
        metavar=("P", "C", "G"),
        action="append",
        help=f"tokens of the prompt and of a completion, completions; may be given again "
        f"(default: {shapes})",
    )
    parsed.add_argument(
        "--lengths",
        choices=get_args(Lengths),
        default="fixed",
        help="C tokens in each completion, or log-normal ones around C, at most 2 C",
    )
    parsed.add_argument(
        "--only", metavar="NAME", action="append", help="of those below; may be given again"
    )
    parsed.add_argument(
        "--rounds", type=int, default=5, help="fewest steps of each provider (default: 5)"
    )
    parsed.add_argument(
        "--seconds", type=float, default=20.0, help="time for more rounds (default: 20)"
    )
    parsed.add_argument(
        "--pieces",
        type=int,
        default=PIECES,
        help=f"micro-batches of those who cut the padded batch (default: {PIECES})",
    )
    parsed.add_argument(
        "--together",
        action="store_true",
        help="all in one process: times compare closer than 10 %%, memory means nothing",
    )
    parsed.add_step()
    parsed.add_place()
    return parsed


def main(argv: list[str]) -> int:
    """Exit code 0; 1 when ours has no number; 2 for a wrong option."""
    command = parser()
    options = command.parse_args(argv)
    device = command.device(options.device)
    if options.rounds < 2 or min(options.threads, options.pieces) < 1:
        command.error("--rounds from 2, --threads and --pieces from 1")
    there = {provider.name: provider for provider in PROVIDERS}
    for name in set(options.only or ()) - set(there):
        command.error(f"--only {name!r}: there are {', '.join(there)}")
    shapes = [tuple(shape) for shape in options.shape or SHAPES]
    for shape in shapes:
        if min(shape) < 1 or shape[2] < 2:
            found = " ".join(map(str, shape))
            command.error(f"--shape {found}: sizes from 1, at least two completions")
    facts = about(
        device,
        "--step",
        argv,
        threads=options.threads,
        together=options.together,
        model=MODELS[options.model]._asdict(),
    )
    if device.type == "cpu" and options.threads > 1:
        facts["clock"] = "wall clock"
    print(f"{facts['device']}, torch {facts['torch']}, commit {facts['commit']}")
    rate = matmul_rate(DTYPES[options.dtype], device, threads=options.threads)
    facts["matmul_flops_per_second"] = rate
    rows: list[dict] = []
    chosen = [there[name] for name in options.only or there]
    if not options.only:
        chosen = [provider for provider in chosen if not provider.on_request]
    place = Inline if options.together else Worker
    workers = [place(provider, options.threads, StepSeat) for provider in chosen]
    limits = {"least": options.rounds, "seconds": options.seconds}
    limits["matmul_rate"] = rate
    try:
        for shape in shapes:
            match = StepMatch(
                shape=shape,
                lengths=options.lengths,
                model=options.model,
                dtype=DTYPES[options.dtype],
                device=device,
                pieces=options.pieces,
            )
            with tempfile.TemporaryDirectory() as scratch:
                rows += (fresh := play(match, workers, Path(scratch), **limits))
            print(f"\n{match}")
            print("\n".join(step_table(fresh)), flush=True)
    finally:
        for worker in workers:
            worker.close()
    result = written(options.json, "step", facts, rows)
    print(f"\nload of the machine {facts['load_before']:.1f} to {facts['load_after']:.1f}")
    if options.plot:
        draw(result, options.plot)
    ours = [provider.name for provider in PROVIDERS if provider.package == "grpo-fast"]
    return 1 if any(r["error"] for r in rows if r["provider"] in ours) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
