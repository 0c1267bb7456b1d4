"""What a step knows of each of its tokens, brought over from the device in one transfer.

Shapes: `T` completion tokens of the step, in group order, `S` completions.
"""

import itertools
from collections.abc import Sequence
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


class StepColumns(NamedTuple):
    arrays: dict[str, np.ndarray]
    """[T] each, as `token_log.COLUMNS` names them; NaN where not measured."""
    slope: np.ndarray
    """[T] d(loss) / d(logp), entropy bonus left out; 0 where masked."""
    weights: np.ndarray
    """[T] the aggregation: loss = sum(weights x per-token loss)."""
    offsets: np.ndarray
    """[S+1]."""


def step_columns(groups: Sequence[Group], output: StepOutput, loss: LossConfig) -> StepColumns:
    """Columns of all tokens of a step: those that `grpo_backward(model, groups, loss=loss)` made,
    and the slope, by the same functions from its log-probs."""
    device = output.loss.device
    ids, mask = _flat(groups, "completion_ids", np.int64), _flat(groups, "completion_masks", bool)
    mask = np.ones(len(ids), bool) if mask is None else mask
    lengths = [len(part) for part in output.logprobs]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    made = {"logprobs": output.logprobs, "entropy": output.entropy, "ratio": output.tokens.ratio}
    made |= {"gradient_mass": output.tokens.gradient_mass}
    made |= {} if output.tokens.kl is None else {"kl": output.tokens.kl}
    none = torch.zeros(0, device=device)
    columns = {name: torch.cat([none, *parts]) for name, parts in made.items()}
    columns |= {name: _given(groups, name, columns["logprobs"]) for name in PER_TOKEN}
    columns = {name: values for name, values in columns.items() if values is not None}
    places = _Places(ids, mask, offsets)
    columns |= _slopes(groups, columns, places, output, loss)
    names = list(columns)
    # The one transfer.
    table = torch.stack([columns[name].to(columns["slope"].dtype) for name in names]).cpu().numpy()
    arrays = dict(zip(names, table, strict=True))
    slope, weights = arrays.pop("slope"), arrays.pop("weights")
    for name in arrays.keys() & set(_MADE):
        arrays[name][~mask] = np.nan
    return StepColumns(arrays | {"token_ids": ids, "mask": mask}, slope, weights, offsets)


class _Places(NamedTuple):
    ids: np.ndarray
    mask: np.ndarray
    offsets: np.ndarray


def _flat(groups: Sequence[Group], name: str, dtype: type) -> np.ndarray | None:
    """One number a token of what every group has, or None where none has it."""
    if all(getattr(group, name) is None for group in groups):
        return None
    parts = []
    for group in groups:
        values = getattr(group, name)
        # Masks are all 1 where not given.
        values = [[1] * len(ids) for ids in group.completion_ids] if values is None else values
        parts += [
            np.asarray(part.cpu() if isinstance(part, Tensor) else part, dtype) for part in values
        ]
    return np.concatenate([np.zeros(0, dtype), *parts])


def _given(groups: Sequence[Group], name: str, like: Tensor) -> Tensor | None:
    if any(getattr(group, name) is None for group in groups):
        return None
    parts = [torch.as_tensor(part) for group in groups for part in getattr(group, name)]
    return torch.cat([part.float() for part in parts]).to(like) if parts else like[:0]


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
    spread = torch.repeat_interleave(advantages, torch.diff(cu_seqlens), output_size=len(logp))
    # Not forwarded, because its slope is 0; a NaN of another token is a NaN of the step.
    dead = live & logp.isnan() & (spread == 0)
    known = {name: torch.where(dead, 0.0, values) for name, values in columns.items()}
    of_group = np.repeat(np.arange(len(groups)), [len(group.completion_ids) for group in groups])
    of_token = np.repeat(of_group, np.diff(places.offsets))
    tokens = np.bincount(of_token, weights=places.mask, minlength=len(groups)).astype(np.int64)
    rows = loss_rows(
        torch.from_numpy(places.ids).to(device),
        advantages,
        mask=live,
        cu_seqlens=cu_seqlens,
        **{name: known.get(name) for name in PER_TOKEN},
        group_ids=torch.from_numpy(of_group).to(device),
        group_lengths=torch.from_numpy(tokens[of_group]).to(device),
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
        keep = _kept(columns["entropy"], rows, places, output.tokens.rows, loss)
        rows, made = rows.replace(keep=keep), {"keep": keep}
    terms = policy_terms(known["logprobs"], known["entropy"], rows, loss, reduce=segment_reduce)
    return {"slope": terms.slope, "weights": rows.weights, **made}


def _kept(
    entropy: Tensor, rows: LossRows, places: _Places, row_of: Sequence[int], loss: LossConfig
) -> Tensor:
    """The top-entropy mask: the quantile is one of each packed row."""
    keep = torch.zeros_like(rows.weights)
    row_of_token = np.repeat(row_of, np.diff(places.offsets))
    for number in range(max(row_of, default=-1) + 1):
        here = torch.from_numpy(np.flatnonzero(row_of_token == number)).to(entropy.device)
        keep[here] = top_entropy(entropy[here], rows.mask[here], loss.top_entropy_quantile)
    return keep


def push_table(columns: StepColumns, eos_token_ids: Sequence[int], most: int = 20) -> dict:
    """Vocabulary ids that the step makes likelier and unlikelier, by the sum of -slope over all
    their tokens: `up` and `down` as (id, value), `eos` of all ids that end a completion together,
    None without one."""
    # An id that is masked may be none at all.
    live = columns.arrays["mask"]
    net = np.bincount(
        columns.arrays["token_ids"][live], weights=-columns.slope[live].astype(np.float64)
    )
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
    for start, stop in itertools.pairwise(ends):
        found = values[start:stop][np.isfinite(values[start:stop])]
        means.append(float(found.mean()) if len(found) else float("nan"))
    return means
