"""Weights & Biases, as its own environment says: WANDB_MODE=offline sends nothing."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PROJECT = "grpo-fast"
LEVELS = {"info": "INFO", "warning": "WARN", "error": "ERROR"}


class Tracker:
    def __init__(self, folder: Path, options: Mapping[str, Any], first_step: int) -> None:
        import wandb

        self._wandb = wandb
        self._run = wandb.init(
            project=PROJECT,
            name=folder.resolve().name,
            dir=str(folder),
            config=dict(options),
            settings=wandb.Settings(silent=True),
        )
        self.where = self._run.url or f"offline, in {folder / 'wandb'}: wandb sync sends it"

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log(dict(metrics), step=step)

    def table(self, step: int, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        table = self._wandb.Table(columns=list(names), data=[list(row) for row in rows])
        self._run.log({"completions": table}, step=step)

    def alert(self, step: int, title: str, text: str, severity: str) -> None:
        self._run.alert(title=title, text=text, level=LEVELS[severity])

    def close(self) -> None:
        self._run.finish()
