"""Records as pictures: what was measured, beside what was predicted or is the ceiling."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
# Ours in blues, others in the rest; readable without colour by order, marker and label.
OURS = ("#1d4ed8", "#0891b2", "#7c3aed")
OTHERS = ("#6b7280", "#e8890c", "#16a34a", "#e5484d", "#a16207", "#db2777", "#84cc16", "#111827")
FLOOR = "floor"
MARKERS = "osD^vP*X"


def figure(width: float, height: float, **grid: Any):
    """(matplotlib figure, its axes); nothing of it is shown on a screen."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(squeeze=False, **grid)
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25, linewidth=0.6)
        one.set_axisbelow(True)
        one.tick_params(labelsize=8)
    return made, axes


def caption(record: Record) -> str:
    """Machine, versions, commit, day."""
    about = record["about"]
    threads = f", {about['threads']} thread(s)" if "threads" in about else ""
    return (
        f"{about['device']}{threads}, torch {about['torch']}, commit {about['commit'][:8]}, "
        f"{about['date'][:10]}"
    )


def colours(names: Iterable[str], ours: Callable[[str], bool]) -> dict[str, str]:
    mine = [name for name in names if ours(name)]
    rest = [name for name in names if not ours(name)]
    found = {name: OURS[k % len(OURS)] for k, name in enumerate(mine)}
    return found | {name: OTHERS[k % len(OTHERS)] for k, name in enumerate(rest)}


def distinct(values: Iterable) -> list:
    return list(dict.fromkeys(values))


def is_ours(name: str) -> bool:
    """A layout that only `grpo_backward` has, or the loss of this project."""
    return name.startswith("grpo-fast") or name in ("shared", "one row", "budget", "recomputed")


def step_ratios(record: Record):
    """Each layout's step beside the padded one: measured, and by counting operations."""
    rows = [row for row in record["rows"] if row["over_padded"] is not None]
    shapes = distinct((r["P"], r["C"], r["G"]) for r in rows)
    names = distinct(r["provider"] for r in rows)[::-1]
    made, axes = figure(
        1.6 + 3.1 * len(shapes), 0.9 + 0.38 * len(names), ncols=len(shapes), sharey=True
    )
    for place, shape in zip(axes[0], shapes, strict=True):
        mine = {r["provider"]: r for r in rows if (r["P"], r["C"], r["G"]) == shape}
        for y, name in enumerate(names):
            if name not in mine:
                continue
            ratio, predicted = mine[name]["over_padded"], mine[name]["predicted"]
            place.barh(y, ratio, 0.62, color=OURS[0] if is_ours(name) else OTHERS[0])
            place.vlines(predicted, y - 0.42, y + 0.42, colors="black", linewidth=1.6)
            place.text(max(ratio, predicted), y, f" {ratio:.2f}", va="center", fontsize=8)
        place.set_title("P={} C={} G={}".format(*shape), fontsize=9)
        place.set_xlim(0, 1.18 * max(max(r["over_padded"], r["predicted"]) for r in mine.values()))
        place.grid(axis="y", visible=False)
    axes[0][0].set_yticks(range(len(names)), names)
    made.supxlabel("times as fast as padded; black line: predicted by FLOPs", fontsize=9)
    made.suptitle(f"One GRPO step. {caption(record)}", fontsize=8)
    return made


def _lines(place, rows: list[dict], x: str, y: Callable[[dict], float], paint: dict) -> None:
    for k, name in enumerate(paint):
        mine = sorted((r for r in rows if r["provider"] == name), key=lambda r: r[x])
        marker = MARKERS[k % len(MARKERS)]
        look = {
            "marker": marker,
            "ms": 4,
            "color": paint[name],
            "lw": 2.4 if is_ours(name) else 1.3,
        }
        if name == FLOOR:
            look |= {"color": "black", "ls": "--", "marker": ""}
        place.plot([r[x] for r in mine], [y(r) for r in mine], label=name, **look)
    place.set_xscale("log", base=2)
    place.set_yscale("log")
    sizes = sorted({r[x] for r in rows})
    place.set_xticks(sizes, [f"{size:,}" for size in sizes], rotation=30)
    place.minorticks_off()


def memory_and_speed(record: Record):
    """A step's memory and its completion tokens a second against the size of the group."""
    rows = [row for row in record["rows"] if not row["error"]]
    paint = colours(distinct(row["provider"] for row in rows), is_ours)
    made, axes = figure(10, 4.2, ncols=2)
    about = record["about"]
    _lines(axes[0][0], rows, "G", lambda r: r["extra"] / 2**20, paint)
    axes[0][0].set_ylabel("memory beyond weights and gradients, MiB", fontsize=9)
    _lines(axes[0][1], rows, "G", lambda r: r["G"] * about["C"] / r["seconds"], paint)
    axes[0][1].set_ylabel("completion tokens a second", fontsize=9)
    axes[0][0].legend(fontsize=8, frameon=False)
    made.supxlabel("completions of the group, G", fontsize=9)
    made.suptitle(
        f"One step, P={about['P']} C={about['C']}, rows of {about['token_budget']:,} tokens. "
        f"{caption(record)}",
        fontsize=8,
    )
    return made


