"""TRL's GRPOTrainer, its update made here: `from grpo_fast.integrations.trl import GRPOTrainer`.

How deep that goes is decided once, for the model and the config, and logged in one line:

    packed   rows without padding, a prompt once for its completions, the fused loss; also the
             passes for old and reference log-probs
    fused    the fused loss on hidden states of TRL's own padded batch
    own      nothing: TRL's code as it is

Generation, rewards, advantages, optimizer and every metric stay TRL's lines: its `_compute_loss` is
called with log-probs that are known already, for what it logs and remembers.

Shapes: `B` rows of a micro-batch, `P` and `C` padded length of prompts and completions.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError, GrpoFastError, InputError
from ..groups import Group
from ..loss_config import LossConfig
from ..model import check_head, head, hidden_states
from ..ops import linear_grpo_loss
from ..step import group_measures, grpo_backward
from .padded import dead_groups, grouped, spread
from .trl_versions import counts_padding, host, of_the_generation

Depth = Literal["packed", "fused", "own"]
# Inputs of `_compute_loss` by the names that the loss has for them.
LOGPROBS = {
    "old_per_token_logps": "old_logprobs",
    "ref_per_token_logps": "ref_logprobs",
    "sampling_per_token_logps": "sampler_logprobs",
}
PADDED = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
# A config of rotary positions, for which it does not matter where a row starts, has one of them.
ROTARY = ("rope_parameters", "rope_theta", "rope_scaling")
SEQUENCE_SUMS = ("grpo", "sapo", "luspo")

log = logging.getLogger("grpo_fast")


TRL, Host = host()


class Denominators(NamedTuple):
    policy: float | Tensor
    entropy: float | Tensor | None
    """None where the call counts the tokens that the bonus acts on."""


class Delivered(torch.autograd.Function):
    """`loss`, whose gradient was added to the parameters when it was made.

    TRL calls `accelerator.backward(loss)` itself, which without a GradScaler and with TRL's own
    accumulation multiplies by exactly 1. To carry the graph of all rows that far would take the
    memory that cutting a micro-batch into rows saves, to carry gradients beside those that are
    there a second copy of every parameter. So they are delivered, and a factor is refused.
    """

    @staticmethod
    def forward(ctx, loss: Tensor, anchor: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx, dloss: Tensor):
        if dloss != 1:
            raise InputError(
                f"the loss was multiplied by {float(dloss)} after compute_loss, and its gradients "
                "are in the parameters: leave the loss as it is, or set GRPOTrainer.depth = 'fused'"
            )
        return None, None


class GRPOTrainer(Host):
    """trl.GRPOTrainer: same arguments, same config, same callbacks, same metrics."""

    _tag_names = [*Host._tag_names, "grpo-fast"]  # noqa: RUF012 - TRL's own form
    depth: Depth = "packed"
    """The deepest way that may be taken, set on the class; `own` turns all of this off."""
    _measured: tuple[Tensor, Tensor] | None = None
    _said: frozenset[str] = frozenset()

    @functools.wraps(Host.__init__)
    def __init__(self, *args, **kwargs):
        self._taken: Depth = "own"
        super().__init__(*args, **kwargs)
        self._taken = self._decide()

    def _decide(self) -> Depth:
        """The deepest way this model and config allow, and the one line about it."""
        why = "depth = 'own' was asked for" if self.depth == "own" else _not_at_all(self)
        if why is None:
            try:
                self._loss = LossConfig.from_trl(self.args)
                model = self.accelerator.unwrap_model(self.model)
                _check_layer(model)
                check_head(model)
            except ConfigError as error:
                why = str(error)
        if why is not None:
            log.warning("TRL %s trains by its own code: %s", TRL.__version__, why)
            return "own"
        why = "depth = 'fused' was asked for" if self.depth == "fused" else self._not_packed(model)
        if why is not None:
            text = "TRL %s with the fused loss on its padded rows, which are not packed: %s"
            log.warning(text, TRL.__version__, why)
            return "fused"
        log.info("TRL %s with packed rows, shared prompts and the fused loss", TRL.__version__)
        return "packed"

    def _not_packed(self, model) -> str | None:
        if self._loss.top_entropy_quantile < 1:
            return "top_entropy_quantile is one quantile of all rows together"
        if not any(hasattr(model.config.get_text_config(), name) for name in ROTARY):
            return "its positions are absolute, and TRL counts padding in them"
        try:
            with _training(model), self._forward():
                for share in ("on", "off"):
                    group_measures(model, [_probe(model)], temperature=1.0, share_prompts=share)
        except GrpoFastError as error:
            return str(error)
        return None

    def _forward(self) -> contextlib.AbstractContextManager:
        return self.accelerator.autocast()

    def _depth_of(self, inputs: dict) -> Depth:
        """That of one micro-batch, which may hold what the model and config did not tell."""
        if self._taken == "own":
            return "own"
        if any(name in inputs for name in ("num_images", "pixel_values")):
            self._say("a micro-batch with images is left to TRL's own code")
            return "own"
        if self._taken == "packed" and inputs["advantages"].dim() > 1:
            self._say("a micro-batch with an advantage a token is not packed")
            return "fused"
        return self._taken

    def _say(self, text: str) -> None:
        if text not in self._said:
            log.warning("TRL %s: %s", TRL.__version__, text)
            self._said = self._said | {text}

    def _compute_loss(self, model, inputs):
        depth = self._depth_of(inputs)
        if depth == "own" or not torch.is_grad_enabled():
            return super()._compute_loss(model, inputs)
        config, denominators = self._step_loss(inputs)
        network = self.accelerator.unwrap_model(model)
        make = self._packed if depth == "packed" else self._fused
        with self._forward():
            loss, logps, entropy = make(network, inputs, config, denominators)
        # Where a token is no part of the loss, a ratio of 1: TRL takes exp before it masks.
        other = inputs.get("old_per_token_logps")
        if other is not None:
            logps = torch.where(_mask(inputs).bool(), logps, other)
        self._measured = (logps, entropy)
        try:
            with torch.no_grad():
                super()._compute_loss(model, inputs)
        finally:
            self._measured = None
        return loss

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        **more,
    ):
        if self._measured is not None:
            return (*self._measured, None)
        foreign = any(value is not None and value is not False for value in more.values())
        if self._taken != "packed" or foreign or torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size=batch_size,
                compute_entropy=compute_entropy,
                **more,
            )
        network = self.accelerator.unwrap_model(model)
        cut, given = input_ids.shape[1] - logits_to_keep, (input_ids, attention_mask)
        completions = input_ids[:, cut:]
        groups, rows = grouped(*(x[:, :cut] for x in given), completions, attention_mask[:, cut:])
        with self._forward():
            found = group_measures(
                network, groups, temperature=self.temperature, return_entropy=compute_entropy
            )
        entropy = spread(found.entropy, rows, completions) if compute_entropy else None
        return spread(found.logprobs, rows, completions), entropy, None

    def _step_loss(self, inputs: dict) -> tuple[LossConfig, Denominators]:
        """What the loss of this micro-batch is, and what it divides by, as TRL has it."""
        tokens = max(int(_mask(inputs).sum()), 1)
        # Set where there is training: nothing is accumulated in an evaluation.
        steps = self.current_gradient_accumulation_steps if self.model.training else 1
        kind, rows = self._loss.loss_type, len(inputs["completion_ids"])
        whole = of_the_generation(TRL.__version__, kind)
        if kind in SEQUENCE_SUMS:
            policy = rows * steps
        elif kind == "bnpo":
            policy = tokens * steps
        elif kind == "dr_grpo":
            policy = rows * self.max_completion_length * steps
        else:
            policy = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            if self.model.training and not whole:
                # Counted over the generation batch, which may last for several optimizer steps.
                policy = policy * steps / self.args.steps_per_generation
        if whole:
            return self._with_bonus(1), Denominators(policy, policy)
        entropy = tokens if self._loss.top_entropy_quantile == 1 else None
        return self._with_bonus(steps), Denominators(policy, entropy)

    def _with_bonus(self, steps: int) -> LossConfig:
        """The config with the entropy bonus that TRL's controller has come to."""
        if not getattr(self, "_entropy_bonus_enabled", False):
            return self._loss
        coefficient = self.entropy_coef
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            coefficient = 0.0
        return dataclasses.replace(self._loss, entropy_coef=coefficient / steps)

    def _fused(self, model, inputs, config, denominators) -> tuple[Tensor, Tensor, Tensor]:
        """(loss with its graph, log-probs, entropies), [B, C] each, from TRL's padded batch."""
        names = ("ids", "mask")
        ids, attention = (
            torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1) for name in names
        )
        states = hidden_states(model, ids, attention)
        first = inputs["prompt_ids"].shape[1] - 1
        layer = head(model)
        loss, logps, entropy, _ = linear_grpo_loss(
            states[:, first:-1],
            layer.weight,
            inputs["completion_ids"],
            inputs["advantages"],
            mask=_mask(inputs),
            **{ours: inputs[name] for name, ours in LOGPROBS.items() if name in inputs},
            bias=layer.bias,
            softcap=layer.softcap,
            logit_scale=layer.logit_scale,
            denominator=denominators.policy,
            entropy_denominator=denominators.entropy,
            config=dataclasses.replace(config, skip_zero_advantage=False),
        )
        return loss, logps, entropy

    def _packed(self, model, inputs, config, denominators) -> tuple[Tensor, Tensor, Tensor]:
        """The same from packed rows, the gradient delivered."""
        known = {ours: inputs[name] for name, ours in LOGPROBS.items() if name in inputs}
        groups, rows = grouped(
            *(inputs[name] for name in PADDED),
            loss_mask=_mask(inputs),
            advantages=inputs["advantages"],
            logprobs=known,
        )
        output = grpo_backward(
            model,
            groups,
            loss=config,
            chunking=self._chunking(),
            denominator=denominators.policy,
            entropy_denominator=denominators.entropy,
        )
        # TRL's metrics are of every token, also of those that teach nothing.
        dead, places = dead_groups(groups, config)
        if dead:
            temperature = config.temperature
            left = group_measures(model, dead, temperature=temperature, return_entropy=True)
            for values, found in zip((output.logprobs, output.entropy), left, strict=True):
                for place, value in zip(places, found, strict=True):
                    values[place] = value
        if not output.metrics["batch/microbatches_per_step"]:
            _zero_gradients(model)
        anchor = torch.zeros((), device=output.loss.device, requires_grad=True)
        like = inputs["completion_ids"]
        logps, entropy = (spread(x, rows, like) for x in (output.logprobs, output.entropy))
        return Delivered.apply(output.loss, anchor), logps, entropy

    def _chunking(self) -> str:
        """Reentrant checkpointing keeps no graph for the gradient of a prompt that waits."""
        asked = self.args.gradient_checkpointing and self.args.gradient_checkpointing_kwargs
        return "off" if asked and asked.get("use_reentrant") else "auto"


