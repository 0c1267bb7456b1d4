"""Which rows and which checkpointing fit into the memory that is there: measured on two small rows,
then rehearsed on the largest micro-batch a run can have, before its first step.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from .attention import window_of
from .config import Checkpointing
from .errors import ConfigError
from .groups import Group
from .loss_config import LossConfig
from .memory import (
    MODES,
    USABLE,
    Meter,
    Need,
    estimated_need,
    free_bytes,
    gigabytes,
    measurable,
    modes_of,
)
from .packing import default_budget, pack
from .step import grpo_backward

# Shorter rows starve a GPU: they are worth less than no checkpointing saves.
LEAST_TOKENS = 8192
# The larger of two probe rows should keep this many bytes, to be seen above an allocator's noise.
PROBE_BYTES = 2**29
PROBE_TOKENS = (256, 2048)


class LargestStep(NamedTuple):
    """The largest step that a run can have."""

    prompts: int
    group_size: int
    prompt_length: int
    completion_length: int

    @property
    def sequence(self) -> int:
        return self.prompt_length + self.completion_length

    @property
    def tokens(self) -> int:
        """Without sharing, all in one row."""
        return self.prompts * self.group_size * self.sequence


class Rows(NamedTuple):
    token_budget: int
    mode: Checkpointing
    need: Need


class Plan(NamedTuple):
    token_budget: int
    checkpointing: Checkpointing
    longest: int = 0
    """Tokens of the longest sequence."""
    predicted: int | None = None
    """Bytes of the largest micro-batch beyond weights and optimizer; None where memory cannot be
    measured."""
    free: int | None = None
    """Bytes that were free for it."""
    rehearsed: int | None = None
    """Bytes that the largest micro-batch took."""

    def __str__(self) -> str:
        text = f"rows of at most {self.token_budget:,} tokens, checkpointing {self.checkpointing}"
        if self.predicted is None or self.free is None:
            return f"memory: {text}"
        took = "" if self.rehearsed is None else f", {gigabytes(self.rehearsed)} rehearsed"
        return (
            f"memory: {text}: {gigabytes(self.predicted)} predicted{took}, of "
            f"{gigabytes(self.free)} free"
        )


def plan_memory(
    model,
    largest: LargestStep,
    *,
    token_budget: int | None = None,
    checkpointing: Checkpointing = "auto",
    reserved: int = 0,
    loss: LossConfig = LossConfig(),  # noqa: B008 - frozen
    **options,
) -> Plan:
    """`token_budget` and `checkpointing` of `grpo_backward` for the memory that is free.

    Measures two small rows with the fastest checkpointing and goes on to the next one only where
    the row that is asked for does not fit; `token_budget` None is `default_budget`, less where
    memory is short (down to 8192 before layers are recomputed, then down to the longest sequence).
    `reserved`: bytes that others will still allocate (the states of an optimizer). `options` go to
    `grpo_backward`. Gradients are left as they were. Raises ConfigError where nothing fits, with a
    number that would.
    """
    device = next(model.parameters()).device
    wanted = token_budget
    if wanted is None:
        default = default_budget(device, largest.prompt_length, largest.completion_length)
        wanted = min(default, largest.tokens)
    free = free_bytes(device)
    if free is None or not measurable(device):
        mode = "off" if checkpointing == "auto" else checkpointing
        return Plan(wanted, mode, largest.sequence)
    free = max(free - reserved, 0)
    modes = modes_of(device) if checkpointing == "auto" else (checkpointing,)
    asked = token_budget is not None
    rows = fastest_rows(
        lambda mode: measured_need(model, mode, wanted, loss, options),
        modes,
        free=free,
        wanted=wanted,
        enough=wanted if asked else min(wanted, max(largest.sequence, LEAST_TOKENS)),
    )
    tokens = longest_row(model, rows.token_budget, largest, loss, options)
    best = Plan(rows.token_budget, rows.mode, largest.sequence, rows.need.at(tokens), free)
    if rows.token_budget >= wanted:
        return best
    return _smallest(best, largest, token_budget, modes[-1])


def fastest_rows(
    need: Callable[[Checkpointing], Need],
    modes: Sequence[Checkpointing],
    *,
    free: int,
    wanted: int,
    enough: int,
) -> Rows:
    """The first of `modes` with which rows of `enough` tokens fit into `free` bytes, with rows of
    up to `wanted`; or the one with the longest rows, where these are shorter."""
    best = None
    for mode in modes:
        found = need(mode)
        most = found.most_tokens(free)
        budget = min(wanted, most if most < LEAST_TOKENS else most // 256 * 256)
        if best is None or budget > best.token_budget:
            best = Rows(budget, mode, found)
        if budget >= enough:
            break
    return best


def longest_row(
    model, token_budget: int, largest: LargestStep, loss: LossConfig, options: dict
) -> int:
    """Tokens of the longest row that a step is cut into."""
    if token_budget < largest.sequence:
        return token_budget
    packing = pack(
        largest_rows(token_budget, largest, loss),
        loss,
        token_budget,
        sharing=options.get("share_prompts", "auto"),
        chunking=options.get("chunking", "auto"),
        window=window_of(model),
    )
    return packing.longest


def _smallest(best: Plan, largest: LargestStep, token_budget: int | None, mode: str) -> Plan:
    """`best`, which is not all that was wanted, or why it will not do."""
    if token_budget is None and best.token_budget >= largest.sequence:
        return best
    wanted = largest.sequence if token_budget is None else token_budget
    if best.token_budget >= largest.sequence:
        advice = f"lower token_budget to {best.token_budget} or leave it out"
    else:
        advice = (
            f"rows of {best.token_budget} would: lower max_completion_length, or train a smaller "
            "model or an adapter"
        )
    raise ConfigError(
        f"a row of {wanted} tokens does not fit into the {gigabytes(best.free)} that are free "
        f"beside weights and optimizer, not with checkpointing {mode} either: {advice}"
    )


def measured_need(model, mode: Checkpointing, most: int, loss: LossConfig, options: dict) -> Need:
    """The straight line through the bytes that two rows took."""
    device = next(model.parameters()).device
    least, enough = PROBE_TOKENS
    seen = int(PROBE_BYTES / estimated_need(model, "off").per_token)
    large = max(min(max(seen, least), enough, most), 16)
    small = large // 4
    took = {}
    with kept_gradients(model):
        # The first one also allocates what stays (workspaces, tables of a kernel).
        for tokens in (small, small, large):
            model.zero_grad(set_to_none=True)
            meter = Meter(device)
            # A row like those of the run: a prompt, and completions that share it.
            group = _group(tokens // 4, 4, max(tokens * 3 // 16, 1), loss)
            grpo_backward(
                model, [group], loss=loss, token_budget=tokens, checkpointing=mode, **options
            )
            took[tokens] = meter.bytes()
    slope = (took[large] - took[small]) / (large - small)
    return Need(max(took[small] - slope * small, 0), max(slope, 0))


def _group(prompt: int, count: int, length: int, loss: LossConfig) -> Group:
    zeros = [[0.0] * length] * count
    return Group(
        prompt_ids=[1] * prompt,
        completion_ids=[[2] * length] * count,
        advantages=[1.0 if k % 2 else -1.0 for k in range(count)],
        ref_logprobs=zeros if loss.beta else None,
        sampler_logprobs=zeros if loss.importance_sampling_correction != "none" else None,
    )


def rehearse(
    model,
    plan: Plan,
    largest: LargestStep,
    *,
    reserved: int = 0,
    loss: LossConfig = LossConfig(),  # noqa: B008 - frozen
    **options,
) -> Plan:
    """Forward and backward of the largest micro-batch that `largest` can have, and what it took.

    A run that would die of memory dies here: ConfigError naming the number to lower. `reserved`
    bytes of a GPU are held meanwhile. Gradients are left as they were.
    """
    device = next(model.parameters()).device
    groups = largest_rows(plan.token_budget, largest, loss)
    meter = Meter(device) if plan.predicted is not None else None
    with kept_gradients(model), naming_the_number(plan):
        on_gpu = reserved if device.type == "cuda" else 0
        held = torch.empty(on_gpu, dtype=torch.uint8, device=device)
        grpo_backward(
            model,
            groups,
            loss=loss,
            token_budget=plan.token_budget,
            checkpointing=plan.checkpointing,
            **options,
        )
        took = None if meter is None else max(meter.bytes() - held.nbytes, 0)
    return plan._replace(rehearsed=took)


def largest_rows(token_budget: int, largest: LargestStep, loss: LossConfig) -> list[Group]:
    """As many groups as fill one row; or one that is cut, long enough for two rows."""
    prompt, length = largest.prompt_length, largest.completion_length
    whole = prompt + largest.group_size * length
    if whole <= token_budget:
        groups = min(max(token_budget // whole, 1), largest.prompts)
        return [_group(prompt, largest.group_size, length, loss)] * groups
    a_row = max((token_budget - prompt) // length, 1)
    return [_group(prompt, min(largest.group_size, a_row + 1), length, loss)]


@contextlib.contextmanager
def kept_gradients(model) -> Iterator[None]:
    """The gradients of `model` are put aside, and back."""
    before = [(parameter, parameter.grad) for parameter in model.parameters()]
    model.zero_grad(set_to_none=True)
    try:
        yield
    finally:
        for parameter, grad in before:
            parameter.grad = grad


@contextlib.contextmanager
def naming_the_number(plan: Plan) -> Iterator[None]:
    """Running out of memory inside is a ConfigError that says what to lower."""
    try:
        yield
    except RuntimeError as error:
        of_memory = isinstance(error, torch.OutOfMemoryError)
        # A CPU's allocator has no error of its own.
        if not of_memory and "can't allocate memory" not in str(error):
            raise
        smaller = int(plan.token_budget * USABLE / 2)
        advice = (
            f"lower token_budget, to {smaller} for a start"
            if smaller >= plan.longest
            else "lower max_completion_length"
        )
        # From a CPU there is nowhere to offload to.
        smaller_modes = MODES[MODES.index(plan.checkpointing) + 1 : 3 if of_memory else 2]
        if smaller_modes:
            advice += f", or set checkpointing to {smaller_modes[-1]}"
        raise ConfigError(
            f"out of memory with rows of {plan.token_budget} tokens and checkpointing "
            f"{plan.checkpointing}: {advice}"
        ) from error
