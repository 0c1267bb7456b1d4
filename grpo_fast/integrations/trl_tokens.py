"""The steps of TRL's GRPOTrainer token by token, for the group X-ray.

Log-probs and entropies are those that TRL's own `_compute_loss` asks for, so nothing is computed
twice, and no number of the training changes.
"""

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from ..errors import ConfigError, GrpoFastError
from ..import_lines import text_of
from ..loss_config import LossConfig
from ..rollout import token_text
from ..token_choice import MOST_COMPLETIONS, chosen_groups, evenly, kept_in_words, ranked
from ..token_columns import StepColumns, push_table
from ..token_log import TokenLog
from ..token_step import distances, kl_metrics, loss_values
from .trl_columns import PLACES, MicroBatch, Row, columns_of, metric_columns
from .trl_loss import step_loss
from .trl_versions import counts_padding, host

HOOKED = ("_generate_and_score_completions", "_get_per_token_logps_and_entropies", "_compute_loss")
# Those whose `_compute_loss` is the loss that the config says.
KNOWN = ("trl.trainer.grpo_trainer", "grpo_fast.integrations.trl")

log = logging.getLogger("grpo_fast")


class Generation(NamedTuple):
    """What TRL knows of its completions before it shuffles them, those of all processes."""

    prompts: list[str]
    completions: list[str]
    rewards: dict[str, list[float]]
    totals: list[float]
    """Weighted sums; NaN where no function applied."""
    advantages: list[float]


def step_tokens(trainer: Any, tokens: TokenLog | None) -> "StepWatch | None":
    """What keeps the steps of `trainer` in `tokens`; None, and a line, where that is not known."""
    if tokens is None:
        return None
    try:
        trl, kind = host()
        if not isinstance(trainer, kind):
            raise ConfigError(f"{type(trainer).__name__} is no GRPOTrainer")
    except ConfigError as error:
        log.warning("no token log: %s", error)
        return None
    return StepWatch(trainer, tokens, trl.__version__)


