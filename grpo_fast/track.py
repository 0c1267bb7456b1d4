"""The run log, live, in the trackers of `TrainConfig.track`: the same rows under the same names.

A tracker is a class as in `track_trackio.py`. It is a window: one that fails is closed with one
note, and training goes on.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .errors import ConfigError

# What is missing is said before anything is loaded.
PACKAGES = {"trackio": "trackio", "tensorboard": "tensorboard", "wandb": "wandb"}
COLUMNS = ("prompt", "completion", "reward", "advantage", "finish_reason")


def check_packages(names: Sequence[str]) -> None:
    """Raise ConfigError naming the package that a tracker needs and is not installed."""
    for name in names:
        if importlib.util.find_spec(PACKAGES[name]) is None:
            raise ConfigError(
                f"track = '{name}' needs the package {PACKAGES[name]}, which is not installed: "
                f"pip install {PACKAGES[name]}, or leave it out of track"
            )


class Trackers:
    """trackers = Trackers(("trackio",), folder, options, first_step=1, note=print)
    trackers.log(1, {"reward": 0.4})"""

    def __init__(
        self,
        names: Sequence[str],
        folder: Path,
        options: Mapping[str, Any],
        *,
        first_step: int,
        note: Callable[[str], None],
    ) -> None:
        self._note = note
        self._open: dict[str, Any] = {}
        for name in names:
            module = importlib.import_module(f".track_{name}", __package__)
            try:
                tracker = module.Tracker(folder, options, first_step)
            except Exception as error:
                self._off(name, error)
                continue
            self._open[name] = tracker
            note(f"{name}: {tracker.where}")

    def close(self) -> None:
        """Also of a run that was interrupted; safe to call twice."""
        self._all("close")
        self._open.clear()

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl."""
        self._all("log", step, metrics)

    def log_completions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Rows of completions.jsonl, as a table."""
        if rows:
            cells = [[row.get(name) for name in COLUMNS] for row in rows]
            self._all("table", rows[0]["step"], COLUMNS, cells)

    def alert(self, finding: Any) -> None:
        """A finding of the doctor."""
        title = f"{finding.rule.id} {finding.rule.name}"
        self._all("alert", finding.steps[-1], title, finding.line(), finding.severity)

    def _all(self, call: str, *given: Any) -> None:
        for name, tracker in list(self._open.items()):
            try:
                getattr(tracker, call)(*given)
            except Exception as error:
                del self._open[name]
                self._off(name, error)

    def _off(self, name: str, error: Exception) -> None:
        text = " ".join(str(error).split())
        self._note(f"{name} is off, the run goes on: {type(error).__name__}: {text}")
