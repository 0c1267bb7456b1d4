"""The tokens of an optimizer step of TRL's, from its padded micro-batches: a column a number.

Ratio, KL, gradient mass and slope are what our loss made; where the loss is TRL's own, the gradient
mass is not known, and the others follow from its log-probs.

Shapes: `B` rows of a micro-batch, `C` padded length of completions, `T` tokens.
"""

from collections.abc import Mapping, Sequence
from itertools import groupby
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
from ..tokens import tokens_of
from ..torch_segments import segment_reduce
from .trl_loss import LOGPROBS, Denominators, loss_mask

# A column of a generation, (number of the generation, place in it): TRL shuffles it along with all
# the others, and reads it nowhere.
PLACES = "grpo_fast_places"
# What metrics are made of, where our loss gave the slope.
OF_METRICS = ("logprobs", "old_logprobs", "sampler_logprobs", "slope")


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

    def named(self) -> dict[str, Tensor]:
        """Every [B, C] of numbers by the name of its column."""
        known = {ours: self.inputs[name] for name, ours in LOGPROBS.items() if name in self.inputs}
        return self.made | {"logprobs": self.logprobs, "entropy": self.entropy} | known

    def prompt_ids(self, row: int) -> list[int]:
        ids, mask = (self.inputs[name][row] for name in ("prompt_ids", "prompt_mask"))
        return ids[mask.bool()].tolist()


class Row(NamedTuple):
    """One completion of a step."""

    generation: int
    place: int
    """In its generation."""
    batch: int
    """Its micro-batch."""
    number: int
    """In its micro-batch."""
    weight: float
    """Of each of its tokens in the loss; NaN where it has none, or where that is not known."""
    start: int
    stop: int


def columns_of(batches: Sequence[MicroBatch], pad: int) -> tuple[StepColumns, list[Row]]:
    """All tokens of a step, group by group, and whose they are; NaN where not known."""
    found = _joined([_of_run(run, pad, whole=True) for run in _runs(batches)])
    bounds, weights = found.offsets.tolist(), found.weights.tolist()
    rows = []
    for number, batch in enumerate(batches):
        for k, key in enumerate(batch.inputs[PLACES].tolist()):
            at = len(rows)
            rows.append(Row(*key, number, k, weights[at], bounds[at], bounds[at + 1]))
    # Where a step goes over a completion more than once, the latest comes last.
    rows.sort(key=lambda row: row[:2])
    order = np.concatenate([np.arange(row.start, row.stop) for row in rows])
    offsets = np.cumsum([0, *(row.stop - row.start for row in rows)])
    arrays = {name: values[order] for name, values in found.arrays.items()}
    weights = np.array([row.weight for row in rows])
    bounds = offsets.tolist()
    rows = [row._replace(start=bounds[k], stop=bounds[k + 1]) for k, row in enumerate(rows)]
    return StepColumns(arrays, found.slope[order], weights, offsets), rows


def metric_columns(batches: Sequence[MicroBatch], pad: int) -> StepColumns:
    """Those that metrics of a step are made of, in any order."""
    return _joined([_of_run(run, pad, whole=False) for run in _runs(batches)])


def _runs(batches: Sequence[MicroBatch]) -> list[list[MicroBatch]]:
    """Cut between micro-batches that are not parts of one loss."""

    def key(numbered: tuple[int, MicroBatch]) -> tuple:
        number, batch = numbered
        if batch.loss is None:
            return (None, *batch.named())
        # A quantile is one of the micro-batch.
        alone = number if batch.loss.top_entropy_quantile < 1 else None
        return (batch.loss, float(batch.denominators.policy), alone, *batch.named())

    return [[batch for _, batch in run] for _, run in groupby(enumerate(batches), key)]


def _joined(parts: Sequence[StepColumns]) -> StepColumns:
    if len(parts) == 1:
        return parts[0]
    names = dict.fromkeys(name for part in parts for name in part.arrays)
    columns = {
        # Micro-batches with images know less.
        name: [part.arrays.get(name, np.full(len(part.slope), np.nan)) for part in parts]
        for name in names
    }
    arrays = {name: np.concatenate(values) for name, values in columns.items()}
    weights = None
    if parts[0].weights is not None:
        weights = np.concatenate([part.weights for part in parts])
    lengths = np.concatenate([np.diff(part.offsets) for part in parts])
    slope = np.concatenate([part.slope for part in parts])
    return StepColumns(arrays, slope, weights, np.cumsum([0, *lengths]))


