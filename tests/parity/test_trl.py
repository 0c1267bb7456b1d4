"""`LossConfig.from_trl` against TRL's own `_compute_loss`, option by option, and the traps: one
name, two meanings."""

import dataclasses
import math
import re

import pytest
import torch

from grpo_bench.hosts import (
    Gap,
    Trap,
    even_batch,
    gap,
    ours,
    random_batch,
    run_lines,
    theirs,
    trl_config,
    trl_loss,
    trl_trainer,
)
from grpo_fast import group_advantages, linear_grpo_loss
from grpo_fast.errors import ConfigError
from grpo_fast.loss_config import LossConfig

# TRL's own default.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
# Both sides compute in float64, each in its own order.
LIMIT = 1e-12
CASES = [
    {"loss_type": "grpo"},
    {"loss_type": "bnpo"},
    {"loss_type": "dapo"},
    {"loss_type": "dr_grpo", "max_completion_length": 16},
    {"loss_type": "cispo", "epsilon_high": 1.5},
    {"loss_type": "sapo"},
    {"loss_type": "luspo"},
    {"loss_type": "vespo"},
    *(
        {"loss_type": loss_type, "importance_sampling_level": "sequence"}
        for loss_type in ("grpo", "dapo", "luspo", "sapo")
    ),
    {"loss_type": "cispo", "epsilon_high": 1.1, "importance_sampling_level": "sequence"},
    {"loss_type": "grpo", "epsilon": 0.1, "epsilon_high": 0.28},
    {"loss_type": "grpo", "delta": 1.5},
    {"loss_type": "sapo", "sapo_temperature_pos": 2.0, "sapo_temperature_neg": 3.0},
    {"loss_type": "vespo", "vespo_k_pos": 1.0, "vespo_lambda_pos": 2.0},
    {"loss_type": "vespo", "vespo_k_neg": 1.0, "vespo_lambda_neg": 0.0},
    {"loss_type": "grpo", "temperature": 0.7},
    {"loss_type": "grpo", "beta": 0.1},
    {"loss_type": "grpo", "beta": 0.1, "use_bias_correction_kl": False},
    {"loss_type": "grpo", "beta": 0.1, "importance_sampling_level": "sequence"},
    {"loss_type": "grpo", "beta": 0.1, "delta": 1.5},
    {"loss_type": "cispo", "beta": 0.1, "epsilon_high": 1.5},
    {"loss_type": "vespo", "beta": 0.1},
    {"loss_type": "dapo", "use_vllm": True},
    *(
        {
            "loss_type": loss_type,
            "use_vllm": True,
            "vllm_importance_sampling_mode": mode,
            "vllm_importance_sampling_clip_max": 1.1 if "token" in mode else 1.2,
            "vllm_importance_sampling_clip_min": 0.9,
        }
        for loss_type, mode in (
            ("dapo", "token_truncate"),
            ("dapo", "token_mask"),
            ("dapo", "sequence_truncate"),
            ("dapo", "sequence_mask"),
            ("vespo", "token_truncate"),
            ("vespo", "token_mask"),
        )
    ),
    {"loss_type": "grpo", "off_policy_mask_threshold": -0.05},
    {"loss_type": "grpo", "off_policy_mask_threshold": 0.0, "use_vllm": True},
    {"loss_type": "grpo", "top_entropy_quantile": 0.3},
    {"loss_type": "grpo", "entropy_coef": 0.1},
    {"loss_type": "dr_grpo", "entropy_coef": 0.1},
    {"loss_type": "grpo", "entropy_coef": 0.1, "top_entropy_quantile": 0.3, "beta": 0.1},
]
# What TRL has by default anyway, or needs: there to be read, not to change anything.
DEFAULTS = {("vllm_importance_sampling_mode", "sequence_mask"), ("max_completion_length", 16)}


def batch_for(options: dict) -> dict:
    """What the trainer would have at hand."""
    # The product of a sequence's ratios is what VESPO looks at: it must stay near 1.
    batch = random_batch(old_gap=0.3 if options.get("loss_type") == "vespo" else 0.9)
    if not options.get("beta"):
        del batch["ref_logprobs"]
    if options.get("use_vllm"):
        # A token that the sampler could not score.
        batch["sampler_logprobs"][2, batch["mask"][2].nonzero()[0]] = math.nan
    else:
        del batch["sampler_logprobs"]
    return batch


