"""What `report`, `doctor` and `diff` open: `open_records(path)`, whoever wrote it."""

import json
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .errors import InputError
from .import_lines import Found, import_lines, read_lines
from .import_trl import import_trl, is_trl
from .import_verl import (
    import_console,
    import_metrics,
    import_rollouts,
    import_steps,
    is_console,
    is_file_log,
    is_rollout,
    step_files,
)
from .runlog import COMPLETIONS, METRICS, SCHEMA, read_completions, read_metrics, read_saved_config
from .token_log import VOCABULARY, TokenStep, read_token_step, read_token_steps, read_vocabulary

KNOWN = (
    f"a grpo-fast run ({METRICS}), a TRL output_dir (trainer_state.json, "
    "completions/completions_*.parquet), verl's rollout_data_dir (1.jsonl, 2.jsonl, ...), or a "
    "file with one JSON object a line"
)


class TokenSource(Protocol):
    """Steps of which a log keeps tokens."""

    def steps(self) -> list[int]: ...

    def read(self, step: int) -> TokenStep: ...

    def vocabulary(self) -> dict[int, str]: ...


class FolderTokens:
    """tokens/ of a run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def steps(self) -> list[int]:
        return read_token_steps(self.folder)

    def read(self, step: int) -> TokenStep:
        return read_token_step(self.folder, step)

    def vocabulary(self) -> dict[int, str]:
        return read_vocabulary(self.folder)


class Records(NamedTuple):
    """A log, whoever wrote it."""

    name: str
    rows: list[dict[str, Any]]
    """Metrics, one row a step, under TRL's names."""
    completions: list[dict[str, Any]]
    """As in completions.jsonl."""
    config: dict[str, Any]
    source: str
    """`grpo-fast run`, `TRL`, `verl` or `JSON lines`."""
    tokens: TokenSource | None = None
    """None where the log has no numbers of tokens."""
    notes: tuple[str, ...] = ()
    """What is to be said of the log: a cut last line, what was computed here."""


def open_records(path: str | Path) -> Records:
    """The log in `path`, by what lies there: no option says who wrote it.

    Raises InputError, in one sentence naming file and line, for everything else.
    """
    path = Path(path)
    try:
        if path.is_dir():
            found = _folder(path)
        elif path.is_file():
            found = _file(path)
        else:
            raise InputError(f"no run at {path}: no such file or folder")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): check its rights") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not text: expected {KNOWN}") from None
    if not found.rows:
        log = path / METRICS if (path / METRICS).is_file() else path
        raise InputError(f"{log} has no rows yet: wait for the first step")
    if found.source != "grpo-fast run":
        _check_metrics(path, found)
    schema = found.rows[0].get("schema", SCHEMA)
    if schema != SCHEMA:
        raise InputError(
            f"{path} has schema {schema!r}, this version reads {SCHEMA}: pip install -U grpo-fast"
        )
    if path.is_dir() and read_token_steps(path):
        found = found._replace(tokens=FolderTokens(path))
    return Records(name=path.resolve().name, **found._asdict())


def _check_metrics(path: Path, found: Found) -> None:
    expected = ("reward", "loss", "grad_norm")
    if not any(name in row for row in found.rows for name in expected):
        raise InputError(
            f"{path} has neither {', '.join(expected[:-1])} nor {expected[-1]} in any row: it is "
            "no run"
        )


def _folder(path: Path) -> Found:
    # A folder that has lost one of the two is a broken run, and no other log.
    if (path / METRICS).is_file() or (path / COMPLETIONS).is_file():
        rows = read_metrics(path)
        cut = rows and not (path / METRICS).read_bytes().endswith(b"\n")
        said = "the last line is not finished: the run is being written, or was cut"
        config, completions = read_saved_config(path), read_completions(path)
        return Found(rows, completions, config, "grpo-fast run", (said,) if cut else ())
    if is_trl(path):
        return import_trl(path)
    folders = [path, *sorted(p for p in path.iterdir() if p.is_dir())]
    steps = [folder for folder in folders if step_files(folder)]
    if steps[:1] == [path] or len(steps) == 1:
        return import_steps(steps[0], path)
    if steps:
        names = ", ".join(folder.name for folder in steps)
        raise InputError(f"{path} has rollouts in {names}: give one of these folders")
    files = sorted(file for file in path.glob("*.jsonl") if file.name != VOCABULARY)
    if len(files) == 1:
        return _file(files[0])
    raise InputError(f"no run in {path}: expected {KNOWN}")


def _file(path: Path) -> Found:
    if path.suffix == ".parquet":
        return import_trl(path)
    text = path.read_text(encoding="utf-8")
    if path.name == "trainer_state.json" or _has_history(text):
        return import_trl(path)
    if not _is_json(text.strip().partition("\n")[0]) and is_console(text):
        return import_console(path, text)
    lines, notes = read_lines(path)
    first = lines[0][1] if lines else None
    if is_file_log(first):
        return import_metrics(lines, notes)
    if is_rollout(first):
        return import_rollouts(lines, notes, [path.parent])
    return import_lines(lines, notes, [path.parent])


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _has_history(text: str) -> bool:
    """Whether a file is one JSON object with TRL's history; a file of lines is none."""
    if '"log_history"' not in text:
        return False
    try:
        whole = json.loads(text)
    except ValueError:
        return False
    return isinstance(whole, dict) and isinstance(whole.get("log_history"), list)
