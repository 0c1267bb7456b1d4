"""The group X-ray of the report: which steps of a token log the page carries, as what, and which
groups and tokens show a finding of the doctor.

Shapes: `T` stored tokens of a step.
"""

import base64
import hashlib
import json
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import numpy as np

from .doctor import Finding
from .errors import InputError
from .loss_config import AGGREGATIONS, BELONGS_TO, LossConfig
from .records import TokenSource
from .token_log import TokenStep

PAGE = Path(__file__).parent / "page"
# In this order they are one script.
SCRIPTS = (
    "data", "charts", "loss", "advantage", "whatif", "forks", "chunks", "precision", "tokens",
    "why", "twins", "trend", "group", "fixture", "missing", "page",
)  # fmt: skip
STYLES = ("report.css", "xray.css")
# Of the embedded steps; a page of twice that still opens at once, and can be mailed.
MOST_BYTES = 5_500_000
# The first, the last and the one of the worst finding find room, however large a step is.
LEAST_STEPS = 3
MOST_TEXT = 20_000
ABSENT = (
    "No token log in this run: log_tokens_mb was 0, the log is of a trainer that does not write "
    "one, or its lines have no token_ids."
)
# Browsers have no float16 yet.
_STORED = {"float16": "float32", "float64": "float32", "int64": "int32", "bool": "uint8"}


class Xray(NamedTuple):
    island: str | None
    """JSON that is safe inside a script element; None without a token log."""
    said: str
    """How much of the log is here, or why nothing is."""
    links: dict[str, list[dict[str, str]]]
    """By rule id: {text, href} of the groups and tokens that show the finding."""
    rows: dict[tuple[int, Any], str]
    """(step, dataset row) -> the #fragment that opens that group."""


def build_xray(tokens: TokenSource | None, findings: Iterable[Finding]) -> Xray:
    """The X-ray of a token log, or one that says why there is none."""
    if tokens is None:
        return Xray(None, ABSENT, {}, {})
    try:
        stored = tokens.steps()
        if not stored:
            return Xray(None, "The token log has no step yet.", {}, {})
        findings = list(findings)
        chosen = choose_steps(stored, wanted_steps(findings, stored))
        embedded = _embed(tokens, chosen)
        if not embedded:
            return Xray(None, "No group was kept in any step of the token log.", {}, {})
        vocabulary = tokens.vocabulary()
    except InputError as error:
        return Xray(None, f"The token log is not shown: {error}.", {}, {})
    entries = [embedded[step].entry for step in sorted(embedded)]
    island = {
        "steps": entries,
        "stored": stored,
        "group_test": (PAGE / "group_test.py.txt").read_text(encoding="utf-8"),
        "vocabulary": _pieces(vocabulary, embedded.values()),
        "loss_types": {
            name: {
                "aggregation": kind,
                "options": [o for o, of in BELONGS_TO.items() if name in of],
            }
            for name, kind in AGGREGATIONS.items()
        },
        "loss_defaults": {f.name: f.default for f in fields(LossConfig) if f.name in BELONGS_TO},
    }
    said = f"{len(embedded)} of {len(stored)} step{'s' * (len(stored) > 1)} embedded"
    cut = sum(step.cut for step in embedded.values())
    said += f", {cut} groups left out to keep the page small." if cut else "."
    links = {found.rule.id: found_links(found, embedded) for found in findings}
    return Xray(to_json(island), said, links, _fragments(entries))


