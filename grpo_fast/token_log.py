"""tokens/ of a run folder: one .npz a kept step, and the text of every token id in them.

What is read is what is written here, by `token_step.py` or by a host; no torch. One entry a token,
all kept completions one behind the other, `meta` says which is whose. `T` tokens.
"""

import io
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .errors import InputError

FOLDER = "tokens"
VOCABULARY = "vocabulary.jsonl"
SCHEMA = 1
COLUMNS = {
    "token_ids": np.int32,
    "logprobs": np.float32,
    "entropy": np.float16,
    "ratio": np.float32,
    "gradient_mass": np.float32,
    "mask": np.uint8,
}
# Those a step may have beside them.
MORE_COLUMNS = {
    "old_logprobs": np.float32,
    "ref_logprobs": np.float32,
    "sampler_logprobs": np.float32,
    "kl": np.float32,
    "keep": np.uint8,
}
_STEP = re.compile(r"step-(\d+)\.npz")
_LINES = {"encoding": "utf-8", "errors": "backslashreplace", "newline": "\n"}
# Log-probs are noise to deflate: a higher level takes longer and gains nothing.
_LEVEL = 1


class TokenStep(NamedTuple):
    meta: dict[str, Any]
    """Of the step: loss, totals, push table, groups with their completions."""
    arrays: dict[str, np.ndarray]
    """[T] each; completion `c` is `[c["start"] : c["stop"]]`."""


class _Written(NamedTuple):
    step: int
    """Bytes."""
    lines: int
    """Bytes of the vocabulary."""
    ids: set[int]
    """New in the vocabulary."""


class TokenLog:
    """Writes steps while they fit in `budget_mb` (million bytes), spread over `max_steps`.

    background: deflate and write in another thread while the next step is made, at most one step at
    a time. What goes wrong there is raised by the next call of this log, at the latest by `close`.
    """

    def __init__(
        self, folder: str | Path, *, budget_mb: float, max_steps: int, background: bool = False
    ) -> None:
        self.folder = Path(folder) / FOLDER
        self.budget = int(budget_mb * 1e6)
        self.max_steps = max_steps
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*.writing"):
            left.unlink()
        steps = read_token_steps(folder)
        sizes = [_path(self.folder, step).stat().st_size for step in steps]
        self._known = set(read_vocabulary(folder))
        vocabulary = self.folder / VOCABULARY
        _drop_unfinished_line(vocabulary)
        self.steps = len(steps)
        """Kept ones, without one that is being written: `flush` waits for it."""
        self.spent = sum(sizes) + (vocabulary.stat().st_size if vocabulary.is_file() else 0)
        """Bytes of those."""
        self._largest, self._latest = max(sizes, default=0), sizes[-1] if sizes else 0
        self._worker = ThreadPoolExecutor(1, "token-log") if background else None
        self._pending: Future[_Written | None] | None = None

    def due(self, step: int) -> bool:
        """Whether the budget's share of the steps so far has room: the first and the last step's
        is kept for them."""
        self.flush()
        if self.steps == 0 or step >= self.max_steps:
            return self.spent < self.budget
        share = (self.budget - self._largest) * step / self.max_steps
        return self.spent + self._latest <= share

    def write(
        self,
        step: int,
        meta: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        text_of: Callable[[int], str],
    ) -> bool:
        """Keep a step that is due, whole or not at all; False where it is above the budget.

        text_of: the text of a token id. In the background True says that the step was taken, and
        `meta` and `arrays` are not to be changed any more; the last step is waited for.
        """
        self.flush()
        kept = f"{meta['kept']}; {self._kept_steps(step)}"
        meta = {"schema": SCHEMA, "step": step, **meta, "kept": kept}
        # Here, because a tokenizer is not to be asked by two threads at once.
        texts = {i: text_of(i) for i in sorted(_ids(meta, arrays) - self._known)}
        if self._worker is None:
            return self._count(self._put(step, meta, arrays, texts))
        self._pending = self._worker.submit(self._put, step, meta, arrays, texts)
        return self.flush() if step >= self.max_steps else True

    def flush(self) -> bool:
        """Wait for the step that is being written, and count it; raises what went wrong with it.
        False where it was above the budget."""
        pending, self._pending = self._pending, None
        return True if pending is None else self._count(pending.result())

    def close(self) -> None:
        """`flush`, and end the thread."""
        try:
            self.flush()
        finally:
            if self._worker is not None:
                self._worker.shutdown()

    def _put(
        self,
        step: int,
        meta: Mapping[str, Any],
        arrays: Mapping[str, np.ndarray],
        texts: Mapping[int, str],
    ) -> _Written | None:
        """The files of a step, or None where they are above the budget; changes nothing here."""
        data = _encode(_to_json(meta), arrays)
        lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in texts.items())
        if self.spent + len(data) + len(lines) > self.budget:
            return None
        # The texts first: whoever finds a step finds the text of its ids.
        if lines:
            with (self.folder / VOCABULARY).open("a", **_LINES) as file:
                file.write(lines)
        path = _path(self.folder, step)
        staging = path.with_name(f".{path.name}.writing")
        staging.write_bytes(data)
        staging.replace(path)
        return _Written(len(data), len(lines), set(texts))

    def _count(self, written: _Written | None) -> bool:
        if written is None:
            return False
        self._known |= written.ids
        self.spent += written.step + written.lines
        self.steps += 1
        self._largest, self._latest = max(self._largest, written.step), written.step
        return True

    def _kept_steps(self, step: int) -> str:
        if self.steps + 1 == step:
            return "every step so far"
        return f"{self.steps + 1} of {step} steps so far, for {self.budget / 1e6:g} MB"


