"""A table as a JSON file: its rows, and what its figures depend on."""

import json
import math
import os
import shlex
from pathlib import Path
from typing import Any

import torch

from .timing import header

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
# Options that say where results go change no figure.
_PLACES = ("--json", "--plot", "--out")


def about(device: torch.device, flag: str, argv: list[str], **facts: Any) -> dict[str, Any]:
    """`header`, the command that makes the figures again, the load of the machine, and `facts`."""
    return header(device, ROOT) | {
        "command": command_line(flag, argv),
        "load_before": os.getloadavg()[0],
        **facts,
    }


def command_line(flag: str, argv: list[str]) -> str:
    """As a person types it, without the files that were written."""
    words, skip = ["grpo-fast", "bench", *([flag] if flag else [])], False
    for word in argv:
        if skip or word.startswith(tuple(f"{place}=" for place in _PLACES)):
            skip = False
        elif word in _PLACES:
            skip = True
        else:
            words.append(word)
    return shlex.join(words)


def written(path: Path | None, kind: str, about: dict, rows: list[dict]) -> dict[str, Any]:
    """The record of a table, in `path` where one is given."""
    about["load_after"] = os.getloadavg()[0]
    record = finite({"schema": SCHEMA, "kind": kind, "about": about, "rows": rows})
    if path:
        path.write_text(json.dumps(record, indent=1) + "\n")
    return record


def finite(value: Any) -> Any:
    """JSON has no NaN: null."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def named_records(folder: Path) -> dict[str, dict[str, Any]]:
    """Every record of a folder by the name of its file; a part of a `make gpu` file that holds one
    is `<file>-<part>`."""
    found = {}
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        for name, part in content.get("parts", {}).items():
            if "result" in part:
                found[f"{path.stem}-{name}"] = part["result"]
        if "kind" in content:
            found[path.stem] = content
    return found
