"""`grpo-fast bench --drop-in`: TRL's GRPOTrainer beside the one of `grpo_fast.integrations.trl`.

One micro-batch, from token ids to gradients, as TRL's training step makes it: the reference
policy's log-probs, `compute_loss` with its metrics, the backward of the accelerator. Not in it:
generation, rewards, optimizer, and the gradient checkpointing that TRL has on by default. One
prompt of P tokens with G completions of C tokens, a random model that is its own reference. Each
trainer works in a process of its own and they take turns. Loss and gradients are held against
float64 first; what is wrong or missing has no number.

  time      median of one micro-batch: process time of one thread, or wall clock with more
  x TRL     median over rounds of TRL's time over this one's: above 1 is faster
  tokens/s  prompt and completion tokens, padding left out, over the time
  extra     most memory at once beyond what was there before and beyond the gradients
  of TRL    the same over TRL's"""

import os
import statistics
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import get_args

import torch
import transformers
from torch import Tensor

from .bench_step import Check, StepSeat
from .compare import rounds_of
from .isolated import Worker
from .options import Parser
from .provider import DTYPES, Gap, Provider
from .record import about, written
from .steps import (
    Lengths,
    PaddedGroup,
    Step,
    StepMatch,
    exact_step,
    trl_trainer,
)
from .timing import align, dtype_name, seconds_text, summary

# Where a trainer's head and prompts weigh as they do in practice, in seconds on one CPU thread.
SHAPE, MODEL = (512, 64, 16), "wide"
BASE, BETA = "TRL", 0.04


def host_class(depth: str | None = None) -> type:
    """TRL's class, or the one that takes its place, at `depth`."""
    if depth is None:
        from trl import GRPOTrainer

        return GRPOTrainer
    from grpo_fast.integrations.trl import GRPOTrainer

    return type("GRPOTrainer", (GRPOTrainer,), {"depth": depth})


