"""Who computes one attention call over `Spans`: (out, lse) forward, and backward for *any* out and
lse, so that calls over different keys can be merged.

    scores = scale * q @ k.T; lse = logsumexp(scores); out = exp(scores - lse) @ v

Shapes: q, out [Hq, Tq, d], k, v [Hk, Tk, d], lse [Hq, Tq] float32 (float64 for float64); a query
head reads key head `h // (Hq / Hk)`.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .layout import Spans

aten = torch.ops.aten
# The least bound on a query range: at 1 flash-attn 2 (PyTorch's is one) would take every range for
# a step of decoding, of exactly one query, and a prompt whose completions are all empty has none.
LEAST_QUERIES = 2
# Query rows of one tile of scores of `tiles`.
TILE = 256


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer scores."""

    scale: float
    causal: bool
    softcap: float | None = None
    """scores = softcap * tanh(scores / softcap); Gemma 2."""
    window: int | None = None
    """A query sees the last `window` keys, itself among them; causal only."""


class Backend(Protocol):
    """One implementation of the two calls."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, scoring: Scoring
    ) -> tuple[Tensor, Tensor]: ...

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        spans: Spans,
        scoring: Scoring,
    ) -> tuple[Tensor, Tensor, Tensor]: ...


def segments_of(cu: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """(segment, position in it), each [tokens], of every token of segments that start at `cu`."""
    token = torch.arange(tokens, dtype=cu.dtype, device=cu.device)
    segment = torch.searchsorted(cu, token, right=True) - 1
    return segment, token - cu[segment]


def _by_key_head(q: Tensor, heads: int) -> Tensor:
    """[Hq, T, d] -> [Hq / Hk, Hk, T, d], a view: the query heads that read one key head."""
    return q.unflatten(0, (heads, -1)).transpose(0, 1)


class CPUFlash:
    """PyTorch's CPU flash kernel, one call a segment."""

    def forward(self, q, k, v, spans, scoring):
        out = q.new_empty(q.shape)
        lse = q.new_empty(q.shape[:2], dtype=torch.promote_types(q.dtype, torch.float32))
        # One call has no grouped heads: they become its batch, over keys that are not copied.
        qs, outs = _by_key_head(q, len(k)), _by_key_head(out, len(k))
        lses = lse.unflatten(0, (len(k), -1)).transpose(0, 1)
        for rows, keys in spans.ranges():
            if rows.start == rows.stop:
                continue
            part = qs[:, :, rows]
            kv = [x[None, :, keys].expand(len(part), -1, -1, -1) for x in (k, v)]
            found = aten._scaled_dot_product_flash_attention_for_cpu(
                part, *kv, 0.0, scoring.causal, scale=scoring.scale
            )
            outs[:, :, rows], lses[:, :, rows] = found
        return out, lse

    def backward(self, grad, q, k, v, out, lse, spans, scoring):
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        heads = len(k)
        qs, outs, grads, dqs = (_by_key_head(x, heads) for x in (q, out, grad, dq))
        lses = lse.unflatten(0, (heads, -1)).transpose(0, 1)
        for rows, keys in spans.ranges():
            if rows.start == rows.stop:
                continue
            kv = [x[None, :, keys].expand(len(qs), -1, -1, -1) for x in (k, v)]
            found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
                grads[:, :, rows],
                qs[:, :, rows],
                *kv,
                outs[:, :, rows],
                lses[:, :, rows],
                0.0,
                scoring.causal,
                scale=scoring.scale,
            )
            dqs[:, :, rows] = found[0]
            dk[:, keys], dv[:, keys] = found[1].sum(0), found[2].sum(0)
        return dq, dk, dv