def _of_run(batches: Sequence[MicroBatch], pad: int, *, whole: bool) -> StepColumns:
    """The tokens of micro-batches of one loss, row by row."""
    names = list(batches[0].named())
    if not whole and "slope" in names:
        names = [name for name in names if name in OF_METRICS]
    parts = zip(*(_flat(batch, names, pad) for batch in batches), strict=True)
    ids, mask, lengths, table = (np.concatenate(part, -1) for part in parts)
    columns = dict(zip(names, table, strict=True))
    offsets = np.cumsum([0, *lengths])
    unknown = np.full(len(ids), np.nan, np.float32)
    slope, weights = columns.get("slope", unknown), unknown
    if batches[0].loss is not None and (whole or "slope" not in names):
        slope, weights, found = _terms(columns, ids, mask, offsets, batches)
        # What teaches nothing was not forwarded by our loss, but measured for TRL's metrics.
        columns |= {
            name: np.where(np.isnan(columns[name]), values, columns[name])
            if name in columns
            else values
            for name, values in found.items()
        }
    columns = {"ratio": unknown, "gradient_mass": unknown} | columns
    columns.pop("slope", None)
    if not mask.all():
        columns = {name: np.where(mask, x, np.float32(np.nan)) for name, x in columns.items()}
    of_row = _of_row(weights, mask, offsets) if whole else None
    return StepColumns(columns | {"token_ids": ids, "mask": mask}, slope, of_row, offsets)


def _flat(
    batch: MicroBatch, names: Sequence[str], pad: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """(token ids [T], mask [T], lengths [B], numbers by name [names, T]) of a micro-batch."""
    inputs, named = batch.inputs, batch.named()
    ids, given = (inputs[f"completion_{name}"].cpu().numpy() for name in ("ids", "mask"))
    # TRL masks the whole of a truncated completion, which does not end with padding of its own.
    places = np.arange(1, ids.shape[1] + 1)
    last = np.where(ids != pad, places, 0).max(1)
    lengths = np.where(given.any(1), given.sum(1), last)
    inside = np.flatnonzero(places <= lengths[:, None])
    mask = loss_mask(inputs).cpu().numpy().astype(bool)
    # The one transfer.
    table = torch.stack([named[name].float().flatten() for name in names]).cpu().numpy()
    return ids.take(inside), mask.take(inside), lengths, table.take(inside, 1)


def _of_row(weights: np.ndarray, mask: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """[T] -> [B]: the value of a row's first token in the loss, NaN where it has none."""
    live = np.append(np.flatnonzero(mask), len(mask))
    first = live[np.searchsorted(live, offsets[:-1])]
    return np.where(first < offsets[1:], np.append(weights, np.nan)[first], np.nan)


def _terms(
    columns: Mapping[str, np.ndarray],
    ids: np.ndarray,
    mask: np.ndarray,
    offsets: np.ndarray,
    batches: Sequence[MicroBatch],
) -> tuple[np.ndarray, np.ndarray, dict[str, np.ndarray]]:
    """(slope, weights, columns that follow from the log-probs), [T] each."""
    loss, known = batches[0].loss, {name: torch.from_numpy(x) for name, x in columns.items()}
    rows = loss_rows(
        torch.from_numpy(ids),
        torch.cat([batch.inputs["advantages"] for batch in batches]).float().cpu(),
        mask=torch.from_numpy(mask),
        cu_seqlens=torch.from_numpy(offsets),
        **{name: known.get(name) for name in LOGPROBS.values()},
        group_ids=None,
        group_lengths=None,
        temperature=None,
        denominator=float(batches[0].denominators.policy),
        entropy_denominator=None,
        config=loss,
        vocabulary=int(ids.max()) + 1,
        dtype=torch.float32,
    )
    logprobs, entropy, found = known["logprobs"], known["entropy"], {}
    if loss.top_entropy_quantile < 1:
        keep = top_entropy(entropy, rows.mask, loss.top_entropy_quantile)
        rows, found = rows.replace(keep=keep), {"keep": keep}
    if "slope" in known:
        slope = known["slope"]
        if np.isnan(columns["ratio"][mask]).any():
            options = {"level": loss.level, "limit": loss.log_ratio_clamp}
            tokens = tokens_of(logprobs, entropy, rows, **options, reduce=segment_reduce)
            found["ratio"] = tokens.ratio
        found["gradient_mass"] = torch.where(slope == 0, 0.0, torch.nan)
        if "ref_logprobs" in known and "kl" not in known:
            # Nothing was forwarded: all of it is masked.
            found["kl"] = torch.full_like(slope, torch.nan)
    else:
        rows = rows.replace(correction=known_correction(rows, loss, reduce=segment_reduce))
        terms = policy_terms(logprobs, entropy, rows, loss, reduce=segment_reduce)
        slope, found["ratio"] = terms.slope, terms.ratio
        if terms.kl is not None:
            found["kl"] = terms.kl
    return slope.numpy(), rows.weights.numpy(), {name: x.numpy() for name, x in found.items()}
