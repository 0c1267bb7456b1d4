"""The loop: rollout, score, advantages, update, log. `grpo-fast train --config FILE` or
`grpo_fast.train(config)`.

Where this differs from the GRPO paper (2402.03300), each a field of TrainConfig or LossConfig:
1. The loss is averaged over the tokens of the whole optimizer step (`dapo`), not sequence by
sequence. 2. beta is 0: no reference policy unless asked for. 3. Old log-probs are the first inner
iteration's own, so they cost no pass and its ratio is exactly 1. 4. How completions are cut into
micro-batches (`token_budget`) does not change the result.
"""

import contextlib
import dataclasses
import math
import random
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .config import TrainConfig
from .console import Progress
from .doctor import Doctor
from .entropy_control import bonus_entropy
from .errors import GrpoFastError
from .groups import Group
from .metrics import completion_rows, length_metrics, rollout_metrics, update_metrics
from .planner import naming_the_number
from .prompts import step_prompts
from .report import write_report
from .rollout import ScoredGroup, sample_groups, score_groups, set_advantages, training_groups
from .runlog import RunLog, open_run, read_metrics
from .session import Parts, build, plan, restore, save
from .step import group_logprobs, grpo_backward
from .token_step import log_tokens
from .track import Trackers

# One bad batch happens; three in a row is a diverged run.
MAX_SKIPPED_STEPS = 3


class TrainResult(NamedTuple):
    output_dir: str
    metrics: dict[str, float]
    """Of the last step."""
    eval_before: float
    """Mean greedy reward on the held-out prompts before training."""
    eval_after: float
    """The same at the end; NaN when interrupted."""
    seconds: float
    """Training time over all resumed parts, evaluations included."""
    interrupted: bool
    step: int
    """Last finished step."""
    report: str
    """Path of report.html."""


def train(config: TrainConfig) -> TrainResult:
    """Train as `config` says; writes metrics.jsonl, completions.jsonl, checkpoints and report.html.

    Raises GrpoFastError for anything a user can mend. Ctrl-C or SIGTERM once: the step is finished,
    saved, and the result says `interrupted`; twice: KeyboardInterrupt, checkpoints intact.
    """
    with open_run(config) as run, Progress(config.max_steps) as progress:
        parts = build(config, run, progress)
        first, seconds, tokens = restore(config, run, parts, progress)
        progress.note(plan(config, parts))
        progress.note(str(parts.memory))
        run.trackers = Trackers(
            config.track,
            run.folder,
            dataclasses.asdict(config),
            first_step=first + 1,
            note=progress.note,
        )
        return loop(config, run, parts, progress, first, seconds, tokens)


def loop(
    config: TrainConfig,
    run: RunLog,
    parts: Parts,
    progress: Progress,
    done: int,
    seconds: float,
    tokens: int,
) -> TrainResult:
    """Steps done + 1 ... max_steps."""
    started = time.perf_counter() - seconds
    metrics: dict[str, float] = {}
    skipped = 0
    with StopRequest(progress) as stop:
        if done == 0:
            run.log(0, evaluate(config, parts, progress))
        doctor = Doctor(dataclasses.asdict(config))
        for row in read_metrics(run.folder):
            doctor.feed(row)
        progress.start(done)
        for step in range(done + 1, config.max_steps + 1):
            watch = Stopwatch()
            seed_step(config, step)
            groups = rollout(config, parts, step, watch)
            metrics = rollout_metrics(groups) | update(config, parts, groups, step, watch, run)
            tokens += count_tokens(groups)
            metrics |= watch.metrics(groups) | {
                "num_tokens": tokens,
                "epoch": epoch(config, parts, step),
            }
            skipped = skipped + 1 if metrics["skipped_updates"] else 0
            if step == config.max_steps or due(step, config.eval_every):
                metrics |= evaluate(config, parts, progress)
            # Asked once: a step that is shown as the last one is also saved.
            last = step == config.max_steps or stop.requested
            run.log(step, metrics)
            findings = doctor.feed({"step": step, **metrics})
            answers = completion_rows(step, groups, config.log_completions)
            run.log_completions(answers)
            done = step
            if step % config.log_every == 0 or last:
                progress.step(step, metrics, answers[0]["completion"] if answers else "")
            for finding in findings:
                if finding.severity != "info":
                    progress.note(finding.line())
                    if run.trackers is not None:
                        run.trackers.alert(finding)
            if last or due(step, config.save_every):
                save(config, run, parts, step, time.perf_counter() - started, tokens)
            if skipped >= MAX_SKIPPED_STEPS:
                raise GrpoFastError(diverged(run, step))
            if last:
                break
    report = write_report(run.folder)
    history = read_metrics(run.folder)
    return TrainResult(
        output_dir=str(run.folder),
        metrics=metrics or history[-1],
        eval_before=history[0].get("eval_reward", math.nan),
        eval_after=history[-1].get("eval_reward", math.nan),
        seconds=time.perf_counter() - started,
        interrupted=done < config.max_steps,
        step=done,
        report=str(report),
    )


