"""What report, doctor and diff open: the records of a run, whoever wrote them."""

from pathlib import Path
from typing import Any, NamedTuple, Protocol

from .runlog import read_completions, read_metrics, read_saved_config
from .token_log import TokenStep, read_token_step, read_token_steps, read_vocabulary


class TokenSource(Protocol):
    """Steps of which a run keeps tokens."""

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
    name: str
    rows: list[dict[str, Any]]
    """Metrics: `step` and TRL's names; NaN where a number is none."""
    completions: list[dict[str, Any]]
    """As in completions.jsonl."""
    config: dict[str, Any]
    source: str
    """Who wrote them: `grpo-fast run`, ..."""
    tokens: TokenSource | None
    """None where none are kept."""


def open_records(path: str | Path) -> Records:
    """The records of a run folder; a run that is still writing has those of its finished steps.

    Raises InputError, in one sentence, for anything else.
    """
    folder = Path(path)
    rows = read_metrics(folder)
    return Records(
        name=folder.resolve().name,
        rows=rows,
        completions=read_completions(folder),
        config=read_saved_config(folder),
        source="grpo-fast run",
        tokens=FolderTokens(folder) if read_token_steps(folder) else None,
    )
