"""Which groups and completions of a step are kept token by token: the ends, the odd ones and one at
random, so that a small log shows more than averages."""

import math
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MOST_COMPLETIONS = 16
# Why a group was kept, in words.
REASONS = {
    "best": "best",
    "worst": "worst",
    "degenerate": "degenerate",
    "highest_kl": "highest KL to the reference",
    "highest_kl_old": "highest KL to the old policy",
    "highest_kl_sampler": "highest KL to the sampler",
    "widest_rewards": "widest rewards",
    "random": "random",
}


def chosen_groups(
    rewards: Sequence[Sequence[float]],
    degenerate: Sequence[bool],
    distance: Mapping[str, Sequence[float]],
    *,
    seed: int,
    step: int,
) -> dict[int, list[str]]:
    """Group -> why it was chosen, at most five groups: highest and lowest mean reward, a degenerate
    one, the one of the largest `distance` (one name of REASONS, a number a group), one at random
    from (seed, step).

    rewards: a list a group, NaN where unscored.
    """
    found: dict[int, list[str]] = {}
    draw = random.Random(f"{seed} {step}")

    def add(reason: str, among: Iterable[tuple[float, int]]) -> None:
        best = max(((value, -g) for value, g in among if not math.isnan(value)), default=None)
        if best is not None:
            found.setdefault(-best[1], []).append(reason)

    def drawn(reason: str, among: Sequence[int]) -> None:
        if among:
            # One that is not shown yet, where there is one.
            others = [g for g in among if g not in found] or among
            found.setdefault(draw.choice(others), []).append(reason)

    means = [_mean(group) for group in rewards]
    add("best", ((mean, g) for g, mean in enumerate(means)))
    add("worst", ((-mean, g) for g, mean in enumerate(means)))
    drawn("degenerate", [g for g, dead in enumerate(degenerate) if dead])
    for reason, values in distance.items():
        add(reason, ((value, g) for g, value in enumerate(values)))
    drawn("random", range(len(rewards)))
    return found


def evenly(count: int, most: int) -> list[int]:
    """`most` of `count` places: the first, the last, the others evenly between."""
    most = min(most, count)
    return [round(k * (count - 1) / max(most - 1, 1)) for k in range(most)]


def ranked(rewards: Sequence[float]) -> list[int]:
    """Completions by reward, the best first, unscored ones last."""
    unscored = [-math.inf if math.isnan(reward) else reward for reward in rewards]
    return sorted(range(len(rewards)), key=lambda k: unscored[k], reverse=True)


def kept_in_words(chosen: Mapping[int, Sequence[str]], groups: int, sizes: Sequence[int]) -> str:
    """`5 of 64 groups: best, worst, random; at most 16 of 256 completions a group`."""
    reasons = {reason for why in chosen.values() for reason in why}
    named = ", ".join(words for reason, words in REASONS.items() if reason in reasons)
    text = f"{len(chosen)} of {groups} groups: {named}"
    largest = max(sizes, default=0)
    if largest <= MOST_COMPLETIONS:
        return f"{text}; all completions of a group"
    return f"{text}; at most {MOST_COMPLETIONS} of {largest} completions a group, best to worst"


def spread(rewards: Sequence[float]) -> float:
    """Standard deviation of those that were scored."""
    scored = [reward for reward in rewards if not math.isnan(reward)]
    return statistics.stdev(scored) if len(scored) > 1 else 0.0


def _mean(values: Sequence[Any]) -> float:
    scored = [value for value in values if not math.isnan(value)]
    return statistics.fmean(scored) if scored else math.nan
