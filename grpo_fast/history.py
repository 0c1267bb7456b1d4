"""What a rule of the doctor sees of a run: every metric as a series, with means and trends that
cost the same in step 10 and in step 10,000."""

import bisect
import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

SEVERITIES = ("info", "warning", "error")
Limits = Mapping[str, Mapping[str, float]]
# Rows that a rule looks back on in full; everything longer goes through sums.
RECENT = 20
# Rows of a short mean: long enough against noise, short enough to be told in time.
WINDOW = 10
# Share of a run that a slow trend is looked for in, and the fewest rows of it.
SLOW, SLOW_LEAST = 0.35, 21
# What a rule may need beside a metric.
TWO_REWARDS = "a second rewards/<name>/mean"
ONE_ITERATION = "clip_ratio/region_mean with num_iterations 1"


def measured(value: Any) -> bool:
    """A finite number; beyond 1e150 its square is none."""
    return type(value) in (float, int) and abs(value) < 1e150


class Trend(NamedTuple):
    """Last third of a window against its first."""

    first: float
    middle: float
    last: float
    spread: Callable[[], float]

    @property
    def noise(self) -> float:
        """Standard error of last - first; rarely asked for, and not for nothing."""
        return self.spread()

    @property
    def change(self) -> float:
        return self.last - self.first

    @property
    def flat(self) -> bool:
        """Not seen to rise."""
        return self.change <= self.noise

    @property
    def rises(self) -> bool:
        return self.first < self.middle < self.last and self.change > 2 * self.noise

    @property
    def falls(self) -> bool:
        return self.change < -2 * self.noise


class Series:
    """The finite values of one metric, in order."""

    __slots__ = ("_squares", "_sums", "highest", "steps", "values")

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: list[float] = []
        self.highest = -math.inf
        self._sums, self._squares = [0.0], [0.0]

    def __len__(self) -> int:
        return len(self.values)

    def append(self, step: int, value: float) -> None:
        self.steps.append(step)
        self.values.append(value)
        self.highest = max(self.highest, value)
        sums, squares = self._sums, self._squares
        sums.append(sums[-1] + value)
        squares.append(squares[-1] + value * value)

    def mean(self, start: int, stop: int) -> float:
        """`fmean(values[start:stop])` for 0 <= start < stop."""
        return (self._sums[stop] - self._sums[start]) / (stop - start)

    def variance(self, start: int, stop: int) -> float:
        square = (self._squares[stop] - self._squares[start]) / (stop - start)
        return max(square - self.mean(start, stop) ** 2, 0.0)

    def around(self, step: int, count: int) -> float:
        """Mean of the `count` values up to `step`, or of the first ones."""
        stop = max(bisect.bisect_right(self.steps, step), min(count, len(self)))
        return self.mean(max(stop - count, 0), stop)


