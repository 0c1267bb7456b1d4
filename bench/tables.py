"""Records as Markdown tables: what a page shows of a result file."""

from collections.abc import Callable
from typing import Any

from .charts import distinct
from .timing import seconds_text

Record = dict[str, Any]


def markdown(titles: list[str], rows: list[list[str]]) -> list[str]:
    """Words to the left, numbers to the right."""
    lines = [f"| {' | '.join(titles)} |"]
    lines.append("|" + "|".join([" --- ", *[" ---: "] * (len(titles) - 1)]) + "|")
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def form(value: float | None, text: str) -> str:
    return "-" if value is None else text.format(value)


def mebibytes(value: float | None) -> str:
    return form(None if value is None else value / 2**20, "{:,.0f} MiB")


def source(record: Record) -> str:
    """What the figures depend on, and the command that makes them again."""
    about = record["about"]
    threads = f", {about['threads']} thread(s)" if "threads" in about else ""
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "triton"))
    return (
        f"{about['device']}{threads}; {versions}; commit {about['commit'][:8]}; "
        f"{about['date'][:10]}. Again: `{about['command']}`"
    )


def gaps(rows: list[dict], key: str = "error") -> list[str]:
    """Who has no number, and why; once each."""
    missing = distinct((row["provider"], row[key]) for row in rows if row.get(key))
    return [f"- {provider}: {why}" for provider, why in missing]


def peers(record: Record) -> list[str]:
    titles = ["loss, forward and backward", "time", "over ours", "of floor", "extra memory"]
    lines = []
    for match in distinct(_match(row) for row in record["rows"]):
        rows = [r for r in record["rows"] if _match(r) == match and r["seconds"]]
        body = [
            [
                r["provider"] + (f" {r['version']}" if r["version"] else ""),
                seconds_text(r["seconds"]),
                form(r["over_ours"], "{:.2f}"),
                form(r.get("of_floor"), "{:.2f}"),
                mebibytes(r["extra_bytes"]),
            ]
            for r in rows
        ]
        lines += [f"{match}:", "", *markdown(titles, body), ""]
    return lines + gaps(record["rows"])


def _match(row: dict) -> str:
    sizes = " ".join(f"{letter}={row[letter]}" for letter in "NDV" if row.get(letter))
    return f"{sizes}, {row['dtype']}" + (f", head {row['head']}" if row.get("head") else "")


def accuracy(record: Record) -> list[str]:
    titles = ["against float64", "log-prob, nats", "dH", "dW", "ratio exactly 1"]
    words = {None: "-", True: "yes", False: "no"}
    lines = []
    for dtype in distinct(row["dtype"] for row in record["rows"]):
        rows = [r for r in record["rows"] if r["dtype"] == dtype and not r["gap"]]
        body = [
            [
                r["provider"] + (f" {r['version']}" if r["version"] else ""),
                *(form(r[name], "{:.1e}") for name in ("logp", "dhidden", "dweight")),
                words[r["ratio_is_1"]],
            ]
            for r in rows
        ]
        lines += [f"{dtype}:", "", *markdown(titles, body), ""]
    return lines + gaps(record["rows"], "gap")


def step(record: Record) -> list[str]:
    shapes = distinct((r["P"], r["C"], r["G"]) for r in record["rows"])
    titles = ["times as fast as padded", *("P={} C={} G={}".format(*shape) for shape in shapes)]
    found = {(r["provider"], r["P"], r["C"], r["G"]): r for r in record["rows"]}
    body = []
    for name in distinct(r["provider"] for r in record["rows"]):
        rows = [found.get((name, *shape)) for shape in shapes]
        body.append([name, *(form(r and r["over_padded"], "{:.2f}") for r in rows)])
    shared = [next(r for r in record["rows"] if _shared_at(r, shape)) for shape in shapes]
    body.append(["predicted of a shared prompt", *(f"{r['predicted']:.2f}" for r in shared)])
    return [*markdown(titles, body), "", *gaps(record["rows"])]


def _shared_at(row: dict, shape: tuple[int, int, int]) -> bool:
    return row["layout"] == "shared" and (row["P"], row["C"], row["G"]) == shape


def memory(record: Record) -> list[str]:
    names = distinct(r["provider"] for r in record["rows"])
    found = {(r["provider"], r["G"]): r for r in record["rows"] if not r["error"]}
    body = [
        [f"{size:,}", *(mebibytes(found.get((name, size), {}).get("extra")) for name in names)]
        for size in sorted({r["G"] for r in record["rows"]})
    ]
    return [*markdown(["G", *names], body), "", *gaps(record["rows"])]


