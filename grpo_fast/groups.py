"""What is trained on: a prompt, its completions and what is known of each.

Shapes: `G` completions of a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .advantages import group_advantages
from .errors import InputError


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """One prompt, its G completions and what is known of each: the unit that is trained on."""

    prompt_ids: Sequence[int]
    """Token ids of the prompt, at least one."""
    completion_ids: Sequence[Sequence[int]]
    """Token ids of each completion, end-of-sequence token included."""
    advantages: Sequence[float] | Tensor | None = None
    """[G]; made from `rewards` when not given."""
    rewards: Sequence[float] | Tensor | None = None
    """[G], NaN where a completion could not be scored."""
    old_logprobs: Sequence[Tensor] | None = None
    """One tensor a completion; without them the policy is its own (ratio 1)."""
    ref_logprobs: Sequence[Tensor] | None = None
    """One tensor a completion, of the reference policy."""
    sampler_logprobs: Sequence[Tensor] | None = None
    """One tensor a completion, as the sampler gave them."""
    completion_masks: Sequence[Sequence[int]] | None = None
    """1 = in the loss, 0 = not, per completion token; all 1 when not given."""

    def __post_init__(self) -> None:
        named = [("prompt_ids", self.prompt_ids)]
        named += [(f"completion_ids[{k}]", ids) for k, ids in enumerate(self.completion_ids)]
        for name, ids in named:
            if isinstance(ids, Tensor) and ids.dim() != 1:
                raise InputError(
                    f"Group.{name} has shape {tuple(ids.shape)}, expected token ids in a row, "
                    "without padding"
                )
        if len(self.prompt_ids) == 0:
            raise InputError(
                "Group.prompt_ids is empty, expected at least one token: nothing predicts the "
                "completion"
            )
        if (self.advantages is None) == (self.rewards is None):
            raise InputError(
                "Group needs either advantages or rewards [G], not both and not neither"
            )
        count = len(self.completion_ids)
        for name in (
            "advantages",
            "rewards",
            "old_logprobs",
            "ref_logprobs",
            "sampler_logprobs",
            "completion_masks",
        ):
            values = getattr(self, name)
            if values is not None and len(values) != count:
                raise InputError(
                    f"Group.{name} has {len(values)} entries, expected {count}, one a completion"
                )
        for name in ("old_logprobs", "ref_logprobs", "sampler_logprobs", "completion_masks"):
            for k, values in enumerate(getattr(self, name) or ()):
                if len(values) != len(self.completion_ids[k]):
                    raise InputError(
                        f"Group.{name}[{k}] has {len(values)} entries for "
                        f"{len(self.completion_ids[k])} tokens"
                    )

    def live_tokens(self, k: int) -> int:
        """Tokens of completion `k` in the loss."""
        if self.completion_masks is None:
            return len(self.completion_ids[k])
        mask = self.completion_masks[k]
        return int(mask.sum() if isinstance(mask, Tensor) else sum(mask))

    def advantage_values(self) -> list[float]:
        """`advantages`, or `group_advantages(rewards)`."""
        if self.advantages is not None:
            return torch.as_tensor(self.advantages, dtype=torch.float32).tolist()
        size = len(self.completion_ids)
        return group_advantages(torch.as_tensor(self.rewards), group_size=size).advantages.tolist()


class Member(NamedTuple):
    """One completion of one group."""

    group: int
    index: int


def members(groups: Sequence[Group]) -> list[Member]:
    """Every completion, in group order."""
    return [
        Member(g, k) for g, group in enumerate(groups) for k in range(len(group.completion_ids))
    ]


def make_groups(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    group_size: int,
    prompt_masks: Sequence[Sequence[int]] | None = None,
    **known: Sequence,
) -> list[Group]:
    """Sequences as most trainers hold them, one prompt each and `group_size` neighbours to a group,
    as groups. `prompt_masks`: 0 at the padding of prompts, left or right, which is taken off, so
    that every prompt starts at position 0. `known`: the other fields of Group, one entry a
    sequence.

    Raises InputError for a group whose prompts differ: they would be trained behind the first one.
    """
    count = len(completion_ids)
    if group_size < 1 or count % group_size:
        raise InputError(
            f"{count} completions are no multiple of group_size = {group_size}: pass whole groups"
        )
    per_sequence = {"prompt_ids": prompt_ids, **known}
    if prompt_masks is not None:
        per_sequence["prompt_masks"] = prompt_masks
    for name, values in per_sequence.items():
        if len(values) != count:
            raise InputError(f"{name} has {len(values)} entries for {count} completions")
    if prompt_masks is not None:
        prompt_ids = [
            _unpadded(i, ids, mask)
            for i, (ids, mask) in enumerate(zip(prompt_ids, prompt_masks, strict=True))
        ]
    made = []
    for start in range(0, count, group_size):
        prompt = list(prompt_ids[start])
        for i in range(start + 1, start + group_size):
            if list(prompt_ids[i]) != prompt:
                raise InputError(
                    f"prompt_ids[{i}] is another prompt than prompt_ids[{start}], and both are in "
                    f"one group of {group_size}: sort sequences by prompt, or mend group_size"
                )
        members = slice(start, start + group_size)
        fields = {name: values[members] for name, values in known.items()}
        made.append(Group(prompt_ids=prompt, completion_ids=completion_ids[members], **fields))
    return made


def _unpadded(i: int, ids: Sequence[int], mask: Sequence[int]) -> Sequence[int]:
    """Prompt `i` without its padding on either side."""
    real = torch.as_tensor(mask).bool().nonzero().flatten()
    whole = len(real) > 0 and int(real[-1] - real[0]) + 1 == len(real)
    if len(mask) != len(ids) or not whole:
        raise InputError(
            f"prompt_masks[{i}] has {len(real)} tokens in {len(mask)} places for {len(ids)} ids: "
            "expected one place an id, and tokens without a gap; pass prompts as they are sampled "
            "from"
        )
    return ids[int(real[0]) : int(real[-1]) + 1]
