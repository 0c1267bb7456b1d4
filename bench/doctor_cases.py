"""Faults laid over a healthy synthetic log, each sick in exactly one way."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from .doctor_logs import CONFIG, GAP, START, healthy


class Fault(NamedTuple):
    name: str
    rule: str
    says: tuple[str, ...]
    """In the finding's evidence."""
    key: str
    change: Callable[[dict, int], dict]
    """(row, steps since the fault's start, at least 0) -> what is different."""
    options: Mapping[str, Any] = MappingProxyType({})
    start: int = START
    severity: str = "warning"
    """Of the finding, at least."""


def _flat(row: dict) -> dict:
    """The reward stands still, to noise."""
    return {"reward": 0.5 + 0.03 * math.sin(2.4 * row["step"])}


def _constant(row: dict, value: float) -> dict:
    """Every completion has this reward."""
    parts = {name for name in row if name.startswith("reward")}
    return (
        {name: 0.0 if name.endswith("std") else value for name in parts}
        | {name: 0.0 for name in parts if name.endswith("unscored_frac")}
        | {"frac_reward_zero_std": 1.0, "groups/std_mean": 0.0, "advantage/abs_mean": 0.0}
        | {"grad_norm": 0.0}
    )


FAULTS = (
    Fault(
        "prompts too easy",
        "R1",
        ("90% of the groups", "29 of 32"),
        "dataset",
        lambda row, k: (
            {"eval_reward": 0.95}
            | ({"frac_reward_zero_std": 0.9, "reward": 0.97} if row["step"] else {})
        ),
        start=0,
        severity="error",
    ),
    Fault(
        "prompts too hard",
        "R1",
        ("of the groups", "mean reward 0.03"),
        "dataset",
        lambda row, k: {"frac_reward_zero_std": 0.8, "reward": 0.03, "eval_reward": 0.03},
        start=1,
    ),
    Fault(
        "all answers right from the start",
        "R1",
        ("100% of the groups", "mean reward 1.00"),
        "dataset",
        lambda row, k: {"eval_reward": 0.95} | (_constant(row, 1.0) if row["step"] else {}),
        start=0,
        severity="error",
    ),
    Fault(
        "half the prompts solved, half never",
        "R1",
        ("bought no gradient",),
        "dataset",
        lambda row, k: {"frac_reward_zero_std": 0.8},
    ),
    Fault(
        "group of 4",
        "R2",
        ("group_size 4", "p = 0.1", "measured 5"),
        "group_size",
        lambda row, k: (
            {"reward": 0.15 + row["reward"] / 50, "frac_reward_zero_std": 0.52}
            | ({"eval_reward": 0.15} if "eval_reward" in row else {})
        ),
        {"group_size": 4},
        start=1,
    ),
    Fault(
        "group of 2",
        "R2",
        ("group_size 2", "0.71"),
        "group_size",
        lambda row, k: {},
        {"group_size": 2},
        start=1,
    ),
    Fault(
        "KL explodes",
        "R3",
        ("kl ", "learning_rate 1e-05"),
        "learning_rate",
        lambda row, k: {"kl": row["kl"] * 1.3**k},
        severity="error",
    ),
    Fault(
        "KL jumps once",
        "R3",
        ("jumped to 0.3", "median"),
        "learning_rate",
        lambda row, k: {"kl": 0.3} if k == 3 else {},
    ),
    Fault(
        "KL rises, reward stands still",
        "R4",
        ("kl went", "reward went"),
        "loss.beta",
        lambda row, k: _flat(row) | {"kl": row["kl"] + 0.006 * k},
    ),
    Fault(
        "sampler keeps old weights",
        "R5",
        ("a token", "before the first update 0.00"),
        "loss.importance_sampling_correction",
        lambda row, k: {GAP: 0.002 + 0.012 * k},
    ),
    Fault(
        "first iteration clips",
        "R6",
        ("18.0%",),
        "dtype",
        lambda row, k: {"clip_ratio/first_mean": 0.18, "clip_ratio/region_mean": 0.2},
        severity="error",
    ),
    Fault(
        "a rollout used too long",
        "R7",
        ("low 15.0%", "high 15.0%"),
        "num_iterations",
        lambda row, k: (
            {f"clip_ratio/{side}_mean": 0.15 for side in ("low", "high")}
            | {"clip_ratio/region_mean": 0.30}
        ),
    ),
    Fault(
        "rising tokens clipped",
        "R7",
        ("high 25.0%",),
        "loss.epsilon_high",
        lambda row, k: {"clip_ratio/high_mean": 0.25, "clip_ratio/region_mean": 0.26},
    ),
    Fault(
        "entropy collapses",
        "R8",
        ("entropy", "of its start"),
        "loss.epsilon_high",
        lambda row, k: _flat(row) | {"entropy": row["entropy"] * 0.85**k},
        severity="error",
    ),
    Fault(
        "policy falls into noise",
        "R8",
        ("entropy rose", "reward fell"),
        "learning_rate",
        lambda row, k: (
            {
                "reward": max(row["reward"] - 0.02 * k, 0.05),
                "entropy": row["entropy"] * min(1 + 0.15 * k, 4),
            }
            | ({"eval_reward": 0.3} if "eval_reward" in row else {})
        ),
    ),
    Fault(
        "completions cut off",
        "R9",
        ("cut off at 256 tokens",),
        "max_completion_length",
        lambda row, k: {"completions/clipped_ratio": min(0.05 * k, 1)},
        severity="error",
    ),
    Fault(
        "padding for reward",
        "R10",
        ("mean length", "correlation"),
        "reward",
        lambda row, k: {
            "completions/mean_length": row["completions/mean_length"] * (1 + 0.06 * k),
            "reward": 0.5 + min(0.004 * k, 0.1),
            **({"eval_reward": 0.45} if "eval_reward" in row else {}),
        },
    ),
    Fault(
        "completions shrink to nothing",
        "R10",
        ("mean length", "not rising"),
        "reward",
        lambda row, k: _flat(row) | {"completions/mean_length": max(130 * 0.85**k, 2)},
    ),
    Fault(
        "one part pays for length",
        "R10",
        ("correlation", "held-out reward beside 'padding' gained"),
        "reward",
        lambda row, k: (
            {"completions/mean_length": row["completions/mean_length"] * (1 + 0.06 * k)}
            | {"reward": 0.5 + 0.02 * k, "rewards/answer/mean": 0.5}
            | {"rewards/padding/mean": 0.02 * k, "rewards/padding/std": 0.1}
            | ({"eval_reward": 0.4 + 0.02 * k} if "eval_reward" in row else {})
            | ({"eval_rewards/answer/mean": 0.4} if "eval_reward" in row else {})
        ),
    ),
    Fault(
        "the end is pushed down",
        "R10",
        ("end-of-sequence token below 0 in the last 10 rows", "since the start"),
        "loss.loss_type",
        lambda row, k: (
            _flat(row)
            | {"push/eos": -1e-3, "completions/mean_length": 130 * (1 + 0.015 * k)}
            | {"rewards/answer/mean": 0.5}
            | ({"eval_reward": 0.45} if "eval_reward" in row else {})
        ),
        start=1,
    ),
    Fault(
        "held-out reward stays behind",
        "R11",
        ("held-out", "gap of 0."),
        "reward",
        lambda row, k: (
            {"reward": min(0.5 + 0.02 * k, 0.8)}
            | ({"eval_reward": 0.45} if "eval_reward" in row else {})
        ),
    ),
    Fault(
        "winners become near-duplicates",
        "R11",
        ("held-out", "winners of a group share 9"),
        "reward",
        lambda row, k: (
            {"reward": min(0.5 + 0.005 * k, 0.62), "groups/winners_alike": min(0.3 + 0.1 * k, 0.95)}
            | ({"eval_reward": 0.45} if "eval_reward" in row else {})
        ),
    ),
    Fault(
        "one reward part eats the other",
        "R11",
        ("'format' went", "'answer' went"),
        "reward_weights",
        lambda row, k: {
            "rewards/format/mean": 0.2 + min(0.03 * k, 0.7),
            "rewards/answer/mean": max(0.5 - 0.02 * k, 0),
        },
    ),
    Fault(
        "noise normalised to advantages",
        "R12",
        ("std of 0.0005", "amplified"),
        "scale_rewards",
        lambda row, k: {"groups/std_mean": 4e-4, "frac_reward_zero_std": 0.2},
        severity="error",
    ),
    Fault(
        "gradient not finite",
        "R13",
        ("not finite in ",),
        "max_grad_norm",
        lambda row, k: {"grad_norm": math.nan, "skipped_updates": 1.0} if k % 3 == 0 else {},
        severity="error",
    ),
    Fault(
        "gradient spikes",
        "R13",
        ("grad_norm 40",),
        "max_grad_norm",
        lambda row, k: {"grad_norm": 40.0} if k == 4 else {},
    ),
    Fault(
        "gradient spikes before there is a usual one",
        "R13",
        ("grad_norm 40 at step 4",),
        "max_grad_norm",
        lambda row, k: {"grad_norm": 40.0} if k == 3 else {},
        start=1,
    ),
    Fault(
        "parameters frozen",
        "R13",
        ("exactly 0", "groups to learn from"),
        "model",
        lambda row, k: {"grad_norm": 0.0},
        severity="error",
    ),
    Fault(
        "all rewards identical",
        "R14",
        ("all rewards were 0", "every advantage is 0"),
        "reward",
        lambda row, k: _constant(row, 0.0) | ({"eval_reward": 0.0} if "eval_reward" in row else {}),
        severity="error",
    ),
    Fault(
        "rewards lost",
        "R14",
        ("got no reward",),
        "reward",
        lambda row, k: {"unscored_frac": 0.2},
        severity="error",
    ),
    Fault(
        "a part that never varies",
        "R14",
        ("'format' was 0.5",),
        "reward",
        lambda row, k: {"rewards/format/mean": 0.5, "rewards/format/std": 0.0},
        start=1,
    ),
    Fault(
        "a part gives up more and more",
        "R14",
        ("'answer' said None of ", "0.0% at first"),
        "reward",
        lambda row, k: {"rewards/answer/unscored_frac": min(0.02 * k, 0.3)},
        severity="error",
    ),
    Fault(
        "sampler has another model",
        "R15",
        ("in the first 3 rows",),
        "temperature",
        lambda row, k: {GAP: 0.4},
        start=1,
        severity="error",
    ),
    Fault(
        "learning rate 0",
        "R17",
        ("learning_rate 0 in 3 rows",),
        "max_steps",
        lambda row, k: {"learning_rate": 0.0},
    ),
    Fault(
        "warm-up longer than the run",
        "R17",
        ("warm-up takes 900 of 400 steps",),
        "warmup_steps",
        lambda row, k: {"learning_rate": 1e-5 * row["step"] / 900},
        {"warmup_steps": 900, "learning_rate": 1e-5},
        start=1,
    ),
    Fault(
        "steps too small to change anything",
        "R17",
        ("kl was never above 4e-08",),
        "learning_rate",
        lambda row, k: {"kl": 4e-8},
        start=1,
    ),
    Fault(
        "reward functions slow",
        "R18",
        ("reward functions take 8",),
        "reward",
        lambda row, k: (
            {"time/reward": 0.85 * row["step_time"], "time/rollout": 0.1} | {"time/update": 0.05}
        ),
    ),
    Fault(
        "the run slows down",
        "R18",
        ("tokens a second",),
        "token_budget",
        lambda row, k: {"tokens_per_second": row["tokens_per_second"] / 4},
    ),
)


def sick(fault: Fault, seed: int) -> tuple[list[dict], dict]:
    rows = [
        row | (fault.change(row, row["step"] - fault.start) if row["step"] >= fault.start else {})
        for row in healthy(seed)
    ]
    return rows, CONFIG | dict(fault.options)
