"""One step, token by token: its columns, what is kept of them and the metrics that follow."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .groups import Group
from .loss_config import LossConfig
from .outputs import StepOutput
from .rollout import ScoredGroup
from .token_choice import (
    MOST_COMPLETIONS,
    chosen_groups,
    evenly,
    kept_in_words,
    ranked,
    spread,
)
from .token_columns import StepColumns, group_means, push_table, step_columns
from .token_log import TokenLog


class Told(NamedTuple):
    """What a run tells of itself once."""

    seed: int
    eos_token_ids: tuple[int, ...]
    """The tokenizer's first."""
    advantage: dict[str, str]
    """How rewards become advantages, as in TrainConfig."""
    text_of: Callable[[int], str]
    """The text of a token id."""


def log_tokens(
    log: TokenLog | None,
    told: Told,
    scored: Sequence[ScoredGroup],
    groups: Sequence[Group],
    output: StepOutput,
    loss: LossConfig,
    *,
    step: int,
    iteration: int,
) -> dict[str, float]:
    """Keep a step in `log` where that is due; metrics of all its tokens.

    groups, output, loss: what `grpo_backward` was given and gave in `iteration`.
    """
    kept = log is not None and log.due(step)
    columns = step_columns(groups, output, loss, whole=kept)
    push = push_table(columns, told.eos_token_ids)
    metrics = kl_metrics(columns) | ({} if push["eos"] is None else {"push/eos": push["eos"]})
    if log is None:
        return metrics
    if kept:
        meta, arrays = _kept(told, scored, columns, step)
        meta |= {
            "iteration": iteration,
            "loss": loss_values(loss),
            "temperature": loss.temperature,
            "eos_token_id": next(iter(told.eos_token_ids), None),
            "eos_token_ids": list(told.eos_token_ids),
            "advantage": told.advantage,
            "totals": _totals(scored, columns, loss),
            "denominator": _denominator(output, loss),
            "push": push,
        }
        log.write(step, meta, arrays, told.text_of)
    return metrics | {"tokens/steps_kept": float(log.steps), "tokens/mb": log.spent / 1e6}


def loss_values(loss: LossConfig) -> dict[str, Any]:
    """Every field; an objective that is a function by its name."""
    values = dataclasses.asdict(loss)
    if callable(loss.objective):
        values["objective"] = getattr(loss.objective, "__qualname__", repr(loss.objective))
    return values


def distances(columns: StepColumns, scored: Sequence[ScoredGroup]) -> dict[str, list[float]]:
    """The mean KL of each group's tokens under the name of what was measured: to the reference by
    the config's estimator, else to the old policy or to the sampler by k3; without any of them the
    spread of its rewards."""
    sizes = [len(group.completions) for group in scored]
    if "kl" in columns.arrays:
        return {"highest_kl": group_means(columns, sizes, columns.arrays["kl"])}
    for other in ("old", "sampler"):
        values = kl_of(columns, other)
        if values is not None:
            return {f"highest_kl_{other}": group_means(columns, sizes, values)}
    rewards = [[c.reward for c in group.completions] for group in scored]
    return {"widest_rewards": [spread(group) for group in rewards]}


def kl_of(columns: StepColumns, other: str) -> np.ndarray | None:
    """[T] k3 of the KL from the old policy to the policy, or from the sampler to the old policy,
    which are one where there were no steps between; None where not known."""
    arrays = columns.arrays
    if f"{other}_logprobs" not in arrays:
        return None
    old = arrays.get("old_logprobs", arrays["logprobs"])
    d = arrays["logprobs"] - old if other == "old" else old - arrays["sampler_logprobs"]
    d = np.where(arrays["mask"], d.clip(-20, 20), np.nan).astype(np.float64)
    return np.expm1(d) - d


def kl_metrics(columns: StepColumns) -> dict[str, float]:
    """Means over the measured tokens of the step; what was not measured has no entry."""
    found = {}
    for other in ("old", "sampler"):
        values = kl_of(columns, other)
        if values is not None and np.isfinite(values).any():
            found[f"kl/{other}_k3"] = float(values[np.isfinite(values)].mean())
    return found


def _kept(
    told: Told, scored: Sequence[ScoredGroup], columns: StepColumns, step: int
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(`kept` and `groups` of the meta, the columns of what is kept)."""
    rewards = [[c.reward for c in group.completions] for group in scored]
    chosen = chosen_groups(
        rewards,
        [group.degenerate for group in scored],
        distances(columns, scored),
        seed=told.seed,
        step=step,
    )
    sizes = [len(group.completions) for group in scored]
    firsts = np.cumsum([0, *sizes])
    groups, places, at = [], [np.zeros(0, np.int64)], 0
    for g, why in sorted(chosen.items()):
        group, completions = scored[g], []
        order = ranked(rewards[g])
        for k in (order[place] for place in evenly(sizes[g], MOST_COMPLETIONS)):
            start, stop = columns.offsets[firsts[g] + k : firsts[g] + k + 2].tolist()
            places.append(np.arange(start, stop))
            end = at + stop - start
            entry = _completion(group, k) | {"start": at, "stop": end}
            weight = float(columns.weights[firsts[g] + k])
            completions.append(entry | {"weight": None if math.isnan(weight) else weight})
            at = end
        groups.append(
            {
                "index": g,
                "row": group.prompt.row,
                "prompt": group.prompt.text,
                "prompt_ids": list(group.prompt.token_ids),
                "chosen_by": why,
                "size": sizes[g],
                "rewards": rewards[g],
                "advantages": [c.advantage for c in group.completions],
                "completions": completions,
            }
        )
    where = np.concatenate(places)
    kept = kept_in_words(chosen, len(scored), [sizes[g] for g in chosen])
    arrays = {name: values[where] for name, values in columns.arrays.items()}
    return {"kept": kept, "groups": groups}, arrays


def _completion(group: ScoredGroup, k: int) -> dict[str, Any]:
    completion = group.completions[k]
    return {
        "index": k,
        "reward": completion.reward,
        "rewards": dict(completion.rewards),
        "advantage": completion.advantage,
        "finish_reason": completion.finish_reason,
        "text": completion.text,
    }


def _totals(
    scored: Sequence[ScoredGroup], columns: StepColumns, loss: LossConfig
) -> dict[str, int]:
    lengths = np.diff(columns.offsets)
    longest = loss.max_completion_length or int(lengths.max(initial=0))
    return {
        "groups": len(scored),
        "completions": len(lengths),
        "sequences": len(lengths),
        "tokens": int(columns.arrays["mask"].sum()),
        "max_completion_length": longest,
    }


def _denominator(output: StepOutput, loss: LossConfig) -> float | None:
    """The normaliser where it is all that divides a token's loss."""
    if loss.adds_up in ("sequence_mean", "prompt_mean"):
        return None
    value = float(output.tokens.denominator)
    return value if math.isfinite(value) else None
