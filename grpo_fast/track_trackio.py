"""trackio: a database on this machine, looked at with `trackio show` on 127.0.0.1."""

import contextlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROJECT = "grpo-fast"


class Tracker:
    def __init__(self, folder: Path, options: Mapping[str, Any], first_step: int) -> None:
        import trackio

        self._trackio = trackio
        resume = "allow" if first_step > 1 else "never"
        self._run = self._quiet(
            trackio.init, PROJECT, folder.resolve().name, config=dict(options), resume=resume
        )
        self.where = f"look at it with: trackio show --project {PROJECT}"

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log(dict(metrics), step=step)

    def table(self, step: int, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        table = self._trackio.Table(data=[dict(zip(names, row, strict=True)) for row in rows])
        self._run.log({"completions": table}, step=step)

    def alert(self, step: int, title: str, text: str, severity: str) -> None:
        levels = self._trackio.AlertLevel
        level = {"info": levels.INFO, "warning": levels.WARN, "error": levels.ERROR}[severity]
        self._quiet(self._run.alert, title=title, text=text, level=level)

    def close(self) -> None:
        # Not the run's own finish, which leaves it the current one and is called again at exit.
        self._quiet(self._trackio.finish)

    def _quiet(self, call: Any, *given: Any, **named: Any) -> Any:
        # It prints, and the console is the progress line's.
        with contextlib.redirect_stdout(io.StringIO()):
            return call(*given, **named)
