"""The tensors of one packed row: what the model reads, and what the loss reads.

Shapes: `T` tokens of the row, `N` completion tokens in the loss, `S` completions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .errors import InputError
from .groups import Group, Member
from .layout import Layout, PromptLeaves, chunk_layout, row_layout
from .packing import Part

PER_TOKEN = ("old_logprobs", "ref_logprobs", "sampler_logprobs")


@dataclass(frozen=True, slots=True)
class Row:
    """One packed row. There is no padding in it."""

    members: list[Member]
    """The S completions, in the order of the loss."""
    input_ids: Tensor
    """[1, T]."""
    position_ids: Tensor
    """[1, T], from 0 in every prompt; a completion goes on where its prompt ends."""
    layout: Layout
    predictors: Tensor
    """[N]: which state predicts each completion token; T is the last state of a prompt that another
    row has forwarded."""
    targets: Tensor
    """[N]."""
    mask: Tensor
    """[N] bool."""
    cu_seqlens: Tensor
    """[S+1]."""
    advantages: Tensor
    """[S]."""
    group_ids: Tensor
    """[S]."""
    group_lengths: Tensor
    """[S] tokens in the loss of each one's whole group."""
    old_logprobs: Tensor | None
    """[N], like the two below."""
    ref_logprobs: Tensor | None
    sampler_logprobs: Tensor | None

    def split(self, per_token: Tensor) -> Iterator[tuple[Member, Tensor]]:
        """[N] -> each completion's own."""
        lengths = torch.diff(self.cu_seqlens).tolist()
        return zip(self.members, per_token.split(lengths), strict=True)


class GroupOrder(NamedTuple):
    """Where the tokens of a step lie in its rows, completion after completion in group order."""

    index: Tensor
    """[T] into the tokens of all rows, behind which lie those of a masked and of a dead one."""
    lengths: list[int]
    """Tokens of each completion."""
    rows: list[int]
    """Of each completion; -1 where not forwarded."""

    def of(self, values: Sequence[Tensor], *, dead: float = torch.nan) -> Tensor:
        """[N] of each row -> [T]; 0 in completions that are masked, `dead` where not forwarded."""
        dtype = values[0].dtype if values else torch.float32
        left_out = torch.zeros(2, dtype=dtype, device=self.index.device)
        # Filled there: a copy from here would wait for the device.
        left_out[1:] = dead
        return torch.cat([*values, left_out])[self.index]


def group_order(
    groups: Sequence[Group], rows: Sequence[Row], dead: Sequence[Member], device: torch.device
) -> GroupOrder:
    """The order in which tokens of `rows` are the groups' own; what is in no row is masked, where
    it is not `dead`."""
    firsts = np.cumsum([0, *(len(group.completion_ids) for group in groups)])
    lengths = np.array([len(ids) for group in groups for ids in group.completion_ids], np.int64)
    begins, row_of, at = np.empty_like(lengths), np.full_like(lengths, -1), 0
    for number, row in enumerate(rows):
        here = [firsts[g] + k for g, k in row.members]
        ends = at + np.cumsum(lengths[here])
        begins[here], row_of[here], at = ends - lengths[here], number, ends[-1]
    begins[row_of < 0] = at
    begins[[firsts[g] + k for g, k in dead]] = at + 1
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    index = np.repeat(begins, lengths) + np.where(np.repeat(row_of >= 0, lengths), within, 0)
    return GroupOrder(torch.from_numpy(index).to(device), lengths.tolist(), row_of.tolist())


