"""A run as one page: the log of any trainer in, report.html out."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .charts import charts, draw, finite, missing_matplotlib, short_number
from .doctor import Doctor, diagnose, flat
from .doctor_rules import RULES
from .errors import InputError
from .records import Records, open_records
from .xray import build_xray, page_parts

_MAX_TEXT = 4000


def write_report(run: str | Path, out: str | Path | None = None) -> Path:
    """Write the page of a run, going on or cut ones too, and return its path: report.html in the
    folder `run`, or beside the file, unless `out` is given.

    Raises InputError where there is no run, or no step yet, or nothing can be written.
    """
    page = report_page(open_records(run))
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    path = folder / "report.html" if out is None else Path(out)
    staging = path.with_name(f".{path.name}.writing")
    try:
        staging.write_bytes(page.encode("utf-8", errors="replace"))
        staging.replace(path)
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror}): choose a file with --out"
        ) from None
    return path


def report_page(records: Records) -> str:
    """The page of a log, whoever wrote it, as HTML."""
    rows, config = records.rows, records.config
    doctor = diagnose(rows, config, records.completions)
    script, script_hash, style = page_parts()
    return _template().render(
        name=records.name,
        headline=headline(rows),
        state=progress_state(rows, config),
        notes=records.notes,
        tiles=tiles(rows),
        charts=[draw(chart, rows, number) for number, chart in enumerate(charts(rows))],
        no_charts=missing_matplotlib(),
        doctor=diagnosis(doctor),
        xray=build_xray(records.tokens, doctor.ranked()),
        script=script,
        script_hash=script_hash,
        style=style,
        samples=samples(records.completions),
        config={key: "" if value is None else value for key, value in flat(config).items()},
    )


def headline(rows: Sequence[dict[str, Any]]) -> str:
    """The run in one line."""
    held_out = finite(rows, "eval_reward")
    if len(held_out) > 1:
        return f"Reward on held-out prompts {held_out[0]:.2f} → {held_out[-1]:.2f}"
    first, last = _ends(finite(rows, "reward"))
    return f"Reward on training prompts {first} → {last}"


def progress_state(rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> str:
    """`200 steps`, or how far a run that has not reached its last step has come."""
    done, planned = rows[-1]["step"], config.get("max_steps")
    if isinstance(planned, int) and done < planned:
        return f"step {done} of {planned}: still running, or interrupted"
    return f"{done} steps"


def tiles(rows: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(label, value) of the row of numbers under the title."""
    first, last = _ends(finite(rows, "reward"))
    held_out = [f"{value:.2f}" for value in finite(rows, "eval_reward")] or ["not measured"]
    tokens, speed = finite(rows, "num_tokens"), finite(rows, "tokens_per_second")
    return [
        ("held-out reward before", held_out[0]),
        ("held-out reward after", held_out[-1] if len(held_out) > 1 else "not measured"),
        ("training reward, first steps", first),
        ("training reward, last steps", last),
        ("steps", str(rows[-1]["step"])),
        ("time in steps", _duration(sum(finite(rows, "step_time")))),
        ("tokens", _count(tokens[-1]) if tokens else "not measured"),
        ("tokens a second", _count(statistics.median(speed)) if speed else "not measured"),
    ]


def diagnosis(doctor: Doctor) -> dict[str, Any]:
    """The doctor's findings, worst first, and what it says of the other rules."""
    states = [(rule, doctor.status(rule)) for rule in RULES]
    return {
        "findings": doctor.ranked(),
        "ok": [rule.name for rule, state in states if state == "ok"],
        "skipped": [
            (rule.name, doctor.missing(rule)) for rule, state in states if state == "skipped"
        ],
    }


def samples(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The kept completions of the first, middle and last step, ready for the template."""
    steps = sorted({row["step"] for row in rows})
    chosen = dict.fromkeys([steps[0], steps[len(steps) // 2], steps[-1]]) if steps else {}
    blocks = []
    for step in chosen:
        here = [row for row in rows if row["step"] == step]
        for group in dict.fromkeys(str(row.get("group")) for row in here):
            members = [row for row in here if str(row.get("group")) == group]
            blocks.append(
                {
                    "step": step,
                    "prompt": _excerpt(members[0].get("prompt", "")),
                    "columns": {
                        key: _excerpt(value)
                        for key, value in (members[0].get("columns") or {}).items()
                    },
                    "rows": [_sample(row) for row in members],
                }
            )
    return blocks


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    advantage = row.get("advantage")
    known = isinstance(advantage, (int, float))
    return {
        "completion": _excerpt(row.get("completion", "")),
        "reward": _number(row.get("reward")),
        "parts": {name: _number(value) for name, value in (row.get("rewards") or {}).items()},
        "advantage": f"{advantage:+.2f}" if known else "not scored",
        "finish_reason": row.get("finish_reason") or "unknown",
        "winner": known and advantage > 0,
    }


def _ends(values: Sequence[float]) -> tuple[str, str]:
    """Mean of the first and of the last tenth, at least one step each."""
    if not values:
        return "not measured", "not measured"
    size = max(len(values) // 10, 1)
    return f"{statistics.fmean(values[:size]):.2f}", f"{statistics.fmean(values[-size:]):.2f}"


def _excerpt(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    if len(text) <= _MAX_TEXT:
        return text
    return f"{text[:_MAX_TEXT]} … ({len(text) - _MAX_TEXT:,} more characters in completions.jsonl)"


def _number(value: Any) -> str:
    return short_number(value) if isinstance(value, (int, float)) else "not scored"


def _count(value: float) -> str:
    for unit, size in (("B", 1e9), ("M", 1e6)):
        if value >= size:
            return f"{value / size:.1f} {unit}"
    return f"{value:,.0f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template("report.html.jinja")
