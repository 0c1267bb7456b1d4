"""What a step knows of each of its tokens, brought over from the device in one transfer.

Shapes: `T` completion tokens of the step, in group order, `S` completions.
"""

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .aggregation import token_weights, top_entropy
from .collate import PER_TOKEN, joined, live_mask
from .groups import Group
from .loss_config import LossConfig
from .outputs import StepOutput
from .rows import Segments

# What the loss made, and what of the rest is a number only where the token is in it.
_MADE = ("logprobs", "slope", "entropy", "ratio", "gradient_mass", "kl")
_NUMBERS = {*_MADE, "old_logprobs"} - {"slope"}
# What metrics are made of.
_OF_METRICS = ("logprobs", "slope", "old_logprobs", "sampler_logprobs")


class StepColumns(NamedTuple):
    arrays: dict[str, np.ndarray]
    """[T] each, those of `token_log.COLUMNS` that were asked for; NaN where not measured."""
    slope: np.ndarray
    """[T] d(loss) / d(logp), entropy bonus left out; 0 where masked."""
    weights: np.ndarray | None
    """[S] of each of its tokens in the loss = sum(weight x the token's loss), NaN for a completion
    without one; None where only metrics were asked for."""
    offsets: np.ndarray
    """[S+1]."""


def step_columns(
    groups: Sequence[Group], output: StepOutput, loss: LossConfig, *, whole: bool = True
) -> StepColumns:
    """Columns of all tokens of a step, as `grpo_backward(model, groups, loss=loss)` made them.

    whole: all of them, for a step that is kept; else those that metrics are made of.
    """
    completions = [ids for group in groups for ids in group.completion_ids]
    offsets = np.cumsum([0, *map(len, completions)], dtype=np.int64)
    each = (group.completion_masks or [None] * len(group.completion_ids) for group in groups)
    ids, mask = joined(completions, np.int64), live_mask([*chain(*each)], offsets)
    tokens = output.tokens
    wanted = (*_MADE, *PER_TOKEN) if whole else _OF_METRICS
    columns = {name: getattr(tokens, name) for name in _MADE if name in wanted}
    if tokens.kl is None:
        columns.pop("kl", None)
    for name in PER_TOKEN:
        if name in wanted and all(getattr(group, name) is not None for group in groups):
            columns[name] = _given(groups, name, tokens.logprobs)
    if whole and loss.top_entropy_quantile < 1:
        columns["keep"] = _kept(columns["entropy"], mask, offsets, tokens.rows, loss)
    arrays = _on_host(columns)
    slope = arrays.pop("slope")
    if not mask.all():
        # A copy, because on a CPU these are the output's own.
        for name in arrays.keys() & _NUMBERS:
            arrays[name] = np.where(mask, arrays[name], np.nan)
    weights = None
    if whole:
        dtype = columns["slope"].dtype
        weights = _weights(groups, mask, offsets, tokens.denominator, loss, dtype)
    return StepColumns(arrays | {"token_ids": ids, "mask": mask}, slope, weights, offsets)


def _on_host(columns: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """In the slope's dtype, in one transfer."""
    dtype = columns["slope"].dtype
    values = [column.to(dtype) for column in columns.values()]
    table = values if values[0].device.type == "cpu" else torch.stack(values).cpu()
    return {name: column.numpy() for name, column in zip(columns, table, strict=True)}


def _given(groups: Sequence[Group], name: str, like: Tensor) -> Tensor:
    parts = [part for group in groups for part in getattr(group, name)]
    parts = [part if isinstance(part, Tensor) else torch.as_tensor(part) for part in parts]
    return torch.cat(parts).float().to(like) if parts else like[:0]


def _kept(
    entropy: Tensor, mask: np.ndarray, offsets: np.ndarray, row_of: Sequence[int], loss: LossConfig
) -> Tensor:
    """The top-entropy mask: the quantile is one of each packed row."""
    keep = torch.zeros_like(entropy)
    live = torch.from_numpy(mask).to(entropy.device)
    row_of_token = np.repeat(row_of, np.diff(offsets))
    for number in range(max(row_of, default=-1) + 1):
        here = torch.from_numpy(np.flatnonzero(row_of_token == number)).to(entropy.device)
        keep[here] = top_entropy(entropy[here], live[here], loss.top_entropy_quantile)
    return keep


def _weights(
    groups: Sequence[Group],
    mask: np.ndarray,
    offsets: np.ndarray,
    denominator: float | Tensor,
    loss: LossConfig,
    dtype: torch.dtype,
) -> np.ndarray:
    """The aggregation, by completion: in all of them every token in the loss has the same."""
    live = np.diff(np.concatenate([[0], np.cumsum(mask)])[offsets])
    count = len(live)
    of_group = np.repeat(np.arange(len(groups)), [len(group.completion_ids) for group in groups])
    group_tokens = np.bincount(of_group, weights=live, minlength=len(groups)).astype(np.int64)
    # Sequences of one row each, of the lengths that they have.
    segments = Segments(
        torch.arange(count + 1), torch.arange(count), torch.from_numpy(live).to(dtype)
    )
    weights = token_weights(
        torch.ones(count, dtype=torch.bool),
        loss,
        segments=segments,
        group_ids=torch.from_numpy(of_group),
        group_lengths=torch.from_numpy(group_tokens[of_group]),
        denominator=float(denominator),
        dtype=dtype,
    )
    return np.where(live > 0, weights.numpy(), np.nan)


def push_table(columns: StepColumns, eos_token_ids: Sequence[int], most: int = 20) -> dict:
    """Vocabulary ids that the step makes likelier and unlikelier, by the sum of -slope over all
    their tokens: `up` and `down` as (id, value), `eos` of all ids that end a completion together,
    None without one."""
    # An id that is masked may be none at all.
    ids, slope, live = columns.arrays["token_ids"], columns.slope, columns.arrays["mask"]
    if not live.all():
        ids, slope = ids[live], slope[live]
    net = np.bincount(ids, weights=-slope.astype(np.float64))
    most = min(most, len(net))

    def extreme(sign: int) -> list[list]:
        first = np.argpartition(-sign * net, most - 1)[:most] if most else np.zeros(0, np.int64)
        first = first[np.argsort(-sign * net[first], kind="stable")]
        return [[int(i), float(net[i])] for i in first if not sign * net[i] <= 0]

    known = [i for i in eos_token_ids if i < len(net)]
    eos = float(net[known].sum()) if len(eos_token_ids) else None
    return {"up": extreme(1), "down": extreme(-1), "eos": eos}


def group_means(columns: StepColumns, sizes: Sequence[int], values: np.ndarray) -> list[float]:
    """Mean of [T] over the measured tokens of each group; NaN where none is."""
    ends = columns.offsets[np.cumsum([0, *sizes])]
    means = []
    for start, stop in pairwise(ends):
        found = values[start:stop][np.isfinite(values[start:stop])]
        means.append(float(found.mean()) if len(found) else float("nan"))
    return means
