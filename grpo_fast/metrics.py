"""What a step says about itself, under TRL's names. What was not measured has no entry."""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .token_choice import evenly, ranked, spread

if TYPE_CHECKING:
    # Only its shape is used, so that the logs of others are measured without torch.
    from .rollout import ScoredGroup

_WORD = re.compile(r"\w+|[^\w\s]")


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values) if values else math.nan


def rollout_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Rewards raw and normalised, the winners, dead groups, lengths."""
    completions = [c for group in groups for c in group.completions]
    scored = [c.reward for c in completions if not math.isnan(c.reward)]
    # Where all rewards of a step are the same, the sign says whether that is the best or the worst.
    best, worst = max(scored, default=math.nan), min(scored, default=math.nan)
    spreads = [spread(group.scores()) for group in groups]
    metrics = {
        "reward": _mean(scored),
        "reward_std": spread(scored),
        "frac_reward_zero_std": _mean([float(group.degenerate) for group in groups]),
        "groups/std_mean": _mean(spreads),
        "groups/all_best_frac": _all_equal(groups, best) if best > worst or best > 0 else 0.0,
        "groups/all_worst_frac": _all_equal(groups, worst) if best > worst or worst <= 0 else 0.0,
        "advantage/winners": _mean([max(c.advantage for c in g.completions) for g in groups]),
        "advantage/abs_mean": _mean([abs(c.advantage) for c in completions]),
        "unscored_frac": 1 - len(scored) / len(completions),
    }
    alive = [std for std in spreads if std > 0]
    if alive:
        # Of groups that teach: a mean would hide many tiny ones behind a wide one.
        metrics["groups/std_median"] = statistics.median(alive)
    alike = [a for group in groups if (a := winners_alike(group)) is not None]
    if alike:
        metrics["groups/winners_alike"] = _mean(alike)
    return metrics | reward_metrics(groups) | length_metrics(groups)


def winners_alike(group: ScoredGroup, most: int = 4) -> float | None:
    """Mean Jaccard similarity `|A & B| / |A | B|` of the word pairs of the winners' texts: 1 where
    they say the same, None with fewer than two winners.

    Of the first `most` winners, so that it does not depend on how many there are.
    """
    texts = [c.text for c in group.completions if c.advantage > 0][:most]
    if len(texts) < 2:
        return None
    words = [["", *_WORD.findall(text)] for text in texts]
    said = [set(itertools.pairwise(w)) if len(w) > 1 else {("", "")} for w in words]
    return _mean([len(a & b) / len(a | b) for a, b in itertools.combinations(said, 2)])


def reward_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Mean and std of each reward function, and the share of the completions it said None of."""
    completions = [c for group in groups for c in group.completions]
    metrics = {}
    for name in completions[0].rewards:
        values = [c.rewards[name] for c in completions if not math.isnan(c.rewards[name])]
        metrics[f"rewards/{name}/mean"] = _mean(values)
        metrics[f"rewards/{name}/std"] = spread(values)
        metrics[f"rewards/{name}/unscored_frac"] = 1 - len(values) / len(completions)
    return metrics


def _all_equal(groups: Sequence[ScoredGroup], value: float) -> float:
    """Share of groups whose every score is `value`: all right, or all wrong."""
    return _mean([float(bool(g.scores()) and all(s == value for s in g.scores())) for g in groups])


def length_metrics(groups: Sequence[ScoredGroup]) -> dict[str, float]:
    """Completion lengths in tokens; terminated = ended by itself."""
    completions = [c for group in groups for c in group.completions]
    lengths = [len(c.token_ids) for c in completions]
    ended = [len(c.token_ids) for c in completions if c.finish_reason == "stop"]
    metrics = {
        "completions/mean_length": _mean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": 1 - len(ended) / len(completions),
    }
    if ended:
        metrics["completions/mean_terminated_length"] = _mean(ended)
        metrics["completions/min_terminated_length"] = min(ended)
        metrics["completions/max_terminated_length"] = max(ended)
    return metrics


def update_metrics(iterations: Sequence[dict[str, float]]) -> dict[str, float]:
    """One step's inner iterations as one row: means, and the extremes over iterations of the clip
    ratios."""
    counts = {"n_tokens", "n_tokens_unscorable"}
    names = sorted({name for iteration in iterations for name in iteration} - counts)
    merged = {}
    for name in names:
        values = [iteration[name] for iteration in iterations if name in iteration]
        extreme = {"/min": min, "/max": max}.get(name[name.rfind("/") :], _mean)
        merged[name] = extreme(values)
        if name == "clip_ratio/low_mean":
            merged["clip_ratio/low_min"] = min(values)
        if name == "clip_ratio/high_mean":
            merged["clip_ratio/high_max"] = max(values)
        # Before the first update every ratio is 1: anything clipped there is rounding.
        if name == "clip_ratio/region_mean" and name in iterations[0]:
            merged["clip_ratio/first_mean"] = iterations[0][name]
    return merged


def completion_rows(step: int, groups: Sequence[ScoredGroup], count: int) -> list[dict]:
    """Up to `count` completions of the group with the widest rewards: best first, worst last."""
    if count == 0:
        return []
    group = max(groups, key=lambda g: spread(g.scores()))
    order = ranked([c.reward for c in group.completions])
    picks = [group.completions[order[place]] for place in evenly(len(order), count)]
    return [
        {
            "step": step,
            "group": group.prompt.row,
            "prompt": group.prompt.text,
            "completion": completion.text,
            "reward": completion.reward,
            "rewards": completion.rewards,
            "advantage": completion.advantage,
            "finish_reason": completion.finish_reason,
            "columns": dict(group.prompt.columns),
        }
        for completion in picks
    ]
