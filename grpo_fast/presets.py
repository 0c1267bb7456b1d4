"""The loss of another trainer's config: `LossConfig.from_trl` and `LossConfig.from_verl`.

Attributes and keys are read, neither package is imported. What has no exact equivalent is refused
by name; docs/conformance.md has every equivalent, with the difference measured.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .errors import ConfigError, nearest
from .loss_config import CLIPPED, LossConfig

TRL_LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")
TRL_LEVELS = ("token", "sequence")
TRL_CORRECTIONS = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
# TRL bounds no log-ratio; this is the widest bound a LossConfig has.
TRL_LOG_RATIO_CLAMP = 80.0
# TRL raises a smaller VESPO decay to this one.
TRL_LEAST_LAMBDA = 1e-4

VERL_LOSS_TYPES = {
    "vanilla": "dapo",
    "gspo": "gspo",
    "sapo": "sapo",
    "gpg": "gpg",
    "geo_mean": "gmpo",
    "dro": "dro",
    "cispo": "cispo",
    "dppo_tv": "dppo_tv",
    "dppo_kl": "dppo_kl",
    "bypass_mode": "reinforce",
}
VERL_AGGREGATIONS = {
    "token-mean": "token_mean",
    "token-sum": "token_mean",
    "seq-mean-token-sum": "sequence_sum",
    "seq-mean-token-sum-norm": "constant",
    "seq-mean-token-mean": "sequence_mean",
}
VERL_KL = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}
VERL_KL |= {"abs": "abs"}
VERL_KL |= {f"{name}+": ours if ours == "k2" else f"{ours}+" for name, ours in VERL_KL.items()}

Read = Callable[..., Any]
"""`read(name)` or `read(name, default)`: one option of somebody's config."""


def loss_config_from_trl(args: Any) -> LossConfig:
    """`GRPOTrainer(args=args)._compute_loss` as a LossConfig.

    args: a GRPOConfig of TRL 0.19 to 1.16, or anything with its attributes or keys; an option that
    a version does not have is off. The caller's, as they are no part of the per-token formula: the
    mask (mask_truncated_completions), advantages (scale_rewards), when to pass old_logprobs, the
    load-balancing loss of an MoE model, and gradient accumulation (in `denominator`). Raises
    ConfigError naming an option that has no exact equivalent.
    """
    read = _reader(args, "a GRPOConfig")
    loss_type = _choice("loss_type", read("loss_type"), TRL_LOSS_TYPES)
    router = read("router_aux_loss_coef", None)
    # Up to TRL 1.13 there was a default, which only an MoE model reads: it is nobody's choice.
    if router and router != getattr(type(args), "router_aux_loss_coef", None):
        raise ConfigError(
            f"router_aux_loss_coef = {router!r} is a loss of the model's routers, not of its "
            "tokens: set it to 0.0 here and add router_aux_loss_coef x aux_loss to the loss"
        )
    options = {
        "loss_type": loss_type,
        "temperature": read("temperature"),
        "beta": read("beta"),
        "top_entropy_quantile": read("top_entropy_quantile", 1.0),
        "off_policy_mask_threshold": read("off_policy_mask_threshold", None),
        "entropy_coef": read("entropy_coef", 0.0),
        "log_ratio_clamp": TRL_LOG_RATIO_CLAMP,
    }
    if options["beta"]:
        options["use_bias_correction_kl"] = read("use_bias_correction_kl", False)
    if read("use_adaptive_entropy", False):
        control = [f"entropy_coef_{name}" for name in ("min", "max", "delta")]
        for name in ("use_adaptive_entropy", "entropy_target", *control):
            options[name] = read(name)
    return LossConfig(**options | _trl_objective(loss_type, read) | _trl_correction(read))