class StepWatch:
    """Watches `trainer` between `attach` and `detach`; `end_step` keeps what was seen."""

    def __init__(self, trainer: Any, tokens: TokenLog, version: str) -> None:
        self._trainer, self._log, self._version = trainer, tokens, version
        self._tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        self._eos = _end_tokens(trainer, self._tokenizer)
        self._loss = _loss_of(trainer, version)
        self._generations: dict[int, Generation] = {}
        self._before: dict[str, Any] = {}
        self._batches: list[MicroBatch] = []
        self._passes: list[tuple[torch.Tensor, ...]] | None = None
        self._iteration = 0
        self._said: str | None = None

    def attach(self) -> None:
        """Put functions of this class before three methods, of this one trainer."""
        ours = (self._generate, self._logprobs, self._compute)
        for name, around in zip(HOOKED, ours, strict=True):
            self._before[name] = vars(self._trainer).get(name)
            setattr(self._trainer, name, _around(getattr(self._trainer, name), around))
        if hasattr(self._trainer, "watched"):
            self._trainer.watched = True

    def detach(self) -> None:
        """The trainer is what it was."""
        for name, value in self._before.items():
            delattr(self._trainer, name)
            if value is not None:
                setattr(self._trainer, name, value)
        if vars(self._trainer).pop("watched", False):
            self._trainer.made = None

    def begin_step(self) -> None:
        self._batches = []

    def end_step(self, step: int) -> dict[str, float]:
        """Metrics of all tokens of the step that is over; the step in the log where it is due."""
        batches, self._batches = self._batches, []
        if self._cannot_be_told(batches):
            return {}
        # Of several iterations on a generation the last one: in the first every ratio is 1.
        last = self._iteration == self._trainer.num_iterations - 1 or step >= self._log.max_steps
        kept, pad = last and self._log.due(step), self._tokenizer.pad_token_id
        columns, rows = columns_of(batches, pad) if kept else (metric_columns(batches, pad), [])
        metrics, known = kl_metrics(columns), {}
        if not np.isnan(columns.slope).any():
            push = push_table(columns, self._eos)
            metrics |= {} if push["eos"] is None else {"push/eos": push["eos"]}
            known["push"] = push
        if kept:
            meta, arrays = self._kept(columns, rows, batches, step)
            meta |= self._meta(batches, columns) | known
            text_of_id = functools.partial(token_text, self._tokenizer)
            self._log.write(step, meta, arrays, text_of_id)
        return metrics | {
            "tokens/steps_kept": float(self._log.steps),
            "tokens/mb": self._log.spent / 1e6,
        }

    def _generate(self, call: Callable, inputs: Sequence[Any]) -> Any:
        output, trainer = call(inputs), self._trainer
        if not trainer.model.training:
            return output
        local = len(output["completion_ids"])
        number = max(self._generations, default=-1) + 1
        self._generations[number] = _latest(trainer, local * trainer.accelerator.num_processes)
        # An optimizer step may be of several generations.
        steps = -(-trainer.args.gradient_accumulation_steps // trainer.args.steps_per_generation)
        for old in [n for n in self._generations if n < number - steps]:
            del self._generations[old]
        first = trainer.accelerator.process_index * local
        places = torch.arange(first, first + local, device=output["completion_ids"].device)
        return output | {PLACES: torch.stack([torch.full_like(places, number), places], 1)}

    def _logprobs(self, call: Callable, *args, **kwargs) -> Any:
        output = call(*args, **kwargs)
        if self._passes is not None:
            self._passes.append(tuple(values.detach() for values in output[:2]))
        return output

    def _compute(self, call: Callable, model: Any, inputs: Any) -> Any:
        trainer = self._trainer
        if not (trainer.model.training and torch.is_grad_enabled()):
            return call(model, inputs)
        loss, denominators = self._loss, None
        if loss is not None:
            # Before the call, which moves the coefficient of the entropy bonus.
            loss, denominators = step_loss(trainer, loss, inputs, self._version)
        self._passes = []
        try:
            output = call(model, inputs)
            passes = self._passes
        finally:
            self._passes = None
        if passes:
            made = dict(getattr(trainer, "made", None) or {})
            self._batches.append(MicroBatch(inputs, *passes[-1], made, loss, denominators))
        steps = trainer.args.steps_per_generation
        self._iteration = trainer._step // steps % trainer.num_iterations
        return output

    def _cannot_be_told(self, batches: Sequence[MicroBatch]) -> bool:
        """Whether a step cannot be kept token by token; said once."""
        reason = None
        if not batches:
            reason = "its log-probs are not seen outside of its loss"
        elif any(batch.inputs["advantages"].dim() > 1 for batch in batches):
            reason = "it has an advantage a token"
        elif any(PLACES not in batch.inputs for batch in batches):
            reason = "its completions were sampled before this training"
        if reason not in (None, self._said):
            log.warning("a step is not kept token by token: %s", reason)
            self._said = reason
        return reason is not None

    def _kept(
        self,
        columns: StepColumns,
        rows: Sequence[Row],
        batches: Sequence[MicroBatch],
        step: int,
    ) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """(`kept` and `groups` of the meta, the columns of what is kept)."""
        size, least = self._trainer.num_generations, rows[0].generation
        members: dict[tuple[int, int], list[Row]] = {}
        for row in rows:
            members.setdefault((row.generation, row.place // size), []).append(row)
        keys = list(members)
        totals = [self._of_group(key, "totals") for key in keys]
        chosen = chosen_groups(
            totals,
            [len({x for x in group if not math.isnan(x)}) < 2 for group in totals],
            distances(columns, [self._scored(members[key]) for key in keys]),
            seed=self._trainer.args.seed,
            step=step,
        )
        groups, places, at = [], [np.zeros(0, np.int64)], 0
        for g, why in sorted(chosen.items()):
            generation, number = key = keys[g]
            # Of a completion that a step went over twice, the latest.
            latest = list({row.place: row for row in members[key]}.values())
            order = ranked([self._generations[generation].totals[row.place] for row in latest])
            completions = []
            for k in (order[place] for place in evenly(len(latest), MOST_COMPLETIONS)):
                row = latest[k]
                places.append(np.arange(row.start, row.stop))
                end = at + row.stop - row.start
                completions.append(self._completion(row, columns) | {"start": at, "stop": end})
                at = end
            in_generation = len(self._generations[generation].totals) // size
            groups.append(
                {
                    "index": (generation - least) * in_generation + number,
                    "prompt": self._generations[generation].prompts[number * size],
                    "prompt_ids": batches[latest[0].batch].prompt_ids(latest[0].number),
                    "chosen_by": why,
                    "size": size,
                    "rewards": totals[g],
                    "advantages": self._of_group(key, "advantages"),
                    "completions": completions,
                }
            )
        where = np.concatenate(places)
        arrays = {name: values[where] for name, values in columns.arrays.items()}
        return {"kept": self._in_words(chosen, members), "groups": groups}, arrays

    def _of_group(self, key: tuple[int, int], name: str) -> list[float]:
        size = self._trainer.num_generations
        values = getattr(self._generations[key[0]], name)
        return values[key[1] * size : (key[1] + 1) * size]

    def _scored(self, rows: Sequence[Row]) -> Any:
        """The rows of a group in the shape of `rollout.ScoredGroup`."""
        totals = [self._generations[row.generation].totals[row.place] for row in rows]
        return SimpleNamespace(completions=[SimpleNamespace(reward=total) for total in totals])

    def _completion(self, row: Row, columns: StepColumns) -> dict[str, Any]:
        found, here = self._generations[row.generation], slice(row.start, row.stop)
        ids = columns.arrays["token_ids"][here]
        ended = len(ids) > 0 and int(ids[-1]) in self._eos
        cut = "length" if len(ids) >= self._trainer.max_completion_length else None
        return {
            "index": row.place % self._trainer.num_generations,
            "reward": found.totals[row.place],
            "rewards": {name: values[row.place] for name, values in found.rewards.items()},
            "advantage": found.advantages[row.place],
            "finish_reason": "stop" if ended else cut,
            "text": found.completions[row.place],
            "weight": row.weight,
        }

    def _in_words(self, chosen: Mapping[int, Sequence[str]], members: Mapping) -> str:
        sizes = [len({row.place for row in rows}) for rows in members.values()]
        text = kept_in_words(chosen, len(sizes), [sizes[g] for g in chosen])
        whole = self._trainer.num_generations * len(sizes)
        if sum(sizes) < whole:
            text += f", {sum(sizes)} of {whole} completions are of this optimizer step"
            text += " and this process" if self._trainer.accelerator.num_processes > 1 else ""
        processes = self._trainer.accelerator.num_processes
        return text if processes == 1 else f"{text}; process 0 of {processes} only"

    def _meta(self, batches: Sequence[MicroBatch], columns: StepColumns) -> dict[str, Any]:
        trainer, loss = self._trainer, batches[-1].loss
        lengths = np.diff(columns.offsets)
        size = trainer.num_generations
        groups = {
            (number, place // size)
            for batch in batches
            for number, place in batch.inputs[PLACES].tolist()
        }
        advantage = {"scale_rewards": trainer.args.scale_rewards, "baseline": "mean"}
        rule = getattr(trainer.args, "multi_objective_aggregation", "sum_then_normalize")
        if rule != "sum_then_normalize":
            advantage = {}
        return {
            "iteration": self._iteration,
            "loss": None if loss is None else loss_values(loss),
            "temperature": trainer.temperature,
            "eos_token_id": next(iter(self._eos), None),
            "eos_token_ids": list(self._eos),
            "advantage": advantage,
            "totals": {
                "groups": len(groups),
                "completions": len(lengths),
                "sequences": len(lengths),
                "tokens": int(columns.arrays["mask"].sum()),
                "max_completion_length": trainer.max_completion_length,
            },
            "denominator": _denominator(batches),
        }


def _around(method: Callable, around: Callable) -> Callable:
    return functools.wraps(method)(functools.partial(around, method))


def _latest(trainer: Any, count: int) -> Generation:
    """Of all processes, as TRL gathered it for its own table."""
    logs = trainer._logs
    prompts, texts, advantages = (
        list(logs[name])[-count:] for name in ("prompt", "completion", "advantages")
    )
    rewards = {name: list(values)[-count:] for name, values in logs["rewards"].items()}
    weights = trainer.reward_weights.tolist()
    totals = []
    for parts in zip(*rewards.values(), strict=True):
        scored = [w * x for w, x in zip(weights, parts, strict=True) if not math.isnan(x)]
        totals.append(sum(scored) if scored else math.nan)
    return Generation(
        [text_of(prompt) for prompt in prompts],
        [text_of(text) for text in texts],
        rewards,
        totals,
        advantages,
    )


def _denominator(batches: Sequence[MicroBatch]) -> float | None:
    """What every token's loss is divided by, where that is one number."""
    loss = batches[-1].loss
    if loss is None or loss.adds_up in ("sequence_mean", "prompt_mean"):
        return None
    found = {float(batch.denominators.policy) for batch in batches}
    return found.pop() if len(found) == 1 else None


def _end_tokens(trainer: Any, tokenizer: Any) -> tuple[int, ...]:
    """All that end a completion, the tokenizer's first."""
    declared = trainer.model.generation_config.eos_token_id
    declared = declared if isinstance(declared, list) else [declared]
    known = dict.fromkeys([tokenizer.eos_token_id, *declared])
    return tuple(token for token in known if token is not None)


def _loss_of(trainer: Any, version: str) -> LossConfig | None:
    """The loss as a config; None, and a line, where it is not one."""
    try:
        module = type(trainer)._compute_loss.__module__
        if module not in KNOWN:
            raise ConfigError(f"the loss is that of {module}")
        if counts_padding(version, trainer.args):
            raise ConfigError("luspo by token is a mean over padding too before 1.10")
        return LossConfig.from_trl(trainer.args)
    except GrpoFastError as error:
        log.warning("the token log has no ratio and no slope: %s", error)
        return None
