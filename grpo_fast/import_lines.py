"""JSON lines of any trainer: one object a completion, or one object a step.

A completion has a prompt (or the name of its group), a text and a reward; what a step says about
itself is then computed from them, by the functions that the trainer itself uses.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from .errors import InputError
from .import_tokens import FIELDS, KEY, read_tokens, take_tokens
from .metrics import rollout_metrics

# What a completion is made of, under the names that are in use; the first one there counts.
NAMES = {
    "step": ("step", "global_step"),
    "group": ("group", "group_id", "uid", "prompt_id"),
    "prompt": ("prompt", "input", "question"),
    "completion": ("completion", "output", "response"),
    "reward": ("reward", "score"),
    "rewards": ("rewards",),
    "advantage": ("advantage",),
    "finish_reason": ("finish_reason",),
    "length": ("token_ids", "completion_ids", "logprobs", "completion_length", "length"),
}
KNOWN = FIELDS.union(*NAMES.values())
# The divisor's addend of GRPO's advantage, as in `group_advantages`.
EPS = 1e-4
COMPUTED = (
    f"advantages are not in the log: computed as (reward - mean) / (std + {EPS}) of each group"
)

Line = tuple[str, Any]
"""(`file:line`, what stands there)."""


class Found(NamedTuple):
    """What an importer makes of a log; see `records.Records`."""

    rows: list[dict[str, Any]]
    completions: list[dict[str, Any]]
    config: dict[str, Any]
    source: str
    notes: tuple[str, ...] = ()
    tokens: Any = None


def import_lines(
    lines: Sequence[Line], notes: Sequence[str] = (), places: Sequence[Path] = ()
) -> Found:
    """Rows of steps, or completions and the rows that follow from them; `places` are folders in
    which a vocabulary may lie."""
    if not lines or not is_completion(lines[0][1]):
        return Found(metric_rows(lines), [], {}, "JSON lines", tuple(notes))
    completions, more = read_completions(lines)
    tokens = take_tokens(completions, places, computed=COMPUTED in more)
    rows = measured(completions)
    return Found(rows, completions, {}, "JSON lines", (*notes, *more), tokens)


def read_lines(path: Path) -> tuple[list[Line], list[str]]:
    """(every object of a file of JSON lines, what is to be said of them); one JSON list will do.

    An unfinished last line is left out. Raises InputError naming file and line.
    """
    text = path.read_text(encoding="utf-8")
    if text.lstrip().startswith("["):
        try:
            return [(f"{path}: row {k}", row) for k, row in enumerate(json.loads(text), 1)], []
        except ValueError as error:
            raise InputError(f"{path}: not JSON ({error}): expected one list") from None
    found: list[Line] = []
    lines = text.split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            found.append((f"{path}:{number}", json.loads(line)))
        except ValueError as error:
            if number == len(lines) and found:
                return found, [
                    f"the last line is not finished: {path.name} is being written, or was cut"
                ]
            raise InputError(
                f"{path}:{number}: not JSON ({error}): expected one JSON object a line"
            ) from None
    return found, []


def is_completion(row: Any) -> bool:
    """Whether a row has a text; a row of a step has numbers."""
    return isinstance(row, Mapping) and isinstance(_value(row, "completion"), (str, list, Mapping))


def metric_rows(lines: Iterable[Line]) -> list[dict[str, Any]]:
    """One row a step, in order: rows of the same step are one, null is NaN."""
    merged: dict[int, dict[str, Any]] = {}
    for number, (where, row) in enumerate(lines, start=1):
        if not isinstance(row, Mapping):
            raise InputError(f"{where} is no object, expected metrics by name")
        if is_completion(row):
            raise InputError(f"{where}: a completion among the metrics of steps: split the file")
        step = _step(row.get("step", number), where)
        values = {k.removeprefix("train/").replace("eval/", "eval_"): v for k, v in row.items()}
        values = {k: math.nan if v is None else v for k, v in values.items()}
        merged[step] = merged.get(step, {}) | values | {"step": step}
    return [merged[step] for step in sorted(merged)]


def read_completions(lines: Sequence[Line]) -> tuple[list[dict[str, Any]], list[str]]:
    """(rows as in completions.jsonl, sorted by step, what is to be said of them).

    Raises InputError naming the line that is no completion, or has no prompt, reward or step.
    """
    completions = [_completion(row, where) for where, row in lines]
    with_step = [row["step"] is not None for row in completions]
    if any(with_step) and not all(with_step):
        where = lines[with_step.index(False)][0]
        raise InputError(f"{where}: no step, and other lines have one: give every line a 'step'")
    for row in completions:
        row["step"] = 1 if row["step"] is None else row["step"]
    completions.sort(key=lambda row: row["step"])
    groups: dict[int, dict[Any, int]] = {}
    for row in completions:
        here = groups.setdefault(row["step"], {})
        if row["group"] is None:
            row["group"] = here.setdefault(row["prompt"], len(here))
    notes = []
    if not all(with_step):
        notes.append("no line names a step: all completions are taken as one step")
    if _fill_advantages(completions):
        notes.append(COMPUTED)
    return completions, notes


def measured(completions: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the completions of each step say, under the names of the trainer's own log."""
    rows = []
    for step, members in _by(completions, "step").items():
        groups = [_group(group) for group in _by(members, "group").values()]
        metrics = rollout_metrics(groups)
        if any(row.get("length") is None for row in members):
            metrics = {n: v for n, v in metrics.items() if not n.startswith("completions/")}
        elif any(row["finish_reason"] is None for row in members):
            metrics = {
                n: v
                for n, v in metrics.items()
                if "terminated" not in n and n != "completions/clipped_ratio"
            }
        rows.append({"step": step, **metrics})
    return rows


