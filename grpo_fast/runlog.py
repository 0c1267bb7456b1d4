"""The run folder: config.json, metrics.jsonl, completions.jsonl, tokens/, checkpoints/ and
run.lock."""

import contextlib
import dataclasses
import fcntl
import json
import math
import os
import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from .config import TrainConfig
from .errors import ConfigError, InputError
from .token_log import FOLDER as TOKENS
from .token_log import TokenLog, truncate_tokens
from .track import Trackers

CONFIG = "config.json"
METRICS = "metrics.jsonl"
COMPLETIONS = "completions.jsonl"
CHECKPOINTS = "checkpoints"
LOCK = "run.lock"
# Of the run folder; config.json says it. A folder of before there was one says nothing.
SCHEMA = 1
# Made once for a folder, the same for every run in it.
BASE_MODEL = "base_model"
# A folder that holds nothing else is ours to write in; an empty log is a run that never started.
_OURS = {CONFIG, METRICS, COMPLETIONS, TOKENS, CHECKPOINTS, LOCK, BASE_MODEL, "report.html"}
# Of trackers.
_OURS |= {"tensorboard", "wandb"}


class RunLog:
    """One run's files; made by `open_run`, closed by `with`. Rows go in after `start` or
    `truncate_after`: until then, nothing of an older run has been touched."""

    def __init__(self, folder: Path, config: TrainConfig, lock: IO[str]) -> None:
        self.folder = folder
        self.checkpoints = folder / CHECKPOINTS
        self.tokens: TokenLog | None = None
        """None before the run starts, and where `log_tokens_mb` is 0."""
        self.trackers: Trackers | None = None
        """See the same rows, live."""
        self._config = config
        self._lock = lock
        self._open: dict[str, IO[str]] = {}

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Finish and close the logs, give the lock back, whichever of them fails."""
        with contextlib.ExitStack() as last_first:
            last_first.callback(_unlock, self.folder, self._lock)
            for file in self._open.values():
                last_first.callback(file.close)
            for log in (self.trackers, self.tokens):
                if log is not None:
                    last_first.callback(log.close)

    def start(self) -> Path | None:
        """Begin a new run: move an older one aside, write config.json; returns where it went."""
        aside = _move_aside(self.folder) if _holds_run(self.folder) else None
        self._begin()
        return aside

    def truncate_after(self, step: int) -> None:
        """Go on with a resumed run from `step` (-1: from nothing): drop the rows of later steps,
        put this config in config.json."""
        for name in (METRICS, COMPLETIONS):
            _cut(self.folder / name, step)
        truncate_tokens(self.folder, step)
        self._begin()

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl; NaN and infinity become null."""
        self._open[METRICS].write(_to_line({"step": step, **metrics}))
        if self.trackers is not None:
            self.trackers.log(step, metrics)

    def log_completions(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append one line a row to completions.jsonl; a NaN reward becomes null."""
        for row in rows:
            self._open[COMPLETIONS].write(_to_line(row))
        if self.trackers is not None:
            self.trackers.log_completions(rows)

    def _begin(self) -> None:
        write_config(self.folder, dataclasses.asdict(self._config))
        self._open = {name: _open_log(self.folder / name) for name in (METRICS, COMPLETIONS)}
        if self._config.log_tokens_mb:
            budget, steps = self._config.log_tokens_mb, self._config.max_steps
            self.tokens = TokenLog(self.folder, budget_mb=budget, max_steps=steps, background=True)


def open_run(config: TrainConfig) -> RunLog:
    """The log in `config.output_dir`, locked; nothing else is written yet.

    Raises ConfigError, with nothing written, when the folder holds a run that is neither resumed
    nor moved, other files, no run to resume, a live run, or cannot be written.
    """
    folder = Path(config.output_dir)
    foreign = _foreign(_names(folder))
    holds_run = _holds_run(folder)
    if config.resume and not holds_run:
        raise ConfigError(
            f"resume: no run in {folder}: looked for rows in {METRICS} and for folders in "
            f"{CHECKPOINTS}/; check output_dir, or leave --resume out to start a new run"
        )
    if not holds_run and foreign:
        raise ConfigError(
            f"output_dir {folder} holds files that are no run ('{min(foreign)}'): choose "
            "another folder with --output-dir"
        )
    if config.resume:
        read_saved_config(folder)
    lock = _acquire(folder)
    if holds_run and not config.resume and config.existing == "refuse":
        _unlock(folder, lock)
        raise ConfigError(
            f"output_dir {folder} already holds a run: go on with it by --resume, choose "
            "another folder with --output-dir, or move the old run aside with --existing move"
        )
    return RunLog(folder, config, lock)


def read_metrics(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, null as NaN; an unfinished last line is left out.

    Raises InputError for a missing file, for a run of another schema, and naming file and line for
    a broken one.
    """
    path = Path(folder) / METRICS
    if not path.is_file():
        raise InputError(f"no run in {folder}: {METRICS} not found, expected a run's output_dir")
    read_saved_config(folder)
    rows = _read_rows(path)
    return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]


