"""Prompts to scored groups: sample G completions each, reward them, compare them within their
group.

Shapes: `P` prompts, `G` completions per prompt.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from .advantages import group_advantages
from .config import TrainConfig
from .generate import generate
from .groups import Group
from .prompts import Prompt
from .rewards import RewardFunction, score


@dataclass(slots=True)
class Completion:
    """One answer to one prompt; reward and advantage are filled in after sampling."""

    token_ids: list[int]
    """End-of-sequence token included."""
    logprobs: list[float]
    """Of the sampler, at the sampling temperature."""
    text: str
    finish_reason: str
    """`stop`, or `length` when cut at max_completion_length."""
    reward: float = math.nan
    """Weighted sum of `rewards`; NaN where no function applied."""
    rewards: dict[str, float] = field(default_factory=dict)
    advantage: float = 0.0


@dataclass(slots=True)
class ScoredGroup:
    """One prompt with its completions."""

    prompt: Prompt
    completions: list[Completion]
    degenerate: bool = False
    """All scores equal, or fewer than two: nothing to learn from."""

    def scores(self) -> list[float]:
        """Rewards of the completions that could be scored."""
        return [c.reward for c in self.completions if not math.isnan(c.reward)]


def sample_groups(
    model,
    tokenizer,
    prompts: Sequence[Prompt],
    *,
    group_size: int,
    max_completion_length: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> list[ScoredGroup]:
    """`group_size` completions of each prompt, a pure function of model, prompts and seed."""
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    sampled = generate(
        model,
        [list(prompt.token_ids) for prompt in prompts],
        group_size=group_size,
        max_new_tokens=max_completion_length,
        temperature=temperature,
        top_p=top_p,
        eos_token_ids=end_tokens(model, tokenizer),
        pad_token_id=0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        generator=generator,
    )
    return [
        ScoredGroup(
            prompt,
            [
                Completion(
                    token_ids=list(sample.token_ids),
                    logprobs=list(sample.logprobs),
                    text=tokenizer.decode(sample.token_ids, skip_special_tokens=True),
                    finish_reason="stop" if sample.finished else "length",
                )
                for sample in samples
            ],
        )
        for prompt, samples in zip(prompts, sampled, strict=True)
    ]


def end_tokens(model, tokenizer) -> list[int]:
    """Every id that ends a completion: the tokenizer's and the generation config's."""
    declared = model.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    return sorted({token for token in (tokenizer.eos_token_id, *declared) if token is not None})


def token_text(tokenizer, token: int) -> str:
    """The text of one token, its leading space included, which SentencePiece's decoder takes off;
    `\ufffd` for a token that is part of a character."""
    piece = tokenizer.convert_ids_to_tokens(token)
    text = tokenizer.decode([token])
    led = isinstance(piece, str) and piece.startswith("\u2581")
    return f" {text}" if led and not text.startswith(" ") else text


def score_groups(groups: Sequence[ScoredGroup], rewards: Sequence[RewardFunction]) -> None:
    """Fill in `reward` and `rewards` of every completion, in one call of each reward function."""
    pairs = [(group.prompt, completion) for group in groups for completion in group.completions]
    scores = score(
        rewards,
        [prompt for prompt, _ in pairs],
        [completion.text for _, completion in pairs],
        [completion.token_ids for _, completion in pairs],
    )
    for k, (_, completion) in enumerate(pairs):
        completion.reward = scores.total[k]
        completion.rewards = {name: values[k] for name, values in scores.parts.items()}


def set_advantages(groups: Sequence[ScoredGroup], config: TrainConfig) -> None:
    """Fill in `advantage` and `degenerate` from the rewards."""
    completions = [c for group in groups for c in group.completions]
    options = {
        "multi_reward": config.multi_objective_aggregation,
        "scale": config.scale_rewards,
        "baseline": config.baseline,
        "group_size": config.group_size,
    }
    if config.multi_objective_aggregation == "normalize_then_sum":
        table = torch.tensor([list(c.rewards.values()) for c in completions])
        weights = config.reward_weights or [1.0] * len(config.reward)
        output = group_advantages(table, weights=weights, **options)
    else:
        # Summed already, in float64.
        output = group_advantages(torch.tensor([c.reward for c in completions]), **options)
    values = iter(output.advantages.tolist())
    for group, degenerate in zip(groups, output.degenerate.tolist(), strict=True):
        group.degenerate = degenerate
        for completion in group.completions:
            completion.advantage = next(values)


def training_groups(groups: Sequence[ScoredGroup], config: TrainConfig) -> list[Group]:
    """What the update needs of scored groups."""
    return [
        Group(
            prompt_ids=group.prompt.token_ids,
            completion_ids=[c.token_ids for c in group.completions],
            advantages=[c.advantage for c in group.completions],
            sampler_logprobs=[torch.tensor(c.logprobs) for c in group.completions],
            completion_masks=[_mask(c, config) for c in group.completions],
        )
        for group in groups
    ]


def _mask(completion: Completion, config: TrainConfig) -> list[int]:
    left_out = config.mask_truncated_completions and completion.finish_reason == "length"
    # A completion nobody could score is in no group statistic and must not move the KL either.
    left_out = left_out or math.isnan(completion.reward)
    return [0 if left_out else 1] * len(completion.token_ids)
