"""Liger's `LigerFusedLinearGRPOLoss`, same arguments and result, computed by `linear_grpo_loss`:
for trainers that call it, as ms-swift, axolotl and TRL up to 1.13 do.

Shapes: `S` sequences, `L` padded length, `D` hidden, `V` vocabulary.
"""

import dataclasses
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, InputError
from ..loss_config import AGGREGATIONS, BELONGS_TO, LossConfig
from ..objective import VESPO_LOG_LEAST, bounds_of
from ..ops import linear_grpo_loss, linear_logprob
from ..outputs import LossOutput
from ..presets import TRL_LEAST_LAMBDA, TRL_LOG_RATIO_CLAMP
from .hosts import Exchange, holders, host_module, no_gradient, version_of

TESTED = "0.8.5"
NAME = "LigerFusedLinearGRPOLoss"
# Those that divide by the tokens of the whole step.
BY_TOKENS = ("dapo", "cispo", "vespo")
UNBOUNDED = {
    "importance_sampling_correction": "token_truncate",
    "importance_sampling_max": None,
}
_exchange = Exchange("liger-kernel")


class LigerFusedLinearGRPOLoss(nn.Module):
    """`liger_kernel.chunked_loss.LigerFusedLinearGRPOLoss`, exact in the model's own dtype.

    compiled and chunk_size change nothing here. Where Liger is wrong without a word this is right
    (advantages per token, padding under luspo); an option that Liger ignores without a word is
    ignored with a warning (beta without a reference).
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        # Liger has a KL in its result wherever beta is not 0.
        self.kl_is_zero = bool(beta) and not use_ref_model
        if loss_type == "dr_grpo" and max_completion_length is None:
            raise ConfigError("loss_type 'dr_grpo' divides by max_completion_length: set it")
        # VESPO has no level; Liger's default is no wish for one.
        level = (
            None
            if (loss_type, importance_sampling_level) == ("vespo", "token")
            else (importance_sampling_level)
        )
        one_bound = epsilon_high == epsilon_low and loss_type != "cispo"
        options = {
            "loss_type": loss_type,
            "beta": beta,
            "epsilon": epsilon_low,
            "epsilon_high": None if one_bound else epsilon_high,
            "delta": delta,
            "max_completion_length": max_completion_length,
            "importance_sampling_level": level,
            "temperature": temperature,
            "use_bias_correction_kl": use_bias_correction_kl,
            "sapo_temperature_pos": sapo_temperature_pos,
            "sapo_temperature_neg": sapo_temperature_neg,
            "vespo_k_pos": vespo_k_pos,
            "vespo_lambda_pos": max(vespo_lambda_pos, TRL_LEAST_LAMBDA),
            "vespo_k_neg": vespo_k_neg,
            "vespo_lambda_neg": max(vespo_lambda_neg, TRL_LEAST_LAMBDA),
            "log_ratio_clamp": TRL_LOG_RATIO_CLAMP,
        }
        self.config = LossConfig(**_read(options, use_ref_model=use_ref_model))

    def forward(
        self,
        _input: Tensor,
        lin_weight: Tensor,
        selected_token_ids: Tensor,
        attention_mask: Tensor,
        advantages: Tensor,
        bias: Tensor | None = None,
        ref_per_token_logps: Tensor | None = None,
        old_per_token_logps: Tensor | None = None,
        ref_input: Tensor | None = None,
        ref_weight: Tensor | None = None,
        ref_bias: Tensor | None = None,
        vllm_is_ratio: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, (mean KL where beta is not 0, share of clipped tokens)).

        _input [S, L, D], lin_weight [V, D], selected_token_ids, attention_mask (of the loss) and
        log-probs [S, L], advantages [S] or [S, L], vllm_is_ratio [S], [S, 1] or [S, L].
        num_items_in_batch: the tokens of the step over all processes, for dapo, cispo and vespo.
        """
        mask = attention_mask != 0
        config, more = self.config, {}
        if config.beta:
            if ref_per_token_logps is not None and ref_input is not None:
                warnings.warn("ref_input is not read. Using ref_per_token_logps.", stacklevel=2)
            if ref_per_token_logps is None:
                reference = (ref_input, ref_weight, ref_bias)
                ref_per_token_logps = self._reference(selected_token_ids, mask, *reference)
            more["ref_logprobs"] = no_gradient(ref_per_token_logps)
        if config.loss_type in BY_TOKENS:
            more["denominator"] = _tokens_of_step(num_items_in_batch)
        scaled = no_gradient(advantages)
        if vllm_is_ratio is not None:
            ratio = _ratio(vllm_is_ratio, mask)
            if config.loss_type == "vespo":
                if old_per_token_logps is None:
                    # On policy: the weight is that of the sampler alone.
                    old_per_token_logps = self._logprobs(
                        selected_token_ids, mask, _input, lin_weight, bias
                    )
                more["sampler_logprobs"] = _sampler(ratio, mask, old_per_token_logps)
                config = dataclasses.replace(config, **UNBOUNDED)
            else:
                # Every objective is proportional to its advantage. A token of weight 0 has none
                # then, and still counts as clipped or not.
                scaled = _like(scaled, mask) * ratio
                config = dataclasses.replace(config, skip_zero_advantage=False)
        output = linear_grpo_loss(
            _input,
            lin_weight,
            selected_token_ids,
            scaled,
            mask=mask,
            old_logprobs=no_gradient(old_per_token_logps),
            bias=bias,
            config=config,
            **more,
        )
        kl = (output.metrics["kl"],) if config.beta else (output.loss.new_zeros(()),)
        kl = kl if config.beta or self.kl_is_zero else ()
        return output.loss, (*kl, _clipped(output, _like(advantages, mask), mask, config))

    def _reference(self, ids, mask, ref_input, ref_weight, ref_bias) -> Tensor:
        if ref_input is None or ref_weight is None:
            raise ConfigError(
                f"beta = {self.config.beta} needs a reference: pass ref_per_token_logps, or "
                "ref_input and ref_weight, or set beta = 0.0"
            )
        return self._logprobs(ids, mask, ref_input, ref_weight, ref_bias)

    @torch.no_grad()
    def _logprobs(self, ids, mask, hidden, weight, bias) -> Tensor:
        targets = ids.masked_fill(~mask, 0)
        options = {"bias": bias, "temperature": self.config.temperature}
        return linear_logprob(hidden, weight, targets, **options).logprobs