def timing(record: Record) -> list[str]:
    titles = ["op", "ours", "eager", "x eager", "of ceiling", "GB/s", "GFLOP/s"]
    body = []
    for r in record["rows"]:
        sizes = " ".join(f"{key}={r[key]}" for key in ("N", "D", "V", "S", "G", "T") if key in r)
        columns = {name: r["columns"].get(name, {}) for name in ("ours", "eager")}
        body.append(
            [
                f"{r['op']}, {r['label']}, {sizes}, {r['dtype']}",
                *(seconds_text(column.get("seconds")) for column in columns.values()),
                form(r["speedup_over_eager"], "{:.2f}"),
                form(r["fraction_of_ceiling"], "{:.2f}"),
                form(r["gigabytes_per_second"], "{:,.1f}"),
                form(r["teraflops"] and 1e3 * r["teraflops"], "{:,.1f}"),
            ]
        )
    return [*markdown(titles, body), ""] + [
        f"- {r['op']}, {r['label']}: {r['error']}" for r in record["rows"] if r["error"]
    ]


def static(record: Record, target: str = "sm_90") -> list[str]:
    titles = [f"kernel on {target}", "registers", "spill B", "shared B", "occupancy", "16 B loads"]
    body = [
        [
            f"{r['kernel'].strip('_').removesuffix('_kernel')}, {r['variant']}, {r['config']}",
            *(str(r[name]) for name in ("registers", "spill_bytes", "shared_bytes")),
            form(r["occupancy"], "{:.2f}"),
            str(r["loads_16_byte"]),
        ]
        for r in record["rows"]
        if r["target"] == target and not r["error"]
    ]
    return [*markdown(titles, body), ""]


def plan(record: Record) -> list[str]:
    titles = ["a step", "predicted", "measured", "error", "memory predicted", "measured", "error"]

    def error(predicted: float | None, found: float | None) -> str:
        return "-" if not predicted or not found else f"{predicted / found - 1:+.0%}"

    body = [
        [
            f"{r['provider']}, P={r['P']} C={r['C']} G={r['G']}, {r['model']}, {r['dtype']}",
            seconds_text(r["predicted_seconds"]),
            seconds_text(r["seconds"]),
            error(r["predicted_seconds"], r["seconds"]),
            mebibytes(r["predicted_bytes"]),
            mebibytes(r["extra_bytes"]),
            error(r["predicted_bytes"], r["extra_bytes"]),
        ]
        for r in record["rows"]
    ]
    return [*markdown(titles, body), "", *gaps(record["rows"])]


def rollout(record: Record) -> list[str]:
    titles = ["sampling a group", "time", "tokens/s", "x HF generate", "of roof", "extra memory"]
    body = [
        [
            "{provider} {version}, P={P} C={C} G={G}, {model}, {dtype}".format(**r),
            seconds_text(r["seconds"]),
            form(r["tokens_per_second"], "{:,.0f}"),
            form(r["over_hf"], "{:.2f}"),
            form(r["of_roof"], "{:.2f}"),
            mebibytes(r["extra_bytes"]),
        ]
        for r in record["rows"]
    ]
    return [*markdown(titles, body), "", *gaps(record["rows"])]


def drop_in(record: Record) -> list[str]:
    titles = ["a micro-batch", "trainer", "time", "x TRL", "tokens/s", "extra memory", "of TRL"]
    body = [
        [
            "P={P} C={C} G={G}, {model}, {dtype}".format(**r),
            r["provider"] + (f" {r['version']}" if r["provider"] == "TRL" else ""),
            seconds_text(r["seconds"]),
            form(r["over_trl"], "{:.2f}"),
            form(r["tokens_per_second"], "{:,.0f}"),
            mebibytes(r["extra_bytes"]),
            form(r["of_trl_bytes"], "{:.0%}"),
        ]
        for r in record["rows"]
    ]
    return [*markdown(titles, body), "", *gaps(record["rows"])]


TABLES: dict[str, Callable[[Record], list[str]]] = {
    "peers": peers,
    "accuracy": accuracy,
    "step": step,
    "memory": memory,
    "timing": timing,
    "static": static,
    "plan": plan,
    "rollout": rollout,
    "drop_in": drop_in,
}


def table(record: Record) -> list[str]:
    """The table and its source line; no lines for a kind that has none."""
    lines = TABLES[record["kind"]](record) if record["kind"] in TABLES else []
    while lines and not lines[-1]:
        lines.pop()
    return [*lines, "", source(record)] if lines else []
