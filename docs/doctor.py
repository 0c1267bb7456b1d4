"""docs/doctor.md from rules, real demos and synthetic logs: `.venv/bin/python docs/doctor.py`."""

import importlib.util
import statistics
from pathlib import Path
from types import ModuleType

from grpo_bench.doctor_cases import FAULTS, sick
from grpo_bench.doctor_logs import CONFIG, SEEDS, START, STEPS, healthy, watch
from grpo_fast.doctor import TRL_KEYS
from grpo_fast.doctor_rules import LIMITS, RULES, Rule
from grpo_fast.faults import SHORT

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path(__file__).with_suffix(".md")
HEAD = """# The doctor

`grpo-fast doctor RUN` reads a run folder, or TRL's `trainer_state.json` or a JSON log with TRL's
metric names, and says what is wrong, how it shows, the likely cause and the option to change.
`grpo-fast train` prints a warning or an error when it first appears, and the report has them above
its charts: the same rules, the same words.

A limit is passed together with a second signal (entropy falls *and* the reward does not rise), and
one cause is told by one rule: where all rewards are identical, R14 speaks and R1 is silent. A rule
whose metrics are not in the log is `skipped` with their names. Exit codes: 0 nothing at or above
`--fail-on` (error), 1 findings, 2 a wrong option or no readable run. `--set R1.warning=0.6`, or
`R1: {warning: 0.6}` in a YAML file after `--limits`, changes a limit.

This page is written by `docs/doctor.py`; a test holds it to the rules and to what is measured.

## The rules
"""
MEASURED = """## Measured on synthetic logs

Synthetic runs of {steps} steps with noise, made by `bench/doctor_cases.py`; a fault starts in step
{start}, or in the first. Found: seeds in which its rule gives a warning or an error. Delay: steps
from the fault's start, median and longest. Others: alarms of any other rule in the same runs. A
rule is told apart here by construction; real faults are above.

| fault | rule | found | delay | others |
| --- | --- | --- | --- | --- |
"""
MATRIX_SEEDS = range(5)
REAL = """## Measured on real demos

`grpo-fast demo --fault NAME`, {prompts} prompts a step, and `grpo-fast demo` as it is; trained by
`docs/doctor_matrix.py` and kept in `doctor_runs.json.gz`: a changed rule is measured on them
without training. {seeds}

Found: a warning or an error within {within} steps. Others: alarms of other rules in the same runs,
with the number of runs; most are what the fault also does (a policy that explodes is never right).
R18 is left out: it is about the machine, which others used.

| fault | rule | found | step: median, last | others |
| --- | --- | --- | --- | --- |
"""


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def real_matrix() -> str:
    real = load("docs/doctor_matrix.py")
    runs = real.outcomes()
    lines, found, all_sick = [], 0, 0
    for fault in real.FAULTS.values():
        own = [run for run in runs if run.name == fault.name]
        lines.append(real.line(fault, own))
        found += sum(run.alarms.get(fault.rule, 99) <= real.WITHIN for run in own)
        all_sick += len(own)
    well = [run for run in runs if run.name == "healthy"]
    false = [f"{rule} (seed {run.seed})" for run in well for rule in run.alarms]
    lines += ["", f"Found: {found} of {all_sick} runs, {found / all_sick:.0%}; the goal is 95 %."]
    lines.append(
        f"False alarms in {len(well)} healthy demos of 60 steps: {', '.join(false) or 'none'}."
    )
    return (
        REAL.format(prompts=SHORT["prompts_per_step"], seeds=real.SEEDS, within=real.WITHIN)
        + "\n".join(lines)
        + "\n"
    )


def rule_text(rule: Rule) -> str:
    limits = ", ".join(f"{name} {value:g}" for name, value in LIMITS[rule.id].items())
    trl = f" (TRL: `{TRL_KEYS[rule.key]}`)" if rule.key in TRL_KEYS else ""
    key = f"`{rule.key}`{trl}: " if rule.key else ""
    return (
        f"### {rule.id} {rule.name}\n\n"
        f"- Means: {rule.means}\n"
        f"- Do: {key}{rule.change}. Likely cause: {rule.cause}.\n"
        f"- Limits: {limits}. Source: {rule.source}.\n"
    )


def matrix() -> str:
    lines = []
    for fault in FAULTS:
        outcomes = [watch(*sick(fault, seed)).alarms for seed in MATRIX_SEEDS]
        delays = [found[fault.rule] - fault.start for found in outcomes if fault.rule in found]
        others = sum(len(set(found) - {fault.rule}) for found in outcomes)
        delay = f"{statistics.median(delays):g}, {max(delays)}" if delays else "-"
        found = f"{len(delays)} of {len(outcomes)}"
        lines.append(f"| {fault.name} | {fault.rule} | {found} | {delay} | {others} |")
    false = sum(len(watch(healthy(s), CONFIG).alarms) for s in SEEDS)
    said = f"False alarms in {len(SEEDS)} healthy runs: {false}."
    return "\n".join([*lines, "", said, ""])


def page() -> str:
    rules = "\n".join(map(rule_text, RULES))
    head = MEASURED.format(steps=STEPS, start=START)
    return f"{HEAD}\n{rules}\n{real_matrix()}\n{head}{matrix()}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
