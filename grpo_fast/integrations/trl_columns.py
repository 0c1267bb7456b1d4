"""The tokens of an optimizer step of TRL's, from its padded micro-batches: a column a number.

Ratio, KL and gradient mass are what our loss made; where the loss is TRL's own, ratio and KL follow
from its log-probs, and the gradient mass is not known.

Shapes: `B` rows of a micro-batch, `C` padded length of completions, `T` tokens.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..aggregation import top_entropy
from ..correction import known_correction
from ..inputs import loss_rows
from ..loss_config import LossConfig
from ..policy_terms import policy_terms
from ..token_columns import StepColumns
from ..torch_segments import segment_reduce
from .trl_loss import LOGPROBS, Denominators, loss_mask

# A column of a generation, (number of the generation, place in it): TRL shuffles it along with all
# the others, and reads it nowhere.
PLACES = "grpo_fast_places"


class MicroBatch(NamedTuple):
    """One call of `_compute_loss`, on the device; [B, C] each."""

    inputs: Mapping[str, Any]
    logprobs: Tensor
    entropy: Tensor
    made: dict[str, Tensor]
    """What our loss made of each token; empty where the loss was TRL's."""
    loss: LossConfig | None
    """None where it is not known as one; so are its denominators."""
    denominators: Denominators | None


class Row(NamedTuple):
    """One completion of a step."""

    generation: int
    place: int
    """In its generation."""
    prompt_ids: list[int]
    weight: float
    """Of each of its tokens in the loss; NaN where it has none, or where that is not known."""
    start: int
    stop: int


def columns_of(batches: Sequence[MicroBatch], pad: int) -> tuple[StepColumns, list[Row]]:
    """All tokens of a step, group by group, and whose they are; NaN where not known."""
    parts = [_flat(batch, pad) for batch in batches]
    rows, first = [], 0
    for batch, part in zip(batches, parts, strict=True):
        prompts = _prompts(batch.inputs)
        bounds = (first + part.offsets).tolist()
        places = batch.inputs[PLACES].T.tolist()
        rows += map(Row, *places, prompts, part.weights.tolist(), bounds[:-1], bounds[1:])
        first = bounds[-1]
    # Where a step goes over a completion more than once, the latest comes last.
    rows.sort(key=lambda row: row[:2])
    order = np.concatenate([np.arange(row.start, row.stop) for row in rows])
    offsets = np.cumsum([0, *(row.stop - row.start for row in rows)])
    rows = [
        row._replace(start=int(start), stop=int(stop))
        for row, start, stop in zip(rows, offsets[:-1], offsets[1:], strict=True)
    ]

    def joined(values: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate(values)[order]

    names = dict.fromkeys(name for part in parts for name in part.arrays)
    arrays = {
        # Micro-batches with images know less.
        name: joined([part.arrays.get(name, np.full(len(part.slope), np.nan)) for part in parts])
        for name in names
    }
    slope = joined([part.slope for part in parts])
    weights = np.array([row.weight for row in rows])
    return StepColumns(arrays, slope, weights, offsets), rows


def _flat(batch: MicroBatch, pad: int) -> StepColumns:
    """The tokens of one micro-batch, row by row."""
    inputs = batch.inputs
    ids, given = inputs["completion_ids"].cpu(), inputs["completion_mask"].cpu().bool()
    # TRL masks the whole of a truncated completion, which does not end with padding of its own.
    places = torch.arange(1, ids.shape[1] + 1)
    whole = torch.where(given.any(1), given.sum(1), ((ids != pad) * places).amax(1))
    inside = places <= whole[:, None]
    mask = loss_mask(inputs).cpu().bool()[inside]
    named = batch.made | {"logprobs": batch.logprobs, "entropy": batch.entropy}
    named |= {ours: inputs[name] for name, ours in LOGPROBS.items() if name in inputs}
    # The one transfer.
    table = torch.stack([values.float() for values in named.values()]).cpu()
    columns = {name: values[inside] for name, values in zip(named, table, strict=True)}
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), whole.cumsum(0)])
    advantages = inputs["advantages"].float().cpu()
    unknown = torch.full(mask.shape, torch.nan)
    slope, weights = unknown, unknown
    if batch.loss is not None:
        slope, weights, found = _terms(
            columns, ids[inside], mask, offsets, advantages, batch.loss, batch.denominators
        )
        # What teaches nothing was not forwarded by our loss, but measured for TRL's metrics.
        columns |= {
            name: torch.where(columns[name].isnan(), values, columns[name])
            if name in columns
            else values
            for name, values in found.items()
        }
    columns = {"ratio": unknown, "gradient_mass": unknown} | columns
    arrays = {
        name: torch.where(mask, values, torch.nan).numpy() for name, values in columns.items()
    }
    arrays |= {"token_ids": ids[inside].numpy(), "mask": mask.numpy()}
    of_row = [
        float(part[live][0]) if live.any() else np.nan
        for part, live in zip(
            weights.split(whole.tolist()), mask.split(whole.tolist()), strict=True
        )
    ]
    return StepColumns(arrays, slope.numpy(), np.array(of_row), offsets.numpy())


def _terms(
    columns: Mapping[str, Tensor],
    ids: Tensor,
    mask: Tensor,
    offsets: Tensor,
    advantages: Tensor,
    loss: LossConfig,
    denominators: Denominators,
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(slope, weights, columns that follow from the log-probs), [T] each."""
    rows = loss_rows(
        ids,
        advantages,
        mask=mask,
        cu_seqlens=offsets,
        **{name: columns.get(name) for name in LOGPROBS.values()},
        group_ids=None,
        group_lengths=None,
        temperature=None,
        denominator=float(denominators.policy),
        entropy_denominator=None,
        config=loss,
        vocabulary=int(ids.max()) + 1,
        dtype=torch.float32,
    )
    rows = rows.replace(correction=known_correction(rows, loss, reduce=segment_reduce))
    found = {}
    if loss.top_entropy_quantile < 1:
        keep = top_entropy(columns["entropy"], rows.mask, loss.top_entropy_quantile)
        rows, found = rows.replace(keep=keep), {"keep": keep}
    terms = policy_terms(columns["logprobs"], columns["entropy"], rows, loss, reduce=segment_reduce)
    found["ratio"] = terms.ratio
    if terms.kl is not None:
        found["kl"] = terms.kl
    if "gradient_mass" in columns:
        found["gradient_mass"] = torch.where(terms.slope == 0, 0.0, torch.nan)
    return terms.slope, rows.weights, found


def _prompts(inputs: Mapping[str, Any]) -> list[list[int]]:
    ids, mask = inputs["prompt_ids"].cpu(), inputs["prompt_mask"].cpu().bool()
    return [row[real].tolist() for row, real in zip(ids, mask, strict=True)]
