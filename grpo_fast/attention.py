"""Attention of packed rows for any transformers model that uses its attention interface: each
sequence sees itself, completions also the prompt they share.

    softmax(q @ cat(prompt keys, own keys).T) @ cat(prompt values, own values)

in two flash calls, causal over every segment and dense from completions to prompts, merged by their
log-sum-exps. Both backward calls are given the *merged* output and log-sum-exp, which makes each
exact by itself; merging through autograd would lose the gradient of the log-sum-exp (the trick is
ring attention's, arXiv 2310.01889).

Shapes: `T` tokens of the row, `P` of a prompt, `Hq` and `Hk` query and key heads, `d` head size.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .attention_backends import Backend, Scoring
from .attention_choice import Needs, pick_backend
from .errors import ConfigError, InputError
from .layout import Layout, Leaf, PromptLeaves

NAME = "grpo_fast"
# What a layer may hand over, and what it asks for with that: nothing that is computed here.
REFUSED = {
    "s_aux": "sinks",
    "sinks": "sinks",
    "position_bias": "a position bias",
    "indices": "keys that it picks itself",
    "block_indices": "keys that it picks itself",
}


class MergedAttention(torch.autograd.Function):
    """(q [Hq, T, d], k, v [Hk, T, d]) -> out [Hq, T, d] by both calls of a layout."""

    @staticmethod
    def forward(ctx, q, k, v, layout: Layout, leaf: Leaf | None, backend: Backend, own: Scoring):
        out, lse = backend.forward(q, k, v, layout.own, own)
        ctx.layout, ctx.leaf, ctx.backend, ctx.own = layout, leaf, backend, own
        if layout.shared is not None:
            rows = layout.completions
            keys, values = _shared_keys(layout, leaf, k, v)
            far = _dense(own)
            out_far, lse_far = backend.forward(q[:, rows], keys, values, layout.shared, far)
            out, lse = _merged(out, lse, out_far, lse_far, rows)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        with torch.autocast(grad.device.type, enabled=False):
            return MergedAttention._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        layout, leaf, backend = ctx.layout, ctx.leaf, ctx.backend
        dq, dk, dv = backend.backward(grad, q, k, v, out, lse, layout.own, ctx.own)
        if layout.shared is None:
            return dq, dk, dv, None, None, None, None
        rows = layout.completions
        keys, values = _shared_keys(layout, leaf, k, v)
        grad, q, out, lse = (x[:, rows] for x in (grad, q, out, lse))
        dq_far, dk_far, dv_far = backend.backward(
            grad, q, keys, values, out, lse, layout.shared, _dense(ctx.own)
        )
        dq = _added(dq, dq_far, rows)
        if leaf is None:
            dk = _added(dk, dk_far, layout.prompts)
            dv = _added(dv, dv_far, layout.prompts)
        else:
            leaf.add(dk_far, dv_far)
        return dq, dk, dv, None, None, None, None


def _dense(own: Scoring) -> Scoring:
    """Of completions at their prompt: all of it comes before them."""
    return Scoring(scale=own.scale, causal=False, softcap=own.softcap)


def _shared_keys(layout: Layout, leaf: Leaf | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    if leaf is None:
        return k[:, layout.prompts], v[:, layout.prompts]
    return leaf.key.detach().to(k.dtype), leaf.value.detach().to(v.dtype)


def _merged(
    out: Tensor, lse: Tensor, out_far: Tensor, lse_far: Tensor, rows: slice
) -> tuple[Tensor, Tensor]:
    """Two attentions over disjoint keys as one, on `rows` of the first, whose tensors it is put in:
    nothing else of a row is read or written."""
    near = lse[:, rows]
    total = torch.logaddexp(near, lse_far)
    # Where no rounding is lost this is a view, and there is nothing to copy back.
    mixed = out[:, rows].to(total.dtype)
    mixed *= (near - total).exp()[..., None]
    mixed.addcmul_(out_far, (lse_far - total).exp()[..., None])
    if mixed.dtype != out.dtype:
        out[:, rows] = mixed
    lse[:, rows] = total
    return out, lse


def _added(whole: Tensor, part: Tensor, rows: slice) -> Tensor:
    """`part` added to `rows` of `whole`, rounded once."""
    whole = whole if whole.is_contiguous() else whole.contiguous()
    whole[:, rows] += part
    return whole


def packed_attention(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    sliding_window: int | None = None,
    softcap: float | None = None,
    grpo_layout: Layout | None = None,
    **given: object,
) -> tuple[Tensor, None]:
    """What a transformers attention layer calls under the name NAME: query [1, Hq, T, d], key and
    value [1, Hk, T, d] -> ([1, T, Hq, d], None)."""
    layout = _checked(module, grpo_layout, attention_mask, dropout, given)
    if query.shape[2] != key.shape[2]:
        raise ConfigError(
            f"{type(module).__name__} attends to {key.shape[2]} keys from {query.shape[2]} tokens, "
            "and a packed row has a key for each token: use a model without keys of its own"
        )
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    q, k, v = (x[0].to(dtype) for x in (query, key, value))
    window = None
    if sliding_window is not None and sliding_window < layout.longest:
        window = sliding_window
        if sliding_window < layout.longest_shared:
            raise InputError(
                f"a layer of {type(module).__name__} sees the last {sliding_window} tokens only, "
                f"and a sequence that shares its prompt has {layout.longest_shared}: use "
                "share_prompts='off'"
            )
    needs = Needs(kind, dtype, q.shape[-1], v.shape[-1], softcap is not None, window)
    backend = pick_backend(layout.backend, needs)
    scale = q.shape[-1] ** -0.5 if scaling is None else scaling
    if layout.capture is not None and module not in layout.capture.layers:
        _check_graph(module, layout.capture)
        layout.capture.layers[module] = Leaf(k, v)
    layout.layers += 1
    layout.windowed += sliding_window is not None
    leaf = None if layout.leaves is None else layout.leaves.layers[module]
    scoring = Scoring(scale, True, softcap, window)
    # The cast is done: a backend computes in the dtypes that it is given, both ways.
    with torch.autocast(kind, enabled=False):
        out = MergedAttention.apply(q, k, v, layout, leaf, backend, scoring)
    return out.transpose(0, 1)[None], None


def _checked(module, layout, attention_mask, dropout, given) -> Layout:
    """Whatever this attention does not compute is refused by name."""
    name = type(module).__name__
    if layout is None:
        raise InputError(
            f"{name} was called with attention '{NAME}' but without the layout of a packed row: "
            "call the model through grpo_backward or group_logprobs"
        )
    for argument, meaning in REFUSED.items():
        if given.get(argument) is not None:
            raise ConfigError(
                f"{name} attends with {meaning} ({argument}), which packed attention does not "
                "compute: use a model without it"
            )
    causal = given.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    if attention_mask is not None or not causal:
        raise ConfigError(
            f"{name} attends under a mask of its own, or not causally, and a packed row has its "
            "own order: use a causal language model"
        )
    if dropout:
        raise ConfigError(
            f"{name} drops attention weights (p = {dropout}): old and new log-probs would not be "
            "of one policy; call model.eval(), or set attention_dropout to 0"
        )
    return layout


def _check_graph(module, leaves: PromptLeaves) -> None:
    if leaves.trained and not torch.is_grad_enabled():
        raise ConfigError(
            f"{type(module).__name__} is recomputed by reentrant checkpointing, which keeps no "
            "graph that the gradient of a prompt could go through: call "
            "model.gradient_checkpointing_enable({'use_reentrant': False}), or chunking='off'"
        )


@contextlib.contextmanager
def using_packed_attention(model) -> Iterator[None]:
    """`model` attends by `packed_attention` for a while, backward included."""
    from transformers import AttentionInterface

    _check_kinds(model)
    AttentionInterface.register(NAME, packed_attention)
    config = model.get_decoder().config
    before = config._attn_implementation
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before


def window_of(model) -> int | None:
    """The fewest tokens that any layer of `model` sees, or None when all see everything."""
    config = model.get_decoder().config
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if not getattr(config, "use_sliding_window", True):
        return None
    return window if kinds is None or "sliding_attention" in kinds else None


def _check_kinds(model) -> None:
    """Layers of other kinds may ask for attention and still mix tokens in ways of their own."""
    kinds = set(getattr(model.get_decoder().config, "layer_types", None) or ())
    if other := sorted(kinds - {"full_attention", "sliding_attention", "chunked_attention"}):
        raise ConfigError(
            f"{type(model).__name__} has layers of the kind '{other[0]}', which would mix the "
            "sequences of a packed row: use a model of full or sliding-window attention layers"
        )


def check_layers(model, layout: Layout) -> None:
    """After a forward: every layer must have asked for attention, or some mix tokens otherwise; and
    for its window, or it is told to them by a mask, which a packed row has none of."""
    config, window = model.get_decoder().config, window_of(model)
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        window = config.attention_chunk_size
    if window is not None and window < layout.longest and not layout.windowed:
        raise ConfigError(
            f"{type(model).__name__} sees {window} tokens by a mask of its own, and a sequence has "
            f"{layout.longest}: use shorter sequences, or a model that tells its layers the window"
        )
    if layout.layers != config.num_hidden_layers:
        raise ConfigError(
            f"{layout.layers} of the {config.num_hidden_layers} layers of {type(model).__name__} "
            "use transformers' attention interface: the others (state space, convolution, linear "
            "attention or code of their own) would mix the sequences of a packed row; use a model "
            "of attention layers"
        )
