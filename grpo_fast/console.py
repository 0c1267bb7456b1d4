"""What a person sees while a run goes on: a live bar on a terminal, plain lines anywhere else."""

import contextlib
import itertools
import logging
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

_BLOCKS = "▁▂▃▄▅▆▇█"
# (label, metric, format) of the numbers in every line.
_COLUMNS = (
    ("reward", "reward", "{:.2f}"),
    ("kl", "kl", "{:.4f}"),
    ("clip", "clip_ratio/region_mean", "{:.3f}"),
    ("entropy", "entropy", "{:.2f}"),
)


class _Notes(logging.Handler):
    """What the package logs, as notes of a run: which implementation 'auto' is."""

    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._note = note

    def emit(self, record: logging.LogRecord) -> None:
        self._note(self.format(record))


class Progress:
    """Progress of `total_steps` steps on `console` (default: standard output), and between its
    lines what the package logs.

    with Progress(200) as progress:
        progress.start(0)
        progress.step(1, metrics)
    """

    def __init__(
        self,
        total_steps: int,
        *,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps = total_steps
        self.console = console or Console()
        self._clock = clock
        self._live: Live | None = None
        self._status: Spinner | None = None
        self._numbers: list[str] = []
        self._rewards: list[float] = []
        self._completion = ""
        self._first = self._done = 0
        self._started = self._reported = clock()

    def __enter__(self) -> "Progress":
        log = logging.getLogger("grpo_fast")
        self._logged = _Notes(self.note), log.level
        log.addHandler(self._logged[0])
        log.setLevel(logging.INFO)
        return self

    def __exit__(self, *_: object) -> None:
        log = logging.getLogger("grpo_fast")
        notes, level = self._logged
        log.removeHandler(notes)
        log.setLevel(level)
        self.stop()

    @property
    def fancy(self) -> bool:
        """Whether the console can redraw a line."""
        return self.console.is_terminal and not self.console.is_dumb_terminal

    def start(self, done: int = 0) -> None:
        """Start the clock, and the bar, after `done` steps of an earlier part of the run."""
        self._first = self._done = done
        self._started = self._reported = self._clock()
        if self.fancy:
            self._live = Live(
                console=self.console, get_renderable=self._render, refresh_per_second=8
            )
            self._live.start()

    def step(self, step: int, metrics: Mapping[str, float], completion: str = "") -> None:
        """Show step `step`; a metric that is absent is shown as `-`. A live panel also has the
        course of the reward and a completion of the step."""
        self._done, self._reported = step, self._clock()
        self._numbers = _numbers(metrics)
        self._rewards.append(metrics.get("reward", math.nan))
        self._completion = completion
        if self._live is not None:
            self._live.refresh()
            return
        parts = [f"step {step}/{self.total_steps}", *self._numbers, f"{self._left()} left"]
        self.note(" | ".join(parts))

    def note(self, text: str) -> None:
        """Print one line, above the bar where there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def status(self, text: str) -> Iterator[None]:
        """Say what silent work is going on until the block ends."""
        if self._live is not None:
            self._status = Spinner("dots", Text(text, style="dim"))
            self._live.refresh()
            try:
                yield
            finally:
                self._status = None
                self._live.refresh()
        elif self.fancy:
            with self.console.status(Text(text)):
                yield
        else:
            self.note(text)
            yield

    def stop(self) -> None:
        """Leave the bar as it stands; safe to call twice."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _left(self) -> str:
        done = self._done - self._first
        if done == 0:
            return "-"
        seconds = (self._reported - self._started) / done * (self.total_steps - self._done)
        # Between two steps the estimate counts down.
        return _clock_text(max(seconds - (self._clock() - self._reported), 0))

    def _render(self) -> RenderableType:
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column()
        bar.add_column(ratio=1)
        bar.add_column()
        bar.add_row(
            Text(f"step {self._done}/{self.total_steps}", style="bold"),
            ProgressBar(total=max(self.total_steps, 1), completed=self._done),
            f"{_clock_text(self._clock() - self._started)} elapsed, {self._left()} left",
        )
        if self._status is not None:
            return Group(bar, self._status)
        # Two spaces, not a bar: with a held-out reward the line still fits 80 columns.
        numbers = "  ".join(self._numbers) or "first step"
        lines = [numbers]
        # An old terminal has no blocks to draw with.
        if self.console.encoding.startswith("utf"):
            lines += [f"reward {course}" for course in [sparkline(self._rewards)] if course]
        if self._completion:
            # Whatever a model says is one line, and moves no cursor.
            text = "".join(c if c.isprintable() else " " for c in self._completion)
            lines.append(f"last   {' '.join(text.split())}")
        return Group(bar, *(_dim(line) for line in lines))


def sparkline(values: Sequence[float], width: int = 40) -> str:
    """`▁▃▇`: the course of the values from their smallest to their largest, means where there are
    more than `width`; nothing of fewer than two."""
    known = [value for value in values if math.isfinite(value)]
    count = min(len(known), width)
    if count < 2:
        return ""
    cuts = [k * len(known) // count for k in range(count + 1)]
    means = [statistics.fmean(known[a:b]) for a, b in itertools.pairwise(cuts)]
    low, span = min(means), max(means) - min(means)
    heights = [(mean - low) / span if span else 0.5 for mean in means]
    return "".join(_BLOCKS[min(int(h * len(_BLOCKS)), len(_BLOCKS) - 1)] for h in heights)


def _dim(line: str) -> Text:
    return Text(line, style="dim", no_wrap=True, overflow="ellipsis")


def _numbers(metrics: Mapping[str, float]) -> list[str]:
    parts = [
        f"{label} {form.format(metrics[name]) if name in metrics else '-'}"
        for label, name, form in _COLUMNS
    ]
    speed = metrics.get("tokens_per_second", math.nan)
    parts.append(f"{speed:,.0f} tok/s" if math.isfinite(speed) else "- tok/s")
    if "eval_reward" in metrics:
        parts.append(f"held-out {metrics['eval_reward']:.2f}")
    return parts


def _clock_text(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
