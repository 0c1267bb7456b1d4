"""What a step knows of each of its tokens, brought over from the device in one transfer.

Shapes: `T` completion tokens of the step, in group order, `S` completions.
"""

from collections.abc import Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .aggregation import top_entropy
from .collate import PER_TOKEN
from .correction import known_correction
from .groups import Group
from .inputs import loss_rows
from .loss_config import LossConfig
from .outputs import StepOutput
from .policy_terms import policy_terms
from .rows import LossRows
from .torch_segments import segment_reduce

# What the loss made; no number where the token is not in it.
_MADE = ("logprobs", "entropy", "ratio", "gradient_mass", "kl", "old_logprobs")
_OF_METRICS = ("logprobs", "old_logprobs", "sampler_logprobs", "slope")


class StepColumns(NamedTuple):
    arrays: dict[str, np.ndarray]
    """[T] each, those of `token_log.COLUMNS` that were asked for; NaN where not measured."""
    slope: np.ndarray
    """[T] d(loss) / d(logp), entropy bonus left out; 0 where masked."""
    weights: np.ndarray | None
    """[T] the aggregation: loss = sum(weights x per-token loss); None where only metrics are."""
    offsets: np.ndarray
    """[S+1]."""


def step_columns(
    groups: Sequence[Group], output: StepOutput, loss: LossConfig, *, whole: bool = True
) -> StepColumns:
    """Columns of all tokens of a step: those that `grpo_backward(model, groups, loss=loss)` made,
    and the slope, by the same functions from its log-probs.

    whole: all of them, for a step that is kept; else those that metrics are made of.
    """
    ids, mask = _ids(groups), _masks(groups)
    lengths = [len(part) for part in output.logprobs]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    made = {"logprobs": output.logprobs, "entropy": output.entropy, "ratio": output.tokens.ratio}
    made |= {"gradient_mass": output.tokens.gradient_mass}
    made |= {} if output.tokens.kl is None else {"kl": output.tokens.kl}
    none = torch.zeros(0, device=output.loss.device)
    needed = made if whole else {"logprobs"} | _of_slopes(loss)
    columns = {name: torch.cat([none, *made[name]]) for name in made if name in needed}
    columns |= {name: _given(groups, name, columns["logprobs"]) for name in PER_TOKEN}
    columns = {name: values for name, values in columns.items() if values is not None}
    places = _Places(ids, mask, offsets)
    columns |= _slopes(groups, columns, places, output, loss)
    if not whole:
        columns = {name: columns[name] for name in columns if name in _OF_METRICS}
    arrays = _on_host(columns)
    slope, weights = arrays.pop("slope"), arrays.pop("weights", None)
    if not mask.all():
        for name in arrays.keys() & set(_MADE):
            arrays[name][~mask] = np.nan
    return StepColumns(arrays | {"token_ids": ids, "mask": mask}, slope, weights, offsets)


def _of_slopes(loss: LossConfig) -> set[str]:
    """What the slope is made of beside the log-probs."""
    wants = loss.objective is not None or loss.top_entropy_quantile < 1
    return {"entropy"} if wants else set()


