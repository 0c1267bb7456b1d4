"""Reward functions, called the way TRL calls them, and their answers checked one by one.

Shapes: `S` completions of one call.
"""

import asyncio
import copy
import inspect
import math
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from .errors import ConfigError, RewardError, nearest
from .plugins import describe, load_function, raised_at
from .prompts import Prompt

# Rewards become float32 tensors.
LARGEST_REWARD = 3.4e38


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """One term of the reward."""

    name: str
    """In metrics: `rewards/{name}/mean`."""
    function: Callable[..., Any]
    weight: float = 1.0


class Scores(NamedTuple):
    total: list[float]
    """[S] weighted sums of what applied; NaN where nothing did."""
    parts: dict[str, list[float]]
    """[S] a reward, before its weight; NaN where it did not apply."""


def load_rewards(specs: Sequence[str], weights: Sequence[float] = ()) -> list[RewardFunction]:
    """One RewardFunction a `file.py:function`; all weights 1 when none are given.

    Functions of the same name in two files are told apart as `file.function`.
    """
    functions = [load_function(spec) for spec in specs]
    names = [spec.rpartition(":")[2] for spec in specs]
    longer = [f"{Path(spec.rpartition(':')[0]).stem}.{spec.rpartition(':')[2]}" for spec in specs]
    count = Counter(names)
    names = [full if count[name] > 1 else name for name, full in zip(names, longer, strict=True)]
    if len(set(names)) < len(names):
        name, _ = Counter(names).most_common(1)[0]
        raise ConfigError(f"reward '{name}' is given twice: give it once, with a weight")
    return [
        RewardFunction(*entry)
        for entry in zip(names, functions, weights or [1.0] * len(names), strict=True)
    ]


def score(
    rewards: Sequence[RewardFunction],
    prompts: Sequence[Prompt],
    completions: Sequence[str],
    completion_ids: Sequence[Sequence[int]],
) -> Scores:
    """One call of each function for all S completions; asynchronous ones wait together.

    A function gets, by keyword and as copies, what it names of `prompts`, `completions`,
    `completion_ids` and the data set's columns, or all of it with `**columns`. For chat prompts
    `prompts` and `completions` are lists of messages, as in TRL. It returns S numbers; None = does
    not apply, left out of the weighted sum. Raises RewardError naming the reward and a completion.
    """
    call = _Call(prompts, completions, completion_ids)
    results: list[Any] = []
    try:
        for reward in rewards:
            arguments = call.arguments(reward)
            try:
                results.append(_materialised(reward.function(**arguments)))
            except (Exception, SystemExit) as error:
                raise call.raised(reward, error) from error
        waiting = [k for k, result in enumerate(results) if inspect.isawaitable(result)]
        for k, result in zip(waiting, _wait([results[k] for k in waiting]), strict=True):
            if isinstance(result, BaseException):
                raise call.raised(rewards[k], result) from result
            results[k] = _materialised(result)
    finally:
        for result in results:
            if inspect.iscoroutine(result):
                result.close()
    parts = {
        reward.name: call.checked(reward, result)
        for reward, result in zip(rewards, results, strict=True)
    }
    totals = [_weighted(rewards, values) for values in zip(*parts.values(), strict=True)]
    return Scores(totals, parts)


def _weighted(rewards: Sequence[RewardFunction], values: Sequence[float]) -> float:
    terms = [
        reward.weight * value
        for reward, value in zip(rewards, values, strict=True)
        if not math.isnan(value)
    ]
    return math.fsum(terms) if terms else math.nan


