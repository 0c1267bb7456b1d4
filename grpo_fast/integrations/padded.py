"""Padded micro-batches, as trainers hold them, to groups that share prompts and back.

Shapes: `B` rows, `P` and `C` padded length of prompts and completions.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..groups import Group
from ..live import advantage_is_all
from ..loss_config import LossConfig


def grouped(
    prompt_ids: Tensor,
    prompt_mask: Tensor,
    completion_ids: Tensor,
    completion_mask: Tensor,
    *,
    loss_mask: Tensor | None = None,
    advantages: Tensor | None = None,
    logprobs: Mapping[str, Tensor] | None = None,
) -> tuple[list[Group], list[int]]:
    """(groups of the rows with equal prompts, the row of each completion in group order).

    [B, P] prompts padded on either side, [B, C] completions padded on the right; loss_mask [B, C]
    and the values of `logprobs` [B, C] (old_logprobs, ... of `Group`), advantages [B], else 0.
    """
    # One copy each: on a GPU every number that is looked at would be waited for.
    prompt_ids, prompt_mask = prompt_ids.cpu(), prompt_mask.cpu().bool()
    completion_ids, lengths = completion_ids.cpu(), completion_mask.sum(1).tolist()
    rows: dict[tuple[int, ...], list[int]] = {}
    for row, real in enumerate(prompt_mask):
        rows.setdefault(tuple(prompt_ids[row, real].tolist()), []).append(row)
    loss_mask = None if loss_mask is None else loss_mask.cpu()
    values = [0.0] * len(lengths) if advantages is None else advantages.tolist()

    def cut(tensor: Tensor, where: list[int]) -> list[Tensor]:
        return [tensor[row, : lengths[row]] for row in where]

    groups = [
        Group(
            prompt_ids=prompt,
            completion_ids=cut(completion_ids, where),
            advantages=[values[row] for row in where],
            completion_masks=None if loss_mask is None else cut(loss_mask, where),
            **{name: cut(tensor, where) for name, tensor in (logprobs or {}).items()},
        )
        for prompt, where in rows.items()
    ]
    return groups, [row for where in rows.values() for row in where]


def spread(values: Sequence[Tensor], rows: Sequence[int], like: Tensor) -> Tensor:
    """One tensor a completion, in group order -> [B, C], 0 where padded; float32 or wider."""
    dtype = values[0].dtype if values else torch.float32
    whole = torch.zeros(like.shape, dtype=dtype, device=like.device)
    if not values:
        return whole
    lengths = torch.tensor([len(tensor) for tensor in values])
    ends = lengths.cumsum(0)
    # One copy for all of them, in place of one a row.
    firsts = torch.tensor(rows) * like.shape[1] - (ends - lengths)
    places = firsts.repeat_interleave(lengths) + torch.arange(int(ends[-1]))
    whole.view(-1)[places.to(like.device)] = torch.cat([*values])
    return whole


def dead_groups(groups: Sequence[Group], config: LossConfig) -> tuple[list[Group], list[int]]:
    """(the completions that `grpo_backward` leaves out for their advantage, as groups; the place of
    each among all completions)."""
    dead, places, first = [], [], 0
    if not advantage_is_all(config):
        return dead, places
    for group in groups:
        left = [k for k, value in enumerate(group.advantage_values()) if value == 0]
        if left:
            ids = [group.completion_ids[k] for k in left]
            advantages = [0.0] * len(left)
            dead.append(
                Group(prompt_ids=group.prompt_ids, completion_ids=ids, advantages=advantages)
            )
            places += [first + k for k in left]
        first += len(group.completion_ids)
    return dead, places
