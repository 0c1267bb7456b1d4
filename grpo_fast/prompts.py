"""A JSONL file of prompts to token ids, and which prompts a step works on.

One object a line: `prompt` is text or a list of chat messages, every other column goes to the
reward functions.
"""

import functools
import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ConfigError, InputError, nearest

EXPECTED = '{"prompt": "text, or chat messages", "answer": "..."}'
# What other trainers call the prompt column.
SYNONYMS = ("question", "query", "problem", "input", "instruction", "messages", "text")
# Reward functions get these by keyword, so that no column may have the name.
RESERVED = ("prompts", "completions", "completion_ids")
CHAT = "expected chat messages as [{'role': 'user', 'content': 'text'}]"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row of a data set."""

    row: int
    """Line in its file, from 1."""
    text: str
    """As the model sees it: the chat template is already applied."""
    token_ids: tuple[int, ...]
    columns: Mapping[str, Any]
    """All but `prompt`; a column this row lacks is None."""
    messages: tuple[Mapping[str, Any], ...] | None = None
    """The chat messages, or None for a text prompt."""


def load_prompts(path: str | Path, tokenizer, *, max_length: int) -> list[Prompt]:
    """All prompts of a JSONL file, in order, tokenized once.

    Text gets the tokenizer's special tokens, chat messages its chat template (a last message of
    the assistant is continued). Raises InputError naming `file:line`.
    """
    rows = list(_read_rows(Path(path)))
    if not rows:
        raise InputError(f"{path} has no rows: expected one object a line, like {EXPECTED}")
    chat = isinstance(rows[0][1]["prompt"], list)
    texts = [_text(f"{path}:{line}", row["prompt"], chat, tokenizer) for line, row in rows]
    # Templates write their special tokens themselves; `verbose` would complain about long prompts.
    ids = tokenizer(texts, add_special_tokens=not chat, verbose=False)["input_ids"]
    _check_lengths(path, [line for line, _ in rows], ids, max_length)
    names = list(dict.fromkeys(name for _, row in rows for name in row if name != "prompt"))
    return [
        Prompt(
            row=line,
            text=text,
            token_ids=tuple(tokens),
            columns={name: row.get(name) for name in names},
            messages=tuple(row["prompt"]) if chat else None,
        )
        for (line, row), text, tokens in zip(rows, texts, ids, strict=True)
    ]


def fingerprint(path: str | Path) -> str:
    """SHA-256 of the file: a resumed run must read the same data."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hold_out(prompts: Sequence[Prompt], count: int) -> tuple[list[Prompt], list[Prompt]]:
    """`(prompts[:-count], prompts[-count:])`: training and held-out prompts."""
    if not 0 < count < len(prompts):
        raise ConfigError(
            f"eval_prompts = {count} leaves nothing to train on of {len(prompts)} prompts: lower "
            "it, add prompts, or give eval_dataset"
        )
    return list(prompts[:-count]), list(prompts[-count:])


