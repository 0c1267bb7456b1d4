"""TensorBoard: event files in the run folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = "tensorboard"


class Tracker:
    def __init__(self, folder: Path, options: Mapping[str, Any], first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What a cut run wrote of steps that are trained again is hidden.
        self._writer = SummaryWriter(str(folder / FOLDER), purge_step=first_step)
        self._writer.add_text("config", _block(options), 0)
        self.where = f"look at it with: tensorboard --logdir {folder / FOLDER}"

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def table(self, step: int, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        text = "\n\n".join(_block(dict(zip(names, row, strict=True))) for row in rows)
        self._writer.add_text("completions", text, step)

    def alert(self, step: int, title: str, text: str, severity: str) -> None:
        self._writer.add_text(f"doctor/{title}", _indented(text), step)

    def close(self) -> None:
        self._writer.close()


def _block(values: Mapping[str, Any]) -> str:
    return _indented("\n".join(f"{name}: {value}" for name, value in values.items()))


def _indented(text: str) -> str:
    # Text is shown as Markdown; a model's words are not.
    return "\n".join(f"    {line}" for line in text.splitlines())