def rollout(config: TrainConfig, parts: Parts, step: int, watch: "Stopwatch") -> list[ScoredGroup]:
    """Sample, score and compare the completions of one step."""
    prompts = step_prompts(
        parts.prompts, seed=config.seed, step=step, count=config.prompts_per_step
    )
    with watch("rollout"), parts.autocast(config):
        groups = sample_groups(
            parts.model,
            parts.tokenizer,
            prompts,
            group_size=config.group_size,
            max_completion_length=config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            seed=step_seed(config, step),
        )
    with watch("reward"):
        score_groups(groups, parts.rewards)
        set_advantages(groups, config)
    return groups


def update(
    config: TrainConfig,
    parts: Parts,
    scored: Sequence[ScoredGroup],
    step: int,
    watch: "Stopwatch",
    run: RunLog,
) -> dict[str, float]:
    """`num_iterations` optimizer steps on one rollout; tokens are those of the last one."""
    groups = training_groups(scored, config)
    options = parts.step_options(config)
    iterations = []
    with watch("update"), naming_the_number(parts.memory):
        if parts.reference is not None:
            with parts.autocast(config):
                ref = group_logprobs(
                    parts.reference, groups, temperature=config.temperature, **options
                )
            groups = with_logprobs(groups, ref_logprobs=ref)
        for iteration in range(config.num_iterations):
            parts.optimizer.zero_grad(set_to_none=True)
            control, loss = parts.entropy_control, config.step_loss
            loss = loss if control is None else control.loss(loss)
            with parts.autocast(config):
                output = grpo_backward(
                    parts.model,
                    groups,
                    loss=loss,
                    checkpointing=parts.memory.checkpointing,
                    **options,
                )
            if iteration == 0 and config.num_iterations > 1:
                groups = with_logprobs(groups, old_logprobs=output.logprobs)
            row = {name: float(value) for name, value in output.metrics.items()}
            row["loss"] = float(output.loss)
            if control is not None:
                masks = [mask for group in groups for mask in group.completion_masks]
                entropy = bonus_entropy(output.entropy, masks, loss.top_entropy_quantile)
                parts.entropy_control = control.after(loss, entropy)
            if control is not None or loss.entropy_coef:
                row["entropy_coef"] = loss.entropy_coef
            row |= apply_gradients(config, parts, step)
            iterations.append(row)
    with watch("token_log"):
        of_tokens = log_tokens(
            run.tokens,
            parts.told,
            scored,
            groups,
            output,
            loss,
            step=step,
            iteration=config.num_iterations - 1,
        )
    return update_metrics(iterations) | of_tokens


def apply_gradients(config: TrainConfig, parts: Parts, step: int) -> dict[str, float]:
    """Clip, step the optimizer; a gradient that is not finite is thrown away and counted."""
    norm = float(torch.nn.utils.clip_grad_norm_(parts.model.parameters(), config.max_grad_norm))
    rate = learning_rate(config, step)
    finite = math.isfinite(norm)
    if finite:
        for group in parts.optimizer.param_groups:
            group["lr"] = rate
        parts.optimizer.step()
    return {"grad_norm": norm, "learning_rate": rate, "skipped_updates": float(not finite)}


