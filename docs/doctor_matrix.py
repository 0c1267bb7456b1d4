"""The doctor on real demos, faulty and healthy: `.venv/bin/python docs/doctor_matrix.py FOLDER`.

Trains what is not in FOLDER yet (minutes a run on a busy core; two processes may share a FOLDER),
then writes doctor_runs.json.gz: the rows that rules read, so that a changed rule is measured again
without training.
"""

import dataclasses
import gzip
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from grpo_fast.cli import main, train_config
from grpo_fast.doctor import diagnose
from grpo_fast.faults import Fault, read_faults

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path(__file__).with_name("doctor_runs.json.gz")
FAULTS = read_faults(ROOT / "examples")
SICK_SEEDS, HEALTHY_SEEDS = range(50, 55), range(75, 95)
# Its rule was changed last.
MORE_SEEDS = {"kl-without-reward": range(55, 60)}
SEEDS = """Rules and faults
were tuned on other seeds, R4 last, with seeds 50 to 54 of its fault: what is below was not seen
before the rules were as they are, but for those."""
# Rows of a fault's run; what is not seen within 25 steps counts as not found.
WITHIN = 25
QUICK = {
    "group-too-small": 8,
    "rewards-identical": 8,
    "variance-hidden": 8,
    "kl-explosion": 8,
    "stale-sampler": 12,
    "too-hard": 10,
    "truncation": 10,
    "rewards-lost": 6,
    "endless-warmup": 6,
}
# Wall-clock time is the machine's, which others used meanwhile.
NOT_ASKED = {"R18"}
READ = (
    "step",
    "reward",
    "reward_std",
    "eval_reward",
    "frac_reward_zero_std",
    "groups/std_median",
    "groups/winners_alike",
    "advantage/abs_mean",
    "unscored_frac",
    "completions/mean_length",
    "completions/clipped_ratio",
    "kl",
    "clip_ratio/region_mean",
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/first_mean",
    "entropy",
    "loss",
    "grad_norm",
    "learning_rate",
    "push/eos",
    "skipped_updates",
    "sampling/sampling_logp_difference/mean",
)


class Outcome(NamedTuple):
    name: str
    seed: int
    alarms: dict[str, int]
    """Rule -> step of its first warning or error."""


def command(name: str, seed: int) -> list[str]:
    """Arguments of the demo of a seed; `healthy` is the demo itself."""
    words = ["--seed", str(seed)]
    if name == "healthy":
        return words
    return [*words, "--max-steps", str(QUICK.get(name, WITHIN))]


def options(name: str, seed: int) -> dict[str, Any]:
    """The config of that run."""
    words = ["--config", str(ROOT / "examples/demo.yaml"), *command(name, seed)]
    change = None if name == "healthy" else FAULTS[name].change
    return dataclasses.asdict(train_config(words, change))


def all_runs() -> Iterator[tuple[str, int]]:
    yield from ((name, seed) for seed in SICK_SEEDS for name in FAULTS)
    yield from ((name, seed) for name, seeds in MORE_SEEDS.items() for seed in seeds)
    yield from (("healthy", seed) for seed in HEALTHY_SEEDS)


def record(folder: Path) -> None:
    """Train what is missing; the base models of five seeds serve all."""
    from grpo_examples.arithmetic import base_model

    for name, seed in all_runs():
        run, base = folder / f"{name}-{seed}", folder / f"base-{seed % 5}"
        if run.exists():
            continue
        if not (base / "model.safetensors").exists():
            base_model(base, seed % 5)
        fault = [] if name == "healthy" else ["--fault", name]
        given = ["--model", str(base), "--output-dir", str(run), *command(name, seed)]
        main(["demo", *fault, *given])


def compact(rows: list[dict[str, Any]]) -> dict[str, list]:
    """Rows by column, four digits, of what rules read."""
    names = [n for n in rows[-1] if n in READ or n.startswith(("rewards/", "eval_rewards/"))]
    names += [n for n in READ if n not in names and any(n in row for row in rows)]
    short = lambda x: float(f"{x:.4g}") if isinstance(x, float) else x  # noqa: E731
    return {name: [short(row.get(name)) for row in rows] for name in names}


def pack(folder: Path) -> None:
    found: dict[str, dict[str, Any]] = {}
    for name, seed in all_runs():
        file = folder / f"{name}-{seed}/metrics.jsonl"
        if not file.exists():
            continue
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        found.setdefault(name, {})[str(seed)] = compact(rows)
    RUNS.write_bytes(gzip.compress(json.dumps(found).encode(), mtime=0))


def recorded() -> Iterator[tuple[str, int, list[dict[str, Any]]]]:
    """(name, seed, rows) of the runs that are kept."""
    for name, seeds in json.loads(gzip.decompress(RUNS.read_bytes())).items():
        for seed, columns in seeds.items():
            yield (
                name,
                int(seed),
                [
                    {k: v for k, v in zip(columns, values, strict=True) if v is not None}
                    for values in zip(*columns.values(), strict=True)
                ],
            )


def outcomes() -> list[Outcome]:
    """What the rules say today of the recorded runs."""
    found = []
    for name, seed, rows in recorded():
        alarms = diagnose(rows, options(name, seed)).alarms
        alarms = {rule: step for rule, step in alarms.items() if rule not in NOT_ASKED}
        found.append(Outcome(name, seed, alarms))
    return found


def line(fault: Fault, runs: list[Outcome]) -> str:
    """A row of the table."""
    steps = sorted(run.alarms[fault.rule] for run in runs if fault.rule in run.alarms)
    steps = [step for step in steps if step <= WITHIN]
    delay = f"{steps[len(steps) // 2]}, {steps[-1]}" if steps else "-"
    others = [rule for run in runs for rule in run.alarms if rule != fault.rule]
    ranked = sorted(set(others), key=lambda rule: int(rule[1:]))
    said = ", ".join(f"{rule} ({others.count(rule)})" for rule in ranked) or "-"
    return f"| {fault.name} | {fault.rule} | {len(steps)} of {len(runs)} | {delay} | {said} |"


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    record(folder)
    pack(folder)