def _trl_objective(loss_type: str, read: Read) -> dict[str, Any]:
    """The options that mean something to the loss type; in TRL the others do nothing."""
    level = _choice(
        "importance_sampling_level", read("importance_sampling_level", "token"), TRL_LEVELS
    )
    if loss_type == "vespo":
        if level == "sequence" and read("beta") and read("use_bias_correction_kl", False):
            raise ConfigError(
                "importance_sampling_level = 'sequence' only weights the KL with loss_type 'vespo'"
                ": set it to 'token', or use_bias_correction_kl = False"
            )
        options = {f"vespo_k_{side}": read(f"vespo_k_{side}") for side in ("pos", "neg")}
        for name in ("vespo_lambda_pos", "vespo_lambda_neg"):
            options[name] = max(read(name), TRL_LEAST_LAMBDA)
        return options
    options = {"importance_sampling_level": level}
    if loss_type == "sapo":
        names = ("sapo_temperature_pos", "sapo_temperature_neg")
        return options | {name: read(name) for name in names}
    options["epsilon_high"] = read("epsilon_high", None)
    if loss_type == "cispo" and options["epsilon_high"] is None:
        epsilon = read("epsilon")
        raise ConfigError(
            f"epsilon_high is not set: with loss_type 'cispo' TRL takes epsilon = {epsilon} for "
            "the largest ratio, and every gradient shrinks by it. Set epsilon_high = 5.0, as is "
            f"usual, or epsilon_high = {epsilon} to have that again"
        )
    if loss_type in CLIPPED:
        options |= {"epsilon": read("epsilon"), "delta": read("delta", None)}
    if loss_type == "dr_grpo":
        options["max_completion_length"] = read("max_completion_length")
    return options


def _trl_correction(read: Read) -> dict[str, Any]:
    """The weight for a sampler that is not the policy, which TRL has for vLLM only."""
    if not (read("use_vllm", False) and read("vllm_importance_sampling_correction", False)):
        return {}
    # Up to TRL 0.25 there was one mode, and up to 1.5 one bound, the cap.
    mode = read("vllm_importance_sampling_mode", "token_truncate")
    _choice("vllm_importance_sampling_mode", mode, TRL_CORRECTIONS)
    if read("loss_type") == "vespo" and mode.startswith("sequence"):
        raise ConfigError(
            f"vllm_importance_sampling_mode = {mode!r} does not go with loss_type 'vespo', in TRL "
            "neither: choose token_truncate or token_mask"
        )
    cap = read("vllm_importance_sampling_cap", None)
    return {
        "importance_sampling_correction": mode,
        "importance_sampling_max": read("vllm_importance_sampling_clip_max", cap),
        "importance_sampling_min": read("vllm_importance_sampling_clip_min", None),
    }


def loss_config_from_verl(
    cfg: Any, *, rollout_correction: Any = None, temperature: float = 1.0
) -> LossConfig:
    """verl's `ppo_loss(config=cfg)` as a LossConfig, to be called with
    `**verl_denominators(cfg, mask)`.

    cfg: actor_rollout_ref.actor of verl 0.9, as ActorConfig, DictConfig or dict. What lies
    elsewhere there: rollout_correction is algorithm.rollout_correction, temperature is
    actor_rollout_ref.rollout.temperature. In bypass mode the sampler's log-probs are old_logprobs
    for `ppo_clip`, and sampler_logprobs without old_logprobs for `reinforce`. The same but far from
    the old policy and the reference: beyond a log-ratio of 20 (10 for gspo), and beyond a k3 of 10,
    verl gives a token no gradient. Raises ConfigError naming an option that has no exact
    equivalent.
    """
    read = _reader(cfg, "actor_rollout_ref.actor")
    mode, correction = _verl_mode(read, rollout_correction)
    aggregation = _verl_aggregation(mode, read)
    options = {
        "loss_type": VERL_LOSS_TYPES[mode],
        "aggregation": VERL_AGGREGATIONS[aggregation],
        "temperature": temperature,
    }
    if aggregation == "seq-mean-token-sum-norm":
        options["max_completion_length"] = read("loss_scale_factor", None)
    options |= _verl_objective(mode, read) | _verl_correction(mode, correction)
    return LossConfig(**options | _verl_kl(mode, read) | _verl_entropy(read))


