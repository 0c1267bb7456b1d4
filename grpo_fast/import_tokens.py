"""Token ids in JSON lines, and what is known of each token: a token log for the X-ray.

What a line does not have is NaN, "not measured". Shapes: `T` tokens of a step.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import InputError
from .token_log import COLUMNS, MORE_COLUMNS, SCHEMA, VOCABULARY, TokenStep, vocabulary_in

IDS = ("token_ids", "completion_ids")
# One number a token, or null.
NUMBERS = sorted(({*COLUMNS, *MORE_COLUMNS}) - {"token_ids", "mask", "keep"})
FIELDS = {*IDS, *NUMBERS, "mask", "prompt_ids", "tokens"}
TOKENIZER = "tokenizer"
# A row of completions.jsonl has its tokens under this name, until `take_tokens`.
KEY = "of_tokens"


class Tokens(NamedTuple):
    """Of one completion."""

    columns: dict[str, np.ndarray]
    prompt_ids: list[int]
    texts: list[str]
    """Of each token; empty where not known."""


def read_tokens(row: Mapping[str, Any], where: str) -> Tokens | None:
    """What a line says of its tokens; None without ids.

    Raises InputError naming the line: other lengths, other types, a name that is none.
    """
    name = next((name for name in IDS if isinstance(row.get(name), list)), None)
    if name is None:
        return None
    ids = _ids(row[name], name, where)
    for other, values in row.items():
        if other not in FIELDS and _looks_like_column(values, len(ids)):
            raise InputError(
                f"{where}: '{other}' has one number a token and is no name for that: expected "
                f"{', '.join(NUMBERS)} or mask"
            )
    columns = {"token_ids": np.array(ids, np.int32), "mask": np.ones(len(ids), np.uint8)}
    for column in NUMBERS:
        if row.get(column) is not None:
            values = _of_each(row[column], column, ids, where)
            numbers = [_number(x, f"{column}[{k}]", where) for k, x in enumerate(values)]
            columns[column] = np.array(numbers, np.float32)
    if row.get("mask") is not None:
        for k, x in enumerate(_of_each(row["mask"], "mask", ids, where)):
            if x not in (0, 1):
                raise InputError(f"{where}: mask[{k}] is {x!r}, expected 0 or 1")
        columns["mask"] = np.array(row["mask"], np.uint8)
    texts = row.get("tokens") or []
    for k, text in enumerate(texts and _of_each(texts, "tokens", ids, where)):
        if not isinstance(text, str):
            raise InputError(f"{where}: tokens[{k}] is {text!r}, expected its text")
    return Tokens(columns, _ids(row.get("prompt_ids") or [], "prompt_ids", where), texts)


def take_tokens(
    completions: Sequence[dict[str, Any]], places: Iterable[Path], *, computed: bool
) -> "LineTokens | None":
    """Take the tokens out of rows of completions; None where none has any.

    places: folders in which a vocabulary may lie. computed: advantages were, by the group's
    standard deviation.
    """
    steps: dict[int, dict[Any, list[dict[str, Any]]]] = {}
    for row in completions:
        steps.setdefault(row["step"], {}).setdefault(row["group"], []).append(
            row | {KEY: row.pop(KEY, None)}
        )
    kept = {
        step: groups
        for step, groups in steps.items()
        if any(row[KEY] is not None for rows in groups.values() for row in rows)
    }
    rule = {"scale_rewards": "group", "baseline": "mean"} if computed else {}
    return LineTokens(kept, rule, list(places)) if kept else None


class LineTokens:
    """A `records.TokenSource` of lines."""

    def __init__(
        self,
        groups: Mapping[int, Mapping[Any, list[dict[str, Any]]]],
        rule: dict[str, str],
        places: Sequence[Path],
    ) -> None:
        self._groups, self._rule, self._places = groups, rule, places

    def steps(self) -> list[int]:
        return sorted(self._groups)

    def read(self, step: int) -> TokenStep:
        groups = [_group(k, rows) for k, rows in enumerate(self._groups[step].values())]
        rows = [row for rows in self._groups[step].values() for row in rows]
        told = [row[KEY] for row in rows if row[KEY] is not None]
        at = 0
        for group in groups:
            for one in group["completions"]:
                one["start"], one["stop"] = at, at + one.pop("length")
                at = one["stop"]
        arrays = _joined([tokens.columns for tokens in told])
        meta = {
            "schema": SCHEMA,
            "step": step,
            "iteration": 0,
            "loss": None,
            "temperature": 1.0,
            "eos_token_id": None,
            "eos_token_ids": [],
            "advantage": self._rule,
            "totals": {
                "groups": len(groups),
                "completions": len(rows),
                "sequences": len(rows),
                # Of those without ids it is not known.
                "tokens": int(arrays["mask"].sum()) if len(told) == len(rows) else None,
                "max_completion_length": None,
            },
            "denominator": None,
            "kept": f"the {len(told)} of {len(rows)} completions in the log that have token ids",
            "groups": [group for group in groups if group["completions"]],
        }
        return TokenStep(meta, arrays)

    def vocabulary(self) -> dict[int, str]:
        """The texts that lines have, then those of a vocabulary or a tokenizer beside them."""
        texts: dict[int, str] = {}
        used: set[int] = set()
        for groups in self._groups.values():
            for row in (row for rows in groups.values() for row in rows):
                if row[KEY] is not None:
                    ids = row[KEY].columns["token_ids"].tolist()
                    used |= {*ids, *row[KEY].prompt_ids}
                    texts |= dict(zip(ids, row[KEY].texts, strict=False))
        for place in self._places:
            if (place / VOCABULARY).is_file():
                texts = vocabulary_in(place / VOCABULARY) | texts
            file = place / TOKENIZER / "tokenizer.json"
            if file.is_file():
                texts = _texts(file, used - texts.keys()) | texts
        return texts


def _group(index: int, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    told = [row[KEY] for row in rows if row[KEY] is not None]
    return {
        "index": index,
        "prompt": rows[0]["prompt"],
        "prompt_ids": told[0].prompt_ids if told else [],
        "chosen_by": [],
        "size": len(rows),
        "rewards": [row["reward"] for row in rows],
        "advantages": [row["advantage"] for row in rows],
        "completions": [
            {
                "index": k,
                "reward": row["reward"],
                "rewards": row["rewards"],
                "advantage": row["advantage"],
                "finish_reason": row["finish_reason"],
                "text": row["completion"],
                "weight": None,
                "length": len(row[KEY].columns["token_ids"]),
            }
            for k, row in enumerate(rows)
            if row[KEY] is not None
        ],
    }


def _joined(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """One column of all; without old log-probs nobody knows whether the policy was its own."""
    names = dict.fromkeys([*COLUMNS, "old_logprobs", *(name for part in parts for name in part)])

    def column(part: Mapping[str, np.ndarray], name: str) -> np.ndarray:
        return part[name] if name in part else np.full(len(part["token_ids"]), np.nan, np.float32)

    return {name: np.concatenate([column(part, name) for part in parts]) for name in names}


def _texts(file: Path, ids: Iterable[int]) -> dict[int, str]:
    """Of these ids, by the tokenizer in tokenizer.json."""
    try:
        from tokenizers import Tokenizer
    except ModuleNotFoundError:
        raise InputError(f"{file} needs tokenizers to be read: pip install tokenizers") from None
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # of Rust, without a type of its own
        raise InputError(f"{file} is no tokenizer ({error}): remove it") from None
    texts = {}
    for i in sorted(ids):
        piece = tokenizer.id_to_token(i)
        if piece is not None:
            text = tokenizer.decode([i], skip_special_tokens=False)
            # SentencePiece's decoder takes a leading space off.
            led = piece.startswith("\u2581") and not text.startswith(" ")
            texts[i] = f" {text}" if led else text
    return texts


def _ids(values: Any, name: str, where: str) -> list[int]:
    if not isinstance(values, list):
        raise InputError(f"{where}: {name} is {values!r}, expected a list of token ids")
    for k, x in enumerate(values):
        if type(x) is not int or not 0 <= x < 2**31:
            raise InputError(f"{where}: {name}[{k}] is {x!r}, expected a whole number from 0 up")
    return values


def _of_each(values: Any, name: str, ids: Sequence[int], where: str) -> list[Any]:
    if not isinstance(values, list) or len(values) != len(ids):
        found = f"{len(values)} entries" if isinstance(values, list) else json.dumps(values)[:80]
        raise InputError(f"{where}: {name} has {found} for {len(ids)} token ids, expected one each")
    return values


def _number(value: Any, name: str, where: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{where}: {name} is {value!r}, expected a number or null")
    return float(value)


def _looks_like_column(values: Any, count: int) -> bool:
    return (
        isinstance(values, list)
        and len(values) == count > 0
        and any(isinstance(x, float) for x in values)
        and all(x is None or isinstance(x, (int, float)) for x in values)
    )