@dataclass(slots=True)
class _Call:
    """What one call of every reward function is about."""

    prompts: Sequence[Prompt]
    completions: Sequence[str]
    completion_ids: Sequence[Sequence[int]]

    def arguments(self, reward: RewardFunction) -> dict[str, Any]:
        """Fresh copies of what `reward` names in its signature."""
        columns = {name for prompt in self.prompts for name in prompt.columns}
        available = {"prompts", "completions", "completion_ids"} | columns
        parameters = inspect.signature(reward.function).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in parameters):
            wanted = available
        else:
            wanted = available & {p.name for p in parameters}
        for p in parameters:
            needed = p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)
            if needed and p.kind is p.POSITIONAL_ONLY:
                raise RewardError(
                    f"reward '{reward.name}' wants '{p.name}', which cannot be given by keyword: "
                    "remove the / from its parameters"
                )
            if needed and p.name not in available:
                raise RewardError(
                    f"reward '{reward.name}' wants '{p.name}', which is no column of the data set: "
                    f"{nearest(p.name, available)}there are {', '.join(sorted(available))}"
                )
        return {name: self._values(name) for name in sorted(wanted)}

    def _values(self, name: str) -> list[Any]:
        if name == "completion_ids":
            return [list(ids) for ids in self.completion_ids]
        if name == "prompts":
            return [
                prompt.text if prompt.messages is None else copy.deepcopy(list(prompt.messages))
                for prompt in self.prompts
            ]
        if name == "completions":
            return [
                text if prompt.messages is None else [{"role": "assistant", "content": text}]
                for prompt, text in zip(self.prompts, self.completions, strict=True)
            ]
        return [copy.deepcopy(prompt.columns.get(name)) for prompt in self.prompts]

    def checked(self, reward: RewardFunction, result: Any) -> list[float]:
        """`result` as [S] floats, None as NaN."""
        if not isinstance(result, list):
            raise RewardError(
                f"reward '{reward.name}' returned {_excerpt(result)} of type "
                f"{type(result).__name__}, expected a list of {len(self.completions)} numbers, one "
                "a completion"
            )
        if len(result) != len(self.completions):
            raise RewardError(
                f"reward '{reward.name}' returned {len(result)} values for "
                f"{len(self.completions)} completions: return one a completion, None where it does "
                "not apply"
            )
        return [self._number(reward, k, value) for k, value in enumerate(result)]

    def _number(self, reward: RewardFunction, k: int, value: Any) -> float:
        if value is None:
            return math.nan
        # NumPy and torch scalars; arrays have dimensions and are refused below.
        number = value.item() if getattr(value, "ndim", None) == 0 else value
        if not isinstance(number, Real):
            raise RewardError(
                f"reward '{reward.name}' returned {_excerpt(value)} of type {type(value).__name__} "
                f"for {self._place(k)}: expected a number, or None"
            )
        # Of integers and floats of any size, NaN included.
        if not abs(number) <= LARGEST_REWARD:
            raise RewardError(
                f"reward '{reward.name}' returned {_excerpt(number)} for {self._place(k)}: "
                "expected a finite float32 number, or None where it does not apply"
            )
        return float(number)

    def _place(self, k: int) -> str:
        row = self.prompts[k].row
        return f"completion {k}, {_excerpt(self.completions[k])} to row {row} of the data set"

    def raised(self, reward: RewardFunction, error: BaseException) -> RewardError:
        """The error to show for one that `reward` raised."""
        frames = traceback.extract_tb(error.__traceback__)
        theirs = [frame.filename for frame in frames if frame.filename != __file__]
        where = raised_at(error, theirs[0]) if theirs else ""
        chat = any(prompt.messages is not None for prompt in self.prompts)
        hint = "; for chat prompts a completion is [{'role', 'content'}], as in TRL" if chat else ""
        first = _excerpt(self.completions[0]) if self.completions else "none"
        return RewardError(
            f"reward '{reward.name}' raised {describe(error)}{f' ({where})' if where else ''}, "
            f"called with {len(self.completions)} completions, the first {first}{hint}"
        )


def _materialised(result: Any) -> Any:
    """A list where `result` is any ordered collection of values, otherwise `result` itself."""
    if hasattr(result, "tolist"):
        return result.tolist()
    if inspect.isawaitable(result) or isinstance(result, (str, bytes, dict, set, frozenset)):
        return result
    return list(result) if isinstance(result, Iterable) else result


def _wait(pending: list[Awaitable[Any]]) -> list[Any]:
    """Results of all `pending`, or the exception each one raised."""
    if not pending:
        return []

    async def gather() -> list[Any]:
        return await asyncio.gather(*pending, return_exceptions=True)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(gather())
    # In a notebook this thread's loop is running already, and a loop cannot run inside another.
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(asyncio.run, gather()).result()


def _excerpt(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."