def group_size(completions: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """The option, for a log that keeps all completions: what most groups have."""
    sizes = Counter(
        len(group)
        for members in _by(completions, "step").values()
        for group in _by(members, "group").values()
    )
    return {"group_size": sizes.most_common(1)[0][0]} if sizes else {}


def text_of(value: Any) -> str:
    """A prompt or a completion as text: of chat messages, who said what."""
    if isinstance(value, str):
        return value
    messages = [value] if isinstance(value, Mapping) else value
    if not all(isinstance(message, Mapping) for message in messages):
        return json.dumps(value, ensure_ascii=False, default=str)
    said = []
    for message in messages:
        content = message.get("content")
        content = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        only_answer = len(messages) == 1 and message.get("role") == "assistant"
        said.append(content if only_answer else f"{message.get('role', '')}: {content}")
    return "\n".join(said)


def as_number(value: Any, what: str, where: str) -> float | None:
    """A finite number, or None for null and NaN: not scored."""
    if isinstance(value, bool):
        return float(value)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, (int, float)) or math.isinf(value):
        raise InputError(f"{where}: {what} is {value!r}, expected a finite number or null")
    return float(value)


def _value(row: Mapping[str, Any], field: str) -> Any:
    return next((row[name] for name in NAMES[field] if name in row), None)


def _step(value: Any, where: str) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int:
        raise InputError(f"{where}: has step {value!r}, expected a whole number")
    return value


def _completion(row: Any, where: str) -> dict[str, Any]:
    if not is_completion(row):
        what = f"the fields {', '.join(row)}" if isinstance(row, Mapping) else repr(row)
        raise InputError(
            f"{where}: expected a completion like the lines before it ('prompt', 'completion', "
            f"'reward'), found {what[:200]}"
        )
    prompt, group = _value(row, "prompt"), _value(row, "group")
    if prompt is None and group is None:
        raise InputError(f"{where}: no 'prompt' and no 'group': expected one, to compare within it")
    rewards = _rewards(row, where)
    if not rewards and not any(name in row for name in NAMES["reward"]):
        raise InputError(f"{where}: no 'reward' (or 'score'), expected a number or null")
    scored = [value for value in rewards.values() if value is not None]
    total = sum(scored) if scored else None
    if any(name in row for name in NAMES["reward"]):
        total = as_number(_value(row, "reward"), "reward", where)
    step, length, columns = _value(row, "step"), _value(row, "length"), row.get("columns")
    if not isinstance(columns, Mapping):
        columns = {name: value for name, value in row.items() if name not in KNOWN}
    tokens = read_tokens(row, where)
    return ({} if tokens is None else {KEY: tokens}) | {
        "step": None if step is None else _step(step, where),
        "group": group,
        "prompt": text_of("" if prompt is None else prompt),
        "completion": text_of(_value(row, "completion")),
        "reward": total,
        "rewards": rewards,
        "advantage": as_number(_value(row, "advantage"), "advantage", where),
        "finish_reason": _value(row, "finish_reason"),
        "length": len(length) if isinstance(length, list) else as_number(length, "length", where),
        "columns": dict(columns),
    }


def _rewards(row: Mapping[str, Any], where: str) -> dict[str, float | None]:
    parts = _value(row, "rewards")
    if parts is None:
        return {}
    if not isinstance(parts, Mapping):
        raise InputError(f"{where}: rewards is {parts!r}, expected an object of numbers by name")
    return {name: as_number(value, f"rewards.{name}", where) for name, value in parts.items()}


def _by(completions: Iterable[Any], field: str) -> dict[Any, list[Any]]:
    found: dict[Any, list[Any]] = {}
    for row in completions:
        found.setdefault(row[field], []).append(row)
    return found


def _fill_advantages(completions: Sequence[dict[str, Any]]) -> bool:
    """Put in what no line has; False where some lines have it: there, none is one not scored."""
    if any(row["advantage"] is not None for row in completions):
        return False
    for members in _by(completions, "step").values():
        for group in _by(members, "group").values():
            scores = [row["reward"] for row in group if row["reward"] is not None]
            mean = math.fsum(scores) / max(len(scores), 1)
            rest = max(len(scores) - 1, 1)
            std = math.sqrt(math.fsum((score - mean) ** 2 for score in scores) / rest)
            for row in group:
                known = row["reward"] is not None
                row["advantage"] = (row["reward"] - mean) / (std + EPS) if known else 0.0
    return True


def _group(rows: Sequence[Mapping[str, Any]]) -> Any:
    """The rows of one group in the shape of `rollout.ScoredGroup`."""
    names = dict.fromkeys(name for row in rows for name in row["rewards"])

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    members = [
        SimpleNamespace(
            reward=number(row["reward"]),
            rewards={name: number(row["rewards"].get(name)) for name in names},
            advantage=row["advantage"] or 0.0,
            text=row["completion"],
            token_ids=range(int(row.get("length") or 0)),
            finish_reason=row["finish_reason"],
        )
        for row in rows
    ]
    scores = [c.reward for c in members if not math.isnan(c.reward)]
    equal = len(scores) < 2 or min(scores) == max(scores)
    return SimpleNamespace(completions=members, degenerate=equal, scores=lambda: scores)