def step_prompts(prompts: Sequence[Prompt], *, seed: int, step: int, count: int) -> list[Prompt]:
    """The `count` prompts of `step`, counted from 1: a pure function of (seed, step).

    Steps walk through one shuffle of all prompts after the other, so that every epoch has each
    prompt once; a step may end one epoch and begin the next.
    """
    places = range((step - 1) * count, step * count)
    return [
        prompts[_shuffled(len(prompts), seed, place // len(prompts))[place % len(prompts)]]
        for place in places
    ]


@functools.lru_cache(maxsize=2)
def _shuffled(length: int, seed: int, epoch: int) -> tuple[int, ...]:
    order = list(range(length))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return tuple(order)


def _read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line from 1, row) of every line that is not blank."""
    if not path.is_file():
        kind = "is a folder" if path.is_dir() else "does not exist"
        near = nearest(path.name, (p.name for p in path.parent.glob("*.jsonl")))
        raise InputError(f"data set {path} {kind}: {near}expected a JSONL file")
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            row = _parse(f"{path}:{line}", raw)
            if row is not None:
                yield line, row


def _parse(where: str, raw: bytes) -> dict[str, Any] | None:
    try:
        # Without its end, which the column of an error in a cut line would count as a new line.
        text = raw.decode("utf-8-sig").rstrip()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: byte {error.start + 1} is not UTF-8: expected a JSONL file, like {EXPECTED}"
        ) from error
    if not text:
        return None
    try:
        row = json.loads(text)
        # An escaped half of a surrogate pair parses, but nothing can print or tokenize it.
        json.dumps(row, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise InputError(
            f"{where}: not valid JSON ({error.msg}, column {error.colno}): expected one object a "
            f"line, like {EXPECTED}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: cannot be used ({error}): mend or remove this line") from error
    if not isinstance(row, dict):
        raise InputError(
            f"{where}: found {_excerpt(row)}, expected one object a line, like {EXPECTED}"
        )
    _check_columns(where, row)
    return row


def _check_columns(where: str, row: dict[str, Any]) -> None:
    if "prompt" not in row:
        named = [name for name in SYNONYMS if name in row]
        fix = f": rename '{named[0]}' to 'prompt'" if named else ""
        raise InputError(
            f"{where}: no 'prompt' column, found columns {', '.join(row) or '(none)'}; expected "
            f"{EXPECTED}{fix}"
        )
    for name in RESERVED:
        if name in row:
            raise InputError(
                f"{where}: a column may not be called '{name}', reward functions get their own "
                f"{name}: rename it"
            )


def _text(where: str, prompt: Any, chat: bool, tokenizer) -> str:
    """What the model sees of a prompt."""
    if not isinstance(prompt, (str, list)):
        raise InputError(
            f"{where}: prompt is {_excerpt(prompt)}, expected text or a list of chat messages"
        )
    if isinstance(prompt, list) != chat:
        found, first = ("chat messages", "text") if not chat else ("text", "chat messages")
        raise InputError(
            f"{where}: prompt is {found}, the first row's is {first}: use one form in a file"
        )
    text = _render(where, prompt, tokenizer) if chat else prompt
    if not text.strip():
        raise InputError(f"{where}: prompt is empty: write one, or remove the line")
    return text


def _render(where: str, messages: list[Any], tokenizer) -> str:
    if not messages:
        raise InputError(f"{where}: prompt is an empty list, {CHAT}")
    for k, message in enumerate(messages):
        if not isinstance(message, dict):
            raise InputError(f"{where}: prompt[{k}] is {_excerpt(message)}, {CHAT}")
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = _excerpt(message[key]) if key in message else "missing"
                raise InputError(f"{where}: prompt[{k}]['{key}'] is {found}, {CHAT}")
    if not tokenizer.chat_template:
        raise InputError(
            f"{where}: prompt is chat messages, and the tokenizer has no chat template: write "
            "prompts as text, or add chat_template.jinja to the model folder"
        )
    unanswered = messages[-1]["role"] != "assistant"
    try:
        return tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=unanswered,
            continue_final_message=not unanswered,
        )
    except Exception as error:  # a template is a program of its own and may raise anything
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(
            f"{where}: the chat template refuses these messages (roles {roles}): {error}"
        ) from error


def _check_lengths(
    path: str | Path, lines: list[int], ids: list[list[int]], max_length: int
) -> None:
    for line, tokens in zip(lines, ids, strict=True):
        if not tokens:
            raise InputError(f"{path}:{line}: prompt has no tokens: write one the model can read")
    long = [k for k, tokens in enumerate(ids) if len(tokens) > max_length]
    if long:
        longest = max(len(tokens) for tokens in ids)
        raise InputError(
            f"{path}:{lines[long[0]]}: prompt has {len(ids[long[0]])} tokens, max_prompt_length = "
            f"{max_length}; {len(long)} of {len(ids)} prompts are longer, the longest has "
            f"{longest}: raise it, or shorten or remove these prompts"
        )


def _excerpt(value: Any, limit: int = 60) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else text[:limit] + "..."