def _verl_mode(read: Read, rollout_correction: Any) -> tuple[str, Read]:
    """(loss mode, rollout correction) in force: in bypass mode the correction's own loss_type
    decides, `vanilla` for its ppo_clip and `bypass_mode` for its reinforce."""
    policy = _reader(read("policy_loss", {}), "policy_loss")
    mode = _choice("loss_mode", policy("loss_mode", "vanilla"), tuple(VERL_LOSS_TYPES))
    if mode == "bypass_mode":
        rollout_correction = policy("rollout_correction", None)
    correction = _reader(rollout_correction or {}, "rollout_correction")
    if mode != "bypass_mode" and not correction("bypass_mode", False):
        return mode, correction
    loss = _choice("loss_type", correction("loss_type", "ppo_clip"), ("ppo_clip", "reinforce"))
    if loss == "reinforce":
        return "bypass_mode", correction
    # The clipped ratio is to the sampler already: no weight beside it.
    return "vanilla", _reader({"rollout_rs": correction("rollout_rs", None)}, "")


def _verl_aggregation(mode: str, read: Read) -> str:
    """How the policy term adds up: sapo and geo_mean have their own way."""
    asked = _choice("loss_agg_mode", read("loss_agg_mode"), tuple(VERL_AGGREGATIONS))
    return "seq-mean-token-mean" if mode in ("sapo", "geo_mean") else asked


def _verl_objective(mode: str, read: Read) -> dict[str, Any]:
    """The options that mean something to the loss mode; in verl the others do nothing."""
    if mode in ("gpg", "bypass_mode"):
        return {}
    if mode == "dro":
        return {"dro_beta": _reader(read("policy_loss"), "policy_loss")("dro_beta", None)}
    if mode == "sapo":
        pos, neg = read("tau_pos", 1.0), read("tau_neg", 1.05)
        return {"sapo_temperature_pos": pos, "sapo_temperature_neg": neg}
    clip, low, high = (read(f"clip_ratio{side}", None) for side in ("", "_low", "_high"))
    options = {
        "epsilon": clip if low is None else low,
        "epsilon_high": clip if high is None else high,
    }
    if mode == "gspo":
        return options | {"importance_sampling_level": "sequence_token"}
    if mode == "cispo":
        return options | {"cispo_bounds": "both"}
    if mode == "geo_mean":
        return options
    ceiling = read("clip_ratio_c", 3.0 if mode == "vanilla" else 20.0)
    if not ceiling > 1:
        raise ConfigError(f"clip_ratio_c = {ceiling!r} is out of range: expected more than 1")
    return options | {"dual_clip" if mode == "vanilla" else "delta": ceiling}


def _verl_correction(mode: str, correction: Read) -> dict[str, Any]:
    """algorithm.rollout_correction: one bound truncates, "lower_upper" masks."""
    rejection = correction("rollout_rs", None)
    if rejection:
        raise ConfigError(
            f"rollout_rs = {rejection!r} takes tokens out of the mask: leave it out here and pass "
            "that mask"
        )
    level, bounds = correction("rollout_is", None), correction("rollout_is_threshold", 2.0)
    if level is None or bounds is None:
        return {}
    _choice("rollout_is", level, ("token", "sequence"))
    if correction("rollout_is_batch_normalize", False):
        raise ConfigError(
            "rollout_is_batch_normalize divides by a mean over the whole batch, which the loss of "
            "a micro-batch does not see: set it to False"
        )
    if mode == "geo_mean" and level == "token":
        raise ConfigError(
            "rollout_is = 'token' with loss_mode 'geo_mean' is a geometric mean of bounded "
            "weights: choose 'sequence'"
        )
    low, _, high = str(bounds).rpartition("_")
    try:
        least, most = float(low) if low else None, float(high)
    except ValueError:
        raise ConfigError(
            f"rollout_is_threshold = {bounds!r} is neither a number nor a pair 'lower_upper'"
        ) from None
    return {
        "importance_sampling_correction": f"{level}_{'mask' if low else 'truncate'}",
        "importance_sampling_max": most,
        "importance_sampling_min": least,
    }


