"""What a run works on: put together, saved, and put together again from a checkpoint."""

import contextlib
import dataclasses
import math
from pathlib import Path
from typing import Any

import torch

from .checkpoint import load_optimizer, newest_checkpoint, save_checkpoint
from .config import TrainConfig
from .console import Progress
from .entropy_control import EntropyControl
from .errors import CheckpointError, ConfigError
from .implementation import resolve_impl
from .model import check_head, load_model, load_tokenizer, pick_device, resolve_model
from .optimizer import check_optimizer, make_optimizer, state_bytes
from .planner import LargestStep, Plan, plan_memory, rehearse
from .prompts import Prompt, fingerprint, hold_out, load_prompts
from .rewards import RewardFunction, load_rewards
from .rollout import end_tokens, token_text
from .runlog import RunLog
from .token_step import Told
from .track import check_packages

# A resumed run may change these without becoming another run.
RESUMABLE = {
    "max_steps",
    "token_budget",
    "eval_every",
    "save_every",
    "keep_checkpoints",
    "log_every",
    "log_completions",
    "track",
    "log_tokens_mb",
    "output_dir",
    "existing",
    "resume",
    "device",
    "impl",
    "share_prompts",
    "chunking",
    "checkpointing",
    "attention",
}


@dataclasses.dataclass(slots=True)
class Parts:
    """What the loop works on."""

    model: Any
    reference: Any
    """Frozen copy at the start of training, or None at beta 0."""
    tokenizer: Any
    optimizer: torch.optim.Optimizer
    rewards: list[RewardFunction]
    prompts: list[Prompt]
    held_out: list[Prompt]
    device: torch.device
    entropy_control: EntropyControl | None
    """Of adaptive entropy, changed by every optimizer step; None without it."""
    memory: Plan
    """Rows and checkpointing of every step."""
    told: Told
    """What the log of tokens says of the run."""
    sampler: Any
    """What completions are sampled from: the model itself, so that they are its own."""

    def step_options(self, config: TrainConfig) -> dict[str, Any]:
        """What `grpo_backward` and `group_logprobs` are told alike."""
        return {"token_budget": self.memory.token_budget, **row_options(config)}

    def autocast(self, config: TrainConfig) -> contextlib.AbstractContextManager:
        return autocast(config, self.device)


