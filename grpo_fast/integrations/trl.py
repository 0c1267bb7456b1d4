"""TRL's GRPOTrainer, its update made here: `from grpo_fast.integrations.trl import GRPOTrainer`.

How deep that goes is decided once, for the model and the config, and logged in one line:

    packed   rows without padding, a prompt once for its completions, the fused loss; also the
             passes for old and reference log-probs
    fused    the fused loss on hidden states of TRL's own padded batch
    kernel   TRL's loss on log-probs that are computed here, `trl_head`
    own      nothing: TRL's code as it is

Generation, rewards, advantages, optimizer and every metric stay TRL's lines: its `_compute_loss` is
called with log-probs that are known already, for what it logs and remembers. TRL spreads a group
over the micro-batches of an optimizer step: packed, they are made together, with the first of them,
and a prompt is forwarded once for all of its group. Several processes of DDP average their
gradients once an optimizer step, when all of them have all of theirs.

Shapes: `B` rows of a micro-batch, `P` and `C` padded length of prompts and completions.
"""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import ConfigError, InputError
from ..loss_config import LossConfig
from ..model import check_head, head, hidden_states
from ..ops import linear_grpo_loss
from ..outputs import StepTokens, TokenOutput
from ..step import group_measures, grpo_backward
from . import trl_head
from .gradients import average_gradients, delivered, whole_or_none, zero_gradients
from .padded import dead_groups, grouped, spread
from .trl_depths import DEPTHS, Depth, not_at_all, not_fused, not_packed, replicated
from .trl_loss import LOGPROBS, Denominators, loss_mask, step_loss
from .trl_versions import counts_padding, host

PADDED = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
# What TRL's profiler calls the pass of the policy, which here may be made elsewhere.
POLICY_PASS = "_get_per_token_logps_and_entropies"

log = logging.getLogger("grpo_fast")


TRL, Host = host()
from trl.extras.profiling import profiling_context  # noqa: E402 - after the host's own check


