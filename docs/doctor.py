"""docs/doctor.md from the rules and tests/test_doctor.py: `.venv/bin/python docs/doctor.py`."""

import importlib.util
import statistics
from pathlib import Path
from types import ModuleType

from grpo_fast.doctor import TRL_KEYS
from grpo_fast.doctor_rules import LIMITS, RULES, Rule

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
MEASURED = """## Measured

Synthetic runs of {steps} steps with noise, made by `tests/test_doctor.py`; a fault starts in step
{start}, or in the first. Found: seeds in which its rule gives a warning or an error. Delay: steps
from the fault's start, median and longest. Others: alarms of any other rule in the same runs. So a
rule is told apart here by construction; how often a real fault looks like these is not measured.

| fault | rule | found | delay | others |
| --- | --- | --- | --- | --- |
"""
MATRIX_SEEDS = range(5)


def load_tests() -> ModuleType:
    spec = importlib.util.spec_from_file_location("doctor_cases", ROOT / "tests/test_doctor.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


def matrix(cases: ModuleType) -> str:
    lines = []
    for fault in cases.FAULTS:
        outcomes = [cases.watch(*cases.sick(fault, seed)).alarms for seed in MATRIX_SEEDS]
        delays = [found[fault.rule] - fault.start for found in outcomes if fault.rule in found]
        others = sum(len(set(found) - {fault.rule}) for found in outcomes)
        delay = f"{statistics.median(delays):g}, {max(delays)}" if delays else "-"
        found = f"{len(delays)} of {len(outcomes)}"
        lines.append(f"| {fault.name} | {fault.rule} | {found} | {delay} | {others} |")
    false = sum(len(cases.watch(cases.healthy(s), cases.CONFIG).alarms) for s in cases.SEEDS)
    healthy = f"False alarms in {len(cases.SEEDS)} healthy runs: {false}."
    return "\n".join([*lines, "", healthy, ""])


def page() -> str:
    cases = load_tests()
    rules = "\n".join(map(rule_text, RULES))
    head = MEASURED.format(steps=cases.STEPS, start=cases.START)
    return f"{HEAD}\n{rules}\n{head}{matrix(cases)}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