def autocast(config: TrainConfig, device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 products on a GPU while parameters stay float32, for dtype `auto`."""
    mixed = config.dtype == "auto" and device.type == "cuda"
    return torch.autocast("cuda", torch.bfloat16) if mixed else contextlib.nullcontext()


def row_options(config: TrainConfig) -> dict[str, Any]:
    """How rows are made and computed, whatever their length."""
    names = ("share_prompts", "chunking", "attention", "impl")
    return {name: getattr(config, name) for name in names}


def build(config: TrainConfig, run: RunLog, progress: Progress) -> Parts:
    """Everything the loop works on; cheap checks come before expensive loads."""
    device = pick_device(config.device)
    check_optimizer(config)
    check_packages(config.track)
    rewards = load_rewards(config.reward, config.reward_weights)
    directory = run.folder / "base_model"
    with progress.status(f"preparing the model {config.model}"):
        path = resolve_model(config.model, directory=directory, seed=config.seed)
        tokenizer = load_tokenizer(path)
    prompts, held_out = load_data(config, tokenizer)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" else torch.float32
    with progress.status("loading the model"):
        checkpoint, problems = newest_checkpoint(run.checkpoints) if config.resume else (None, [])
        for problem in problems:
            progress.note(f"passing over a damaged checkpoint: {problem}")
        start = path if checkpoint is None else checkpoint.path
        model = load_model(start, dtype=dtype, device=device)
        check_head(model)
        reference = None
        if config.loss.beta:
            reference = load_model(path, dtype=dtype, device=device).requires_grad_(False).eval()
    resolve_impl(config.impl, next(model.parameters()))
    # No dropout: sampler, old and new policy must be the same function of the weights.
    model.eval()
    optimizer = make_optimizer(model.parameters(), config)
    control = EntropyControl(config.loss.entropy_coef) if config.loss.use_adaptive_entropy else None
    with progress.status("rehearsing the largest micro-batch"):
        memory = rehearsed(config, model, prompts, device)
    return Parts(
        model=model,
        reference=reference,
        tokenizer=tokenizer,
        optimizer=optimizer,
        rewards=rewards,
        prompts=prompts,
        held_out=held_out,
        device=device,
        entropy_control=control,
        memory=memory,
        sampler=model,
        told=told(config, model, tokenizer),
    )


def told(config: TrainConfig, model, tokenizer) -> Told:
    """What stays the same in every step of the log of tokens."""
    ends = end_tokens(model, tokenizer)
    names = ("scale_rewards", "baseline", "multi_objective_aggregation")
    return Told(
        seed=config.seed,
        # The tokenizer's own first, whatever else ends a completion.
        eos_token_ids=tuple(sorted(ends, key=lambda token: token != tokenizer.eos_token_id)),
        advantage={name: getattr(config, name) for name in names},
        text_of=lambda token: token_text(tokenizer, token),
    )


def rehearsed(config: TrainConfig, model, prompts: list[Prompt], device: torch.device) -> Plan:
    """Rows and checkpointing for the memory that is there, tried out on the largest micro-batch."""
    largest = LargestStep(
        prompts=config.prompts_per_step,
        group_size=config.group_size,
        prompt_length=longest_prompt(prompts),
        completion_length=config.max_completion_length,
    )
    options = row_options(config) | {
        "loss": config.step_loss,
        # They come with the first step.
        "reserved": state_bytes(model.parameters(), config),
    }
    with autocast(config, device):
        plan = plan_memory(
            model,
            largest,
            token_budget=config.token_budget,
            checkpointing=config.checkpointing,
            **options,
        )
        return rehearse(model, plan, largest, **options)


def longest_prompt(prompts: list[Prompt]) -> int:
    return max(len(prompt.token_ids) for prompt in prompts)


def load_data(config: TrainConfig, tokenizer) -> tuple[list[Prompt], list[Prompt]]:
    """(training prompts, held-out prompts), checked against the step's needs."""
    prompts = load_prompts(config.dataset, tokenizer, max_length=config.max_prompt_length)
    if config.eval_dataset is None:
        prompts, held_out = hold_out(prompts, config.eval_prompts)
    else:
        held_out = load_prompts(config.eval_dataset, tokenizer, max_length=config.max_prompt_length)
        held_out = held_out[: config.eval_prompts]
    if len(prompts) < config.prompts_per_step:
        raise ConfigError(
            f"prompts_per_step = {config.prompts_per_step} is more than the {len(prompts)} "
            "training prompts in "
            f"{config.dataset}: lower it, lower eval_prompts, or add prompts"
        )
    longest = longest_prompt(prompts) + config.max_completion_length
    if config.token_budget is not None and longest > config.token_budget:
        raise ConfigError(
            f"token_budget = {config.token_budget} is below the longest possible sequence, "
            f"{longest} tokens "
            "(longest prompt + max_completion_length): raise it, or lower max_completion_length"
        )
    return prompts, held_out


def restore(
    config: TrainConfig, run: RunLog, parts: Parts, progress: Progress
) -> tuple[int, float, int]:
    """(steps done, seconds, tokens) of the newest checkpoint when resuming, else zeros; the log is
    cut to match, or started.

    Here, after all that can be wrong with a config, an older run gives way to this one.
    """
    if not config.resume:
        aside = run.start()
        if aside is not None:
            progress.note(f"the run that was in {run.folder} is now in {aside}")
        return 0, 0.0, 0
    checkpoint, _ = newest_checkpoint(run.checkpoints)
    if checkpoint is None:
        progress.note("no checkpoint yet: starting from step 0")
        run.truncate_after(-1)
        return 0, 0.0, 0
    state = checkpoint.state
    check_same_run(config, state, checkpoint.path)
    load_optimizer(checkpoint.path, parts.model, parts.optimizer)
    if parts.entropy_control is not None:
        parts.entropy_control = EntropyControl(**state["entropy_control"])
    run.truncate_after(checkpoint.step)
    progress.note(f"resuming after step {checkpoint.step} from {checkpoint.path}")
    return checkpoint.step, state["seconds"], state["num_tokens"]


def check_same_run(config: TrainConfig, state: dict, path: Path) -> None:
    """A resumed run must be the run that was saved."""
    before, now = _with_later_options(state["config"]), saved_config(config)
    changed = [name for name in now if name not in RESUMABLE and before.get(name) != now[name]]
    if changed:
        name = changed[0]
        raise CheckpointError(
            f"{path} was made with {name} = {before.get(name)!r}, this run has {now[name]!r} "
            "(changed: "
            f"{', '.join(changed)}): put it back, or start a new run with another output_dir"
        )
    if state["dataset_sha256"] != fingerprint(config.dataset):
        raise CheckpointError(
            f"{path} was made with another content of {config.dataset}: put the file back, or "
            "start a new run"
        )


def _with_later_options(saved: dict[str, Any]) -> dict[str, Any]:
    """What a run of before there was an option did, under the option's name."""
    rounded = saved["dtype"] == "bfloat16"
    return {"optimizer": "adamw", "update_precision": "none" if rounded else "master"} | saved


def saved_config(config: TrainConfig) -> dict[str, Any]:
    """The config as it comes back from JSON."""
    values = dataclasses.asdict(config)
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


def save(
    config: TrainConfig, run: RunLog, parts: Parts, step: int, seconds: float, tokens: int
) -> None:
    """A checkpoint after `step`, whose tokens are there before it is: a run may be resumed from
    it."""
    if run.tokens is not None:
        run.tokens.flush()
    control = parts.entropy_control
    save_checkpoint(
        run.checkpoints,
        step,
        model=parts.model,
        tokenizer=parts.tokenizer,
        optimizer=parts.optimizer,
        state={
            "config": saved_config(config),
            "dataset_sha256": fingerprint(config.dataset),
            "seconds": seconds,
            "num_tokens": tokens,
            "entropy_control": None if control is None else control._asdict(),
        },
        keep=config.keep_checkpoints,
    )


def plan(config: TrainConfig, parts: Parts) -> str:
    """One line a person can check before the first step."""
    per_step = config.prompts_per_step * config.group_size
    longest = longest_prompt(parts.prompts) + config.max_completion_length
    rows = parts.memory.token_budget // longest
    parameters = sum(parameter.numel() for parameter in parts.model.parameters())
    weight = next(parts.model.parameters())
    rounded = weight.dtype == torch.bfloat16
    sentences = (
        f"plan: {config.prompts_per_step} prompts x {config.group_size} completions = {per_step} a "
        f"step, {config.num_iterations} optimizer step(s) each, at most "
        f"{math.ceil(per_step / rows)} packed row(s) of {parts.memory.token_budget} tokens",
        f"{parameters / 1e6:,.2f}M parameters in {str(weight.dtype)[6:]} on {weight.device.type}",
        config.optimizer + (f" ({config.update_precision})" if rounded else ""),
        f"loss {config.loss.loss_type} by impl '{resolve_impl(config.impl, weight)}', "
        f"{'without' if parts.reference is None else 'with'} reference",
        f"{len(parts.prompts)} prompts, {len(parts.held_out)} held out",
    )
    return "; ".join(sentences)
