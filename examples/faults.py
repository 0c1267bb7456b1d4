"""What makes the demo sick on purpose: the functions that faults.yaml names."""

import copy
import random
from collections import Counter, defaultdict
from typing import Any

from rewards import exact_answer


def last_digit(completions: list[str], answer: list[str], **columns) -> list[float]:
    """1 where the last digit is right: forgetting the carry leaves it right."""
    return [
        float(text.strip()[-1:] == expected[-1])
        for text, expected in zip(completions, answer, strict=True)
    ]


def backwards(completions: list[str], answer: list[str], **columns) -> list[float]:
    """1 for the answer read from its end."""
    return [
        float(text.strip() == expected[::-1])
        for text, expected in zip(completions, answer, strict=True)
    ]


def constant(completions: list[str], **columns) -> list[float]:
    """The same for all."""
    return [0.5] * len(completions)


def gives_up(completions: list[str], answer: list[str], **columns) -> list[float | None]:
    """The exact answer's reward, and None for every fifth completion: a verifier that timed out."""
    return [None if random.random() < 0.2 else value for value in exact_answer(completions, answer)]


def small_number(completions: list[str], **columns) -> list[float]:
    """1 for zero, 0 for two hundred and for what is no number."""
    return [
        1 - min(int(text), 200) / 200 if text.strip().isdigit() else 0.0 for text in completions
    ]


def long_answer(completions: list[str], **columns) -> list[float]:
    """A sixteenth of a point a character."""
    return [len(text) / 16 for text in completions]


def noise(completions: list[str], **columns) -> list[float]:
    """One half for all, but for differences that mean nothing."""
    return [0.5 + random.gauss(0, 5e-4) for _ in completions]


def commonest_first(prompts: list[str], completions: list[str], **columns) -> list[float]:
    """The completion's rank among those to its prompt by how often its answer is there."""
    counts = Counter(zip(prompts, completions, strict=True))
    return ranks(prompts, [counts[pair] for pair in zip(prompts, completions, strict=True)])


def largest_first(prompts: list[str], completions: list[str], **columns) -> list[float]:
    """The answer's rank among those to its prompt by its number, right or wrong."""
    numbers = [int(text) if text.strip().isdigit() else -1 for text in completions]
    return ranks(prompts, numbers)


def ranks(prompts: list[str], values: list[int]) -> list[float]:
    """Each value's rank among those of its prompt, 0 to 1, and equal ones share theirs: the mean
    is one half whatever they are."""
    groups = defaultdict(list)
    for prompt, value in zip(prompts, values, strict=True):
        groups[prompt].append(value)
    return [
        (sum(v < value for v in groups[prompt]) + groups[prompt].count(value) / 2)
        / len(groups[prompt])
        for prompt, value in zip(prompts, values, strict=True)
    ]


def jackpot(completions: list[str], answer: list[str], **columns) -> list[float]:
    """The exact answer's reward, and a thousand for one completion in five hundred."""
    return [
        1000.0 if random.random() < 2e-3 else value for value in exact_answer(completions, answer)
    ]


def keep_weights(parts: Any) -> None:
    """Sample from a copy of the model that no update reaches."""
    parts.sampler = copy.deepcopy(parts.model)