def _read(options: dict[str, Any], *, use_ref_model: bool) -> dict[str, Any]:
    """The options, those that Liger never reads at their defaults, and one warning of them all."""
    defaults = {field.name: field.default for field in dataclasses.fields(LossConfig)}
    kind = options["loss_type"]
    of_others = {name for name, owners in BELONGS_TO.items() if kind not in owners}
    # A level that a loss does not have is refused, by Liger too.
    of_others -= {"importance_sampling_level"}
    if kind == "cispo":
        of_others |= {"epsilon"}
        if options["epsilon_high"] < 1:
            warnings.warn(
                f"epsilon_high = {options['epsilon_high']} is the largest ratio of loss_type "
                "'cispo', and scales every gradient down: 5.0 is usual",
                stacklevel=3,
            )
    if not use_ref_model:
        of_others |= {"beta"}
    if not use_ref_model or not options["beta"]:
        of_others |= {"use_bias_correction_kl"}
    unread = [n for n in options if n in of_others and options[n] != defaults[n]]
    # The names that the caller knows.
    names = {"epsilon": "epsilon_low"}
    if kind in AGGREGATIONS and unread:
        listed = ", ".join(f"{names.get(name, name)} = {options[name]!r}" for name in unread)
        warnings.warn(
            f"{listed}: no effect with loss_type {kind!r}, use_ref_model = {use_ref_model} and "
            f"beta = {options['beta']}, in Liger and here: leave it out",
            stacklevel=3,
        )
    return options | {name: defaults[name] for name in unread}


def _tokens_of_step(items: int | Tensor | None) -> float | Tensor | None:
    """This process's share of the step's tokens, at least one; None: those of the call."""
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    if items is None:
        if ranks > 1:
            raise ConfigError(
                f"the tokens of the step are on {ranks} processes: pass num_items_in_batch"
            )
        return None
    return (items / ranks).clamp(min=1) if isinstance(items, Tensor) else max(items / ranks, 1.0)


def _like(values: Tensor, mask: Tensor) -> Tensor:
    """[S] or [S, L] -> [S, L]."""
    return values[:, None].expand(mask.shape) if values.dim() == 1 else values


def _ratio(ratio: Tensor, mask: Tensor) -> Tensor:
    """[S], [S, 1] or [S, L] -> [S, 1] or [S, L]."""
    sequences, length = mask.shape
    if ratio.shape not in ((sequences,), (sequences, 1), (sequences, length)):
        raise InputError(
            f"vllm_is_ratio has shape {tuple(ratio.shape)}, expected ({sequences},), "
            f"({sequences}, 1) or ({sequences}, {length})"
        )
    return ratio.detach().reshape(sequences, -1)


def _sampler(ratio: Tensor, mask: Tensor, old: Tensor) -> Tensor:
    """Log-probs of the sampler, [S, L]: the weights `exp(old - sampler)` multiply to the ratio."""
    log_weight = ratio.log().clamp(min=VESPO_LOG_LEAST)
    if ratio.shape[1] == 1:
        log_weight = log_weight / mask.sum(-1, keepdim=True).clamp(min=1)
    return old.detach() - log_weight


def _clipped(output: LossOutput, advantages: Tensor, mask: Tensor, config: LossConfig) -> Tensor:
    """Share of the tokens whose ratio is beyond the bound that holds it."""
    if config.loss_type in ("sapo", "vespo"):
        return torch.zeros((), device=mask.device)
    bounds, ratio = bounds_of(config), output.tokens.ratio
    low, high = (ratio < bounds.low) & (advantages < 0), (ratio > bounds.high) & (advantages > 0)
    return ((low | high) & mask).sum() / mask.sum().clamp(min=1)


def register() -> None:
    """Exchange Liger's class in every module that has it by now; `unregister` puts it back.

    Call it before the trainer builds its loss.
    """
    version_of("liger-kernel", tested=TESTED)
    theirs = _theirs()
    _exchange.apply(*((module, NAME, LigerFusedLinearGRPOLoss) for module in holders(NAME, theirs)))


def unregister() -> None:
    """Liger computes its own loss again."""
    _exchange.undo()


def _theirs() -> Any:
    install = f"pip install 'liger-kernel=={TESTED}'"
    return getattr(host_module("liger_kernel.chunked_loss", install=install), NAME)