def truncate_tokens(folder: str | Path, step: int) -> None:
    """Remove the files of steps later than `step`."""
    for later in read_token_steps(folder):
        if later > step:
            _path(Path(folder) / FOLDER, later).unlink()


def read_token_steps(folder: str | Path) -> list[int]:
    """The steps of which a run folder keeps tokens, ascending; none where it keeps none."""
    path = Path(folder) / FOLDER
    names = [_STEP.fullmatch(file.name) for file in path.iterdir()] if path.is_dir() else []
    return sorted(int(name[1]) for name in names if name)


def read_token_step(folder: str | Path, step: int) -> TokenStep:
    """One kept step.

    Raises InputError naming the file: one that is not there, is damaged or has another schema.
    """
    path = _path(Path(folder) / FOLDER, step)
    if not path.is_file():
        steps = read_token_steps(folder)
        known = f"kept are {len(steps)} from {steps[0]} to {steps[-1]}" if steps else "none is kept"
        raise InputError(f"{path} not found: tokens of step {step} were not kept, {known}")
    try:
        with np.load(path, allow_pickle=False) as file:
            meta = json.loads(str(file["meta"]))
            _check_schema(path, meta)
            arrays = {name: file[name] for name in file.files if name != "meta"}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} is damaged ({error}): remove it") from None
    _check(path, meta, arrays)
    return TokenStep(meta, arrays)


def read_vocabulary(folder: str | Path) -> dict[int, str]:
    """Token id -> text, of every id in the kept steps; an unfinished last line is left out."""
    path = Path(folder) / FOLDER / VOCABULARY
    return vocabulary_in(path) if path.is_file() else {}


def vocabulary_in(path: Path) -> dict[int, str]:
    """The same, of a file."""
    found = {}
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            found[int(row["id"])] = str(row["text"])
        except (ValueError, TypeError, KeyError):
            raise InputError(
                f'{path}:{number}: expected {{"id": 5, "text": "ab"}}: mend or remove the line'
            ) from None
    return found


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}.npz"


def _check_schema(path: Path, meta: Any) -> None:
    found = meta.get("schema") if isinstance(meta, dict) else None
    if found != SCHEMA:
        raise InputError(
            f"{path} has schema {found!r}, this version reads {SCHEMA}: pip install -U grpo-fast"
        )


def _check(path: Path, meta: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    missing = sorted(COLUMNS.keys() - arrays.keys())
    if missing or "groups" not in meta:
        raise InputError(f"{path} has no {missing[0] if missing else 'groups'}: remove it")
    try:
        ends = [c["stop"] for group in meta["groups"] for c in group["completions"]]
        whole = max(ends, default=0) <= len(arrays["mask"])
    except (TypeError, KeyError):
        whole = False
    if not whole or len({array.shape for array in arrays.values()}) != 1:
        raise InputError(f"{path} is damaged (its groups are not those of its columns): remove it")


def _encode(meta: str, arrays: Mapping[str, np.ndarray]) -> bytes:
    """As `numpy.savez_compressed` writes it, the same bytes at every time of day."""
    dtypes = COLUMNS | MORE_COLUMNS
    entries = {name: np.asarray(values, dtypes[name]) for name, values in arrays.items()}
    entries["meta"] = np.array(meta)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, values in entries.items():
            column = io.BytesIO()
            np.lib.format.write_array(column, values, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy")
            file.writestr(entry, column.getbuffer(), zipfile.ZIP_DEFLATED, _LEVEL)
    return buffer.getvalue()


def _ids(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> set[int]:
    """Every token id that a reader will want to show."""
    push = meta.get("push", {})
    known = {i for name in ("up", "down") for i, _ in push.get(name, ())}
    prompts: Iterable[list[int]] = (group["prompt_ids"] for group in meta["groups"])
    # A masked id may be none at all.
    ids = np.asarray(arrays["token_ids"], COLUMNS["token_ids"]).tolist()
    ids = {i for i in set(ids) if i >= 0}
    return known.union(ids, *prompts)


def _to_json(meta: dict[str, Any]) -> str:
    """Strict JSON, NaN and infinity as null."""
    try:
        return json.dumps(meta, allow_nan=False)
    except ValueError:
        return json.dumps(_strict(meta), allow_nan=False)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _drop_unfinished_line(path: Path) -> None:
    """A line that a killed run left would swallow the next one."""
    if path.is_file():
        whole = path.read_bytes()
        if not whole.endswith(b"\n") and whole:
            with path.open("r+b") as file:
                file.truncate(whole.rfind(b"\n") + 1)