class GRPOTrainer(Host):
    """trl.GRPOTrainer: same arguments, same config, same callbacks, same metrics."""

    _tag_names = [*Host._tag_names, "grpo-fast"]  # noqa: RUF012 - TRL's own form
    depth: Depth = "packed"
    """The deepest way that may be taken, set on the class; `own` turns all of this off."""
    watched = False
    """Whether `made` is kept."""
    made: dict[str, Tensor] | None = None
    """What the loss of the last micro-batch made of each token, [B, C] by the names of the token
    log; None where the loss was TRL's own."""
    _measured: tuple[Tensor, Tensor] | None = None
    _since = 0
    """Micro-batches since the last optimizer step."""
    _said: frozenset[str] = frozenset()

    @functools.wraps(Host.__init__)
    def __init__(self, *args, **kwargs):
        self._taken: Depth = "own"
        self._ahead: dict[int, dict[str, Tensor]] = {}
        super().__init__(*args, **kwargs)
        self._taken = self._decide()

    def _decide(self) -> Depth:
        """The deepest way this model and config allow, and the one line about it."""
        if self.depth not in DEPTHS:
            known = ", ".join(DEPTHS)
            raise ConfigError(f"GRPOTrainer.depth = {self.depth!r} is not known: choose {known}")
        for depth, found in (
            ("own", self._not_at_all),
            ("kernel", self._not_fused),
            ("fused", self._not_packed),
        ):
            try:
                why = f"depth = '{depth}' was asked for" if self.depth == depth else found()
            except ConfigError as error:
                why = str(error)
            if why is None:
                continue
            if depth == "kernel" and (missing := trl_head.why_not()):
                depth, why = "own", f"{why}, and {missing}"
            log.warning("TRL %s, %s: %s", TRL.__version__, DEPTHS[depth], why)
            return depth
        log.info("TRL %s, %s", TRL.__version__, DEPTHS["packed"])
        return "packed"

    def _not_at_all(self) -> str | None:
        return not_at_all(self, self.accelerator.unwrap_model(self.model))

    def _not_fused(self) -> str | None:
        self._loss = LossConfig.from_trl(self.args)
        if counts_padding(TRL.__version__, self.args):
            return "luspo by token is a mean over padding too before 1.10"
        why = not_fused(self, self._loss)
        if why is None:
            check_head(self.accelerator.unwrap_model(self.model))
        return why

    def _not_packed(self) -> str | None:
        return not_packed(self.accelerator.unwrap_model(self.model), self._loss, self._forward)

    def _forward(self) -> contextlib.AbstractContextManager:
        return self.accelerator.autocast()

    def _depth_of(self, inputs: dict) -> Depth:
        """That of one micro-batch, which may hold what the model and config did not tell."""
        if self._taken in ("own", "kernel"):
            return self._taken
        if any(name in inputs for name in ("num_images", "pixel_values")):
            self._say("the loss of a micro-batch with images is TRL's own")
            return "kernel"
        if self._taken == "packed" and inputs["advantages"].dim() > 1:
            self._say("a micro-batch with an advantage a token is not packed")
            return "fused"
        return self._taken

    def _averages(self) -> bool:
        """Whether the mean over processes is taken here, after DDP's hooks were passed by."""
        return self._taken in ("packed", "fused") and replicated(self.accelerator)

    def training_step(self, model, inputs, num_items_in_batch):
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except BaseException:
            self._ahead.clear()
            raise
        if self.accelerator.sync_gradients and self._averages():
            average_gradients(self.accelerator.unwrap_model(model).parameters())
        self._since = 0 if self.accelerator.sync_gradients else self._since + 1
        return loss

    def _say(self, text: str) -> None:
        if text not in self._said:
            log.warning("TRL %s: %s", TRL.__version__, text)
            self._said = self._said | {text}

    def _compute_loss(self, model, inputs):
        depth, self.made = self._depth_of(inputs), None
        if not torch.is_grad_enabled():
            return super()._compute_loss(model, inputs)
        if self._ahead and id(inputs) not in self._ahead:
            raise InputError(
                "a micro-batch is not the one of which the gradient was made with the first of its "
                "optimizer step: change them all before that one, or set GRPOTrainer.depth = "
                "'fused'"
            )
        network = self.accelerator.unwrap_model(model)
        if depth in ("own", "kernel"):
            return super()._compute_loss(network if self._averages() else model, inputs)
        with whole_or_none(network) if depth == "packed" else contextlib.nullcontext():
            with profiling_context(self, POLICY_PASS), self._forward():
                loss, made = (self._packed if depth == "packed" else self._fused)(network, inputs)
            logps, entropy = made["logprobs"], made["entropy"]
            # Where a token is no part of the loss, a ratio of 1: TRL takes exp before it masks.
            other = inputs.get("old_per_token_logps")
            if other is not None:
                logps = torch.where(loss_mask(inputs).bool(), logps, other)
            self._measured = (logps, entropy)
            try:
                with torch.no_grad():
                    theirs = super()._compute_loss(model, inputs)
            finally:
                self._measured = None
        self.made = made if self.watched else None
        return delivered(theirs) if loss is None else loss

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
            own = self._taken == "own" or trl_head.why_not() is not None
            with contextlib.nullcontext() if own else trl_head.exchanged():
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
        with profiling_context(self, POLICY_PASS), self._forward():
            found = group_measures(
                network, groups, temperature=self.temperature, return_entropy=compute_entropy
            )
        entropy = spread(found.entropy, rows, completions) if compute_entropy else None
        return spread(found.logprobs, rows, completions), entropy, None

    def _step_loss(self, inputs: dict) -> tuple[LossConfig, Denominators]:
        return step_loss(self, self._loss, inputs, TRL.__version__)

    def _fused(self, model, inputs) -> tuple[Tensor, dict[str, Tensor]]:
        """(loss with its graph, what it made of each token), from TRL's padded batch."""
        config, denominators = self._step_loss(inputs)
        names = ("ids", "mask")
        ids, attention = (
            torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1) for name in names
        )
        states = hidden_states(model, ids, attention)
        first = inputs["prompt_ids"].shape[1] - 1
        layer = head(model)
        output = linear_grpo_loss(
            states[:, first:-1],
            layer.weight,
            inputs["completion_ids"],
            inputs["advantages"],
            mask=loss_mask(inputs),
            **{ours: inputs[name] for name, ours in LOGPROBS.items() if name in inputs},
            bias=layer.bias,
            softcap=layer.softcap,
            logit_scale=layer.logit_scale,
            denominator=denominators.policy,
            entropy_denominator=denominators.entropy,
            config=dataclasses.replace(config, skip_zero_advantage=False),
        )
        made = {"logprobs": output.logprobs, "entropy": output.entropy}
        return output.loss, made | self._told(output.tokens, lambda values: values)

    def _packed(self, model, inputs) -> tuple[Tensor | None, dict[str, Tensor]]:
        """The same from packed rows, the gradient delivered; None for the loss of one of several
        micro-batches, which TRL adds up itself."""
        if (place := id(inputs)) in self._ahead:
            return None, self._ahead.pop(place)
        batches = self._together(inputs)
        if len(batches) == 1:
            return self._delivered(model, inputs, *self._step_loss(inputs))
        _, made = self._delivered(model, _joined(batches), *self._step_loss(inputs))
        parts = zip(*(x.split(len(inputs["completion_ids"])) for x in made.values()), strict=True)
        self._ahead = {
            id(batch): dict(zip(made, part, strict=True))
            for batch, part in zip(batches, parts, strict=True)
        }
        return None, self._ahead.pop(place)

    def _together(self, inputs) -> list[dict]:
        """The micro-batches of the optimizer step that `inputs` begins, where one loss of all of
        them is the sum of theirs; otherwise `inputs` alone."""
        steps, size = self.current_gradient_accumulation_steps, self.args.steps_per_generation
        first = self._step % size
        batches = (self._buffered_inputs or [])[first : first + steps]
        # Both have a mean over the tokens of the micro-batch.
        alone = self._loss.loss_type == "bnpo" or getattr(self, "_entropy_bonus_enabled", False)
        if alone or self._since or len(batches) != steps or batches[0] is not inputs:
            return [inputs]
        shapes = {batch["completion_ids"].shape for batch in batches}
        packed = all(self._depth_of(batch) == "packed" for batch in batches)
        return batches if packed and len(shapes) == 1 else [inputs]

    def _delivered(self, model, inputs, config, denominators) -> tuple[Tensor, dict[str, Tensor]]:
        known = {ours: inputs[name] for name, ours in LOGPROBS.items() if name in inputs}
        groups, rows = grouped(
            *(inputs[name] for name in PADDED),
            loss_mask=loss_mask(inputs),
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
            zero_gradients(model)
        like, lengths = inputs["completion_ids"], output.tokens.lengths
        made = {name: spread(getattr(output, name), rows, like) for name in ("logprobs", "entropy")}
        told = self._told(output.tokens, lambda x: spread(x.split(lengths), rows, like))
        return delivered(output.loss), made | told

    def _told(self, tokens: TokenOutput | StepTokens, place: Callable) -> dict[str, Tensor]:
        """What TRL does not ask for: of each token, [B, C] by `place`, where somebody watches."""
        names = ("ratio", "kl", "gradient_mass", "slope") if self.watched else ()
        found = {name: getattr(tokens, name) for name in names}
        return {name: place(values) for name, values in found.items() if values is not None}

    def _chunking(self) -> str:
        """Reentrant checkpointing keeps no graph for the gradient of a prompt that waits."""
        asked = self.args.gradient_checkpointing and self.args.gradient_checkpointing_kwargs
        return "off" if asked and asked.get("use_reentrant") else "auto"


def _joined(batches: list[dict]) -> dict:
    """Micro-batches of one generation as one."""
    first = batches[0]
    names = [name for name in (*PADDED, "tool_mask", "advantages", *LOGPROBS) if name in first]
    return first | {name: torch.cat([batch[name] for batch in batches]) for name in names}
