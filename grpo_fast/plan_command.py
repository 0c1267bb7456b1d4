"""`grpo-fast plan`: what one update takes on a GPU, before one is rented."""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn, get_args

import torch

from .config import Optimizer
from .errors import ConfigError
from .estimate import LORA_RANK, Estimate, Job, Train, ours, padded
from .gpus import PUBLISHED, Machine, machine
from .model_shapes import MODELS, model_shape

SCHEMA = 1
Line = tuple[str, Callable[[Estimate], str]]
"""(label, the cell of an estimate)."""
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ABOUT = """\
Work, memory and time of one GRPO update: for a trainer that pads, and for this one. Needs no GPU
and loads no weights.

  padded trainer  every completion behind a prompt of its own, a whole group in one batch, nothing
                  computed again, logits in tiles: as TRL 1.16 without gradient checkpointing
  grpo-fast       a prompt once for its group, rows of at most --token-budget tokens, layers
                  computed again only where memory asks for it, as `grpo-fast train` chooses"""
EXAMPLES = """\
examples:
  grpo-fast plan                                                    the defaults
  grpo-fast plan --model llama-3.1-8b --train lora --gpu rtx-4090   an 8B model on 24 GB
  grpo-fast plan --model my-model --gpu here --group-size 16        this machine, measured first
  grpo-fast plan --gpu rtx-4090 --optimizer adamw_8bit --json plan.json

How far from the truth it is: `grpo-fast bench --plan` measures steps beside their estimates."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see grpo-fast plan --help)")


def parser() -> argparse.ArgumentParser:
    parsed = _Parser(
        "grpo-fast plan",
        description=ABOUT,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )

    def add(flag: str, default: object, help: str, **more) -> None:
        said = "" if default is None else f" (default: {default})"
        parsed.add_argument(flag, default=default, help=help + said, **more)

    names = ", ".join(MODELS)
    add("--model", "qwen2.5-1.5b", f"{names}; or a model folder or its config.json", metavar="M")
    add("--gpu", "h100", f"{', '.join(PUBLISHED)}; or here: measured", metavar="GPU")
    add("--prompt", 1024, "tokens of a prompt", type=int, metavar="P")
    add("--completion", 1024, "tokens of each completion", type=int, metavar="C")
    add("--group-size", 64, "completions of a prompt", type=int, metavar="G")
    add("--prompts-per-step", 8, "prompts of one update", type=int, metavar="N")
    add("--dtype", "bfloat16", "of the weights", choices=DTYPES)
    add("--train", "all", f"all weights, or adapters of rank {LORA_RANK}", choices=get_args(Train))
    add("--optimizer", "adamw", "moments of 32 or 8 bits", choices=get_args(Optimizer))
    add("--token-budget", None, "of a row (default: what memory holds)", type=int, metavar="T")
    add("--json", None, "write the estimates to FILE", type=Path, metavar="FILE")
    return parsed


def main(arguments: Sequence[str]) -> int:
    """Exit code 0. Raises ConfigError for a wrong option."""
    if {"-h", "--help"} & set(arguments):
        parser().print_help()
        return 0
    options = parser().parse_args(list(arguments))
    for name in ("prompt", "completion", "group_size", "prompts_per_step", "token_budget"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}, expected 1 or more")
    job = Job(
        model=model_shape(options.model),
        prompt=options.prompt,
        completion=options.completion,
        group_size=options.group_size,
        prompts=options.prompts_per_step,
        dtype=DTYPES[options.dtype],
        train=options.train,
        optimizer=options.optimizer,
    )
    on = machine(options.gpu, job.dtype)
    found = [padded(job, on), ours(job, on, options.token_budget)]
    print("\n".join([*headline(job, options.model, on), "", *table(found, job, on), "", FOOTER]))
    if not found[1].fits:
        print(
            "To fit: --train lora, --optimizer adamw_8bit, a shorter --completion, a smaller model."
        )
    if options.json:
        write(options.json, job, on, found)
    return 0


FOOTER = """\
Times are for the update alone: rollouts are not in it. In brackets: if it did fit.
Completions all have that length; shorter ones are work saved for grpo-fast, and padding otherwise.
Memory: a tenth of what weights and optimizer leave is kept free for what an allocator wastes.
An estimate from sizes; `grpo-fast bench --plan` holds it against steps on your machine."""


def headline(job: Job, name: str, on: Machine) -> list[str]:
    trained = "all weights" if job.train == "all" else f"adapters of rank {LORA_RANK}"
    source = "measured here" if on.reached == 1 else "the maker's published peak"
    return [
        f"{name}, {job.model.parameters / 1e6:,.0f} million parameters in {_dtype(job)}, "
        f"{trained}, {job.optimizer}",
        f"{job.prompts} prompts of {job.prompt:,} tokens, {job.group_size:,} completions of "
        f"{job.completion:,} tokens each",
        f"{on.name}: {on.memory / 1e9:,.0f} GB, {on.flops / 1e12:,.3g} TFLOP/s, "
        f"{on.bandwidth / 1e9:,.0f} GB/s ({source}), times at {on.reached:.0%} of both",
    ]


def table(found: Sequence[Estimate], job: Job, on: Machine) -> list[str]:
    """A column for each estimate."""
    completed = job.prompts * job.group_size * job.completion

    def bracketed(text: str, estimate: Estimate) -> str:
        return text if estimate.fits else f"({text})"

    def parts(title: str, of: Callable[[Estimate], Any], unit: float) -> list[Line]:
        names = of(found[0])._fields
        lines = [(title, lambda e: _number(sum(of(e)) / unit))]
        for k, name in enumerate(names):
            lines.append((f"  {name}", lambda e, k=k: _number(of(e)[k] / unit)))
        return lines

    lines = [
        ("tokens through the model", lambda e: f"{e.tokens:,}"),
        *parts("TFLOP", lambda e: e.flops, 1e12),
        *parts("GB moved", lambda e: e.moved, 1e9),
        *parts("GB of memory at the peak", lambda e: e.memory, 1e9),
        (f"fits into {on.memory / 1e9:,.0f} GB", lambda e: "yes" if e.fits else "does not fit"),
        ("longest row, tokens", lambda e: f"{e.row:,}"),
        ("checkpointing", lambda e: e.checkpointing),
        ("seconds an update", lambda e: bracketed(_number(e.seconds), e)),
        ("completion tokens/s", lambda e: bracketed(f"{completed / e.seconds:,.0f}", e)),
        ("largest group that fits", _largest),
    ]
    rows = [["", *(e.provider for e in found)]]
    rows += [[label, *(text(e) for e in found)] for label, text in lines]
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join(
            cell.rjust(width) if k else cell.ljust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _largest(estimate: Estimate) -> str:
    if estimate.largest_group is None:
        return "no limit"
    return f"{estimate.largest_group:,}" if estimate.largest_group else "none"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _dtype(job: Job) -> str:
    return str(job.dtype).removeprefix("torch.")


def write(path: Path, job: Job, on: Machine, found: Sequence[Estimate]) -> None:
    """The estimates as JSON. Raises ConfigError where `path` cannot be written."""
    question = asdict(job) | {"model": job.model._asdict(), "dtype": _dtype(job)}
    rows = []
    for estimate in found:
        row = estimate._asdict() | {"seconds": estimate.seconds}
        row |= {name: row[name]._asdict() for name in ("flops", "moved", "memory")}
        rows.append(row)
    result = {"schema": SCHEMA, "kind": "estimate", "job": question, "machine": on._asdict()}
    try:
        path.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be written: {error}") from error
