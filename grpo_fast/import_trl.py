"""A folder that TRL wrote: trainer_state.json, and completions/*.parquet of log_completions=True.

TRL's metric names are ours. training_args.bin is a pickle, which may execute code: never opened.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import InputError
from .import_lines import (
    Found,
    Line,
    group_size,
    measured,
    metric_rows,
    read_completions,
)

STATE = "trainer_state.json"
TABLES = "completions_*.parquet"
# Columns that every table has; a reward function has one of its name between them.
_COLUMNS = ("step", "prompt", "completion", "advantage")


def is_trl(folder: Path) -> bool:
    return bool(_states(folder) or tables(folder))


def import_trl(path: Path) -> Found:
    """The log of an output_dir, of its completions folder, or of one file of either."""
    folder = path.is_dir()
    alone = path.suffix == ".parquet"
    states = _states(path) if folder else [path] * (not alone)
    files = tables(path) if folder else [path] * alone
    state = max(map(read_state, states), key=lambda state: state.get("global_step", 0), default={})
    history = state.get("log_history", [])
    where = f"{path / STATE if folder else path}: row"
    rows = metric_rows((f"{where} {k}", row) for k, row in enumerate(history, start=1))
    planned = {"max_steps": state["max_steps"]} if state.get("max_steps") else {}
    if not files:
        return Found(rows, [], planned, "TRL")
    logged = {name for row in rows for name in row}
    completions, notes = read_tables(files, logged)
    # What TRL logged counts; what it does not log is measured in the completions.
    merged = {row["step"]: row for row in measured(completions)}
    for row in rows:
        merged[row["step"]] = merged.get(row["step"], {}) | row
    rows = [merged[step] for step in sorted(merged)]
    return Found(rows, completions, planned | group_size(completions), "TRL", tuple(notes))


def read_state(path: Path) -> dict[str, Any]:
    """trainer_state.json as TRL wrote it."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise InputError(f"{path}:{line}: not JSON ({error}): expected TRL's {STATE}") from None
    if not isinstance(state, dict) or not isinstance(state.get("log_history"), list):
        raise InputError(f"{path} has no list 'log_history': expected TRL's {STATE}")
    return state


def tables(folder: Path) -> list[Path]:
    """The parquet files, oldest step first."""
    found = [*folder.glob(TABLES), *folder.glob(f"completions/{TABLES}")]
    return sorted(found, key=lambda path: [int(n) for n in re.findall(r"\d+", path.stem)])


def read_tables(files: Sequence[Path], logged: set[str]) -> tuple[list[dict], list[str]]:
    """(completions of all files, what is to be said of them); the reward functions are those that
    have a `rewards/<name>/mean` in `logged`, or all columns of fractions where none has."""
    lines: list[Line] = []
    parts: dict[str, None] = {}
    for file in files:
        names, rows = _read_parquet(file)
        own = [n for n in names if f"rewards/{n}/mean" in logged or n in parts]
        parts |= dict.fromkeys(own or _fractions(names, rows))
        lines += [(f"{file}: row {k}", row) for k, row in enumerate(rows, start=1)]
    completions, notes = read_completions([(where, _shaped(row, parts)) for where, row in lines])
    if len(parts) > 1:
        notes.append(
            f"the reward of a completion is the sum of {', '.join(parts)}: TRL's tables do not "
            "have reward_weights"
        )
    return completions, notes


def _states(folder: Path) -> list[Path]:
    found = [folder / STATE, *folder.glob(f"checkpoint-*/{STATE}")]
    return [path for path in found if path.is_file()]


def _shaped(row: dict[str, Any], parts: dict[str, None]) -> dict[str, Any]:
    """A row of a table as a line of `import_lines`."""
    shape = {name: row[name] for name in _COLUMNS}
    shape["rewards"] = {name: row.get(name) for name in parts}
    known = {*_COLUMNS, *parts}
    return shape | {"columns": {name: v for name, v in row.items() if name not in known}}


def _fractions(names: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[str]:
    # TRL writes a reward as a float, or as none where a function did not apply.
    return [
        name
        for name in names
        if name not in _COLUMNS and any(type(row[name]) is float for row in rows)
    ]


def _read_parquet(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ModuleNotFoundError:
        raise InputError(f"{path} needs pyarrow to be read: pip install pyarrow") from None
    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        text = " ".join(str(error).split())
        raise InputError(f"{path} is no whole parquet file ({text}): remove it") from None
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing:
        raise InputError(
            f"{path} has no column {', '.join(missing)}, expected a table of TRL's "
            f"log_completions, found {', '.join(table.column_names)}"
        )
    return table.column_names, table.to_pylist()