def choose_steps(stored: Sequence[int], wanted: Iterable[int]) -> list[int]:
    """Every stored step, the most important first: first, last, wanted, then ever finer halves."""
    order = [stored[0], stored[-1], *wanted]
    parts = 1
    while parts < len(stored):
        parts *= 2
        order += [stored[k * (len(stored) - 1) // parts] for k in range(1, parts, 2)]
    return list(dict.fromkeys([*order, *stored]))


def wanted_steps(findings: Iterable[Finding], stored: Sequence[int]) -> list[int]:
    """Of each finding the last step that is stored, worst findings first."""
    here = set(stored)
    last = [next((s for s in reversed(f.steps) if s in here), None) for f in findings]
    return [step for step in last if step is not None]


class Embedded(NamedTuple):
    entry: dict[str, Any]
    step: TokenStep
    """With the groups that are embedded."""
    size: int
    """Bytes it takes on the page."""
    cut: int
    """Groups left out."""


def _embed(tokens: TokenSource, order: Sequence[int]) -> dict[int, Embedded]:
    """Steps in this order, as many as fit; of a step no more than its share, and the first always,
    at least with a group."""
    embedded: dict[int, Embedded] = {}
    room = MOST_BYTES
    for step in order:
        read = tokens.read(step)
        if not read.meta["groups"]:
            continue
        one = _fitting(read, MOST_BYTES // min(LEAST_STEPS, len(order)))
        if embedded and one.size > room:
            break
        embedded[step] = one
        room -= one.size
    return embedded


def _fitting(step: TokenStep, room: int) -> Embedded:
    """The step with as many groups as fit, at least one, first those that teach."""
    whole = _encode(step)
    groups = step.meta["groups"]
    if whole.size <= room or len(groups) == 1:
        return whole
    # All tokens take about the same.
    left = len(step.arrays["token_ids"]) * room / whole.size
    kept: set[int] = set()
    for place in sorted(range(len(groups)), key=lambda k: not any(groups[k]["advantages"])):
        left -= sum(one["stop"] - one["start"] for one in groups[place]["completions"])
        if kept and left < 0:
            break
        kept.add(place)
    some = _encode(_only(step, [groups[k] for k in sorted(kept)]))
    gone = [group["index"] for k, group in enumerate(groups) if k not in kept]
    return some._replace(entry=some.entry | {"left_out": gone}, cut=len(gone))


def _encode(step: TokenStep) -> Embedded:
    layout, blocks = [], []
    for name, array in step.arrays.items():
        array = np.ascontiguousarray(array.astype(_STORED.get(array.dtype.name, array.dtype)))
        layout.append([name, array.dtype.name, len(array)])
        blocks.append(array.tobytes() + b"\0" * (-array.nbytes % 4))
    data = base64.b64encode(zlib.compress(b"".join(blocks), 6)).decode("ascii")
    meta = _page_meta(step)
    size = len(data) + len(json.dumps(meta))
    entry = {"meta": meta, "layout": layout, "data": data, "left_out": []}
    return Embedded(entry, step, size, 0)


def _only(step: TokenStep, groups: Sequence[dict[str, Any]]) -> TokenStep:
    """The step with these groups alone, their tokens one behind the other again."""
    moved, pieces, at = [], [], 0
    for group in groups:
        completions = []
        for one in group["completions"]:
            pieces.append(np.arange(one["start"], one["stop"]))
            completions.append(one | {"start": at, "stop": at + len(pieces[-1])})
            at += len(pieces[-1])
        moved.append(group | {"completions": completions})
    index = np.concatenate(pieces) if pieces else np.arange(0)
    arrays = {name: array[index] for name, array in step.arrays.items()}
    return step._replace(meta=step.meta | {"groups": moved}, arrays=arrays)


def _page_meta(step: TokenStep) -> dict[str, Any]:
    """What the page reads of a step: without ids and texts that the arrays have too, and which of
    them have no number. Where the log does not say the loss, "what if" begins at the defaults."""
    meta = step.meta
    groups = [
        {k: v for k, v in group.items() if k != "prompt_ids"}
        | {"prompt": _excerpt(group.get("prompt", ""))}
        | {"completions": [_without(one, "text") for one in group["completions"]]}
        for group in meta["groups"]
    ]
    live = step.arrays["mask"] > 0
    unmeasured = [
        name
        for name, values in step.arrays.items()
        if values.dtype.kind == "f" and not np.isfinite(values[live]).any()
    ]
    known = meta.get("loss") is not None
    more = {"unmeasured": unmeasured, "loss_known": known}
    return meta | {"groups": groups} | more | ({} if known else {"loss": asdict(LossConfig())})


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def _excerpt(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    cut = len(text) - MOST_TEXT
    return text if cut <= 0 else f"{text[:MOST_TEXT]} … ({cut:,} more characters)"


def _pieces(vocabulary: dict[int, str], embedded: Iterable[Embedded]) -> dict[str, str]:
    """The text of every id on the page."""
    used: set[int] = set()
    for one in embedded:
        used |= set(np.unique(one.step.arrays["token_ids"]).tolist())
        push = one.step.meta.get("push") or {}
        used |= {pair[0] for side in ("up", "down") for pair in push.get(side, ())}
        used.add(one.step.meta.get("eos_token_id"))
    return {str(i): vocabulary[i][:400] for i in sorted(used - {None}) if i in vocabulary}


def to_json(value: Any) -> str:
    """JSON that no text in it can break out of: `<`, U+2028 and lone surrogates are escaped, NaN
    is null."""
    text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _fragment(step: int, group: Any, **more: Any) -> str:
    return "#" + urlencode({"step": step, "group": group} | more)


def _fragments(entries: Sequence[dict[str, Any]]) -> dict[tuple[int, Any], str]:
    return {
        (entry["meta"]["step"], group.get("row", group["index"])): _fragment(
            entry["meta"]["step"], group["index"]
        )
        for entry in entries
        for group in entry["meta"]["groups"]
    }


class View(NamedTuple):
    """What shows a rule's finding: the group of the largest score above 0, and its token."""

    name: str
    score: Callable[[dict[str, Any], dict[str, np.ndarray]], float]
    channel: str = ""
    token: Callable[[dict[str, np.ndarray]], np.ndarray | None] | None = None
    """[T] of which the largest is named."""


def _equal_rewards(group: dict[str, Any], _: Any) -> float:
    return float(len({r for r in group["rewards"] if r is not None}) <= 1)


def _truncated(group: dict[str, Any], _: Any) -> float:
    ends = [one.get("finish_reason") for one in group["completions"]]
    return ends.count("length") / max(len(ends), 1)


def _lengths(group: dict[str, Any], _: Any) -> float:
    return sum(one["stop"] - one["start"] for one in group["completions"])


def _best(group: dict[str, Any], _: Any) -> float:
    return 1 + max((r for r in group["rewards"] if r is not None), default=-math.inf)


def _mean_of(values: Callable[[dict[str, np.ndarray]], np.ndarray | None]):
    def score(group: dict[str, Any], arrays: dict[str, np.ndarray]) -> float:
        found = values(arrays)
        if found is None or not group["completions"]:
            return 0.0
        spans = [slice(one["start"], one["stop"]) for one in group["completions"]]
        live = np.concatenate([found[s][arrays["mask"][s] > 0] for s in spans])
        live = live[np.isfinite(live)]
        return float(live.mean()) if len(live) else 0.0

    return score


def _kl(arrays: dict[str, np.ndarray]) -> np.ndarray | None:
    return arrays.get("kl")


def _mass(arrays: dict[str, np.ndarray]) -> np.ndarray | None:
    return arrays["gradient_mass"]


def _far(arrays: dict[str, np.ndarray]) -> np.ndarray:
    return np.abs(np.log(np.maximum(arrays["ratio"], 1e-30)))


def _gap(arrays: dict[str, np.ndarray]) -> np.ndarray | None:
    sampler = arrays.get("sampler_logprobs")
    old = arrays.get("old_logprobs", arrays["logprobs"])
    return None if sampler is None else np.abs(old - sampler)


_EQUAL = View("equal rewards", _equal_rewards)
_KL = View("highest KL", _mean_of(_kl), "kl", _kl)
_RATIO = View("ratios furthest from 1", _mean_of(_far), "ratio", _far)
_SAMPLER = View("sampler furthest off", _mean_of(_gap), "gap", _gap)
_SHOWS = {
    "R1": _EQUAL,
    "R2": _EQUAL,
    "R3": _KL,
    "R4": _KL,
    "R5": _SAMPLER,
    "R6": _RATIO,
    "R7": _RATIO,
    "R8": View("least entropy", _mean_of(lambda a: 1 / (1e-3 + a["entropy"])), "entropy"),
    "R9": View("truncated", _truncated),
    "R10": View("longest", _lengths),
    "R11": View("best reward", _best),
    "R12": View("best reward", _best),
    "R13": View("most gradient", _mean_of(_mass), "mass", _mass),
    "R14": _EQUAL,
    "R15": _SAMPLER,
}


def found_links(found: Finding, embedded: dict[int, Embedded]) -> list[dict[str, str]]:
    """{text, href} of the group, and token, that show a finding best in its last embedded step."""
    view = _SHOWS.get(found.rule.id)
    step = next((s for s in reversed(found.steps) if s in embedded), None)
    if view is None or step is None:
        return []
    meta, arrays = embedded[step].step.meta, embedded[step].step.arrays
    scored = [(view.score(group, arrays), -k) for k, group in enumerate(meta["groups"])]
    score, place = max(scored, default=(0.0, 0))
    if not score > 0:
        return []
    group = meta["groups"][-place]
    more = {"channel": view.channel} if view.channel else {}
    values = view.token(arrays) if view.token else None
    if values is not None:
        index, at = _largest(group, values, arrays["mask"])
        more["token"] = f"{index}.{at}"
    text = f"step {step} group {group['index']}: {view.name}"
    return [{"text": text, "href": _fragment(step, group["index"], **more)}]


def _largest(group: dict[str, Any], values: np.ndarray, mask: np.ndarray) -> tuple[int, int]:
    """(completion, token) of the largest value among the group's live tokens."""
    best = (-math.inf, 0, 0)
    for one in group["completions"]:
        part = slice(one["start"], one["stop"])
        live = np.where((mask[part] > 0) & np.isfinite(values[part]), values[part], -math.inf)
        if len(live) and live.max() > best[0]:
            best = (float(live.max()), one["index"], int(live.argmax()))
    return best[1:]


def page_parts() -> tuple[str, str, str]:
    """(script, its hash for the page's policy, style): all the page runs is this text."""
    files = [(PAGE / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS]
    script = '"use strict";\n(() => {\n' + "\n".join(files) + "})();\n"
    assert "</script" not in script
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    style = "".join((PAGE / name).read_text(encoding="utf-8") for name in STYLES)
    return script, f"sha256-{digest}", style
