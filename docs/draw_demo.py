"""docs/demo.png from a finished demo run: `python docs/draw_demo.py runs/demo`."""

import sys
from pathlib import Path

from matplotlib.figure import Figure

from grpo_fast.charts import BLUE, GREEN, GREY, ORANGE, RED, VIOLET
from grpo_fast.runlog import read_metrics

PANELS = (
    ("reward", (("reward", "training batch", BLUE), ("eval_reward", "held out, greedy", ORANGE))),
    ("KL to the reference, nats a token", (("kl", "k3", VIOLET),)),
    ("entropy, nats a token", (("entropy", "policy", GREEN),)),
    (
        "clip ratio",
        (("clip_ratio/high_mean", "upper", ORANGE), ("clip_ratio/low_mean", "lower", RED)),
    ),
)


def draw(run: str, target: Path) -> None:
    """Four panels over the steps of a run."""
    rows = read_metrics(run)
    figure = Figure(figsize=(12, 3.2), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, 4), PANELS, strict=True):
        for metric, label, colour in lines:
            points = [(row["step"], row[metric]) for row in rows if metric in row]
            style = {"marker": "o", "markersize": 4} if metric.startswith("eval_") else {}
            axes.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.6, **style)
        axes.set_title(title, fontsize=11, loc="left")
        axes.set_xlabel("step")
        axes.set_ylim(bottom=0)
        axes.grid(color=GREY, alpha=0.2)
        axes.spines[["top", "right"]].set_visible(False)
        if len(lines) > 1:
            axes.legend(frameon=False, fontsize=9)
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    draw(sys.argv[1], Path(__file__).with_name("demo.png"))