def trainer_of(kind: type, model, whole: PaddedGroup):
    """A trainer with a reference, which TRL reads from where the model lies."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        model.config._name_or_path = folder
        trainer = trl_trainer(model, *whole.completions.shape, folder, kind=kind, beta=BETA)
    trainer.ref_model.to(model.device)
    return trainer


def prepared(trainer, model, whole: PaddedGroup) -> Step:
    """One micro-batch as a call."""
    model.train()
    ids = torch.cat([whole.prompts, whole.completions], 1)
    mask = torch.cat([torch.ones_like(whole.prompts), whole.mask.long()], 1)
    count, longest = whole.completions.shape
    inputs = {
        "prompt_ids": whole.prompts,
        "prompt_mask": torch.ones_like(whole.prompts),
        "completion_ids": whole.completions,
        "completion_mask": whole.mask.long(),
        "advantages": whole.advantages,
        "num_items_in_batch": whole.mask.sum(),
    }

    def step() -> Tensor:
        with torch.no_grad():
            known = trainer._get_per_token_logps_and_entropies(
                trainer.ref_model, ids, mask, longest, batch_size=count
            )
        loss = trainer.compute_loss(model, inputs | {"ref_per_token_logps": known[0]})
        trainer.accelerator.backward(loss)
        return loss.detach()

    return step


def trainer(depth: str | None = None):
    kind = host_class(depth)

    def prepare(model, group, pieces: int = 1) -> Step:
        whole = PaddedGroup.of(group, model.device)
        made = trainer_of(kind, model, whole)
        if depth is not None and made._taken != depth:
            raise Gap(f"went to depth '{made._taken}' with this model")
        return prepared(made, model, whole)

    return prepare


DEPTHS = {
    "packed": "no padding, a prompt once, fused loss",
    "fused": "the fused loss on TRL's padded rows",
    "kernel": "TRL's loss on log-probs from here",
}
PROVIDERS = (
    Provider(name=BASE, computes="trl.GRPOTrainer", load=trainer, package="trl"),
    *(
        Provider(name=name, computes=f"depth '{name}': {text}", load=partial(trainer, name))
        for name, text in DEPTHS.items()
    ),
)


class DropInSeat(StepSeat):
    """One trainer in its own process. The policy is its own reference, so that its KL is 0 with a
    gradient of 0, and the truth is that of `--step`."""

    def __init__(self, provider: Provider):
        # What is said here would be said in the middle of a table.
        warnings.simplefilter("ignore")
        transformers.utils.logging.disable_progress_bar()
        os.environ["HF_HUB_OFFLINE"] = "1"
        super().__init__(provider)


def row(match: StepMatch, provider: Provider, found: dict, times: dict) -> dict:
    """One line of a results file; what was found of it is a text when there is no number."""
    p, c, g = match.shape
    lengths = match.completions()
    line = {
        "provider": provider.name,
        "version": provider.version,
        "computes": provider.computes,
        **{"P": p, "C": c, "G": g, "lengths": match.lengths, "model": match.model},
        "longest": max(lengths),
        "dtype": dtype_name(match.dtype),
        **dict.fromkeys(("seconds", "spread", "rounds", "tokens_per_second", "over_trl")),
        **dict.fromkeys(("loss_error", "gradient_error", "extra_bytes", "of_trl_bytes", "error")),
    }
    mine = found[provider.name]
    if isinstance(mine, str):
        return line | {"error": mine}
    line |= {"loss_error": mine.loss_error, "gradient_error": mine.gradient_error}
    line |= {"extra_bytes": mine.extra} | summary(times[provider.name])
    line["tokens_per_second"] = (g * p + sum(lengths)) / line["seconds"]
    if BASE in times:
        pairs = zip(times[BASE], times[provider.name], strict=True)
        line["over_trl"] = statistics.median(b / m for b, m in pairs)
        line["of_trl_bytes"] = line["extra_bytes"] / found[BASE].extra
    return line


def play(match: StepMatch, workers: list[Worker], scratch: Path, **rounds) -> list[dict]:
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
    calls, lost = rounds_of(right, label=str(match), **rounds)
    found |= lost
    times = {name: [call.seconds for call in made] for name, made in calls.items()}
    return [row(match, worker.provider, found, times) for worker in workers]


def drop_in_table(rows: list[dict]) -> list[str]:
    def form(value: float | None, text: str) -> str:
        return "-" if value is None else text.format(value)

    table = [["trainer", "version", "time", "spread", "x TRL", "tokens/s", "extra", "of TRL"]]
    table[0] += ["off by"]
    for r in rows:
        extra = None if r["extra_bytes"] is None else r["extra_bytes"] / 2**20
        table.append(
            [
                *(r["provider"], r["version"] or "-", seconds_text(r["seconds"])),
                form(r["spread"], "{:.0%}"),
                form(r["over_trl"], "{:.2f}"),
                form(r["tokens_per_second"], "{:,.0f}"),
                form(extra, "{:,.0f} MiB"),
                form(r["of_trl_bytes"], "{:.0%}"),
                form(r["gradient_error"], "{:.1e}"),
            ]
        )
    return align(table) + [f"{r['provider']}: {r['error']}" for r in rows if r["error"]]


def parser() -> Parser:
    epilog = "\n".join(["who is asked:"] + [f"  {p.name:7}  {p.computes}" for p in PROVIDERS])
    parsed = Parser("grpo-fast bench --drop-in", __doc__, epilog)
    words = " ".join(map(str, SHAPE))
    parsed.add_argument(
        "--shape",
        type=int,
        nargs=3,
        metavar=("P", "C", "G"),
        action="append",
        help=f"tokens of the prompt and of a completion, completions; may be given again "
        f"(default: {words})",
    )
    parsed.add_argument(
        "--lengths",
        choices=get_args(Lengths),
        default="lognormal",
        help="C tokens in each completion, or log-normal ones around C (default: lognormal)",
    )
    parsed.add_argument(
        "--only",
        choices=[provider.name for provider in PROVIDERS],
        action="append",
        help="this trainer; may be given again",
    )
    parsed.add_argument("--rounds", type=int, default=3, help="fewest of each (default: 3)")
    parsed.add_argument("--seconds", type=float, default=30.0, help="for more (default: 30)")
    parsed.add_model(MODEL)
    parsed.add_place()
    return parsed


def main(argv: list[str]) -> int:
    """Exit code 0; 1 when a depth of ours has no number; 2 for a wrong option."""
    command = parser()
    options = command.parse_args(argv)
    device = command.device(options.device)
    shapes = [tuple(shape) for shape in options.shape or [SHAPE]]
    if options.rounds < 2 or options.threads < 1 or min(map(min, shapes)) < 1:
        command.error("--rounds from 2, --threads and sizes from 1")
    facts = about(device, "--drop-in", argv, threads=options.threads)
    if device.type == "cpu" and options.threads > 1:
        facts["clock"] = "wall clock"
    print(f"{facts['device']}, torch {facts['torch']}, commit {facts['commit']}")
    chosen = [p for p in PROVIDERS if p.name in (options.only or [p.name])]
    workers = [Worker(provider, options.threads, DropInSeat) for provider in chosen]
    rows: list[dict] = []
    try:
        for shape in shapes:
            match = StepMatch(
                shape=shape,
                lengths=options.lengths,
                model=options.model,
                dtype=DTYPES[options.dtype],
                device=device,
            )
            limits = {"least": options.rounds, "seconds": options.seconds}
            with tempfile.TemporaryDirectory() as scratch:
                rows += (fresh := play(match, workers, Path(scratch), **limits))
            print(f"\n{match}")
            print("\n".join(drop_in_table(fresh)), flush=True)
    finally:
        for worker in workers:
            worker.close()
    written(options.json, "drop_in", facts, rows)
    return 1 if any(r["error"] for r in rows if r["provider"] != BASE) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
