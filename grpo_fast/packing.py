"""Which completions are forwarded, and in which packed rows: best-fit-decreasing under a hard token
budget, each prompt once where that saves enough.

A completion's last token predicts nothing and is read by nobody, so it takes no place in a row.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .config import Chunking, Sharing
from .errors import ConfigError
from .groups import Group, Member, members
from .live import advantage_is_all
from .loss_config import LossConfig, check_choice

# A second attention call and a merge must pay for themselves.
LEAST_SAVED = 0.15
# Of a row: enough to keep a GPU busy; where a CPU was fastest (bench/LOG.md, one step).
MOST_TOKENS = 16384
CPU_TOKENS = 2048


class Part(NamedTuple):
    """Completions of one group that lie in one row."""

    group: int
    completions: tuple[int, ...]
    tokens: int
    """That the row holds for them, prompt included."""
    shared: bool
    """One prompt for all of them; else exactly one completion, behind its own."""


class Chunks(NamedTuple):
    """A group that no row can hold: its prompt is forwarded once, its completions row by row."""

    group: int
    rows: tuple[tuple[int, ...], ...]


@dataclass(slots=True)
class Packing:
    """What a step forwards, and what it leaves out."""

    rows: list[list[Part]] = field(default_factory=list)
    chunks: list[Chunks] = field(default_factory=list)
    masked: list[Member] = field(default_factory=list)
    """Completions without a token in the loss."""
    dead: list[Member] = field(default_factory=list)
    """Completions of advantage 0 where nothing else makes a gradient."""
    tokens: int = 0
    """Through the model."""
    longest: int = 0
    """Tokens of the longest row; a cut group's prompt counts in each of its rows, which it
    outlives."""
    tokens_alone: int = 0
    """Of the same completions with a prompt each, as a trainer without padding has them."""
    tokens_padded: int = 0
    """Of all completions as rows of one batch, padded to the longest prompt and completion."""


def pack(
    groups: Sequence[Group],
    config: LossConfig | None,
    token_budget: int,
    *,
    sharing: Sharing = "auto",
    chunking: Chunking = "auto",
    window: int | None = None,
) -> Packing:
    """Rows of at most `token_budget` tokens for every completion that teaches under `config`, or
    for every one under None. `window`: tokens that a layer of the model sees; a group with a longer
    sequence does not share its prompt.

    Raises ConfigError when a sequence is longer than the budget.
    """
    check_choice("share_prompts", sharing, Sharing)
    check_choice("chunking", chunking, Chunking)
    check_budget(groups, token_budget)
    packing = Packing(tokens_padded=padded_tokens(groups))
    teaching = _teaching(groups, config, packing)
    parts: list[Part] = []
    for g, completions in teaching.items():
        group = groups[g]
        prompt, sizes = len(group.prompt_ids), _sizes(group, completions)
        alone = prompt * len(completions) + sum(sizes.values())
        together = prompt + sum(sizes.values())
        packing.tokens_alone += alone
        longest = prompt + max(len(group.completion_ids[k]) for k in completions)
        saved = 1 - together / alone
        fits_window = window is None or longest <= window
        if sharing == "off" or not fits_window or (sharing == "auto" and saved <= LEAST_SAVED):
            parts += [Part(g, (k,), prompt + sizes[k], False) for k in completions]
        elif chunking != "on" and together <= token_budget:
            parts.append(Part(g, tuple(completions), together, True))
        else:
            rows = best_fit(sizes, token_budget - prompt)
            if chunking == "off":
                parts += [Part(g, r, prompt + sum(sizes[k] for k in r), True) for r in rows]
            else:
                packing.chunks.append(Chunks(g, tuple(rows)))
                packing.tokens += together
                longest_row = prompt + max(sum(sizes[k] for k in row) for row in rows)
                packing.longest = max(packing.longest, longest_row)
    rows = best_fit(dict(enumerate(part.tokens for part in parts)), token_budget)
    packing.rows = [[parts[i] for i in row] for row in rows]
    # The largest first: it dies at once if it must.
    packing.rows.sort(key=lambda row: -sum(part.tokens for part in row))
    packing.tokens += sum(part.tokens for part in parts)
    longest = max((sum(part.tokens for part in row) for row in packing.rows), default=0)
    packing.longest = max(packing.longest, longest)
    return packing


def _teaching(
    groups: Sequence[Group], config: LossConfig | None, packing: Packing
) -> dict[int, list[int]]:
    """The completions that must be forwarded, by group; the others are noted in `packing`."""
    found: dict[int, list[int]] = {}
    skips = config is not None and config.skip_zero_advantage and advantage_is_all(config)
    advantages = [group.advantage_values() if skips else None for group in groups]
    for member in members(groups):
        group = groups[member.group]
        values = advantages[member.group]
        empty = not len(group.completion_ids[member.index])
        if empty or (
            config is not None
            and config.skip_zero_advantage
            and not group.live_tokens(member.index)
        ):
            packing.masked.append(member)
        elif values is not None and values[member.index] == 0:
            packing.dead.append(member)
        else:
            found.setdefault(member.group, []).append(member.index)
    return found


def _sizes(group: Group, completions: Sequence[int]) -> dict[int, int]:
    """Tokens of each completion in a row."""
    return {k: len(group.completion_ids[k]) - 1 for k in completions}


def best_fit(sizes: dict[int, int], capacity: int) -> list[tuple[int, ...]]:
    """Keys in bins of at most `capacity`: the largest first, each into the fullest bin it fits."""
    bins: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (space left, bin), ascending
    for key in sorted(sizes, key=lambda key: (-sizes[key], key)):
        at = bisect.bisect_left(spaces, (sizes[key], -1))
        if at == len(spaces):
            space, chosen = capacity, len(bins)
            bins.append([])
        else:
            space, chosen = spaces.pop(at)
        bins[chosen].append(key)
        bisect.insort(spaces, (space - sizes[key], chosen))
    return [tuple(keys) for keys in bins]


def default_budget(device: torch.device, prompt: int, completion: int) -> int:
    """Tokens of a row where nobody says, for the longest `prompt` and `completion`: 16,384; on a
    CPU 2,048 behind the prompt, which its caches hold better. Never less than a sequence.
    """
    if device.type == "cpu":
        return prompt + max(completion, CPU_TOKENS)
    return max(prompt + completion, MOST_TOKENS)


def group_budget(groups: Sequence[Group], device: torch.device) -> int:
    """`default_budget` for the sequences of `groups`."""
    prompt = max((len(group.prompt_ids) for group in groups), default=0)
    lengths = (len(completion) for group in groups for completion in group.completion_ids)
    return default_budget(device, prompt, max(lengths, default=0))


def check_budget(groups: Sequence[Group], token_budget: int) -> None:
    """Raise ConfigError when a sequence is longer than the budget, naming it."""
    if isinstance(token_budget, bool) or not isinstance(token_budget, int) or token_budget < 1:
        raise ConfigError(f"token_budget = {token_budget!r}, expected a positive whole number")
    for member in members(groups):
        group = groups[member.group]
        length = len(group.prompt_ids) + len(group.completion_ids[member.index])
        if length > token_budget:
            raise ConfigError(
                f"token_budget = {token_budget} is below the longest sequence, {length} tokens "
                f"(group {member.group}, completion {member.index}): raise it, or lower "
                "max_completion_length"
            )


def padded_tokens(groups: Sequence[Group]) -> int:
    """Tokens of one padded batch: prompts padded to the longest, completions likewise."""
    lengths = [len(completion) for group in groups for completion in group.completion_ids]
    longest = max((len(group.prompt_ids) for group in groups), default=0)
    return len(lengths) * (longest + max(lengths, default=0))