def drop_in_bars(record: Record):
    """Time and memory of a micro-batch by trainer, over TRL's."""
    rows = [row for row in record["rows"] if row["over_trl"]]
    shapes = distinct((r["P"], r["C"], r["G"]) for r in rows)
    names = distinct(r["provider"] for r in rows)[::-1]
    made, axes = figure(
        9, 0.5 + (0.5 + 0.3 * len(names)) * len(shapes), nrows=len(shapes), ncols=2, sharey=True
    )
    parts = [
        ("time over TRL's", lambda r: 1 / r["over_trl"]),
        ("extra memory over TRL's", lambda r: r["of_trl_bytes"]),
    ]
    for shape, line in zip(shapes, axes, strict=True):
        mine = {r["provider"]: r for r in rows if (r["P"], r["C"], r["G"]) == shape}
        for place, (title, of) in zip(line, parts, strict=True):
            for y, name in enumerate(names):
                if name in mine:
                    share = of(mine[name])
                    colour = OTHERS[0] if name == "TRL" else OURS[0]
                    place.barh(y, share, 0.62, color=colour)
                    place.text(share, y, f" {share:.2f}", va="center", fontsize=8)
            place.set_title("P={} C={} G={}, ".format(*shape) + title, fontsize=9)
            place.set_xlim(0, 1.15 * max(map(of, mine.values())))
            place.grid(axis="y", visible=False)
        line[0].set_yticks(range(len(names)), names)
    made.suptitle(f"A micro-batch of TRL's trainer. {caption(record)}", fontsize=8)
    return made


def _peer_matches(record: Record) -> list[tuple]:
    return distinct((r["dtype"], r.get("head")) for r in record["rows"])


def peers_by_tokens(record: Record):
    """Time and memory of the loss against the number of tokens, a row for each dtype and head."""
    rows = [row for row in record["rows"] if row["seconds"]]
    matches = _peer_matches(record)
    paint = colours(distinct(row["provider"] for row in rows), is_ours)
    made, axes = figure(11.5, 0.6 + 3.6 * len(matches), nrows=len(matches), ncols=2)
    for (dtype, head), (time, memory) in zip(matches, axes, strict=True):
        mine = [r for r in rows if (r["dtype"], r.get("head")) == (dtype, head)]
        _lines(time, mine, "N", lambda r: r["seconds"], paint)
        having = [r for r in mine if r["extra_bytes"]]
        _lines(memory, having, "N", lambda r: max(r["extra_bytes"] / 2**20, 1), paint)
        time.set_ylabel("seconds, forward and backward", fontsize=9)
        memory.set_ylabel("extra memory, MiB", fontsize=9)
        time.set_title(dtype if head is None else f"{dtype}, head {head}", fontsize=9)
    names = axes[0][0].get_legend_handles_labels()
    made.legend(*names, loc="outside right upper", fontsize=8, frameon=False)
    made.supxlabel("tokens, N", fontsize=9)
    sizes = " ".join(f"{letter}={rows[0][letter]}" for letter in "DV" if rows[0].get(letter))
    made.suptitle(f"The loss, {sizes}. {caption(record)}", fontsize=8)
    return made


def peers_bars(record: Record):
    """Everybody's time over ours, by shape, dtype and head."""
    rows = [row for row in record["rows"] if row["over_ours"] is not None]
    matches = distinct((r["N"], r.get("D"), r["V"], r["dtype"], r.get("head")) for r in rows)
    names = distinct(r["provider"] for r in rows)[::-1]
    most = max(row["over_ours"] for row in rows)
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if tick < 2 * most]
    made, axes = figure(
        1.8 + 2.9 * len(matches), 0.9 + 0.34 * len(names), ncols=len(matches), sharey=True
    )
    for place, match in zip(axes[0], matches, strict=True):
        n, d, v, dtype, head = match
        for row in rows:
            if (row["N"], row.get("D"), row["V"], row["dtype"], row.get("head")) != match:
                continue
            y, ratio = names.index(row["provider"]), row["over_ours"]
            colour = OURS[0] if is_ours(row["provider"]) else OTHERS[0]
            # The floor is no loss: hollow.
            face = colour if row.get("role", "loss") == "loss" else "white"
            # From 1, which is as fast as ours: a logarithm has no 0 to start at.
            place.barh(y, ratio - 1, 0.62, left=1, color=face, edgecolor=colour)
            place.text(max(ratio, 1), y, f" {ratio:.2f}", va="center", fontsize=8)
        place.axvline(1, color="black", linewidth=0.8)
        place.set_xscale("log")
        place.set_xlim(0.4, 2.5 * most)
        place.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        place.minorticks_off()
        place.grid(axis="y", visible=False)
        size = f"N={n} D={d} V={v}" if d else f"N={n} V={v}"
        place.set_title(f"{size}\n{dtype}" + (f", head {head}" if head else ""), fontsize=8)
    axes[0][0].set_yticks(range(len(names)), names)
    made.supxlabel("time over ours, forward and backward (right of 1: slower)", fontsize=9)
    made.suptitle(f"The loss. {caption(record)}", fontsize=8)
    return made


