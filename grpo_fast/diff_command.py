"""The command `grpo-fast diff`: two runs of any trainers, and where they part."""

import argparse
import json
import math
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from .doctor import flat, ranges
from .errors import ConfigError
from .history import measured
from .records import Records, open_records

SCHEMA = 1
WIDTH = 80
ABOUT = "Say in which options two runs differ, and from which step on in which numbers."
EPILOG = """\
A run is what `grpo-fast doctor` opens: of any trainer, finished or not. Where a run lies
(output_dir, existing, resume) and how long things took are no difference. Exit code 0: the same,
1: different, 2: a wrong option, or no readable run.

  grpo-fast diff runs/a runs/b
  grpo-fast diff runs/demo outputs/trl --rtol 1e-5 --json"""
# Of where and how a run was started.
PLACE = {"schema", "output_dir", "existing", "resume"}
CLOCKS = ("step_time", "time/", "train_runtime", "timing_s/", "perf/")
# In this order where both runs have them.
MAIN = (
    "eval_reward",
    "reward",
    "reward_std",
    "frac_reward_zero_std",
    "kl",
    "entropy",
    "clip_ratio/region_mean",
    "loss",
    "grad_norm",
    "completions/mean_length",
    "completions/clipped_ratio",
    "tokens_per_second",
    "step_time",
)
_MOST_LISTED = 8


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see grpo-fast diff --help)")