def _verl_kl(mode: str, read: Read) -> dict[str, Any]:
    weight = read("kl_loss_coef", 0.001)
    if not (read("use_kl_loss", False) and weight):
        return {}
    kind = _choice("kl_loss_type", read("kl_loss_type", "low_var_kl"), tuple(VERL_KL))
    asked, own = read("loss_agg_mode"), _verl_aggregation(mode, read)
    # geo_mean is a mean of this call's sequences, its KL one of the whole step's.
    if mode == "geo_mean" or asked != own:
        raise ConfigError(
            f"use_kl_loss with loss_mode {mode!r} adds up the KL by loss_agg_mode {asked!r} and "
            f"the policy term in its own way: set "
            + ("use_kl_loss = False" if mode == "geo_mean" else f"loss_agg_mode = {own!r}")
        )
    return {"beta": weight, "kl_estimator": VERL_KL[kind]}


def _verl_entropy(read: Read) -> dict[str, Any]:
    weight = read("entropy_coeff", 0)
    if weight and read("loss_agg_mode") == "seq-mean-token-mean":
        raise ConfigError(
            f"entropy_coeff = {weight!r} with loss_agg_mode 'seq-mean-token-mean' is a mean over "
            "sequences, and entropy_coef one over tokens: set entropy_coeff = 0"
        )
    return {"entropy_coef": weight}


def verl_denominators(
    cfg: Any, mask: Tensor, *, rollout_correction: Any = None
) -> dict[str, float | Tensor]:
    """The keywords by which `grpo_loss` divides as verl's `agg_loss` does.

    cfg and rollout_correction as in `loss_config_from_verl`; cfg.global_batch_info holds what verl
    puts there before each micro-batch (dp_size, batch_num_tokens, global_batch_size), and what is
    missing is counted in this call: tokens, or sequences that have one. mask: [S, L], padded as in
    verl, because a missing loss_scale_factor is its width. Returns `denominator`, and
    `entropy_denominator` where entropy_coeff is set.
    """
    read = _reader(cfg, "actor_rollout_ref.actor")
    given = _reader(read("global_batch_info", {}), "global_batch_info")
    ranks = given("dp_size", 1)

    def count(name: str, counted: Tensor) -> float | Tensor:
        number = given(name, None)
        return (counted.clamp(min=1) if number is None else number) / ranks

    def divisor(aggregation: str) -> float | Tensor:
        if aggregation == "token-sum":
            return 1 / ranks
        if aggregation == "token-mean":
            return count("batch_num_tokens", mask.sum())
        sequences = count("global_batch_size", (mask.sum(-1) > 0).sum())
        if aggregation == "seq-mean-token-sum-norm":
            return sequences * (read("loss_scale_factor", None) or mask.shape[-1])
        return sequences

    mode, _ = _verl_mode(read, rollout_correction)
    # geo_mean takes the plain mean of its call's sequences, empty ones and other ranks' aside.
    whole = len(mask) if mode == "geo_mean" else divisor(_verl_aggregation(mode, read))
    if not read("entropy_coeff", 0):
        return {"denominator": whole}
    return {"denominator": whole, "entropy_denominator": divisor(read("loss_agg_mode"))}


_ABSENT = object()


def _reader(source: Any, kind: str) -> Read:
    """How to read an option of `source`, a mapping or an object; `kind` is what it should be."""

    def read(name: str, default: Any = _ABSENT) -> Any:
        if isinstance(source, Mapping):
            value = source.get(name, default)
        else:
            value = getattr(source, name, default)
        if value is _ABSENT:
            raise ConfigError(f"{type(source).__name__} has no option {name}: expected {kind}")
        return value

    return read


def _choice(name: str, value: Any, known: Sequence[str]) -> Any:
    if value not in known:
        raise ConfigError(
            f"{name} = {value!r} has no equivalent: {nearest(str(value), known)}"
            f"choose one of {', '.join(known)}"
        )
    return value
