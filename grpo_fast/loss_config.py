"""Which GRPO loss: `LossConfig`, a frozen dataclass, validated when constructed.

Names and meanings are TRL's where TRL has the option. `presets.py` reads TRL's and verl's own
configs.
"""

import math
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

from .errors import ConfigError, nearest
from .numbered import Numbered

# exp(20) = 4.9e8: past any ratio a clip lets through, far below float32 overflow (88).
DEFAULT_LOG_RATIO_CLAMP = 20.0


def check(condition: bool, name: str, value: Any, expected: str, hint: str = "") -> None:
    """ConfigError that names option, value and range, unless `condition` holds."""
    if not condition:
        raise ConfigError(f"{name} = {value!r} is out of range: expected {expected}{hint}")


def check_choice(name: str, value: Any, choices: Any) -> None:
    """ConfigError that lists the choices of a `Literal`, the nearest one first."""
    allowed = typing.get_args(choices)
    if value not in allowed:
        raise ConfigError(
            f"{name} = {value!r} is not available: {nearest(str(value), map(str, allowed))}"
            f"choose one of {', '.join(map(str, allowed))}"
        )


def is_number(value: Any) -> bool:
    """A finite int or float, and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


if TYPE_CHECKING:
    ObjectiveOption = str | Callable[..., Any] | None
else:
    # The command line is generated from the fields, and offers what can be written there.
    ObjectiveOption = str | None

LossType = Literal[
    "grpo",
    "bnpo",
    "dapo",
    "dr_grpo",
    "cispo",
    "sapo",
    "gspo",
    "luspo",
    "gmpo",
    "vespo",
    "dppo_tv",
    "dppo_kl",
    "dro",
    "gpg",
    "reinforce",
]
Aggregation = Literal["sequence_mean", "token_mean", "constant", "sequence_sum", "prompt_mean"]
ImportanceSamplingLevel = Literal["token", "sequence", "sequence_token"]
KLEstimator = Literal["k1", "k2", "k3", "abs", "k1+", "k3+", "abs+"]
CISPOBounds = Literal["upper", "both"]
Correction = Literal[
    "none",
    "token_truncate",
    "token_mask",
    "sequence_truncate",
    "sequence_mask",
    "geometric_truncate",
    "geometric_mask",
]

# The aggregation a loss type brings along.
AGGREGATIONS: dict[str, Aggregation] = {
    "grpo": "sequence_mean",
    "bnpo": "token_mean",
    "dapo": "token_mean",
    "dr_grpo": "constant",
    "cispo": "token_mean",
    "sapo": "sequence_mean",
    "gspo": "sequence_mean",
    "luspo": "sequence_sum",
    "gmpo": "sequence_mean",
    "vespo": "token_mean",
    "dppo_tv": "token_mean",
    "dppo_kl": "token_mean",
    "dro": "token_mean",
    "gpg": "token_mean",
    "reinforce": "token_mean",
}
CLIPPED = ("grpo", "bnpo", "dapo", "dr_grpo", "gspo", "luspo")
# Their formula is of the whole sequence whatever the level of the ratio.
WHOLE_SEQUENCE = ("gmpo", "vespo")
# Options and the loss types they mean something to; elsewhere they are refused.
BELONGS_TO = {
    "epsilon": (*CLIPPED, "cispo", "gmpo", "dppo_tv", "dppo_kl"),
    "epsilon_high": (*CLIPPED, "cispo", "gmpo", "dppo_tv", "dppo_kl"),
    "delta": (*CLIPPED, "dppo_tv", "dppo_kl"),
    "dual_clip": CLIPPED,
    "cispo_bounds": ("cispo",),
    "importance_sampling_level": (*CLIPPED, "cispo", "sapo"),
    "dro_beta": ("dro",),
    **{f"sapo_temperature_{side}": ("sapo",) for side in ("pos", "neg")},
    **{f"vespo_{name}_{side}": ("vespo",) for name in ("k", "lambda") for side in ("pos", "neg")},
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig(Numbered):
    """Which GRPO loss. Names and meanings are TRL's where TRL has the option."""

    loss_type: LossType = "dapo"
    """Objective and how its tokens add up. PPO clip: `grpo` mean over sequences of token means,
    `bnpo` token mean of this call, `dapo` token mean of the whole optimizer step, `dr_grpo`
    sum / (sequences x max_completion_length), `gspo` one ratio a sequence, `luspo` the same times
    the length. Others: `cispo`, `sapo`, `gmpo`, `vespo`, `dppo_tv`, `dppo_kl`, `dro`, `gpg`,
    `reinforce`."""
    objective: ObjectiveOption = None
    """Your own objective in place of loss_type's: a function (tokens, config) -> per-token loss, or
    `file.py:function`; loss_type still says how tokens add up."""
    aggregation: Aggregation | None = None
    """How tokens add up, where not as loss_type has it: `sequence_mean`, `token_mean`, `constant`
    (Dr. GRPO), `sequence_sum`, `prompt_mean` (each group's token mean)."""
    epsilon: float = 0.2
    """Lower clip: ratio >= 1 - epsilon (gmpo: of the log-ratio, dppo: of the divergence)."""
    epsilon_high: float | None = None
    """Upper clip: at most 1 + epsilon_high; as epsilon when not given. `cispo` needs it: the
    largest ratio itself (5.0 is usual), or 1 + epsilon_high with cispo_bounds `both`."""
    delta: float | None = None
    """Two-sided clip (INTELLECT-2): cap of the unclipped ratio, above 1 + epsilon_high; off when
    not given. dppo: cap of the ratio, 20 when not given."""
    dual_clip: float | None = None
    """Dual clip (1912.09729): with a negative advantage the loss is at most -dual_clip x advantage;
    verl's clip_ratio_c, 3.0 there; off when not given."""
    cispo_bounds: CISPOBounds = "upper"
    """`upper`: ratio <= epsilon_high, no lower bound (TRL, Liger); `both`: within
    [1 - epsilon, 1 + epsilon_high] (verl)."""
    sapo_temperature_pos: float = 1.0
    """SAPO gate temperature where the advantage is positive."""
    sapo_temperature_neg: float = 1.05
    """SAPO gate temperature elsewhere."""
    vespo_k_pos: float = 2.0
    """VESPO power of the sequence ratio, advantage >= 0."""
    vespo_lambda_pos: float = 3.0
    """VESPO decay, advantage >= 0."""
    vespo_k_neg: float = 3.0
    """VESPO power, advantage < 0."""
    vespo_lambda_neg: float = 2.0
    """VESPO decay, advantage < 0."""
    dro_beta: float | None = None
    """DRO: weight of the squared log-ratio; `dro` needs it."""
    beta: float = 0.0
    """Weight of the KL to the reference policy; 0 needs no reference, and KL is not measured."""
    kl_estimator: KLEstimator = "k3"
    """KL estimator with d = logprob - ref_logprob: k1 = d, k2 = d^2/2, k3 = exp(-d) - 1 + d,
    abs = |d|; with a `+` the value is that and the gradient k2's (verl)."""
    use_bias_correction_kl: bool = False
    """Multiply the KL by the differentiable importance ratio (DeepSeek-V3.2)."""
    importance_sampling_level: ImportanceSamplingLevel | None = None
    """`token`: one ratio a token; `sequence`: exp of the mean log-ratio (GSPO); `sequence_token`:
    that value with the token's own gradient (GSPO-token). When not given, `sequence` for gspo and
    luspo, else `token`."""
    importance_sampling_correction: Correction = "none"
    """Weight for a sampler that is not the policy, exp(old - sampler log-probs): per token, or
    their product (`sequence`) or geometric mean over the sequence, truncated to the bounds below or
    0 outside of them (mask)."""
    importance_sampling_max: float | None = 3.0
    """Upper bound of that weight (TRL: vllm_importance_sampling_clip_max); none when not given."""
    importance_sampling_min: float | None = None
    """Lower bound of that weight; none when not given."""
    off_policy_mask_threshold: float | None = None
    """Leave out sequences with a negative advantage whose mean (sampler - policy) log-prob is above
    it (DeepSeek-V3.2)."""
    top_entropy_quantile: float = 1.0
    """Policy term only on this share of tokens, those of highest entropy (2506.01939)."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus: the loss falls by entropy_coef x mean token entropy."""
    use_adaptive_entropy: bool = False
    """Move entropy_coef by entropy_coef_delta each step towards entropy_target (Skywork-OR1)."""
    entropy_coef_min: float = 0.0
    """Least entropy_coef of adaptive control."""
    entropy_coef_max: float = 1.0
    """Largest entropy_coef of adaptive control."""
    entropy_coef_delta: float = 0.005
    """Step of adaptive control."""
    entropy_target: float = 0.2
    """Entropy, in nats, at or below which the bonus acts."""
    skip_zero_advantage: bool = True
    """In training, tokens with advantage 0 and neither KL nor entropy bonus enter no product: their
    log-probs and entropy are NaN, not measured, and metrics leave them out; `grpo_backward` does
    not even forward completions of such tokens, nor fully masked ones."""
    temperature: float = 1.0
    """Log-probs are log_softmax(logits / temperature), as sampled."""
    max_completion_length: int | None = None
    """The constant of `dr_grpo`; the trainer fills it in."""
    log_ratio_clamp: float = DEFAULT_LOG_RATIO_CLAMP
    """Beyond this |log-ratio| a ratio or KL is taken, value and slope, at the limit; such tokens
    are counted."""

    def __post_init__(self) -> None:
        self._check_choices()
        self._check_ranges()
        self._check_clip()
        self._check_together()
        self.assign_number()

    @staticmethod
    def from_trl(args: Any) -> "LossConfig":
        """The loss of a TRL GRPOConfig: `presets.loss_config_from_trl`."""
        from .presets import loss_config_from_trl

        return loss_config_from_trl(args)

    @staticmethod
    def from_verl(
        cfg: Any, *, rollout_correction: Any = None, temperature: float = 1.0
    ) -> "LossConfig":
        """The loss of verl's actor config: `presets.loss_config_from_verl`."""
        from .presets import loss_config_from_verl

        return loss_config_from_verl(
            cfg, rollout_correction=rollout_correction, temperature=temperature
        )

    @property
    def clip_high(self) -> float:
        """`epsilon_high`, or `epsilon` where none was given."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    @property
    def level(self) -> ImportanceSamplingLevel:
        """`importance_sampling_level`, or the one of the loss type where none was given."""
        if self.importance_sampling_level is not None:
            return self.importance_sampling_level
        return "sequence" if self.loss_type in ("gspo", "luspo") else "token"

    @property
    def adds_up(self) -> Aggregation:
        """`aggregation`, or the one of the loss type where none was given."""
        return AGGREGATIONS[self.loss_type] if self.aggregation is None else self.aggregation

    @property
    def cap(self) -> float:
        """Largest unclipped ratio that counts; `dual_clip` is the same where the advantage is
        negative, `delta` on both sides."""
        if self.loss_type in ("dppo_tv", "dppo_kl"):
            return 20.0 if self.delta is None else self.delta
        return math.inf if self.delta is None else self.delta

    def _check_choices(self) -> None:
        check_choice("loss_type", self.loss_type, LossType)
        check_choice("kl_estimator", self.kl_estimator, KLEstimator)
        check_choice("cispo_bounds", self.cispo_bounds, CISPOBounds)
        check_choice(
            "importance_sampling_correction", self.importance_sampling_correction, Correction
        )
        if self.importance_sampling_level is not None:
            check_choice(
                "importance_sampling_level", self.importance_sampling_level, ImportanceSamplingLevel
            )
        if self.aggregation is not None:
            check_choice("aggregation", self.aggregation, Aggregation)
        objective = self.objective
        if objective is not None and not callable(objective) and not isinstance(objective, str):
            raise ConfigError(
                f"objective is {type(objective).__name__}, expected a function (tokens, config) -> "
                "loss, or 'file.py:function'"
            )

    def _check_ranges(self) -> None:
        for name in ("beta", "entropy_coef", "entropy_coef_min", "entropy_coef_delta"):
            value = getattr(self, name)
            check(is_number(value) and value >= 0, name, value, "a finite number >= 0")
        check(
            is_number(self.temperature) and self.temperature > 0,
            "temperature",
            self.temperature,
            "a finite number > 0",
            "; the loss needs the distribution that was sampled, and greedy decoding has none",
        )
        for name in ("sapo_temperature_pos", "sapo_temperature_neg", "max_completion_length"):
            value = getattr(self, name)
            if value is not None:
                check(is_number(value) and value > 0, name, value, "> 0")
        for name in ("vespo_k_pos", "vespo_k_neg", "vespo_lambda_pos", "vespo_lambda_neg"):
            value = getattr(self, name)
            check(is_number(value) and value >= 0, name, value, "a finite number >= 0")
        check(
            is_number(self.log_ratio_clamp) and 0 < self.log_ratio_clamp <= 80,
            "log_ratio_clamp",
            self.log_ratio_clamp,
            "0 < log_ratio_clamp <= 80 (exp overflows float32 at 88)",
        )
        quantile = self.top_entropy_quantile
        check(
            is_number(quantile) and 0 <= quantile <= 1,
            "top_entropy_quantile",
            quantile,
            "0 <= top_entropy_quantile <= 1",
        )
        threshold = self.off_policy_mask_threshold
        if threshold is not None:
            check(is_number(threshold), "off_policy_mask_threshold", threshold, "a finite number")
        check(
            is_number(self.entropy_coef_max) and self.entropy_coef_max >= self.entropy_coef_min,
            "entropy_coef_max",
            self.entropy_coef_max,
            f"at least entropy_coef_min = {self.entropy_coef_min}",
        )
        check(
            is_number(self.entropy_target), "entropy_target", self.entropy_target, "a finite number"
        )
        low, high = self.importance_sampling_min, self.importance_sampling_max
        for name, value in (("importance_sampling_min", low), ("importance_sampling_max", high)):
            if value is not None:
                check(is_number(value) and value >= 0, name, value, "a finite number >= 0")
        if low is not None and high is not None:
            check(low <= high, "importance_sampling_min", low, f"at most the maximum, {high}")

    def _check_clip(self) -> None:
        plain = self.loss_type in CLIPPED or (
            self.loss_type == "cispo" and self.cispo_bounds == "both"
        )
        limit = "0 <= epsilon < 1" if plain else "a finite number >= 0"
        below = self.epsilon < 1 if is_number(self.epsilon) and plain else True
        check(
            is_number(self.epsilon) and self.epsilon >= 0 and below, "epsilon", self.epsilon, limit
        )
        high = self.clip_high
        check(is_number(high) and high >= 0, "epsilon_high", high, "a finite number >= 0")
        if self.loss_type == "cispo" and self.epsilon_high is None and self.objective is None:
            raise ConfigError(
                "loss_type 'cispo' needs epsilon_high: the largest ratio, 5.0 is usual; as epsilon "
                f"= {self.epsilon} it would scale every gradient down"
            )
        if self.loss_type == "dro" and self.objective is None:
            check(
                is_number(self.dro_beta) and self.dro_beta > 0,
                "dro_beta",
                self.dro_beta,
                "a finite number > 0",
                ": loss_type 'dro' needs it",
            )
        for name in ("delta", "dual_clip"):
            value = getattr(self, name)
            least = 1 + high if self.loss_type in CLIPPED and name == "delta" else 1.0
            if value is not None:
                check(
                    is_number(value) and value > least,
                    name,
                    value,
                    f"more than {'1 + epsilon_high = ' if least > 1 else ''}{least:g}",
                    ", or leave it out",
                )

    def _check_together(self) -> None:
        """Options that would do nothing are refused, never ignored."""
        defaults = {field.name: field.default for field in fields(self)}
        for name, owners in BELONGS_TO.items():
            value = getattr(self, name)
            if self.objective is None and self.loss_type not in owners and value != defaults[name]:
                raise ConfigError(
                    f"{name} = {value!r} has no effect with loss_type '{self.loss_type}': leave it "
                    f"out, or choose one of {', '.join(owners)}"
                )
        if self.use_bias_correction_kl and not self.beta:
            raise ConfigError(
                "use_bias_correction_kl has no effect with beta = 0: set beta, or leave it out"
            )
        if self.loss_type == "cispo" and self.cispo_bounds == "upper" and self.epsilon != 0.2:
            raise ConfigError(
                f"epsilon = {self.epsilon} has no effect with cispo_bounds 'upper': leave it out, "
                "or choose cispo_bounds 'both'"
            )
        if self.importance_sampling_correction == "none":
            for name in ("importance_sampling_max", "importance_sampling_min"):
                if getattr(self, name) != defaults[name]:
                    raise ConfigError(
                        f"{name} has no effect with importance_sampling_correction 'none': choose "
                        f"one of {', '.join(typing.get_args(Correction)[1:])}"
                    )
        if not self.use_adaptive_entropy:
            for name in ("min", "max", "delta"):
                name = f"entropy_coef_{name}"
                if getattr(self, name) != defaults[name]:
                    raise ConfigError(
                        f"{name} has no effect without use_adaptive_entropy: set it too"
                    )
            if self.entropy_target != defaults["entropy_target"]:
                raise ConfigError(
                    "entropy_target has no effect without use_adaptive_entropy: set it too"
                )