def read_completions(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of completions.jsonl, or none where a run keeps none."""
    path = Path(folder) / COMPLETIONS
    return _read_rows(path) if path.is_file() else []


def read_saved_config(folder: str | Path) -> dict[str, Any]:
    """config.json as a mapping, empty where there is none.

    Raises InputError for one that is broken, or of another schema.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}): restore it, or remove it") from None
    if not isinstance(values, dict):
        raise InputError(f"{path} holds {type(values).__name__}, expected one object")
    if values.get("schema", SCHEMA) != SCHEMA:
        raise InputError(
            f"{path} has schema {values['schema']!r}, this version reads {SCHEMA}: "
            "pip install -U grpo-fast"
        )
    return values


def _names(folder: Path) -> set[str]:
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output_dir {folder} is a file: choose a folder with --output-dir")
    return set(os.listdir(folder)) if folder.exists() else set()


def _foreign(names: set[str]) -> set[str]:
    # A run that is stopped while it writes a thing aside leaves `.<thing>.writing`.
    return {n for n in names if n.removeprefix(".").removesuffix(".writing") not in _OURS}


def _holds_run(folder: Path) -> bool:
    metrics, checkpoints = folder / METRICS, folder / CHECKPOINTS
    return (metrics.is_file() and metrics.stat().st_size > 0) or (
        checkpoints.is_dir() and any(checkpoints.iterdir())
    )


def _acquire(folder: Path) -> IO[str]:
    """run.lock held by this process until it ends, however it ends; pid and host are for people."""
    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"output_dir {folder} cannot be written ({error.strerror}): choose another with "
                "--output-dir"
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise ConfigError(
                f"output_dir {folder} is in use by {owner}: wait for it, stop it, or choose "
                "another folder with --output-dir"
            ) from None
        # The last owner may have removed the file between our open and our lock.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()
    file.truncate(0)
    file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


def _unlock(folder: Path, lock: IO[str]) -> None:
    if not lock.closed:
        (folder / LOCK).unlink(missing_ok=True)
        lock.close()


def _move_aside(folder: Path) -> Path:
    """Move all but lock and base model to the first free `<folder>.<number>`."""
    named = folder if folder.name not in ("", "..") else folder.resolve()
    number = 1
    while (target := named.with_name(f"{named.name}.{number}")).exists():
        number += 1
    target.mkdir()
    for name in sorted(_names(folder) - {LOCK, BASE_MODEL}):
        shutil.move(folder / name, target / name)
    return target


def _open_log(path: Path) -> IO[str]:
    # Whatever text a model makes must be written: a lone surrogate becomes its JSON escape.
    return path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace", newline="\n")


def _to_line(row: dict[str, Any]) -> str:
    return json.dumps(_strict(row), ensure_ascii=False, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cut(path: Path, step: int) -> None:
    if path.is_file():
        rows = [row for row in _read_rows(path) if row["step"] <= step]
        _write_atomically(path, "".join(map(_to_line, rows)))


def write_config(folder: Path, options: Mapping[str, Any]) -> None:
    """config.json of a run with these options."""
    values = {"schema": SCHEMA, **options}
    text = json.dumps(values, indent=1, ensure_ascii=False, default=str)
    _write_atomically(folder / CONFIG, text + "\n")


def _write_atomically(path: Path, text: str) -> None:
    staging = path.with_name(f".{path.name}.writing")
    with staging.open("w", encoding="utf-8", errors="backslashreplace", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    staging.replace(path)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    # Bytes: str.splitlines also splits at separators that may stand inside a JSON string.
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise InputError(
                f"{path}:{number}: not JSON ({error}): mend or remove the line"
            ) from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise InputError(f"{path}:{number}: expected an object with an integer 'step'")
        rows.append(row)
    return rows