def _on_host(columns: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """In the slope's dtype, in one transfer."""
    dtype = columns["slope"].dtype
    values = [column.to(dtype) for column in columns.values()]
    table = values if values[0].device.type == "cpu" else torch.stack(values).cpu()
    return {name: column.numpy() for name, column in zip(columns, table, strict=True)}


class _Places(NamedTuple):
    ids: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray


def _ids(groups: Sequence[Group]) -> np.ndarray:
    parts = [ids for group in groups for ids in group.completion_ids]
    if all(isinstance(part, list) for part in parts):
        # An array a completion takes half as long again.
        return np.fromiter(chain.from_iterable(parts), np.int64, sum(map(len, parts)))
    return np.concatenate([np.zeros(0, np.int64), *(_array(part, np.int64) for part in parts)])


def _masks(groups: Sequence[Group]) -> np.ndarray:
    """All 1 where not given."""
    parts = []
    for group in groups:
        masks = group.completion_masks
        masks = [None] * len(group.completion_ids) if masks is None else masks
        parts += [_mask(m, ids) for m, ids in zip(masks, group.completion_ids, strict=True)]
    return np.concatenate([np.zeros(0, bool), *parts])


def _mask(mask: Sequence[int] | None, ids: Sequence[int]) -> np.ndarray:
    # Of nearly every completion the whole mask is 1, which a list knows faster than an array.
    if mask is None or (isinstance(mask, list) and mask.count(1) == len(mask)):
        return np.ones(len(ids), bool)
    return _array(mask, bool)


def _array(part: Sequence[int], dtype: type) -> np.ndarray:
    return np.asarray(part.cpu() if isinstance(part, Tensor) else part, dtype)


def _given(groups: Sequence[Group], name: str, like: Tensor) -> Tensor | None:
    if any(getattr(group, name) is None for group in groups):
        return None
    parts = [torch.as_tensor(part) for group in groups for part in getattr(group, name)]
    return torch.cat(parts).float().to(like) if parts else like[:0]


def _slopes(
    groups: Sequence[Group],
    columns: dict[str, Tensor],
    places: _Places,
    output: StepOutput,
    loss: LossConfig,
) -> dict[str, Tensor]:
    """`slope` and `weights`, and `keep` where the policy term acts on some tokens only."""
    logp = columns["logprobs"]
    device = logp.device
    advantages = [a for group in groups for a in group.advantage_values()]
    advantages = torch.tensor(advantages, dtype=logp.dtype, device=device)
    cu_seqlens = torch.from_numpy(places.offsets).to(device)
    live = torch.from_numpy(places.mask).to(device)
    of_row = np.asarray(output.tokens.rows, np.int64)
    # Not forwarded, because its slope is 0; a NaN of another token is a NaN of the step.
    known = {name: columns.get(name) for name in ("logprobs", "entropy", *PER_TOKEN)}
    if (of_row < 0).any():
        dead = torch.from_numpy(np.repeat(of_row < 0, np.diff(places.offsets))).to(device)
        known = {k: v if v is None else torch.where(dead, 0.0, v) for k, v in known.items()}
    of_group = np.repeat(np.arange(len(groups)), [len(group.completion_ids) for group in groups])
    tokens = None
    if loss.adds_up == "prompt_mean":
        of_token = np.repeat(of_group, np.diff(places.offsets))
        tokens = np.bincount(of_token, weights=places.mask, minlength=len(groups))
        tokens = torch.from_numpy(tokens.astype(np.int64)[of_group]).to(device)
    rows = loss_rows(
        torch.from_numpy(places.ids).to(device),
        advantages,
        mask=live,
        cu_seqlens=cu_seqlens,
        **{name: known[name] for name in PER_TOKEN},
        group_ids=torch.from_numpy(of_group).to(device),
        group_lengths=tokens,
        temperature=None,
        denominator=output.tokens.denominator,
        entropy_denominator=None,
        config=loss,
        vocabulary=int(places.ids.max(initial=0)) + 1,
        dtype=logp.dtype,
    )
    rows = rows.replace(correction=known_correction(rows, loss, reduce=segment_reduce))
    made = {}
    if loss.top_entropy_quantile < 1:
        keep = _kept(columns["entropy"], rows, places, of_row, loss)
        rows, made = rows.replace(keep=keep), {"keep": keep}
    # Log-probs in the place of an entropy that nothing looks at.
    entropy = known["logprobs"] if known["entropy"] is None else known["entropy"]
    terms = policy_terms(known["logprobs"], entropy, rows, loss, reduce=segment_reduce)
    return {"slope": terms.slope, "weights": rows.weights, **made}


def _kept(
    entropy: Tensor, rows: LossRows, places: _Places, row_of: np.ndarray, loss: LossConfig
) -> Tensor:
    """The top-entropy mask: the quantile is one of each packed row."""
    keep = torch.zeros_like(rows.weights)
    row_of_token = np.repeat(row_of, np.diff(places.offsets))
    for number in range(row_of.max(initial=-1) + 1):
        here = torch.from_numpy(np.flatnonzero(row_of_token == number)).to(entropy.device)
        keep[here] = top_entropy(entropy[here], rows.mask[here], loss.top_entropy_quantile)
    return keep


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
