"""The charts of the report: what each shows, what to look for in it, and its SVG."""

import dataclasses
import importlib.util
import io
import json
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

# Mid tones: readable on a light and on a dark page.
BLUE, ORANGE, GREEN, RED, VIOLET = "#3b82f6", "#e8890c", "#16a34a", "#e5484d", "#8b5cf6"
GREY = "#8a8f98"
_COLOURS = (BLUE, ORANGE, GREEN, VIOLET, RED, GREY)
# More points than a chart has pixels only make the page heavy: such a line is averaged in bins.
_MAX_POINTS = 600
# Tick distances a person can add up.
_STEPS = [1, 2, 2.5, 5, 10]
# From this many steps on, single batches are noise and the eye needs the average too.
_SMOOTH_FROM = 40


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One metric in a chart."""

    metric: str
    label: str
    colour: str
    smooth: bool = False
    """Draw a running mean over it in long runs."""
    dots: bool = False
    """Mark each value: measured now and then."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """One figure with the sentence that says what to look for."""

    title: str
    lines: tuple[Line, ...]
    caption: str
    missing: str = ""
    """Why there may be nothing to draw."""
    zero: bool = False
    """Let the axis start at 0."""


def charts(rows: Sequence[dict[str, Any]]) -> list[Chart]:
    """Every chart, drawn or not; one line a reward function under Reward parts."""
    found = {name for row in rows for name in row}
    parts = sorted(n for n in found if n.startswith("rewards/") and n.endswith("/mean"))
    part_lines = tuple(
        Line(metric=name, label=name[len("rewards/") : -len("/mean")], colour=colour, smooth=True)
        for name, colour in zip(parts, _COLOURS * (len(parts) // len(_COLOURS) + 1), strict=False)
    )
    return [
        *_reward_charts(part_lines),
        *_group_charts(),
        *_length_charts(),
        *_policy_charts(),
        *_optimizer_charts(),
    ]


def _reward_charts(parts: tuple[Line, ...]) -> list[Chart]:
    return [
        Chart(
            title="Reward",
            lines=(
                Line(metric="reward", label="training batch", colour=BLUE, smooth=True),
                Line(metric="eval_reward", label="held out, greedy", colour=ORANGE, dots=True),
            ),
            caption="Should rise. When only the training line rises, the prompts are being "
            "memorised.",
        ),
        Chart(
            title="Reward parts",
            lines=parts,
            caption="Raw mean of each reward function. One that rises while the others fall is "
            "being gamed.",
        ),
        Chart(
            title="Winners' advantage",
            lines=(
                Line(
                    metric="advantage/winners", label="best of a group", colour=GREEN, smooth=True
                ),
                Line(metric="advantage/abs_mean", label="mean size", colour=GREY),
            ),
            caption="Normalised reward: how far the best completion of a group stands out. High "
            "when few succeed, 0 when all do the same.",
            zero=True,
        ),
    ]


def _group_charts() -> list[Chart]:
    return [
        Chart(
            title="Spread of the rewards",
            lines=(
                Line(metric="reward_std", label="all completions", colour=GREY),
                Line(metric="groups/std_mean", label="within groups", colour=BLUE, smooth=True),
                Line(metric="groups/std_median", label="of groups that teach", colour=GREEN),
            ),
            caption="Standard deviation before normalisation. What is far below a step that means "
            "something is noise, and dividing by it hides that.",
            zero=True,
        ),
        Chart(
            title="Groups that teach nothing",
            lines=(
                Line(metric="frac_reward_zero_std", label="share", colour=VIOLET, smooth=True),
                Line(metric="groups/all_best_frac", label="all right", colour=GREEN),
                Line(metric="groups/all_worst_frac", label="all wrong", colour=RED),
            ),
            caption="All rewards of the group are equal, so every advantage is 0. All right: the "
            "prompts are too easy; all wrong: too hard.",
            zero=True,
        ),
        Chart(
            title="Winners alike",
            lines=(
                Line(
                    metric="groups/winners_alike",
                    label="shared word pairs",
                    colour=ORANGE,
                    smooth=True,
                ),
            ),
            caption="Of a group's winners, 1 where they say the same. Short right answers are the "
            "same; long ones that become so may be a trick that pays.",
            missing="No group had two winners.",
            zero=True,
        ),
    ]


def _length_charts() -> list[Chart]:
    return [
        Chart(
            title="Completion length",
            lines=(
                Line(metric="completions/mean_length", label="mean", colour=BLUE, smooth=True),
                Line(metric="completions/max_length", label="shortest, longest", colour=GREY),
                Line(metric="completions/min_length", label="shortest, longest", colour=GREY),
            ),
            caption="In tokens. Steady growth without more reward is padding; a collapse is a "
            "shortcut.",
            zero=True,
        ),
        Chart(
            title="Truncated completions",
            lines=(
                Line(
                    metric="completions/clipped_ratio",
                    label="share cut off",
                    colour=ORANGE,
                    smooth=True,
                ),
            ),
            caption="Hit max_completion_length before they ended. Many: raise it, or reward "
            "brevity.",
            zero=True,
        ),
    ]


def _policy_charts() -> list[Chart]:
    return [
        Chart(
            title="KL to the reference",
            lines=(Line(metric="kl", label="nats a token", colour=BLUE),),
            caption="How far the policy has moved from where it started, by loss.kl_estimator. A "
            "sudden rise comes before a collapse.",
            missing="loss.beta is 0, so the run has no reference policy.",
            zero=True,
        ),
        Chart(
            title="KL of old policy and sampler",
            lines=(
                Line(metric="kl/old_k3", label="old policy to policy", colour=GREEN),
                Line(metric="kl/sampler_k3", label="sampler to old policy", colour=ORANGE),
            ),
            caption="Nats a token, estimator k3. The first grows with every step on one rollout; "
            "the second should be 0: it is precision, or stale weights.",
            missing="num_iterations is 1, so there is no old policy, and no sampler told its "
            "log-probs.",
            zero=True,
        ),
        Chart(
            title="Clip ratio",
            lines=(
                Line(metric="clip_ratio/region_mean", label="both sides", colour=BLUE),
                Line(metric="clip_ratio/high_mean", label="upper", colour=ORANGE),
                Line(metric="clip_ratio/low_mean", label="lower", colour=GREEN),
                Line(metric="clip_ratio/first_mean", label="first iteration", colour=RED),
            ),
            caption="Share of tokens whose gradient the clip removed. Exactly 0 in the first "
            "iteration, where every ratio is 1; above about 0.2 the steps are too big.",
            zero=True,
        ),
        Chart(
            title="Entropy",
            lines=(Line(metric="entropy", label="nats a token", colour=VIOLET),),
            caption="How undecided the policy is. Falls as it learns; at 0 all completions are "
            "the same and learning stops.",
            zero=True,
        ),
    ]


def _optimizer_charts() -> list[Chart]:
    return [
        Chart(
            title="Loss",
            lines=(Line(metric="loss", label="loss", colour=GREY, smooth=True),),
            caption="Sits near 0 because the advantages of a group add up to 0 and ratios start at "
            "1; only its gradient means something. Judge by reward.",
        ),
        Chart(
            title="Gradient norm",
            lines=(Line(metric="grad_norm", label="before clipping", colour=ORANGE, smooth=True),),
            caption="Steady is good. Spikes that come with falling reward ask for a lower "
            "learning rate.",
            zero=True,
        ),
        Chart(
            title="Learning rate",
            lines=(Line(metric="learning_rate", label="AdamW", colour=BLUE),),
            caption="As scheduled: warm-up, then lr_scheduler_type.",
            zero=True,
        ),
        Chart(
            title="Tokens a second",
            lines=(
                Line(metric="tokens_per_second", label="whole step", colour=GREEN, smooth=True),
            ),
            caption="Prompt and completion tokens over the time of the step, sampling included.",
            zero=True,
        ),
        Chart(
            title="Padding",
            lines=(
                Line(metric="batch/pad_frac", label="if padded", colour=GREY),
                Line(metric="batch/row_fill_frac", label="filled of a packed row", colour=BLUE),
            ),
            caption="Share of a step's tokens: what padded rows would waste, and how full the "
            "packed ones are.",
            zero=True,
        ),
        Chart(
            title="Seconds a step",
            lines=(
                Line(metric="time/rollout", label="sampling", colour=BLUE),
                Line(metric="time/update", label="update", colour=ORANGE),
                Line(metric="time/reward", label="rewards", colour=GREEN),
            ),
            caption="Where the time of a step goes.",
            zero=True,
        ),
    ]


def draw(chart: Chart, rows: Sequence[dict[str, Any]], number: int) -> dict[str, Any]:
    """Title, legend, caption, SVG text, and where its points lie; `svg` is None for a chart with
    nothing measured."""
    drawn = [line for line in chart.lines if finite(rows, line.metric)]
    legend: dict[tuple[str, str], None] = {}
    for line in drawn if len(chart.lines) > 1 else []:
        legend[(line.label, line.colour)] = None
    svg, hover = None, ""
    if drawn and not missing_matplotlib():
        svg, hover = _svg(chart, drawn, rows, prefix=f"c{number}-")
    last = finite(rows, drawn[0].metric)[-1] if drawn else None
    return {
        "title": chart.title,
        "caption": chart.caption,
        "missing": chart.missing,
        "measured": bool(drawn),
        "legend": list(legend),
        "last": "" if last is None else short_number(last),
        "svg": svg,
        "hover": hover,
    }


def missing_matplotlib() -> bool:
    """Whether the page has to do without charts, and to say so."""
    return importlib.util.find_spec("matplotlib") is None


def _svg(
    chart: Chart, lines: Sequence[Line], rows: Sequence[dict[str, Any]], prefix: str
) -> tuple[str, str]:
    """(the chart as SVG text, its points as JSON), the same for the same rows; every id starts with
    `prefix`."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "grpo-fast"}):
        figure = Figure(figsize=(4.4, 2.3), layout="constrained")
        axes = figure.add_subplot()
        for line in lines:
            _plot(axes, line, rows)
        figure.patch.set_alpha(0)
        axes.patch.set_alpha(0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(colors=GREY, labelsize=9, length=3)
        axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, steps=_STEPS, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=_STEPS))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
        if chart.zero and min(min(finite(rows, line.metric)) for line in lines) >= 0:
            # All zeros: without a top the axis would run below 0.
            flat = max(max(finite(rows, line.metric)) for line in lines) == 0
            axes.set_ylim(bottom=0, top=1 if flat else None)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
        hover = _hover(axes, lines, rows)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Sized by the page, not by the figure; the text takes the page's font.
    text = re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", text)
    text = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", text)
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    return re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", text), hover