def roofline(record: Record):
    """Operations a second against operations a byte, under the measured roofs."""
    rows = [row for row in record["rows"] if row["columns"]]
    seconds = {id(r): r["columns"]["ceiling"]["seconds"] for r in rows if "ceiling" in r["columns"]}
    ceilings = [r for r in rows if id(r) in seconds]
    copies = [r for r in ceilings if not r["op"].startswith("linear")]
    products = [r for r in ceilings if r["op"].startswith("linear")]
    made, axes = figure(7.5, 4.6)
    place = axes[0][0]
    intensity = [r["flops"] / r["bytes"] for r in rows]
    left, right = min(intensity) / 3, max(intensity) * 3
    if copies and products:
        bandwidth = max(r["bytes"] / seconds[id(r)] for r in copies)
        peak = max(r["flops"] / seconds[id(r)] for r in products)
        ridge = peak / bandwidth
        roof = [left * bandwidth, peak, peak]
        place.plot([left, ridge, max(right, 2 * ridge)], roof, color="black", linewidth=1.2)
        place.text(left, left * bandwidth * 1.8, f"copy {bandwidth / 1e9:.1f} GB/s", fontsize=8)
        place.text(ridge, peak * 1.12, f"products {peak / 1e9:,.0f} GFLOP/s", fontsize=8)
    for k, row in enumerate(rows):
        x = row["flops"] / row["bytes"]
        label = f"{row['op']}, {row['label']}, {row['dtype']}"
        marker = MARKERS[k % len(MARKERS)]
        for name, face in (("ours", OURS[0]), ("eager", "white")):
            if name in row["columns"]:
                y = row["flops"] / row["columns"][name]["seconds"]
                text = label if name == "ours" else None
                edge = OURS[0] if name == "ours" else OTHERS[0]
                place.plot(x, y, marker, ms=7, mfc=face, mec=edge, ls="", label=text)
    place.set_xscale("log")
    place.set_yscale("log")
    place.set_xlabel("operations a byte", fontsize=9)
    place.set_ylabel("operations a second", fontsize=9)
    place.legend(fontsize=7, frameon=False, title="filled: ours, hollow: eager", title_fontsize=7)
    made.suptitle(f"Roofline, measured roofs. {caption(record)}", fontsize=8)
    return made


def predictions(record: Record):
    """Time and memory as `grpo-fast plan` has them against what was measured."""
    rows = [row for row in record["rows"] if not row.get("error")]
    paint = colours(distinct(row["provider"] for row in rows), is_ours)
    made, axes = figure(9, 4.2, ncols=2)
    for place, names, unit, title in (
        (axes[0][0], ("predicted_seconds", "seconds"), 1, "seconds a step"),
        (axes[0][1], ("predicted_bytes", "extra_bytes"), 2**20, "MiB beyond the gradients"),
    ):
        having = [r for r in rows if r[names[0]] and r[names[1]]]
        for k, name in enumerate(paint):
            mine = [[r[key] / unit for key in names] for r in having if r["provider"] == name]
            marker = MARKERS[k % len(MARKERS)]
            place.plot(*zip(*mine, strict=True), marker, color=paint[name], label=name)
        ends = [r[key] / unit for r in having for key in names]
        low, high = min(ends) / 1.3, max(ends) * 1.3
        place.plot([low, high], [low, high], color="black", linewidth=0.8)
        place.set_xscale("log")
        place.set_yscale("log")
        ticks = [step * 10**k for k in range(-4, 7) for step in (1, 2, 5)]
        ticks = [tick for tick in ticks if low <= tick <= high]
        for axis in (place.xaxis, place.yaxis):
            axis.set_ticks(ticks, [f"{tick:,g}" for tick in ticks])
        place.minorticks_off()
        place.set_xlabel("predicted", fontsize=9)
        place.set_ylabel("measured", fontsize=9)
        place.set_title(title, fontsize=9)
    axes[0][0].legend(fontsize=8, frameon=False)
    made.suptitle(f"The cost model. {caption(record)}", fontsize=8)
    return made


def picture(record: Record):
    """The figure of a record; None where its kind has none, or nothing right was measured."""
    kind, rows = record["kind"], record["rows"]
    if kind == "peers":
        drawable = [row for row in rows if row["seconds"]]
        kind = "tokens" if len({row["N"] for row in drawable}) > 1 else "bars"
    drawing, measured = {
        "bars": (peers_bars, "seconds"),
        "tokens": (peers_by_tokens, "seconds"),
        "step": (step_ratios, "over_padded"),
        "memory": (memory_and_speed, "extra"),
        "timing": (roofline, "columns"),
        "plan": (predictions, "seconds"),
        "drop_in": (drop_in_bars, "over_trl"),
    }.get(kind, (None, ""))
    if drawing is None or not any(row[measured] for row in rows):
        return None
    return drawing(record)


def draw(record: Record, path: Path) -> bool:
    """The record's picture as a PNG; False where there is none to draw."""
    made = picture(record)
    if made is not None:
        made.savefig(path, dpi=120)
    return made is not None
