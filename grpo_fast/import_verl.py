"""What verl wrote: a rollout_data_dir of `<step>.jsonl`, its file logger, its console log."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import InputError
from .import_lines import (
    COMPUTED,
    KNOWN,
    Found,
    Line,
    group_size,
    is_completion,
    measured,
    metric_rows,
    read_completions,
    read_lines,
)
from .import_tokens import take_tokens
from .token_log import VOCABULARY

# verl's name -> ours, where both measure the same thing; other names stay as they are.
METRICS = {
    "critic/score/mean": "reward",
    "response_length/mean": "completions/mean_length",
    "response_length/min": "completions/min_length",
    "response_length/max": "completions/max_length",
    "response_length/clip_ratio": "completions/clipped_ratio",
    "actor/loss": "loss",
    "actor/kl_loss": "kl",
    "actor/pg_clipfrac": "clip_ratio/region_mean",
    "actor/entropy": "entropy",
    "actor/grad_norm": "grad_norm",
    "actor/lr": "learning_rate",
    "training/epoch": "epoch",
    # Of each GPU.
    "perf/throughput": "tokens_per_second",
    "timing_s/step": "step_time",
    "timing_s/gen": "time/rollout",
    "timing_s/reward": "time/reward",
    "timing_s/update_actor": "time/update",
}
LOGS = ("jsonl", "log", "txt")
_CONSOLE = re.compile(r"\bstep:(\d+) - (.+)")
_PAIR = re.compile(r"(\S+?):(?:np\.\w+\()?([-+.\w]+)\)?$")


def step_files(folder: Path) -> list[Path]:
    """`1.jsonl`, `2.jsonl`, ... of a folder."""
    return sorted(path for path in folder.glob("*.jsonl") if path.stem.isdecimal())


def import_steps(folder: Path, home: Path) -> Found:
    """A folder of one file a step, with the metrics of verl's file logger or console if there are
    any beside them, or in the folder's `home`."""
    lines: list[Line] = []
    notes: list[str] = []
    for file in step_files(folder):
        found, said = read_lines(file)
        notes += said
        for where, row in found:
            if not is_completion(row):
                raise InputError(
                    f"{where}: expected a completion ('input', 'output', 'score'), found "
                    f"{str(row)[:80]}"
                )
            lines.append((where, {"step": int(file.stem), **_shaped(row)}))
    completions, more = read_completions(lines)
    places = dict.fromkeys((folder, home))
    tokens = take_tokens(completions, places, computed=COMPUTED in more)
    rows = {row["step"]: row for row in measured(completions)}
    beside = [p for place in places for ext in LOGS for p in sorted(place.glob(f"*.{ext}"))]
    for path in beside:
        if not path.stem.isdecimal() and path.name != VOCABULARY:
            logged, said = _logged(path)
            notes += said
            for row in logged:
                rows[row["step"]] = rows.get(row["step"], {}) | row
    ours = all(is_rollout(row) for _, row in lines)
    return Found(
        [rows[step] for step in sorted(rows)],
        completions,
        group_size(completions),
        "verl" if ours else "JSON lines",
        (*notes, *more),
        tokens,
    )


def is_file_log(row: Any) -> bool:
    """A line of verl's file logger: {"step": 1, "data": {...}}."""
    return isinstance(row, Mapping) and isinstance(row.get("data"), Mapping)


def is_rollout(row: Any) -> bool:
    return isinstance(row, Mapping) and {"input", "output", "score"} <= row.keys()


def is_console(text: str) -> bool:
    return _CONSOLE.search(text) is not None


def import_metrics(lines: Iterable[Line], notes: Iterable[str] = ()) -> Found:
    """Lines of the file logger."""
    return Found(metric_rows(_flat(lines)), [], {}, "verl", tuple(notes))


def import_rollouts(
    lines: Iterable[Line], notes: Iterable[str] = (), places: Iterable[Path] = ()
) -> Found:
    """One file of completions."""
    completions, more = read_completions([(w, _shaped(r)) for w, r in lines])
    tokens = take_tokens(completions, places, computed=COMPUTED in more)
    rows = measured(completions)
    return Found(rows, completions, group_size(completions), "verl", (*notes, *more), tokens)


def import_console(path: Path, text: str) -> Found:
    """Lines `step:1 - name:value - name:value` between others."""
    lines = []
    for number, line in enumerate(text.split("\n"), start=1):
        found = _CONSOLE.search(line)
        if found:
            pairs = map(_PAIR.match, found[2].strip().split(" - "))
            data = {pair[1]: _number(pair[2]) for pair in pairs if pair}
            lines.append((f"{path}:{number}", {"step": int(found[1]), "data": data}))
    return import_metrics(lines)


def renamed(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """verl's metrics under our names; the one validation score there is, as eval_reward."""
    found = {METRICS.get(name, name): value for name, value in metrics.items()}
    scores = [v for n, v in metrics.items() if re.fullmatch(r"val-core/.+/mean@\d+", n)]
    return found | ({"eval_reward": scores[0]} if len(scores) == 1 else {})


def _logged(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The metrics of a file beside the rollouts; none of a text that is no log of verl."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".jsonl":
        return (import_console(path, text).rows, []) if is_console(text) else ([], [])
    lines, notes = read_lines(path)
    return import_metrics(lines, notes).rows, notes


def _flat(lines: Iterable[Line]) -> Iterable[Line]:
    for where, row in lines:
        if not is_file_log(row):
            raise InputError(
                f"{where}: expected verl's metrics, {{'step': 1, 'data': {{...}}}}, found "
                f"{json.dumps(row, ensure_ascii=False)[:80]}"
            )
        yield where, renamed(row["data"]) | {"step": row.get("step")}


def _shaped(row: Mapping[str, Any]) -> dict[str, Any]:
    """A rollout as a line of `import_lines`: numbers beside the score are parts of a reward."""
    if not is_rollout(row):
        return dict(row)
    known = KNOWN | {"gts"}
    parts = {n: v for n, v in row.items() if n not in known and isinstance(v, (int, float))}
    # uid names a sample in some versions and its prompt in others: the prompt says which group.
    return {n: v for n, v in row.items() if n not in parts and n != "uid"} | {"rewards": parts}


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text