def _hover(axes: Any, lines: Sequence[Line], rows: Sequence[dict[str, Any]]) -> str:
    """{span: shares of the width where the axis begins and ends, steps: those there, lines:
    [[label, steps, values]]} as JSON."""
    found = []
    for line in lines:
        steps, values = _thin(_points(line, rows))
        known = [(s, v) for s, v in zip(steps, values, strict=True) if math.isfinite(v)]
        texts = [short_number(value) for _, value in known]
        found.append([line.label, [round(step) for step, _ in known], texts])
    place = axes.get_position()
    where = {"span": [place.x0, place.x1], "steps": [*axes.get_xlim()], "lines": found}
    return json.dumps(where, separators=(",", ":"))


def _points(line: Line, rows: Sequence[dict[str, Any]]) -> list[tuple[int, float]]:
    return [(row["step"], float(row[line.metric])) for row in rows if line.metric in row]


def _plot(axes: Any, line: Line, rows: Sequence[dict[str, Any]]) -> None:
    steps, values = _thin(_points(line, rows))
    few = len(steps) <= 12
    smooth = line.smooth and len(steps) >= _SMOOTH_FROM
    marker = {"marker": "o", "markersize": 3.5} if line.dots or few else {}
    axes.plot(
        steps, values, color=line.colour, linewidth=1 if smooth else 1.6,
        alpha=0.35 if smooth else 1, **marker,
    )  # fmt: skip
    if smooth:
        axes.plot(steps, _running_mean(values), color=line.colour, linewidth=2)


def _thin(points: Sequence[tuple[int, float]]) -> tuple[list[float], list[float]]:
    """Steps and values, at most _MAX_POINTS: means of equal bins, NaN left out."""
    size = math.ceil(len(points) / _MAX_POINTS)
    steps, values = [], []
    for at in range(0, len(points), size):
        part = points[at : at + size]
        known = [value for _, value in part if math.isfinite(value)]
        steps.append(statistics.fmean(step for step, _ in part))
        values.append(statistics.fmean(known) if known else math.nan)
    return steps, values


def _running_mean(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of a tenth of the run; NaN values are left out."""
    half = max(len(values) // 20, 2)
    means = []
    for at in range(len(values)):
        known = [v for v in values[max(at - half, 0) : at + half + 1] if math.isfinite(v)]
        means.append(statistics.fmean(known) if known else math.nan)
    return means


def finite(rows: Iterable[dict[str, Any]], metric: str) -> list[float]:
    """The values of a metric that are numbers, in the order of the rows."""
    return [float(row[metric]) for row in rows if math.isfinite(row.get(metric, math.nan))]


def short_number(value: float) -> str:
    """Three digits, thousands as `5,300`."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
