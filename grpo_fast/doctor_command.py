"""The command `grpo-fast doctor`: a run of any trainer in, a table or JSON out."""

import argparse
import json
import math
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from .doctor import Doctor, diagnose
from .doctor_rules import LIMITS, RULES
from .errors import ConfigError, nearest
from .history import SEVERITIES
from .records import open_records

SCHEMA = 1
# TRL's names of the options that rules read.
FROM_TRL = {"num_generations": "group_size"}
ABOUT = "Name what is wrong with a run, how it shows, and which option to change."
EPILOG = """\
RUN is a run folder, finished or not; what TRL or verl wrote; or a file with one JSON object a line,
a step or a completion each (docs/watch.md). Exit code 0: nothing at or above --fail-on, 1:
findings, 2: a wrong option, or no readable run. docs/doctor.md explains every rule.

  grpo-fast doctor runs/demo
  grpo-fast doctor runs/demo --json --fail-on warning
  grpo-fast doctor outputs/trainer_state.json --given num_generations=8 --set R1.warning=0.6"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see grpo-fast doctor --help)")


def parser() -> argparse.ArgumentParser:
    parsed = _Parser(
        "grpo-fast doctor",
        description=ABOUT,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parsed.add_argument("run", metavar="RUN", type=Path)
    parsed.add_argument("--json", action="store_true", help="print JSON")
    parsed.add_argument("--fail-on", choices=SEVERITIES, default="error", help="(default: error)")
    parsed.add_argument("--limits", metavar="FILE", type=Path, help="YAML: R1: {warning: 0.6}")
    parsed.add_argument(
        "--set", metavar="RULE.LIMIT=X", action="append", default=[], help="change one threshold"
    )
    parsed.add_argument(
        "--given",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="an option of a run without config.json: group_size=8",
    )
    return parsed


def main(arguments: Sequence[str]) -> int:
    """Exit code 0, or 1 with findings at or above --fail-on. Raises ConfigError for a wrong option,
    InputError for a run that cannot be read."""
    if {"-h", "--help"} & set(arguments):
        parser().print_help()
        return 0
    options = parser().parse_args(list(arguments))
    limits = read_limits(options.limits, options.set)
    rows, config, completions, notes = read_run(options.run)
    config |= dict(map(_given, options.given))
    doctor = diagnose(rows, config, completions, limits)
    if options.json:
        print(json.dumps(as_dict(doctor, options.run, notes), indent=1, allow_nan=False))
    else:
        print(as_text(doctor, options.run, notes))
    bad = SEVERITIES[SEVERITIES.index(options.fail_on) :]
    return int(any(found.severity in bad for found in doctor.findings.values()))


def read_run(path: Path) -> tuple[list[dict], dict[str, Any], list[dict], list[str]]:
    """(rows, config, kept completions, what is to be said of the log) of any log that is read.

    Raises InputError, in one sentence, for everything else.
    """
    records = open_records(path)
    notes = [*records.notes]
    broken = sorted({n for row in records.rows for n, v in row.items() if v != v})
    if broken:
        notes.append(f"not finite in some rows, left out there: {', '.join(broken)}")
    return records.rows, records.config, records.completions, notes


def read_limits(file: Path | None, changes: Sequence[str]) -> dict[str, dict[str, float]]:
    """`LIMITS` with those of a YAML file, then those of --set, put in.

    Raises ConfigError naming rule, limit and value.
    """
    limits = {rule: dict(values) for rule, values in LIMITS.items()}
    given: list[tuple[str, Any]] = []
    if file is not None:
        import yaml

        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            text = " ".join(str(error).split())
            raise ConfigError(f"--limits {file} cannot be read: {text}") from None
        if not isinstance(values, dict) or not all(isinstance(v, dict) for v in values.values()):
            raise ConfigError(f"--limits {file}: expected lines such as R1: {{warning: 0.6}}")
        given = [
            (f"{rule}.{name}", x) for rule, named in values.items() for name, x in named.items()
        ]
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise ConfigError(f"--set {change}: expected RULE.LIMIT=NUMBER, as R1.warning=0.6")
        given.append((name, value))
    known = {f"{rule}.{name}" for rule, values in limits.items() for name in values}
    for name, value in given:
        if name not in known:
            raise ConfigError(f"unknown limit '{name}': {nearest(name, known)}see docs/doctor.md")
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number) or isinstance(value, bool):
            raise ConfigError(f"limit {name} = {value!r}: expected a finite number")
        rule, _, key = name.partition(".")
        limits[rule][key] = number
    return limits


def _given(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ConfigError(f"--given {text}: expected KEY=VALUE, as group_size=8")
    try:
        parsed = json.loads(value)
    except ValueError:
        parsed = value
    return FROM_TRL.get(name, name), parsed


def as_dict(doctor: Doctor, run: Path, notes: Sequence[str]) -> dict[str, Any]:
    """The table as plain values; every rule has an entry."""
    rules = []
    for rule in RULES:
        entry = {"id": rule.id, "name": rule.name, "status": doctor.status(rule)}
        if missing := doctor.missing(rule):
            entry["missing"] = missing
        if found := doctor.findings.get(rule.id):
            entry |= found.as_dict()
        rules.append(entry)
    return {
        "schema": SCHEMA,
        "run": str(run),
        "rows": doctor.rows,
        "last_step": doctor.run.step,
        "notes": list(notes),
        "rules": rules,
    }


def as_text(doctor: Doctor, run: Path, notes: Sequence[str]) -> str:
    """Findings worst first, then what is well, then what could not be looked at."""
    states = [doctor.status(rule) for rule in RULES]
    counted = [f"{states.count(name)} {name}" for name in ("error", "warning", "info", "ok")]
    rows = f"{doctor.rows} row{'s' * (doctor.rows != 1)}"
    head = f"{run}: {rows} to step {doctor.run.step} | {', '.join(counted)}"
    lines = [f"{head}, {states.count('skipped')} skipped", *(f"note: {note}" for note in notes)]
    for found in doctor.ranked():
        lines += ["", f"{found.severity.upper():<8} {found.rule.id:<4} {found.rule.name}"]
        lines += _field("seen", f"{found.where} ({len(found.steps)} of {rows})")
        lines += _field("evidence", found.seen.evidence)
        lines += _field("cause", found.cause)
        lines += _field("change", found.change)
        if found.shown_by:
            shown = [f"step {s['step']} group {s['group']}" for s in found.shown_by]
            lines += _field("shown by", f"{', '.join(shown)} in completions.jsonl")
    lines.append("")
    lines += [f"ok       {r.id:<4} {r.name}" for r in RULES if doctor.status(r) == "ok"]
    for rule in RULES:
        if doctor.status(rule) == "skipped":
            names = "; ".join(doctor.missing(rule))
            lines.append(f"skipped  {rule.id:<4} {rule.name}: not in the log: {names}")
    # Names and values come from a file, and a terminal obeys control characters.
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)


def _field(label: str, text: str) -> list[str]:
    width = max(min(shutil.get_terminal_size().columns, 110) - 20, 40)
    first, *rest = textwrap.wrap(text, width) or [""]
    return [f"         {label:<10} {first}", *(" " * 20 + line for line in rest)]
