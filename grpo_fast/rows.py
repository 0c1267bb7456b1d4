"""One call's tokens, flat: what a caller passed, checked by `inputs.py` and read by everything
below.

Shapes: `N` rows (tokens), `S` sequences, `P` groups. Every vector is [N] unless said otherwise.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """Where sequences begin and end in the rows: `lengths` counts live rows, `ids` names each row's
    sequence."""

    cu_seqlens: Tensor
    """[S+1], first 0, last N."""
    ids: Tensor
    """[N] sequence of each row."""
    lengths: Tensor
    """[S] live rows per sequence, in the dtype of the arithmetic."""

    def spread(self, per_sequence: Tensor) -> Tensor:
        """`per_sequence[ids]`: [S] -> [N]."""
        return per_sequence.index_select(0, self.ids)

    def part(self, first: int, last: int, rows: slice) -> "Segments":
        """Sequences first ... last - 1, which are the rows `rows`."""
        offsets = self.cu_seqlens[first : last + 1]
        return Segments(offsets - offsets[0], self.ids[rows] - first, self.lengths[first:last])

    def select(self, index: Tensor) -> "Segments":
        """The rows `index` alone, ascending; a sequence may end up empty."""
        ids = self.ids.index_select(0, index)
        bounds = torch.arange(len(self.lengths) + 1, device=ids.device)
        return Segments(torch.searchsorted(ids, bounds), ids, self.lengths)


@dataclass(frozen=True, slots=True)
class LossRows:
    """What a loss needs to know of each row, float32 (float64 for float64 input)."""

    targets: Tensor
    """0 where masked."""
    mask: Tensor
    """bool; every other vector holds 0 where it is False."""
    advantages: Tensor
    weights: Tensor
    """The aggregation: loss = sum(weights x per-token loss)."""
    temperature: float | Tensor
    old_logp: Tensor | None = None
    ref_logp: Tensor | None = None
    sampler_logp: Tensor | None = None
    correction: Tensor | None = None
    """Importance weight of the sampler, where it is known before the policy's log-probs are."""
    keep: Tensor | None = None
    """Top-entropy mask, as 0 and 1."""
    entropy_weights: Tensor | None = None
    """The entropy bonus: loss -= sum(entropy_weights x entropy)."""
    entropy_denominator: float | Tensor | None = None
    """Replaces the number of tokens the bonus acts on, where `keep` is yet to be found."""
    segments: Segments | None = None

    def __len__(self) -> int:
        return self.targets.shape[0]

    def replace(self, **changes) -> "LossRows":
        """`dataclasses.replace`."""
        return dataclasses.replace(self, **changes)

    def part(self, rows: slice, sequences: tuple[int, int] | None = None) -> "LossRows":
        """The rows of a slice, which holds the sequences first ... last - 1 whole, or has none."""
        values = self._each_vector(lambda vector: vector[rows])
        segments = None if sequences is None else self.segments.part(*sequences, rows)
        return LossRows(segments=segments, **values)

    def select(self, index: Tensor) -> "LossRows":
        """The rows `index`, ascending."""
        values = self._each_vector(lambda vector: vector.index_select(0, index))
        segments = None if self.segments is None else self.segments.select(index)
        return LossRows(segments=segments, **values)

    def _each_vector(self, change) -> dict:
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "segments"
        }
        return {
            name: change(value) if isinstance(value, Tensor) and value.dim() else value
            for name, value in values.items()
        }
