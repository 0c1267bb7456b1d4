"""Measured ratios of `bench_step.py` beside predicted ones, as a picture."""

from pathlib import Path

from .steps import PROVIDERS

WIDTH = 0.8


def draw(result: dict, path: Path) -> None:
    """A PNG: for each shape and provider the padded step's time over its own, and by FLOPs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["over_padded"] is not None]
    shapes = list(dict.fromkeys((r["P"], r["C"], r["G"]) for r in rows))
    names = [p.name for p in PROVIDERS if any(r["provider"] == p.name for r in rows)]
    figure = Figure(figsize=(2 + 3 * max(len(shapes), 1), 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    step = WIDTH / max(len(names), 1)
    for k, name in enumerate(names):
        mine = [r for r in rows if r["provider"] == name]
        at = [
            shapes.index((r["P"], r["C"], r["G"])) + (k - (len(names) - 1) / 2) * step for r in mine
        ]
        bars = axes.bar(at, [r["over_padded"] for r in mine], 0.9 * step, label=name)
        axes.bar_label(bars, fmt="%.2f", fontsize=7)
        predicted = [r["predicted"] for r in mine]
        label = "predicted by FLOPs" if k == len(names) - 1 else None
        axes.hlines(
            predicted,
            [x - 0.45 * step for x in at],
            [x + 0.45 * step for x in at],
            colors="black",
            label=label,
        )
    axes.set_xticks(range(len(shapes)), [f"P={p} C={c} G={g}" for p, c, g in shapes])
    axes.set_ylabel("times as fast as padded")
    about = result["about"]
    axes.set_title(f"one GRPO step, {about['device']}, {about['threads']} thread(s)", fontsize=9)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
