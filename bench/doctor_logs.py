"""Synthetic logs for the doctor: a run that learns, with noise; and what the doctor says of a log.

The faults of `doctor_cases.py` are laid over it.
"""

import math
import random
from typing import Any, NamedTuple

from grpo_fast.doctor import Doctor, diagnose

SEEDS = range(20)
STEPS, START = 120, 60
GAP = "sampling/sampling_logp_difference/mean"
CONFIG = {
    "group_size": 8,
    "prompts_per_step": 32,
    "num_iterations": 2,
    "max_steps": 400,
    "max_completion_length": 256,
    "scale_rewards": "group",
    "loss": {"beta": 0.01},
}


def healthy(seed: int, steps: int = STEPS) -> list[dict[str, Any]]:
    """A run that learns: reward .35 -> .65, entropy and lengths drift, everything is noisy."""
    rng = random.Random(seed)
    noise = lambda size: rng.gauss(0, size)  # noqa: E731
    rows = [{"step": 0, "eval_reward": 0.3 + noise(0.02)}]
    for step in range(1, steps + 1):
        t = step / steps
        p = min(max(0.35 + 0.3 * t + noise(0.03), 0.02), 0.98)
        seconds = 10 * math.exp(noise(0.1))
        row = {
            "step": step,
            "reward": p,
            "reward_std": math.sqrt(p * (1 - p)),
            "frac_reward_zero_std": min(max(0.12 + noise(0.05), 0), 1),
            "groups/std_mean": 0.4 + noise(0.02),
            "groups/winners_alike": 0.3 + 0.1 * t + noise(0.03),
            "advantage/abs_mean": 0.7 + noise(0.03),
            "unscored_frac": 0.0,
            "rewards/answer/mean": p,
            "rewards/answer/std": math.sqrt(p * (1 - p)),
            "rewards/answer/unscored_frac": 0.0,
            "push/eos": noise(1e-3),
            "rewards/format/mean": 0.9 + noise(0.02),
            "rewards/format/std": 0.3,
            "completions/mean_length": 120 + 20 * t + noise(5),
            "completions/clipped_ratio": abs(noise(0.01)),
            "kl": 0.03 * t * math.exp(noise(0.15)) + 1e-4,
            "clip_ratio/region_mean": abs(noise(0.01)),
            "clip_ratio/low_mean": abs(noise(0.005)),
            "clip_ratio/high_mean": abs(noise(0.005)),
            "clip_ratio/first_mean": 0.0,
            "entropy": 0.8 - 0.25 * t + noise(0.02),
            "loss": noise(0.05) + 0.02,
            "grad_norm": math.exp(noise(0.25)),
            "learning_rate": 1e-5,
            "skipped_updates": 0.0,
            GAP: 0.002 + abs(noise(0.0005)),
            "step_time": seconds,
            "tokens_per_second": 20_000 / seconds,
            "time/rollout": 0.5 * seconds,
            "time/update": 0.4 * seconds,
            "time/reward": 0.05 * seconds,
        }
        if step % 5 == 0:
            row["eval_reward"] = 0.3 + 0.3 * t + noise(0.02)
        rows.append(row)
    return rows


class Outcome(NamedTuple):
    alarms: dict[str, int]
    """Rule -> step of its first warning or error."""
    doctor: Doctor


def watch(rows: list[dict], options: dict) -> Outcome:
    doctor = diagnose(rows, options)
    return Outcome(doctor.alarms, doctor)