def with_logprobs(groups: Sequence[Group], **named: list[torch.Tensor]) -> list[Group]:
    """Groups with one tensor a completion put in under each name."""
    changed = []
    at = 0
    for group in groups:
        end = at + len(group.completion_ids)
        changed.append(dataclasses.replace(group, **{k: v[at:end] for k, v in named.items()}))
        at = end
    return changed


def learning_rate(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then `lr_scheduler_type` down to 0 after the last step."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.lr_scheduler_type == "constant":
        return config.learning_rate
    done = (step - 1 - config.warmup_steps) / max(config.max_steps - config.warmup_steps, 1)
    left = 1 - done if config.lr_scheduler_type == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.learning_rate * left


def evaluate(config: TrainConfig, parts: Parts, progress: Progress) -> dict[str, float]:
    """Greedy answers to the held-out prompts, one each, scored by the same rewards."""
    with (
        progress.status(f"evaluating {len(parts.held_out)} held-out prompts"),
        parts.autocast(config),
    ):
        groups = sample_groups(
            parts.model,
            parts.tokenizer,
            parts.held_out,
            group_size=1,
            max_completion_length=config.max_completion_length,
            temperature=0.0,
            top_p=1.0,
            seed=config.seed,
        )
    score_groups(groups, parts.rewards)
    scores = [score for group in groups for score in group.scores()]
    lengths = length_metrics(groups)
    return {
        "eval_reward": sum(scores) / len(scores) if scores else math.nan,
        "eval_completions/mean_length": lengths["completions/mean_length"],
        "eval_completions/clipped_ratio": lengths["completions/clipped_ratio"],
    }


def diverged(run: RunLog, step: int) -> str:
    return (
        f"gradients were not finite in {MAX_SKIPPED_STEPS} steps in a row up to step {step}: lower "
        "learning_rate or "
        f"max_grad_norm; the last good weights are in {run.checkpoints}"
    )


def due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def step_seed(config: TrainConfig, step: int) -> int:
    """Everything random in a step follows from (seed, step), so a resumed run needs no generator
    state."""
    return (config.seed * 1_000_003 + step) % 2**63


def seed_step(config: TrainConfig, step: int) -> None:
    """Seed the global generators too: reward functions may use them."""
    random.seed(step_seed(config, step))
    torch.manual_seed(step_seed(config, step))


def count_tokens(groups: Sequence[ScoredGroup]) -> int:
    return sum(len(g.prompt.token_ids) + len(c.token_ids) for g in groups for c in g.completions)


def epoch(config: TrainConfig, parts: Parts, step: int) -> float:
    return step * config.prompts_per_step / len(parts.prompts)


class Stopwatch:
    """Seconds of the phases of one step."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start

    def metrics(self, groups: Sequence[ScoredGroup]) -> dict[str, float]:
        """`step_time`, `time/<phase>` in seconds, `tokens_per_second` sampled and trained."""
        total = time.perf_counter() - self.started
        phases = {f"time/{name}": value for name, value in self.seconds.items()}
        return {"step_time": total, "tokens_per_second": count_tokens(groups) / total, **phases}


class StopRequest:
    """Ctrl-C or SIGTERM once: `requested` turns true; the second one raises KeyboardInterrupt."""

    def __init__(self, progress: Progress) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}
        self._asked = threading.Event()
        # A signal may come in the middle of a print, which cannot be entered again from its
        # handler: another thread says that it was heard.
        self._answer = threading.Thread(target=self._say, args=(progress,), daemon=True)

    def __enter__(self) -> "StopRequest":
        self._answer.start()
        # Signals can only be caught in the main thread; elsewhere the host decides.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._caught)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._asked.set()
        self._answer.join()

    def _caught(self, number: int, frame: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        self._asked.set()

    def _say(self, progress: Progress) -> None:
        self._asked.wait()
        if self.requested:
            progress.note("stopping after this step, once more to stop at once")
