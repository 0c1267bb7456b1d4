"""The doctor's rules R1 to R18: their limits and their texts.

A limit is passed together with a second signal, so that one noisy number is no finding; the checks
stand in `reward_checks.py` and `policy_checks.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from . import policy_checks as policy
from . import reward_checks as reward
from .history import ONE_ITERATION, TWO_REWARDS, History, Limits, Seen

# Every threshold. `--set R1.warning=0.6` or a YAML file after --limits changes one.
LIMITS: dict[str, dict[str, float]] = {
    "R1": {"info": 0.30, "warning": 0.50, "error": 0.75, "easy": 0.85, "hard": 0.15},
    "R2": {"least": 8, "dead": 0.30, "error": 0.75, "bound": 0.10, "excess": 0.25},
    "R3": {"spike": 3.0, "sigma": 8.0, "floor": 0.02, "warning": 0.5, "error": 2.0},
    "R4": {
        "ratio": 1.5,
        "rise": 0.02,
        "noise": 1.0,
        "speed": 1.4,
        "height": 1.2,
        "rows": 3,
        "eval_gain": 0.1,
        "blind": 0.08,
    },
    "R5": {"info": 0.01, "warning": 0.1, "growth": 2.0, "ess": 0.3, "low": 0.5, "high": 2.0},
    "R6": {"info": 0.0, "warning": 0.02, "error": 0.10},
    "R7": {"info": 0.10, "warning": 0.20, "error": 0.40, "asymmetry": 3.0},
    "R8": {"floor": 0.10, "halved": 0.5, "drop": 0.30, "rise": 1.5, "held": 0.05},
    "R9": {"info": 0.05, "warning": 0.15, "error": 0.50},
    "R10": {
        "growth": 1.5,
        "correlation": 0.6,
        "eval_gain": 0.02,
        "collapse": 0.3,
        "push_rows": 10,
        "push_growth": 1.1,
    },
    "R11": {
        "warning": 0.15,
        "error": 0.30,
        "eval_gain": 0.02,
        "ceiling": 0.9,
        "fall": 0.05,
        "alike": 0.8,
        "alike_rise": 0.3,
        "share": 0.9,
    },
    "R12": {"warning": 100.0, "error": 1000.0, "advantage": 0.1, "eps": 1e-4},
    "R13": {"repeats": 3, "sigma": 8.0, "ratio": 8.0, "info": 0.2, "warning": 0.4, "error": 0.7},
    "R14": {"rows": 5, "warning": 0.01, "error": 0.10, "constant": 10},
    "R15": {"error": 0.1},
    "R16": {"info": 0.01},
    "R17": {"rows": 3, "warmup": 0.5, "still": 1e-6, "still_rows": 20},
    "R18": {"phase": 0.6, "reward": 0.6, "padding": 0.3, "slower": 0.5},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    id: str
    name: str
    check: Callable[[History, Limits], Seen | None]
    needs: tuple[str, ...]
    """Metrics a row must have; `a|b` is either."""
    options: tuple[str, ...] = ()
    """Options of the run it must know."""
    means: str
    cause: str
    change: str
    key: str
    """The option of `grpo-fast train` to change."""
    source: str


RULES = (
    Rule(
        id="R1",
        name="no signal",
        check=reward.no_signal,
        needs=("frac_reward_zero_std", "reward"),
        means="Groups whose completions all have the same reward have advantage 0 and teach "
        "nothing.",
        cause="the prompts are too easy, too hard, or both",
        change="choose prompts that are solved sometimes",
        key="dataset",
        source="DAPO (2503.14476), dynamic sampling; rldoctor",
    ),
    Rule(
        id="R2",
        name="group too small",
        check=reward.small_group,
        needs=("reward",),
        options=("group_size",),
        means="With success rate p a group of G is all right or all wrong with probability p^G + "
        "(1-p)^G.",
        cause="the group is too small to hold right and wrong completions",
        change="raise it",
        key="group_size",
        source="the formula; CoursIA#10603 measured 77 % at p = .18, G = 2",
    ),
    Rule(
        id="R3",
        name="KL explosion",
        check=policy.kl_explosion,
        needs=("kl",),
        means="The policy leaves the reference faster than it can have learned from rewards.",
        cause="steps are too large for this batch",
        change="lower it by 3 to 10 times, or raise loss.beta; go back to a checkpoint from before",
        key="learning_rate",
        source="TRL#238, TRL#3015; rldoctor (a token, k3)",
    ),
    Rule(
        id="R4",
        name="KL without reward",
        check=policy.kl_without_reward,
        needs=("kl", "reward"),
        means="KL goes on rising while the reward does not: the policy moves and gains nothing.",
        cause="the run has run its course, or drifts",
        change="stop at the best checkpoint, or raise it",
        key="loss.beta",
        source="open-r1#257, ms-swift#6550",
    ),
    Rule(
        id="R5",
        name="sampler mismatch",
        check=policy.sampler_mismatch,
        needs=(policy.GAP,),
        means="The sampler's log-probs are not the trainer's: steps are off-policy unawares.",
        cause="sampler and trainer compute in different precision, or its weights are stale",
        change="give both the same precision, and correct: loss.importance_sampling_correction",
        key="dtype",
        source="Tinker (0.01), verl rollout correction, prime-rl",
    ),
    Rule(
        id="R6",
        name="phantom clip",
        check=policy.phantom_clip,
        needs=(f"clip_ratio/first_mean|{ONE_ITERATION}",),
        means="Before the first update the ratio is 1: whatever is clipped there is rounding.",
        cause="old log-probs were computed in another precision or by another program",
        change="compute old and new log-probs alike, in float32 products if need be",
        key="dtype",
        source="TRL's mismatch article (18 % of the tokens)",
    ),
    Rule(
        id="R7",
        name="clip fraction",
        check=policy.clip_fraction,
        needs=("clip_ratio/region_mean",),
        means="Clipped tokens have no gradient; many of them mean that a rollout is used too long.",
        cause="too many or too large steps on one rollout",
        change="fewer of them, or a lower learning_rate",
        key="num_iterations",
        source="the 0.2 rule of thumb; rldoctor; DAPO (clip higher)",
    ),
    Rule(
        id="R8",
        name="entropy collapse",
        check=policy.entropy_collapse,
        needs=("entropy", "reward"),
        means="The policy gets certain without getting better: all completions become the same.",
        cause="exploration ends before the answer is found",
        change="raise it to 0.28, or add loss.entropy_coef",
        key="loss.epsilon_high",
        source="2505.22617 (R = -a e^H + b), DAPO, rllm#116",
    ),
    Rule(
        id="R9",
        name="truncation",
        check=reward.truncation,
        needs=("completions/clipped_ratio",),
        means="Completions that are cut off are scored without their end.",
        cause="completions want more tokens than they get, or never end",
        change="raise it, or leave cut completions out: mask_truncated_completions",
        key="max_completion_length",
        source="rldoctor (5 %, 15 %)",
    ),
    Rule(
        id="R10",
        name="length drift",
        check=reward.length_drift,
        needs=("completions/mean_length", "reward"),
        means="Length buys training reward and no held-out reward, the end is pushed down step by "
        "step, or completions vanish.",
        cause="the reward pays for length",
        change="take length out of it, or sum tokens by loss.loss_type dr_grpo",
        key="reward",
        source="rldoctor; TRL#3138; Dr. GRPO (2503.20783); push/eos is our own",
    ),
    Rule(
        id="R11",
        name="reward hacking",
        check=reward.reward_hacking,
        needs=("reward", f"eval_reward|{TWO_REWARDS}"),
        means="The training reward rises and the held-out one does not (half the gap is enough "
        "where the winners of a group become near-duplicates), or one part rises at the cost of "
        "another.",
        cause="the policy found what the reward pays for, which is not what was meant",
        change="read the best completions, and close what they use",
        key="reward",
        source="rldoctor (gap .15, .30); a suspicion, no proof",
    ),
    Rule(
        id="R12",
        name="variance hidden by normalisation",
        check=reward.hidden_variance,
        needs=("groups/std_mean|reward_std", "frac_reward_zero_std"),
        means="Tiny differences of reward, divided by their own std, become full-size advantages.",
        cause="what separates the completions of a group is noise of the reward",
        change="none, or batch; or round the reward to steps that mean something",
        key="scale_rewards",
        source="Dr. GRPO (2503.20783)",
    ),
    Rule(
        id="R13",
        name="gradient",
        check=policy.gradient,
        needs=("grad_norm|loss",),
        means="Gradients that are not finite, spike, or are exactly 0 although groups differ.",
        cause="one batch pushed far out of what the policy knows",
        change="lower it, or learning_rate",
        key="max_grad_norm",
        source="rldoctor; mlx-lm-lora#55, verl#4514",
    ),
    Rule(
        id="R14",
        name="reward plumbing",
        check=reward.reward_plumbing,
        needs=("reward", "reward_std"),
        means="All rewards are identical, or rewards are missing: the function, not the policy.",
        cause="the reward function fails in silence, or never matches the format",
        change="call it by hand on a completion of completions.jsonl",
        key="reward",
        source="verl#5635, TRL#6533",
    ),
    Rule(
        id="R15",
        name="weight sync",
        check=policy.first_gap,
        needs=(policy.GAP,),
        means="Sampler and trainer disagree before the first update: they are not the same model.",
        cause="the sampler has other weights, or another temperature or top_p",
        change="the same one for sampling and loss; then check that weights reach the sampler",
        key="temperature",
        source="TRL#5312, TRL#3029",
    ),
    Rule(
        id="R16",
        name="loss near 0",
        check=policy.loss_near_zero,
        needs=("loss",),
        means="Normal, no alarm: advantages of a group add up to 0 and the ratio is 1, so the loss "
        "starts at 0 and stays near beta x KL.",
        cause="the loss is not what is learned; its gradient is",
        change="nothing: watch reward and grad_norm instead",
        key="",
        source="TRL#2703, TRL#3857",
    ),
    Rule(
        id="R17",
        name="learning rate",
        check=policy.idle_rate,
        needs=("learning_rate",),
        means="Steps at learning rate 0, or far below the one that was meant, change nothing.",
        cause="the schedule ended before the run",
        change="set it to the real number of steps, or lr_scheduler_type constant",
        key="max_steps",
        source="the schedule's own formula",
    ),
    Rule(
        id="R18",
        name="throughput",
        check=policy.throughput,
        needs=("step_time",),
        means="One phase takes most of a step, tokens are padding, or the run slows down.",
        cause="the reward functions are slow",
        change="make them faster, or score in parallel",
        key="reward",
        source="monitor skills (60 % of a step)",
    ),
)