def trl(options: dict, batch: dict, **inputs):
    args = trl_config(**options)
    return theirs(batch, trl_loss(trl_trainer(args), **inputs), args.temperature)


def translate(options: dict) -> LossConfig:
    return LossConfig.from_trl(trl_config(**options))


def difference(options: dict, impl: str = "auto") -> Gap:
    """One row of docs/conformance.md."""
    batch = batch_for(options)
    return gap(ours(batch, translate(options), impl=impl), trl(options, batch))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_value_and_gradient_are_trl_s(options, impl):
    assert max(difference(options, impl)) <= LIMIT


@pytest.mark.parametrize("options", CASES, ids=str)
def test_every_option_of_a_case_changes_trl_s_loss(options):
    """Otherwise the test above would show nothing."""
    batch = batch_for(options)
    with_all = trl(options, batch)
    for name, value in options.items():
        # VESPO with the default mode is refused.
        needed = (options["loss_type"], name) == ("vespo", "vllm_importance_sampling_mode")
        if name == "loss_type" or needed or (name, value) in DEFAULTS:
            continue
        without = trl({key: options[key] for key in options.keys() - {name}}, batch)
        assert max(gap(without, with_all)) > 1e-6, name


def test_on_policy_no_old_log_probs_are_needed():
    batch = batch_for({"beta": 0.1})
    del batch["old_logprobs"]
    for options in (
        {"loss_type": "grpo", "beta": 0.1},
        {"loss_type": "cispo", "epsilon_high": 5.0},
    ):
        config = translate(options)
        assert max(gap(ours(batch, config), trl(options, batch))) <= LIMIT


GENERATION = "num_items_in_batch x accumulation / steps_per_generation / processes"
NORMALISERS = {
    "grpo": "sequences x accumulation",
    "sapo": "sequences x accumulation",
    "luspo": "sequences x accumulation",
    "bnpo": "tokens x accumulation",
    "dr_grpo": "sequences x max_completion_length x accumulation",
    "dapo": GENERATION,
    "cispo": GENERATION,
    "vespo": GENERATION,
}


@pytest.mark.parametrize("loss_type", NORMALISERS)
def test_gradient_accumulation_is_a_denominator(loss_type):
    options = {
        "loss_type": loss_type,
        "entropy_coef": 0.1,
        "epsilon_high": 0.3,
        "max_completion_length": 16,
        "gradient_accumulation_steps": 4,
        "steps_per_generation": 8,
    }
    batch = batch_for({})
    numbers = {
        "sequences": len(batch["mask"]),
        "tokens": int(batch["mask"].sum()),
        "max_completion_length": 16,
        "accumulation": 4,
        "num_items_in_batch": 1000,
        "steps_per_generation": 8,
        "processes": 1,
    }
    result = ours(
        batch,
        translate(options),
        denominator=eval(NORMALISERS[loss_type].replace(" x ", " * "), numbers),
        entropy_denominator=numbers["tokens"] * numbers["accumulation"],
    )
    theirs = trl(options, batch, num_items_in_batch=torch.tensor(1000))
    assert max(gap(result, theirs)) <= LIMIT


