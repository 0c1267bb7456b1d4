"""`grpo-fast doctor RUN`: what is wrong with a run, how it shows, and which option to change.

The same `Doctor` reads a finished log and, row by row, a run that goes on.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .doctor_rules import LIMITS, RULES, Rule
from .history import SEVERITIES, History, Limits, Seen

# Keys of `grpo-fast train` that TRL calls otherwise.
TRL_KEYS = {
    "dataset": "train_dataset",
    "reward": "reward_funcs",
    "group_size": "num_generations",
    "token_budget": "per_device_train_batch_size",
    "dtype": "bf16",
}
_MOST_SHOWN = 3


def _won(row: Mapping[str, Any]) -> bool:
    return (row.get("advantage") or 0) > 0


def _equal(row: Mapping[str, Any]) -> bool:
    return not row.get("advantage")


# Which kept completions show a rule's finding; other rules are about no text.
_SHOWS = {
    "R1": _equal,
    "R2": _equal,
    "R3": _won,
    "R4": _won,
    "R8": _won,
    "R9": lambda row: row.get("finish_reason") == "length",
    "R10": _won,
    "R11": _won,
    "R12": _won,
    "R14": _equal,
}


@dataclass(slots=True)
class Finding:
    """What one rule said of a run: its worst sight, and every step of that severity."""

    rule: Rule
    seen: Seen
    steps: list[int] = field(default_factory=list)
    shown_by: list[dict[str, Any]] = field(default_factory=list)
    """(step, group) of completions.jsonl."""

    @property
    def severity(self) -> str:
        return self.seen.severity

    @property
    def cause(self) -> str:
        return self.seen.cause or self.rule.cause

    @property
    def key(self) -> str:
        return self.seen.key or self.rule.key

    @property
    def trl_key(self) -> str:
        """TRL's name of the option."""
        return TRL_KEYS.get(self.key, self.key.removeprefix("loss."))

    @property
    def change(self) -> str:
        """The option and what to do with it, TRL's name where it differs."""
        text = self.seen.change or self.rule.change
        if not self.key:
            return text
        trl = f" (TRL: {self.trl_key})" if self.trl_key != self.key else ""
        return f"{self.key}{trl}: {text}"

    @property
    def where(self) -> str:
        """`steps 12-20, 31`, and how many rows that is."""
        parts = [f"{a}" if a == b else f"{a}-{b}" for a, b in ranges(self.steps)]
        more = f" and {len(parts) - 3} more stretches" if len(parts) > 3 else ""
        return f"step{'s' * (len(self.steps) > 1)} {', '.join(parts[:3])}{more}"

    def line(self) -> str:
        """In one line, for a console."""
        said = f"{self.severity} {self.rule.id} {self.rule.name} at step {self.steps[-1]}"
        return f"{said}: {self.seen.evidence} | {self.change}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "severity": self.severity,
            "evidence": self.seen.evidence,
            "first_step": self.steps[0],
            "last_step": self.steps[-1],
            "steps": ranges(self.steps),
            "cause": self.cause,
            "change": self.change,
            "key": self.key,
            "trl_key": self.trl_key,
            "shown_by": self.shown_by,
        }


class Doctor:
    """doctor = Doctor(config); doctor.feed({"step": 1, "reward": 0.4, ...}) -> new findings"""

    def __init__(self, options: Mapping[str, Any], limits: Limits = LIMITS) -> None:
        self.run = History(flat(options))
        self.limits = limits
        self.rows = 0
        self.findings: dict[str, Finding] = {}
        self.alarms: dict[str, int] = {}
        """Step of each rule's first warning or error."""
        self._needs = {rule.id: [{*need.split("|")} for need in rule.needs] for rule in RULES}
        self._missing = {rule.id: [*rule.needs] for rule in RULES}
        self._asked: set[str] = set()

    def feed(self, row: Mapping[str, Any]) -> list[Finding]:
        """Findings that this row shows for the first time, or worse than before."""
        self.run.add(row)
        self.rows += 1
        new = []
        for rule in RULES:
            if not self._can_ask(rule):
                continue
            seen = rule.check(self.run, self.limits)
            if seen is None:
                continue
            found = self.findings.get(rule.id)
            worse = found is None or _rank(seen.severity) > _rank(found.severity)
            if found is None:
                found = self.findings[rule.id] = Finding(rule, seen)
            elif worse:
                # What was seen of a lower severity is not evidence of this one.
                found.steps.clear()
            if seen.severity == found.severity or worse:
                found.seen = seen
                found.steps.append(row["step"])
            if seen.severity != "info":
                self.alarms.setdefault(rule.id, row["step"])
            if worse:
                new.append(found)
        return new

    def _can_ask(self, rule: Rule) -> bool:
        here, known = self.run.here, self.run.options
        if rule.id not in self._asked:
            missing = self._missing[rule.id]
            self._missing[rule.id] = [n for n in missing if here.isdisjoint(n.split("|"))]
        if any(names.isdisjoint(here) for names in self._needs[rule.id]):
            return False
        if any(name not in known for name in rule.options):
            return False
        self._asked.add(rule.id)
        return True

    def missing(self, rule: Rule) -> list[str]:
        """What the rule needs and the run does not say; empty where it was asked."""
        if rule.id in self._asked:
            return []
        options = [f"option {n}" for n in rule.options if n not in self.run.options]
        # A need that is there in some row only is missing beside the others.
        needs = self._missing[rule.id] or ([] if options else [*rule.needs])
        return [need.replace("|", " or ") for need in needs] + options

    def status(self, rule: Rule) -> str:
        """`ok`, `skipped`, or the severity of its finding."""
        if rule.id in self.findings:
            return self.findings[rule.id].severity
        return "skipped" if self.missing(rule) else "ok"

    def ranked(self) -> list[Finding]:
        """Findings, worst first."""
        return sorted(self.findings.values(), key=lambda found: -_rank(found.severity))


def diagnose(
    rows: Iterable[Mapping[str, Any]],
    options: Mapping[str, Any],
    completions: Sequence[Mapping[str, Any]] = (),
    limits: Limits = LIMITS,
) -> Doctor:
    """The doctor after the whole log; findings name the kept completions that show them."""
    doctor = Doctor(options, limits)
    for row in rows:
        doctor.feed(row)
    for found in doctor.findings.values():
        found.shown_by = _shown(found, completions)
    return doctor


def flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested options as `loss.beta`."""
    found: dict[str, Any] = {}
    for key, value in options.items():
        nested = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def ranges(steps: Sequence[int]) -> list[tuple[int, int]]:
    """Rows that follow each other as (first, last); a log that keeps every tenth step has steps of
    ten."""
    stride = min((b - a for a, b in itertools.pairwise(steps) if b > a), default=1)
    found: list[tuple[int, int]] = []
    for step in steps:
        if found and step - found[-1][1] <= stride:
            found[-1] = (found[-1][0], step)
        else:
            found.append((step, step))
    return found


def _rank(severity: str) -> int:
    return SEVERITIES.index(severity)


def _shown(found: Finding, completions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    shows = _SHOWS.get(found.rule.id)
    if shows is None:
        return []
    steps = set(found.steps)
    pairs = {
        (row["step"], row.get("group")): None
        for row in completions
        if row["step"] in steps and shows(row)
    }
    return [{"step": step, "group": group} for step, group in list(pairs)[:_MOST_SHOWN]]
