"""Where the sequences of a packed row lie: segments that attend within themselves, and completions
that look at a prompt they share.

A row is `[lone sequences | prompts | completions]`: prompts and the completions that share them are
each contiguous, so that every attention call takes views of the row and no copy.

Shapes: `T` tokens of the row, `B` segments of one call.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Spans:
    """B query ranges and the key range that each looks at, back to back: what a varlen attention
    call is told. A query range may be empty, a key range not."""

    queries: tuple[int, ...]
    """Lengths."""
    keys: tuple[int, ...]
    cu_queries: Tensor
    """[B+1] int32 on the device of the row."""
    cu_keys: Tensor

    @classmethod
    def of(cls, queries: Sequence[int], keys: Sequence[int], device: torch.device) -> "Spans":
        offsets = [
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
            for lengths in (queries, keys)
        ]
        return cls(tuple(queries), tuple(keys), *offsets)

    @property
    def longest_query(self) -> int:
        return max(self.queries)

    @property
    def longest_key(self) -> int:
        return max(self.keys)

    def ranges(self) -> list[tuple[slice, slice]]:
        """(queries, keys) of each segment, on the host."""
        found, q, k = [], 0, 0
        for queries, keys in zip(self.queries, self.keys, strict=True):
            found.append((slice(q, q + queries), slice(k, k + keys)))
            q, k = q + queries, k + keys
        return found


@dataclass(slots=True)
class Layout:
    """One packed row, as every attention layer is told it."""

    own: Spans
    """Causal: each segment within itself."""
    shared: Spans | None
    """Not causal: the completions of a prompt, all of them, at the whole prompt."""
    completions: slice
    """Queries of `shared`: a range of the row."""
    prompts: slice | None
    """Keys of `shared`: a range of the row; None when they are `leaves`."""
    longest: int
    """Tokens of the longest sequence, its prompt included."""
    longest_shared: int
    """The same of those that share a prompt."""
    backend: str = "auto"
    """`attention_choice.NAMES`."""
    leaves: "PromptLeaves | None" = None
    """Where the keys and values of a prompt lie that another row has forwarded."""
    capture: "PromptLeaves | None" = None
    """Where this row, a prompt, leaves its keys and values."""
    layers: int = 0
    """Attention layers that have asked: fewer than the model has means that some never did."""
    windowed: int = 0
    """Those of them that asked for a window."""


@dataclass(slots=True)
class Leaf:
    """Keys and values [Hk, P, d] of a prompt in one layer, and the gradients that completions, a
    chunk at a time, add to them in at least float32."""

    key: Tensor
    value: Tensor
    key_grad: Tensor | None = None
    value_grad: Tensor | None = None

    def add(self, key_grad: Tensor, value_grad: Tensor) -> None:
        if self.key_grad is None or self.value_grad is None:
            wide = torch.promote_types(key_grad.dtype, torch.float32)
            self.key_grad, self.value_grad = key_grad.to(wide), value_grad.to(wide)
        else:
            self.key_grad += key_grad
            self.value_grad += value_grad


@dataclass(slots=True)
class PromptLeaves:
    """A prompt that is forwarded once: a `Leaf` for each attention layer."""

    trained: bool
    """Whether gradients will gather in the leaves."""
    layers: dict[Any, Leaf] = field(default_factory=dict)

    def roots(self) -> tuple[list[Tensor], list[Tensor]]:
        """(tensors, gradients) for the one backward through the prompt."""
        tensors, gradients = [], []
        for leaf in self.layers.values():
            for tensor, grad in ((leaf.key, leaf.key_grad), (leaf.value, leaf.value_grad)):
                if tensor.requires_grad and grad is not None:
                    tensors.append(tensor)
                    gradients.append(grad.to(tensor.dtype))
        return tensors, gradients


def row_layout(
    lone: Sequence[int],
    prompts: Sequence[int],
    completions: Sequence[Sequence[int]],
    device: torch.device,
    backend: str = "auto",
) -> Layout:
    """Lengths in tokens, in row order: of sequences by themselves, of shared prompts, and of the
    completions of each prompt. A completion may be empty, a prompt may have only empty ones."""
    children = [length for group in completions for length in group]
    totals = [sum(group) for group in completions]
    start, end = sum(lone), sum(lone) + sum(prompts)
    own = [length for length in (*lone, *prompts, *children) if length]
    whole = [p + max(group, default=0) for p, group in zip(prompts, completions, strict=True)]
    return Layout(
        own=Spans.of(own, own, device),
        shared=Spans.of(totals, prompts, device) if any(totals) else None,
        completions=slice(end, end + sum(children)),
        prompts=slice(start, end),
        longest=max([*lone, *whole], default=0),
        longest_shared=max(whole, default=0),
        backend=backend,
    )


def chunk_layout(
    completions: Sequence[int],
    leaves: PromptLeaves,
    prompt: int,
    device: torch.device,
    backend: str = "auto",
) -> Layout:
    """Some completions of the one prompt in `leaves`, `prompt` tokens long."""
    own = [length for length in completions if length]
    longest = prompt + max(own, default=0)
    return Layout(
        own=Spans.of(own, own, device),
        shared=Spans.of([sum(own)], [prompt], device),
        completions=slice(0, sum(own)),
        prompts=None,
        longest=longest,
        longest_shared=longest,
        backend=backend,
        leaves=leaves,
    )