class Tiles:
    """Plain PyTorch, a tile of scores at a time: any device, dtype, softcap and window."""

    def _scores(self, q, k, rows, keys, scoring):
        """(d scores / d logits or None, scores) of query rows at [first, last) of their segment."""
        scores = (q.to(self._wide(q)) @ k.to(self._wide(q)).transpose(-1, -2)) * scoring.scale
        slope = None
        if scoring.softcap is not None:
            bent = (scores / scoring.softcap).tanh()
            scores, slope = scoring.softcap * bent, 1 - bent.square()
        if scoring.causal:
            distance = rows[:, None] - keys[None, :]
            hidden = distance < 0
            if scoring.window is not None:
                hidden |= distance >= scoring.window
            scores = scores.masked_fill(hidden, -torch.inf)
        return scores, slope

    @staticmethod
    def _wide(x: Tensor) -> torch.dtype:
        return torch.promote_types(x.dtype, torch.float32)

    def _tiles(self, spans: Spans, scoring: Scoring, device):
        """(query slice, key slice, positions of the queries and of the keys in their segment)."""
        for rows, keys in spans.ranges():
            count = rows.stop - rows.start
            for first in range(0, count, TILE):
                last = min(first + TILE, count)
                low, high = 0, keys.stop - keys.start
                if scoring.causal:
                    high = last
                    low = 0 if scoring.window is None else max(0, first - scoring.window + 1)
                yield (
                    slice(rows.start + first, rows.start + last),
                    slice(keys.start + low, keys.start + high),
                    torch.arange(first, last, device=device),
                    torch.arange(low, high, device=device),
                )

    def forward(self, q, k, v, spans, scoring):
        out = q.new_empty(*q.shape[:2], v.shape[-1])
        lse = q.new_empty(q.shape[:2], dtype=self._wide(q))
        qs, outs = _by_key_head(q, len(k)), _by_key_head(out, len(k))
        lses = lse.unflatten(0, (len(k), -1)).transpose(0, 1)
        for rows, keys, at, key_at in self._tiles(spans, scoring, q.device):
            scores, _ = self._scores(qs[:, :, rows], k[:, keys], at, key_at, scoring)
            total = scores.logsumexp(-1)
            lses[:, :, rows] = total
            weights = (scores - total[..., None]).exp()
            outs[:, :, rows] = (weights @ v[:, keys].to(weights.dtype)).to(out.dtype)
        return out, lse

    def backward(self, grad, q, k, v, out, lse, spans, scoring):
        wide = self._wide(q)
        dq = torch.zeros_like(q)
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        qs, outs, grads, dqs = (_by_key_head(x, len(k)) for x in (q, out, grad, dq))
        lses = lse.unflatten(0, (len(k), -1)).transpose(0, 1)
        for rows, keys, at, key_at in self._tiles(spans, scoring, q.device):
            part, part_k = qs[:, :, rows], k[:, keys]
            scores, slope = self._scores(part, part_k, at, key_at, scoring)
            weights = (scores - lses[:, :, rows, None]).exp()
            above = grads[:, :, rows].to(wide)
            delta = (above * outs[:, :, rows].to(wide)).sum(-1, keepdim=True)
            down = weights * (above @ v[:, keys].to(wide).transpose(-1, -2) - delta)
            if slope is not None:
                down = down * slope
            down = down * scoring.scale
            dqs[:, :, rows] = (down @ part_k.to(wide)).to(q.dtype)
            dk[:, keys] += (down.transpose(-1, -2) @ part.to(wide)).sum(0)
            dv[:, keys] += (weights.transpose(-1, -2) @ above).sum(0)
        return dq, dk.to(k.dtype), dv.to(v.dtype)


class CUDAFlash:
    """The flash kernels inside every CUDA build of PyTorch; 16-bit only."""

    @staticmethod
    def _window(scoring: Scoring) -> dict[str, int]:
        if scoring.window is None:
            return {}
        return {"window_size_left": scoring.window - 1, "window_size_right": 0}

    def forward(self, q, k, v, spans, scoring):
        found = aten._flash_attention_forward(
            *(x.transpose(0, 1) for x in (q, k, v)),
            spans.cu_queries,
            spans.cu_keys,
            max(spans.longest_query, LEAST_QUERIES),
            spans.longest_key,
            0.0,
            scoring.causal,
            False,
            scale=scoring.scale,
            **self._window(scoring),
        )
        return found[0].transpose(0, 1), found[1]

    def backward(self, grad, q, k, v, out, lse, spans, scoring):
        # Without dropout the kernel reads no random state.
        state = torch.empty(2, dtype=torch.uint64, device=q.device)
        found = aten._flash_attention_backward(
            *(x.transpose(0, 1).contiguous() for x in (grad, q, k, v, out)),
            lse.contiguous(),
            spans.cu_queries,
            spans.cu_keys,
            max(spans.longest_query, LEAST_QUERIES),
            spans.longest_key,
            0.0,
            scoring.causal,
            state,
            torch.empty(0, dtype=torch.uint64, device=q.device),
            scale=scoring.scale,
            **self._window(scoring),
        )
        return tuple(x.transpose(0, 1) for x in found)


class Efficient:
    """PyTorch's memory-efficient kernels on CUDA: float32 and heads of any size, at the price of
    keys copied for each query head that reads them."""

    @staticmethod
    def _tokens_first(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        """[1, T, Hq, d] of each."""
        heads = len(q) // len(k)
        k, v = (x[:, None].expand(-1, heads, -1, -1).flatten(0, 1) for x in (k, v))
        return [x.transpose(0, 1)[None] for x in (q, k, v)]

    def forward(self, q, k, v, spans, scoring):
        found = aten._efficient_attention_forward(
            *self._tokens_first(q, k, v),
            None,
            spans.cu_queries,
            spans.cu_keys,
            spans.longest_query,
            spans.longest_key,
            0.0,
            int(scoring.causal),
            True,
            scale=scoring.scale,
        )
        segment, at = segments_of(spans.cu_queries, q.shape[1])
        return found[0][0].transpose(0, 1), found[1][segment, :, at].T

    def backward(self, grad, q, k, v, out, lse, spans, scoring):
        # [B, Hq, longest, in blocks of 32]; infinity is the weight 0 of a row that is not there.
        longest = -(-spans.longest_query // 32) * 32
        padded = lse.new_full((len(spans.queries), len(q), longest), torch.inf)
        segment, at = segments_of(spans.cu_queries, q.shape[1])
        padded[segment, :, at] = lse.T
        # Without dropout the kernel reads no random state.
        state = torch.empty(2, dtype=torch.int64, device=q.device)
        found = aten._efficient_attention_backward(
            grad.transpose(0, 1)[None],
            *self._tokens_first(q, k, v),
            None,
            out.transpose(0, 1).contiguous()[None],
            spans.cu_queries,
            spans.cu_keys,
            spans.longest_query,
            spans.longest_key,
            padded,
            0.0,
            state[0],
            state[1],
            int(scoring.causal),
            False,
            scale=scoring.scale,
        )
        dq, dk, dv = (x[0].transpose(0, 1) for x in found[:3])
        return dq, *(x.unflatten(0, (len(k), -1)).sum(1) for x in (dk, dv))
