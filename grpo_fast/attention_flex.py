"""FlexAttention as a backend: PyTorch compiles one kernel, softcap and window included.

Its backward knows no other out and lse than its own, but takes gradients of both. A part with
weight w = exp(lse_part - lse) in the merged out and lse has

    out = sum_parts(w * out_part)           d out / d out_part = w
    lse = logsumexp_parts(lse_part)         d out / d lse_part = w * (out_part - out)

so that the gradient of the merged out, handed down to both, is exact again. In 16 bits `w * grad`
is rounded once more than in the flash backends.

Shapes: q, out [Hq, Tq, d], k, v [Hk, Tk, d], lse [Hq, Tq].
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from .attention_backends import Scoring, segments_of
from .layout import Spans

# Tokens of a block of the mask, on both sides: the only size that all of its kernels take.
BLOCK = 128
# With and without gradients, of one block or of more on each side, square or not, static or
# dynamic: PyTorch's limit of 8 is soon reached.
COMPILATIONS = 64


class Flex:
    """`torch.nn.attention.flex_attention`; trains on CUDA only."""

    def forward(self, q, k, v, spans, scoring):
        return _attend(q.detach(), k.detach(), v.detach(), spans, scoring)

    def backward(self, grad, q, k, v, out, lse, spans, scoring):
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in (q, k, v)]
            part, part_lse = _attend(*inputs, spans, scoring)
        weight = (part_lse.detach() - lse).exp()[..., None]
        above = weight * grad
        beside = part.detach().to(lse.dtype) - out
        downs = above.to(part.dtype), (above * beside).sum(-1)
        return torch.autograd.grad((part, part_lse), inputs, downs)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, spans: Spans, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    out, aux = compiled()(
        q[None],
        k[None],
        v[None],
        score_mod=_bent(scoring.softcap),
        block_mask=block_mask(spans, scoring.causal, scoring.window),
        scale=scoring.scale,
        enable_gqa=len(q) != len(k),
        return_aux=AuxRequest(lse=True),
    )
    return out[0], aux.lse[0]


@functools.cache
def compiled() -> Callable:
    """Lengths turn dynamic at the second row; `dynamic=True` would make scale and softcap dynamic,
    too, which kernels want as constants. Past the limit of compilations: an error, not eager."""
    once = torch.compile(flex_attention, fullgraph=True)
    return torch._dynamo.config.patch(recompile_limit=COMPILATIONS)(once)


def _bent(softcap: float | None) -> Callable | None:
    if softcap is None:
        return None

    def bent(score, batch, head, query, key):
        return softcap * torch.tanh(score / softcap)

    return bent


@functools.lru_cache(maxsize=4)
def block_mask(spans: Spans, causal: bool, window: int | None) -> BlockMask:
    """What each query sees. All layers of a row ask for the same two or three.

    The blocks come from the lengths: PyTorch's own builder writes the [Tq, Tk] mask first.
    """
    segment, at = segments_of(spans.cu_queries, sum(spans.queries))
    keys = sum(spans.keys)
    start, stop = spans.cu_keys[segment], spans.cu_keys[segment + 1]
    if causal:
        stop = start + at + 1
        if window is not None:
            start = torch.maximum(start, stop - window)

    def seen(batch, head, query, key):
        return (start[query] <= key) & (key < stop[query])

    # Neither start nor stop ever falls, so that a block of queries sees one range of blocks.
    first = torch.arange(0, len(at), BLOCK, device=at.device)
    last = (first + BLOCK - 1).clamp(max=len(at) - 1)
    low, high = start[first] // BLOCK, (stop[last] - 1) // BLOCK
    columns = -(-keys // BLOCK)
    # Behind those that count, any order will do.
    order = (low[:, None] + torch.arange(columns, device=at.device)) % columns
    count, order = (x[None, None].to(torch.int32) for x in (high - low + 1, order))
    return BlockMask.from_kv_blocks(
        count, order, BLOCK_SIZE=BLOCK, mask_mod=seen, seq_lengths=(len(at), keys)
    )