def parser() -> argparse.ArgumentParser:
    parsed = _Parser(
        "grpo-fast diff",
        description=ABOUT,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parsed.add_argument("a", metavar="RUN_A", type=Path)
    parsed.add_argument("b", metavar="RUN_B", type=Path)
    parsed.add_argument("--json", action="store_true", help="print JSON")
    parsed.add_argument(
        "--rtol",
        metavar="X",
        type=float,
        default=0.0,
        help="numbers no further apart than this, relative to the larger, are the same (default: "
        "0, bit for bit)",
    )
    return parsed


def main(arguments: Sequence[str]) -> int:
    """Exit code 0 for the same, 1 for different. Raises ConfigError for a wrong option, InputError
    for a run that cannot be read."""
    if {"-h", "--help"} & set(arguments):
        parser().print_help()
        return 0
    options = parser().parse_args(list(arguments))
    if not 0 <= options.rtol < 1:
        raise ConfigError(f"--rtol {options.rtol}: expected a number from 0 to 1")
    a, b = open_records(options.a), open_records(options.b)
    found = compare(a, b, options.rtol)
    if options.json:
        runs = {"a": str(options.a), "b": str(options.b)}
        print(json.dumps({"schema": SCHEMA, **runs, **_strict(found)}, indent=1, allow_nan=False))
    else:
        print(as_text(found, options.a, options.b, a, b))
    return int(not found["same"])


def compare(a: Records, b: Records, rtol: float = 0.0) -> dict[str, Any]:
    """Every difference, as plain values: config, metrics, and the main numbers side by side."""
    config = compare_configs(a.config, b.config)
    metrics = compare_metrics(a.rows, b.rows, rtol)
    same = not any(config.values()) and metrics["first_step"] is None
    same = same and not (metrics["steps_only_a"] or metrics["steps_only_b"])
    return {"same": same, "config": config, "metrics": metrics, "main": side_by_side(a, b)}


def compare_configs(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    one, other = ({k: v for k, v in flat(x).items() if k not in PLACE} for x in (a, b))
    return {
        "changed": {k: [one[k], other[k]] for k in one if k in other and one[k] != other[k]},
        "only_a": {k: v for k, v in one.items() if k not in other},
        "only_b": {k: v for k, v in other.items() if k not in one},
    }


def compare_metrics(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], rtol: float
) -> dict[str, Any]:
    """Step by step, of the metrics and steps that both have; times are left out."""
    one, other = ({row["step"]: row for row in rows} for rows in (a, b))
    names_a, names_b = ({n for row in rows for n in row if not is_clock(n)} for rows in (a, b))
    shared = sorted(names_a & names_b - {"step"})
    both = [step for step in one if step in other]
    apart: dict[int, dict[str, list[Any]]] = {}
    largest: dict[str, list[Any]] = {}
    for step in both:
        for name in shared:
            x, y = one[step].get(name), other[step].get(name)
            gap = distance(x, y)
            if gap > rtol:
                apart.setdefault(step, {})[name] = [x, y, gap]
                if gap > largest.get(name, [0, 0.0])[1]:
                    largest[name] = [step, gap]
    first = next(iter(apart), None)
    return {
        "steps": len(both),
        "compared": len(shared),
        "equal_steps": len(both) if first is None else both.index(first),
        "first_step": first,
        "at_first_step": apart.get(first, {}),
        "different_steps": ranges(list(apart)),
        "largest": dict(sorted(largest.items(), key=lambda item: -item[1][1])),
        "only_a": sorted(names_a - names_b),
        "only_b": sorted(names_b - names_a),
        "steps_only_a": ranges([step for step in one if step not in other]),
        "steps_only_b": ranges([step for step in other if step not in one]),
    }


def distance(x: Any, y: Any) -> float:
    """|x - y| over the larger of the two; 0 for the same, NaN and none included; else infinity."""
    if x == y or (x != x and y != y):
        return 0.0
    if not (measured(x) and measured(y)):
        return math.inf
    return abs(x - y) / max(abs(x), abs(y))


def side_by_side(a: Records, b: Records) -> dict[str, list[float | None]]:
    """[a, b] of each main metric that one of them has: mean of the last tenth of its values."""
    found = {}
    for name in MAIN:
        values = [[r[name] for r in run.rows if measured(r.get(name))] for run in (a, b)]
        ends = [statistics.fmean(x[-max(len(x) // 10, 1) :]) if x else None for x in values]
        if ends != [None, None]:
            found[name] = ends
    return found


def is_clock(name: str) -> bool:
    """Whether a metric is of time, which no two runs share."""
    return name.startswith(CLOCKS) or name.endswith("_per_second") or name.endswith("_runtime")


def as_text(found: Mapping[str, Any], path_a: Path, path_b: Path, a: Records, b: Records) -> str:
    """The differences in lines of 80 columns: config, first step, main numbers."""
    lines = []
    for mark, path, run in (("A", path_a, a), ("B", path_b, b)):
        about = f" ({run.source}, {len(run.rows)} rows to step {run.rows[-1]['step']})"
        lines.append(f"{mark}  {_cut(str(path), WIDTH - 3 - len(about))}{about}")
    lines += ["", *_config_lines(found["config"], bool(a.config), bool(b.config))]
    lines += ["", *_metric_lines(found["metrics"])]
    rows = [(name, *map(_short, ends), _change(*ends), "") for name, ends in found["main"].items()]
    lines += ["", *_table(("mean of the last tenth", "A", "B", "change", ""), rows)]
    # Names and values come from a file, and a terminal obeys control characters.
    return "\n".join("".join(c if c.isprintable() else "?" for c in line) for line in lines)


def _config_lines(config: Mapping[str, Any], has_a: bool, has_b: bool) -> list[str]:
    if not (has_a and has_b):
        missing = "A and B have" if not (has_a or has_b) else "A has" if has_b else "B has"
        return [f"config: not compared, {missing} none"]
    if not any(config.values()):
        return ["config: the same"]
    lines = [f"config: {len(config['changed'])} keys differ"] if config["changed"] else ["config:"]
    rows = [(key, str(x), str(y), "", "") for key, (x, y) in config["changed"].items()]
    lines += _table(("", "A", "B", "", ""), rows) if rows else []
    for mark in ("a", "b"):
        if only := config[f"only_{mark}"]:
            lines += _wrapped(f"only in {mark.upper()}", list(only))
    return lines


def _metric_lines(metrics: Mapping[str, Any]) -> list[str]:
    steps, first = metrics["steps"], metrics["first_step"]
    if first is None:
        lines = [f"metrics: identical for {steps} steps ({metrics['compared']} metrics)"]
    else:
        before = metrics["equal_steps"]
        here = metrics["at_first_step"]
        lines = [
            f"metrics: identical for {before} steps, first difference at step {first}, in "
            f"{len(here)} of {metrics['compared']}"
        ]
        ranked = sorted(here.items(), key=lambda item: -item[1][2])[:_MOST_LISTED]
        rows = [
            (name, _short(x), _short(y), _relative(gap), _largest(metrics["largest"].get(name)))
            for name, (x, y, gap) in ranked
        ]
        lines += _table((f"step {first}", "A", "B", "relative", "largest"), rows)
        if len(here) > len(rows):
            lines.append(f"  and {len(here) - len(rows)} more")
    for mark in ("a", "b"):
        if metrics[f"steps_only_{mark}"]:
            spans = [f"{x}-{y}" if x != y else f"{x}" for x, y in metrics[f"steps_only_{mark}"]]
            lines += _wrapped(f"steps only in {mark.upper()}", spans)
        if metrics[f"only_{mark}"]:
            lines += _wrapped(f"metrics only in {mark.upper()}", metrics[f"only_{mark}"])
    return lines


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Name and columns; what is too long for 80 columns is cut in the middle."""
    table = [tuple(head), *rows]
    widths = [min(max(len(row[k]) for row in table), limit) for k, limit in _LIMITS]
    lines = []
    for name, *cells in table:
        fields = [f"  {_cut(name, widths[0]):<{widths[0]}}"]
        fields += [f"{_cut(c, w):>{w}}" for c, w in zip(cells, widths[1:], strict=True) if w]
        lines.append("  ".join(fields).rstrip())
    return lines


# Widths add up to 80 with what stands between the columns.
_LIMITS = tuple(enumerate((23, 12, 12, 8, 15)))


def _cut(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    left = (width - 1) // 2
    return f"{text[:left]}…{text[len(text) - (width - 1 - left) :]}"


def _wrapped(label: str, names: Sequence[str]) -> list[str]:
    text = f"{label} ({len(names)}): {', '.join(names[:_MOST_LISTED])}"
    text += ", ..." if len(names) > _MOST_LISTED else ""
    return textwrap.wrap(
        text, WIDTH, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False
    )


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return "-" if value is None else str(value)


def _relative(gap: float) -> str:
    return f"{gap:.1e}" if math.isfinite(gap) else "-"


def _largest(found: Sequence[Any] | None) -> str:
    return f"{_relative(found[1])} at {found[0]}" if found else ""


def _change(x: float | None, y: float | None) -> str:
    return f"{y - x:+.2g}" if x is not None and y is not None else "-"


def _strict(value: Any) -> Any:
    """Without NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