def _mask(inputs: dict) -> Tensor:
    """[B, C]: the tokens in the loss."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask


def _zero_gradients(model) -> None:
    """What a backward of nothing leaves: an optimizer goes on with its momentum."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _not_at_all(trainer: Host) -> str | None:
    """Why nothing can be taken over, as far as trainer and config tell."""
    accelerator, args = trainer.accelerator, trainer.args
    reasons = {
        f"{accelerator.num_processes} processes, and the update is of one": (
            accelerator.num_processes > 1
        ),
        "DeepSpeed or FSDP hold the parameters": (
            trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
        ),
        "fp16 scales the loss, use bf16": accelerator.scaler is not None,
        "an auxiliary loss of the experts' router is added": getattr(
            trainer, "aux_loss_enabled", False
        ),
        "a model that sees images": getattr(trainer, "_is_vlm", False),
        "torch_compile holds the whole model": args.torch_compile,
        # Up to TRL 1.13 the whole loss is Liger's, afterwards only layers are.
        "use_liger_kernel brings a loss of its own": getattr(trainer, "use_liger_kernel", False),
        "cast_lm_head_to_fp32 patches the head": args.cast_lm_head_to_fp32,
        "luspo by token is a mean over padding too before 1.10": (
            counts_padding(TRL.__version__, args)
        ),
        f"optim '{args.optim}' steps inside of the backward": (
            any(word in str(args.optim) for word in ("lomo", "layerwise"))
        ),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _check_layer(model) -> None:
    """Raise ConfigError for a head that is more than the weights it shows."""
    layer = head(model)
    if not layer.weight.is_floating_point() or hasattr(layer.weight, "quant_state"):
        raise ConfigError(f"the output head is quantised ({layer.weight.dtype})")


def _probe(model) -> Group:
    """Any few tokens: whether a model can be packed is seen on them."""
    vocabulary = head(model).weight.shape[0]
    ids = [token % vocabulary for token in range(1, 20)]
    return Group(prompt_ids=ids[:8], completion_ids=[ids[8:14], ids[14:]], advantages=[0.0, 0.0])


@contextlib.contextmanager
def _training(model) -> Iterator[None]:
    """As in a training step, dropout included, and without a trace of it."""
    device, before = next(model.parameters()).device, model.training
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model.train()
        try:
            yield
        finally:
            model.train(before)
