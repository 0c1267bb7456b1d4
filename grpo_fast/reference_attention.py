"""The oracle of packed attention: one softmax over a dense mask, written token by token.

Shapes: `T` tokens of the row, `Hq` and `Hk` query and key heads, `d` head size.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor


@functools.lru_cache(maxsize=16)
def visible(
    lone: Sequence[int],
    prompts: Sequence[int],
    completions: Sequence[Sequence[int]],
    window: int | None = None,
) -> Tensor:
    """[T, T] bool: which keys each token of `layout.row_layout(lone, prompts, completions)` sees,
    itself and what is before it in its sequence, a completion also all of its prompt; `window`: the
    last so many of these. Lengths in tuples."""
    where = []  # (segment, segment of its prompt, position in its sequence)
    for k, length in enumerate(lone):
        where += [(("lone", k), None, i) for i in range(length)]
    for g, length in enumerate(prompts):
        where += [(("prompt", g), None, i) for i in range(length)]
    for g, lengths in enumerate(completions):
        for k, length in enumerate(lengths):
            where += [((g, k), ("prompt", g), prompts[g] + i) for i in range(length)]
    seen = torch.zeros(len(where), len(where), dtype=torch.bool)
    for q, (segment, prompt, at) in enumerate(where):
        for k, (other, _, key_at) in enumerate(where):
            near = window is None or at - key_at < window
            seen[q, k] = near and ((other == segment and key_at <= at) or other == prompt)
    return seen


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, *, scale: float, softcap: float | None = None
) -> Tensor:
    """`softmax(scale * q @ k.T, masked) @ v`: q [Hq, T, d], k and v [Hk, T, d], seen [T, T] bool
    -> [Hq, T, d of v]."""
    k, v = (x.repeat_interleave(len(q) // len(k), 0) for x in (k, v))
    scores = scale * q @ k.transpose(-1, -2)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    return scores.masked_fill(~seen.to(q.device), -math.inf).softmax(-1) @ v
