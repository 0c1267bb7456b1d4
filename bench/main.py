"""`grpo-fast bench`: how fast the kernels are on this machine, what they compile to without one
(`--static`), how exact they are (`--accuracy`), how fast beside the peers (`--peers`), and what a
whole step takes (`--step`, `--memory`, and beside an estimate `--plan`)."""

import importlib
import sys

import torch

from . import (
    bench_group_advantage,
    bench_linear_grpo,
    bench_policy_loss,
    bench_segment_reduce,
    bench_token_logprob,
)
from .options import Parser
from .record import about, written
from .timing import measure, timing_table

OPS = {
    "token_logprob": bench_token_logprob,
    "policy_loss": bench_policy_loss,
    "group_advantage": bench_group_advantage,
    "segment_reduce": bench_segment_reduce,
    "linear_grpo": bench_linear_grpo,
}
DESCRIPTION = """\
Time every op against eager PyTorch and against a ceiling measured in the same run.

  ours     the Triton kernels on a GPU, the chunked PyTorch implementation on a CPU
  eager    the formula as a trainer writes it, float32 arithmetic
  ceiling  what the work cannot do without: a copy of the same bytes, or the bare matrix products

Columns take turns in one process; the times are medians (CUDA events on a GPU, process time of one
thread on a CPU). An op is held against float64 first, and one that is wrong gets no number."""
EPILOG = """\
examples:
  grpo-fast bench                    this machine's table
  grpo-fast bench --op policy_loss   one op
  grpo-fast bench --static           registers, spills and fp64 of every kernel, no GPU needed
  grpo-fast bench --accuracy         ours, eager and the peers against float64
  grpo-fast bench --peers            time and memory of the loss against the peers installed here
  grpo-fast bench --peers --logits   the same of the loss from logits
  grpo-fast bench --step             a step padded, packed, with a shared prompt, and TRL's
  grpo-fast bench --memory           the most memory of a step against the size of the group
  grpo-fast bench --plan             how far off the estimates of `grpo-fast plan` are here
  grpo-fast bench --rollout          sampling a group, beside transformers' generate
  grpo-fast bench --drop-in          TRL's trainer beside the one that takes its place
  grpo-fast bench --all --quick      all of it at small sizes in under six minutes, with pictures
  grpo-fast bench --cases            aims A to J on a GPU, and how far they are met
  grpo-fast bench --report           the pictures and pages of bench/results made anew
  grpo-fast bench --static --help    its options; the other tables have theirs too"""
# Tables of their own, with options of their own.
TABLES = {
    "--static": "static",
    "--accuracy": "accuracy",
    "--peers": "compare",
    "--step": "bench_step",
    "--memory": "memory",
    "--plan": "plan_check",
    "--rollout": "rollouts",
    "--drop-in": "drop_in",
    "--cases": "cases",
    "--report": "report",
    "--all": "everything",
}


def parser() -> Parser:
    parsed = Parser("grpo-fast bench", DESCRIPTION, EPILOG)
    parsed.add_argument(
        "--static",
        action="store_true",
        help="cross-compile the kernels instead, and fail on a spill or fp64 instruction",
    )
    for flag, help in (
        ("--accuracy", "log-probs and gradients against float64 instead, ours and the peers'"),
        ("--peers", "the loss against the peers installed here instead: time and memory"),
        ("--step", "forward and backward of a whole step instead, beside what its FLOPs predict"),
        ("--memory", "the most memory of a whole step instead, for groups of 8 to 4096"),
        ("--plan", "time and memory of steps instead, beside what `grpo-fast plan` predicts"),
        ("--rollout", "sampling a group instead, beside transformers' generate"),
        ("--drop-in", "a micro-batch of TRL's trainer and of the drop-in's depths instead"),
        ("--cases", "what is aimed at on a GPU, case by case, and what results say of it"),
        ("--all", "every one of these tables, into a folder, with pictures"),
        ("--report", "pictures and pages from a folder of results; measures nothing"),
    ):
        parsed.add_argument(flag, action="store_true", help=help)
    parsed.add_argument(
        "--op", choices=OPS, action="append", help="only this op; may be given again"
    )
    parsed.add_argument(
        "--seconds", type=float, default=1.0, help="time spent on each case (default: 1)"
    )
    parsed.add_place()
    return parsed


def time_ops(device: torch.device, ops: list[str], *, seconds: float) -> list[dict]:
    """The row of every size that each op's file has for `device`; one line of progress a case."""
    rows = []
    for op in ops:
        module = OPS[op]
        for size in module.SIZES[device.type]:
            print(f"{op} {size} ...", file=sys.stderr, flush=True)
            rows.append(measure(module.case(size, device), device, seconds=seconds))
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def main(argv: list[str]) -> int:
    """Exit code: 0, 1 when a result is wrong (or a kernel fails the static gate), 2 for a wrong
    option."""
    for flag, module in TABLES.items():
        if flag in argv:
            table = importlib.import_module(f".{module}", __package__)
            return table.main([word for word in argv if word != flag])
    command = parser()
    options = command.parse_args(argv)
    device = command.device(options.device)
    facts = about(device, "", argv)
    rows: list[dict] = []
    for op in options.op or OPS:
        rows += time_ops(device, [op], seconds=options.seconds)
        # Whole after each op: a time limit keeps what is done.
        written(options.json, "timing", facts, rows)
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton"))
    print(f"{facts['device']}, {versions}, commit {facts['commit']}, clock: {facts['clock']}")
    print("\n".join(timing_table(rows)))
    return 1 if any(not row["columns"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