class History:
    """A run so far, a row at a time; NaN and infinity are no values."""

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options
        """Of the run, flat: `loss.beta`."""
        self.row: Mapping[str, Any] = {}
        self.here: set[str] = set()
        """What the latest row has of what a rule may need."""
        self.recent: deque[Mapping[str, Any]] = deque(maxlen=RECENT)
        self.series: dict[str, Series] = {}
        self.parts: list[str] = []
        """Names of reward functions."""
        self.identical = 0
        """Last rows in which every completion had the same reward."""
        self._lasting: dict[str, int] = {}

    def add(self, row: Mapping[str, Any]) -> None:
        self.row = row
        finite = [name for name, value in row.items() if name != "step" and measured(value)]
        self.here = set(finite)
        self.recent.append(row)
        step = row["step"]
        for name in finite:
            series = self.series.get(name)
            if series is None:
                series = self.series[name] = Series()
                if name.startswith("rewards/") and name.endswith("/mean"):
                    self.parts.append(name[len("rewards/") : -len("/mean")])
            series.append(step, row[name])
        if "reward_std" in row:
            spreads = [row.get(f"rewards/{part}/std", 0.0) for part in self.parts]
            same = row["reward_std"] == 0 and not any(spreads)
            self.identical = self.identical + 1 if same else 0
        self._complete()

    def _complete(self) -> None:
        """What is here beside finite metrics."""
        # A NaN says something to the gradient's rule, and to no other.
        self.here |= {"grad_norm", "loss"} & self.row.keys()
        if len(self.parts) > 1:
            self.here.add(TWO_REWARDS)
        if self.options.get("num_iterations") == 1 and "clip_ratio/region_mean" in self.here:
            self.here.add(ONE_ITERATION)

    def lasts(self, name: str, here: bool) -> int:
        """In how many rows in a row something was seen, this one included; asked once a row."""
        self._lasting[name] = self._lasting.get(name, 0) + 1 if here else 0
        return self._lasting[name]

    @property
    def step(self) -> int:
        return self.row["step"]

    def value(self, name: str) -> float:
        """Of the latest row; NaN where it has none."""
        value = self.row.get(name)
        return value if measured(value) else math.nan

    def mean(self, name: str, count: int, least: int = 5) -> float:
        """Of the last `count` values; NaN where there are fewer than `least`, so that no limit is
        passed."""
        series = self.series.get(name)
        if series is None or len(series) < least:
            return math.nan
        return series.mean(max(len(series) - count, 0), len(series))

    def start(self, name: str, count: int = 5) -> float:
        series = self.series[name]
        return series.mean(0, min(count, len(series)))

    def before(self, name: str, count: int, least: int = 10) -> list[float]:
        """Up to `count` values before the latest; none where there are fewer than `least`."""
        values = self.series[name].values[-count - 1 : -1] if name in self.series else []
        return values if len(values) >= least else []

    def median(self, name: str, count: int) -> float:
        return statistics.median(self.series[name].values[-count:])

    def trend(self, name: str, count: int) -> Trend | None:
        """Over the last `count` values; None where there are fewer."""
        series = self.series.get(name)
        third = count // 3
        if series is None or len(series) < count or third < 2:
            return None
        end = len(series)
        a, b, c = end - 3 * third, end - 2 * third, end - third

        def spread() -> float:
            return math.sqrt((series.variance(a, b) + series.variance(c, end)) / (third - 1))

        return Trend(series.mean(a, b), series.mean(b, c), series.mean(c, end), spread)


class Seen(NamedTuple):
    severity: str
    evidence: str
    cause: str = ""
    """Where the rule knows better than its own text; so too `change` and `key`."""
    change: str = ""
    key: str = ""


def level(value: float, limits: Mapping[str, float]) -> str:
    """The highest severity whose limit `value` is above, or the empty string."""
    passed = [name for name in SEVERITIES if name in limits and value > limits[name]]
    return passed[-1] if passed else ""


def slow(run: History, name: str) -> int:
    """Rows of a slow trend's window."""
    return max(SLOW_LEAST, int(SLOW * len(run.series[name])))


def solved(run: History, limits: Limits) -> bool:
    """The reward, or the held-out one, rose to where most completions have all of it."""
    easy, evals = limits["R1"]["easy"], run.series.get("eval_reward")
    # The latest two, because one evaluation of few prompts is noise.
    held_out = min(evals.values[-2:]) if evals is not None and len(evals) > 2 else 0.0
    if easy <= held_out <= 1 and held_out - evals.values[0] > 0.1:
        return True
    now = run.mean("reward", WINDOW)
    return easy <= now <= 1 and now - run.start("reward") > 0.1


def reward_flat(run: History, limits: Limits, count: int) -> bool:
    """Not seen to rise, and not because nothing is left to gain."""
    trend = run.trend("reward", count)
    return (
        trend is not None
        and trend.flat
        and not solved(run, limits)
        and not held_out_rose(run, limits, count)
    )


def held_out_rose(run: History, limits: Limits, count: int) -> bool:
    """Over the last `count` rows of the reward, which is noisier: other prompts every step."""
    evals = run.series.get("eval_reward")
    if evals is None or len(evals) < 2:
        return False
    rewards = run.series["reward"].steps
    before = evals.around(rewards[max(len(rewards) - count, 0)], 1)
    return evals.values[-1] - before > limits["R4"]["eval_gain"]