def test_adaptive_entropy_acts_once_entropy_was_seen_to_be_low():
    batch = batch_for({})
    args = trl_config(loss_type="grpo", use_adaptive_entropy=True, entropy_coef=0.1)
    config = LossConfig.from_trl(args)
    assert config.use_adaptive_entropy
    for last, coefficient in ((math.inf, 0.0), (0.1, 0.1)):
        trainer = trl_trainer(args)
        trainer._last_world_entropy = last
        expected = theirs(batch, trl_loss(trainer))
        result = ours(batch, dataclasses.replace(config, entropy_coef=coefficient))
        assert max(gap(result, expected)) <= LIMIT


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss_type": "gspo_token"}, "loss_type = 'gspo_token' has no equivalent"),
        ({"loss_type": "cispo"}, "Set epsilon_high = 5.0"),
        ({"importance_sampling_level": "turn"}, "importance_sampling_level = 'turn'"),
        ({"router_aux_loss_coef": 0.01}, "router_aux_loss_coef = 0.01"),
        ({"delta": 1.1}, "delta = 1.1"),
        ({"epsilon": 1.5}, "epsilon = 1.5"),
        ({"use_vllm": True, "vllm_importance_sampling_mode": "x"}, "sampling_mode = 'x'"),
        ({"use_vllm": True, "loss_type": "vespo"}, "vllm_importance_sampling_mode"),
        (
            {"loss_type": "vespo", "beta": 0.1, "importance_sampling_level": "sequence"},
            "importance_sampling_level = 'sequence'",
        ),
    ],
    ids=str,
)
def test_what_has_no_equivalent_is_refused_by_name(options, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        translate(options)


def test_without_vllm_or_its_correction_there_is_no_weight():
    for options in ({}, {"use_vllm": True, "vllm_importance_sampling_correction": False}):
        config = translate(options)
        assert config.importance_sampling_correction == "none"


def cispo_without_epsilon_high():
    """(size of the gradient with the default, with epsilon_high = 5), on policy."""
    batch = even_batch((4,), (1.0,))
    sizes = []
    for options in ({}, {"epsilon_high": 5.0}):
        sizes.append(trl({"loss_type": "cispo", **options}, batch).hidden.norm())
    config = LossConfig.from_trl(trl_config(loss_type="cispo", epsilon_high=5.0))
    return sizes[0] / sizes[1], ours(batch, config).hidden.norm() / sizes[1]


def bnpo_split_in_two():
    """(sum of two micro-batches of TRL, of ours with the step's denominator); as one batch 0.5."""
    whole = even_batch((1, 3), (1.0, -1.0))
    parts = [{name: x[k : k + 1] for name, x in whole.items()} for k in (0, 1)]
    for part in parts:
        part["weight"] = whole["weight"]
    args = {"loss_type": "bnpo", "gradient_accumulation_steps": 2}
    there = sum(trl(args, part).loss for part in parts)
    config = LossConfig.from_trl(trl_config(**args))
    return there, sum(ours(part, config, denominator=4).loss for part in parts)


def product_of_a_long_sequence():
    """Weight of 100 tokens, each 0.012 nats likelier to policy than to sampler."""
    batch = even_batch((100,), (-1.0,))
    batch["sampler_logprobs"] = batch["old_logprobs"] - 0.012
    del batch["ref_logprobs"]
    there = trl({"loss_type": "dapo", "use_vllm": True}, batch).loss
    config = LossConfig(importance_sampling_correction="geometric_mask")
    return there, ours(batch, config).loss


def kl_that_is_measured():
    """The metric `kl` where the ratio is 2 and k3 is log 2 - 1/2."""
    batch = even_batch((4,), (1.0,), log_ratio=math.log(2), ref_gap=math.log(2))
    args = trl_config(loss_type="grpo", beta=0.1)
    trainer, config = trl_trainer(args), LossConfig.from_trl(args)
    theirs(batch, trl_loss(trainer))
    there = trainer._metrics["train"]["kl"][0]
    assert float(linear_grpo_loss(**batch, config=config).metrics["kl"]) == pytest.approx(there)
    plain = dataclasses.replace(config, use_bias_correction_kl=False)
    return there, linear_grpo_loss(**batch, config=plain).metrics["kl"]


def kl_of_the_async_trainer():
    """The metric `kl` of a policy that is its reference, after steps of ratio 2."""
    from trl.experimental.async_grpo.async_grpo_trainer import AsyncGRPOTrainer

    batch = even_batch((4,), (1.0,), log_ratio=math.log(2))
    log_ratio = torch.full((4,), math.log(2))
    scope = {"log_probs": log_ratio, "log_ratio": log_ratio, "coef_1": log_ratio.exp()}
    method = AsyncGRPOTrainer.compute_loss
    lines = run_lines(method, "local_ratio_sum =", last="local_kl_sum =", scope=scope)
    output = linear_grpo_loss(**batch)
    return lines["local_kl_sum"] / lines["local_count"], output.metrics["kl"]


def gradient_of_the_kl():
    """Slope of the KL on policy, log 2 from the reference: TRL 1.16's default, and before 1.10."""
    batch = even_batch((1,), (0.0,), ref_gap=math.log(2))

    def slope(**options):
        result = trl({"loss_type": "grpo", "beta": 1.0, **options}, batch)
        # d(log p) / d(hidden of the target) = 1 - p = 1/2
        return 2 * result.hidden[0, 0, 0]

    return slope(), slope(use_bias_correction_kl=False)


def advantages(rewards: list[list[float]], **options):
    """TRL's own lines from rewards [P, G] to advantages and their metrics."""
    args = trl_config(num_generations=len(rewards[0]), **options)
    trainer = trl_trainer(args)
    trainer.num_generations = len(rewards[0])
    trainer.reward_weights, trainer.reward_func_names = torch.ones(1), ["f"]
    column = torch.tensor(rewards).reshape(-1, 1)
    scope = {"self": trainer, "rewards_per_func": column, "prompts": column}
    scope |= {"num_generations": len(rewards[0]), "device": column.device, "mode": "train"}
    scope = run_lines(
        type(trainer)._generate_and_score_completions,
        "unscorable_mask =",
        last="self._metrics[mode]['frac_reward_zero_std']",
        scope=scope,
    )
    return scope["advantages"], {k: v[0] for k, v in trainer._metrics["train"].items()}


def dead_groups():
    """Share of groups that teach nothing, one of two, with scale_rewards = "batch"."""
    rewards = [[0.0, 1.0], [1.0, 1.0]]
    _, metrics = advantages(rewards, scale_rewards="batch")
    output = group_advantages(torch.tensor(rewards).flatten(), group_size=2, scale="batch")
    return metrics["frac_reward_zero_std"], output.degenerate.float().mean()


def spread_of_rewards():
    """Mean std within a group, where groups differ by 10."""
    rewards = [[0.0, 1.0], [10.0, 11.0]]
    _, metrics = advantages(rewards)
    output = group_advantages(torch.tensor(rewards).flatten(), group_size=2)
    return metrics["reward_std"], output.group_std.mean()


def unscorable_completion():
    """Token mean over two completions, one of them without any reward."""
    values, _ = advantages([[1.0, math.nan], [0.0, 2.0]], scale_rewards="none")
    assert values.tolist() == [0.0, 0.0, -1.0, 1.0]
    batch = even_batch((4, 4), (1.0, 0.0))
    masked = batch | {"mask": batch["mask"] & (batch["advantages"] != 0)[:, None]}
    return trl({"loss_type": "dapo"}, batch).loss, ours(masked, LossConfig()).loss


TRAPS = [
    Trap(
        "`cispo` without `epsilon_high` takes `epsilon` for the largest ratio: size of every "
        "on-policy gradient. `from_trl` refuses it",
        0.2,
        1.0,
        cispo_without_epsilon_high,
    ),
    Trap(
        "`bnpo` depends on how a step is cut into micro-batches: a loss of 0.5, in two parts. "
        "Here `denominator` is the step's number of tokens",
        0.0,
        0.5,
        bnpo_split_in_two,
    ),
    Trap(
        "`sequence_mask`, the default, multiplies the ratios of a sequence: weight of 100 tokens "
        "that are 0.012 nats apart. `geometric_mask` takes their mean (ms-swift gives that the "
        "same name, `sequence_mask`)",
        0.0,
        math.exp(0.012),
        product_of_a_long_sequence,
    ),
    Trap(
        "`kl` is measured times the ratio with `use_bias_correction_kl`, here too: ratio 2, "
        "k3 = log 2 - 1/2. Without that option it is k3 itself",
        2 * math.log(2) - 1,
        math.log(2) - 0.5,
        kl_that_is_measured,
    ),
    Trap(
        "`kl` of the experimental AsyncGRPOTrainer is between policy and old policy: ratio 2, no "
        "distance to the reference",
        1 - math.log(2),
        0.0,
        kl_of_the_async_trainer,
    ),
    Trap(
        "`use_bias_correction_kl` is on by default from TRL 1.10 on and was off before: slope of "
        "the KL on policy, log 2 from the reference. Off by default here",
        math.log(2),
        0.5,
        gradient_of_the_kl,
    ),
    Trap(
        '`frac_reward_zero_std` looks at the std that scales, with `scale_rewards="batch"` the '
        "batch's: share of dead groups, one of two. Here `degenerate` looks at the group",
        0.0,
        0.5,
        dead_groups,
    ),
    Trap(
        "`reward_std` is the std over the batch: groups of spread 0.71 that are 10 apart. Here "
        "`group_std`",
        5.802298,
        math.sqrt(0.5),
        spread_of_rewards,
    ),
    Trap(
        "A completion that no reward function scores has advantage 0 and still counts in the token "
        "mean: loss of one scored and one unscored completion. Leave it out of the mask",
        -0.5,
        -1.0,
        unscorable_completion,
    ),
]


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.measure.__name__)
def test_trap(trap):
    assert trap.measure() == pytest.approx((trap.there, trap.here), abs=1e-6)