class _Builder:
    """Tokens of a row in the order in which they are laid."""

    def __init__(self, groups: Sequence[Group]):
        self.groups = groups
        self.ids: list[Sequence[int]] = []
        self.positions: list[int] = []
        """Of the first of `ids` each."""
        self.predictors: list[tuple[int, int]] = []
        """By completion: the state before it, its own first one."""
        self.members: list[Member] = []
        self.at = 0

    def lay(self, ids: Sequence[int], position: int) -> int:
        """Put tokens down, the first at `position` of its sequence: where they begin in the row."""
        begin = self.at
        self.ids.append(ids)
        self.positions.append(position)
        self.at += len(ids)
        return begin

    def completion(self, g: int, k: int, first: int, begin: int) -> None:
        """Note one: state `first` predicts its first token, those from `begin` the others."""
        self.predictors.append((first, begin))
        self.members.append(Member(g, k))

    def row(self, layout: Layout, group_lengths: Sequence[int], device: torch.device) -> Row:
        groups, rows = self.groups, self.members
        ids = [groups[g].completion_ids[k] for g, k in rows]
        lengths = np.array([len(part) for part in ids])
        offsets = np.append(0, lengths.cumsum())
        known = [(groups[g].completion_masks, k) for g, k in rows]
        masks = [None if given is None else given[k] for given, k in known]
        values = {g: groups[g].advantage_values() for g in {g for g, _ in rows}}

        def put(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device)

        return Row(
            members=rows,
            input_ids=put(joined(self.ids, np.int64))[None],
            position_ids=put(_ranges(self.positions, [len(part) for part in self.ids]))[None],
            layout=layout,
            predictors=put(self._predictors(lengths, offsets)),
            targets=put(joined(ids, np.int64)),
            mask=put(live_mask(masks, offsets)),
            cu_seqlens=put(offsets),
            advantages=torch.tensor([values[g][k] for g, k in rows], device=device),
            group_ids=torch.tensor([g for g, _ in rows], device=device),
            group_lengths=torch.tensor([group_lengths[g] for g, _ in rows], device=device),
            **{name: _gathered(groups, rows, name, device) for name in PER_TOKEN},
        )

    def _predictors(self, lengths: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        firsts, begins = np.array(self.predictors).T
        found = _ranges(begins - 1, lengths)
        found[offsets[:-1]] = firsts
        return found


def live_mask(parts: Sequence[Sequence[int] | None], offsets: np.ndarray) -> np.ndarray:
    """The masks of completions that begin and end at `offsets`; all 1 for None."""
    mask, bounds = np.ones(offsets[-1], bool), offsets.tolist()
    for number, part in enumerate(parts):
        # Nearly every one is 1 throughout, which a list knows faster than an array.
        if not (part is None or (isinstance(part, list) and part.count(1) == len(part))):
            inside = slice(bounds[number], bounds[number + 1])
            mask[inside] = part.cpu() if isinstance(part, Tensor) else part
    return mask


def joined(parts: Sequence[Sequence[int]], dtype: type) -> np.ndarray:
    """Lists or tensors, one after the other."""
    if not any(isinstance(part, Tensor) for part in parts):
        # An array a part takes twice as long.
        return np.fromiter(chain.from_iterable(parts), dtype, sum(map(len, parts)))
    arrays = [np.asarray(part.cpu() if isinstance(part, Tensor) else part) for part in parts]
    return np.concatenate([np.zeros(0, dtype), *(array.astype(dtype) for array in arrays)])


def _ranges(starts: Sequence[int], lengths: Sequence[int]) -> np.ndarray:
    """`start, start + 1, ...` of each, one after the other."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) + np.repeat(np.asarray(starts) - (ends - lengths), lengths)


def _gathered(
    groups: Sequence[Group], rows: Sequence[Member], name: str, device: torch.device
) -> Tensor | None:
    if all(getattr(group, name) is None for group in groups):
        return None
    parts = [getattr(groups[g], name) for g, _ in rows]
    if any(part is None for part in parts):
        raise InputError(
            f"Group.{name} is given for some groups and not for others: give it for all or none"
        )
    values = [torch.as_tensor(part[k]) for part, (_, k) in zip(parts, rows, strict=True)]
    return torch.cat(values).float().to(device)


def collate(
    groups: Sequence[Group],
    parts: Sequence[Part],
    group_lengths: Sequence[int],
    device: torch.device,
    backend: str = "auto",
) -> Row:
    """The row of `parts`; prompts before the completions that share them."""
    build = _Builder(groups)
    lone, prompts, lengths = [], [], []
    shared = [part for part in parts if part.shared]
    for part in parts:
        if not part.shared:
            group, k = groups[part.group], part.completions[0]
            prompt, completion = group.prompt_ids, group.completion_ids[k]
            begin = build.lay([*prompt, *completion[:-1]], 0)
            build.completion(part.group, k, begin + len(prompt) - 1, begin + len(prompt))
            lone.append(build.at - begin)
    lasts = []
    for part in shared:
        build.lay(groups[part.group].prompt_ids, 0)
        prompts.append(len(groups[part.group].prompt_ids))
        lasts.append(build.at - 1)
    for part, last in zip(shared, lasts, strict=True):
        lengths.append(_completions(build, part.group, part.completions, last))
    layout = row_layout(lone, prompts, lengths, device, backend)
    return build.row(layout, group_lengths, device)


def collate_chunk(
    groups: Sequence[Group],
    group: int,
    completions: Sequence[int],
    leaves: PromptLeaves,
    group_lengths: Sequence[int],
    device: torch.device,
    backend: str = "auto",
) -> Row:
    """The row of some completions of one group, whose prompt lies in `leaves`."""
    build = _Builder(groups)
    total = sum(len(groups[group].completion_ids[k]) - 1 for k in completions)
    lengths = _completions(build, group, completions, total)
    prompt = len(groups[group].prompt_ids)
    layout = chunk_layout(lengths, leaves, prompt, device, backend)
    return build.row(layout, group_lengths, device)


def _completions(build: _Builder, g: int, completions: Sequence[int], last: int) -> list[int]:
    """Lay completions of a group whose last prompt state is `last`; their lengths in the row."""
    lengths = []
    prompt = len(build.groups[g].prompt_ids)
    for k in completions:
        ids = build.groups[g].completion_ids[k][:-1]
        begin = build.lay(ids, prompt)
        build.completion(g, k, last, begin)
        lengths.append(len(ids))
    return lengths
