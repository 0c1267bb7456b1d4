"""Packed and shared-prompt attention: every backend against one softmax over a dense mask, in value
and gradient; and what must not be merged."""

from types import SimpleNamespace

import pytest
import torch

from grpo_fast import ConfigError
from grpo_fast.attention import MergedAttention, check_layers, packed_attention
from grpo_fast.attention_backends import CPUFlash, Scoring, Tiles
from grpo_fast.layout import Leaf, PromptLeaves, chunk_layout, row_layout
from grpo_fast.reference_attention import dense_attention, visible

CPU = torch.device("cpu")
HQ, HK, D = 4, 2, 8
# Lone sequences, prompts, completions of each; a prompt whose completions are empty, too.
ROW = ((3, 5), (4, 2, 3), ((2, 6, 1), (0, 0), (5, 0, 3)))
BACKEND = {"cpu_flash": CPUFlash(), "tiles": Tiles()}


def qkv(tokens: int, dtype=torch.float64, seed=0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(heads, tokens, D, generator=generator, dtype=torch.float64)
        .to(dtype)
        .requires_grad_()
        for heads in (HQ, HK, HK)
    ]


def close(found, expected, tolerance):
    # At least 1: with a window of one token the gradient of the queries is exactly 0.
    found, expected = found.detach().double(), expected.detach().double()
    assert (found - expected).norm() <= tolerance * max(expected.norm(), 1.0)


@pytest.mark.parametrize("name", BACKEND)
@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-12), (torch.float32, 2e-6), (torch.bfloat16, 1e-2)],
)
def test_a_shared_row_is_one_softmax_over_what_each_token_sees(name, dtype, tolerance):
    layout = row_layout(*ROW, CPU)
    seen = visible(*ROW)
    inputs = qkv(len(seen), dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    scoring = Scoring(scale=0.3, causal=True)
    out = MergedAttention.apply(*inputs, layout, None, BACKEND[name], scoring)
    expected = dense_attention(*exact, seen, scale=0.3)
    above = torch.randn_like(expected)
    close(out, expected, tolerance)
    found = torch.autograd.grad(out, inputs, above.to(dtype))
    for mine, theirs in zip(found, torch.autograd.grad(expected, exact, above), strict=True):
        close(mine, theirs, tolerance)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 1, 3])
def test_tiles_know_softcap_and_window(softcap, window, monkeypatch):
    monkeypatch.setattr("grpo_fast.attention_backends.TILE", 4)
    lone = (9, 1, 13)
    layout = row_layout(lone, (), (), CPU)
    seen = visible(lone, (), (), window)
    inputs = qkv(sum(lone))
    scoring = Scoring(scale=1.3, causal=True, softcap=softcap, window=window)
    out = MergedAttention.apply(*inputs, layout, None, Tiles(), scoring)
    expected = dense_attention(*inputs, seen, scale=1.3, softcap=softcap)
    close(out, expected, 1e-12)
    above = torch.randn_like(expected)
    found = torch.autograd.grad(out, inputs, above)
    for mine, theirs in zip(found, torch.autograd.grad(expected, inputs, above), strict=True):
        close(mine, theirs, 1e-12)


def test_softcap_reaches_the_prompt():
    layout = row_layout(*ROW, CPU)
    inputs = qkv(len(visible(*ROW)))
    scoring = Scoring(scale=1.3, causal=True, softcap=2.0)
    out = MergedAttention.apply(*inputs, layout, None, Tiles(), scoring)
    expected = dense_attention(*inputs, visible(*ROW), scale=1.3, softcap=2.0)
    above = torch.randn_like(expected)
    close(out, expected, 1e-12)
    found = torch.autograd.grad(out, inputs, above)
    for mine, theirs in zip(found, torch.autograd.grad(expected, inputs, above), strict=True):
        close(mine, theirs, 1e-12)


@pytest.mark.parametrize("name", BACKEND)
def test_chunks_leave_in_the_leaves_what_one_row_gives_the_prompt(name):
    prompt, lengths = 5, (4, 0, 3, 6)
    tokens = prompt + sum(lengths)
    inputs = qkv(tokens)
    expected = dense_attention(*inputs, visible((), (prompt,), (lengths,)), scale=0.4)
    above = torch.randn_like(expected)
    above[:, :prompt] = 0  # only completions are asked
    truth = torch.autograd.grad(expected, inputs, above)
    q, k, v = (x.detach() for x in inputs)
    leaf = Leaf(k[:, :prompt], v[:, :prompt])
    scoring = Scoring(scale=0.4, causal=True)
    at = prompt
    for chunk in (lengths[:2], lengths[2:]):
        rows = slice(at, at + sum(chunk))
        at = rows.stop
        part = [x[:, rows].clone().requires_grad_() for x in (q, k, v)]
        layout = chunk_layout(chunk, PromptLeaves(trained=True), prompt, CPU)
        out = MergedAttention.apply(*part, layout, leaf, BACKEND[name], scoring)
        close(out, expected[:, rows], 1e-12)
        for mine, theirs in zip(torch.autograd.grad(out, part, above[:, rows]), truth, strict=True):
            close(mine, theirs[:, rows], 1e-12)
    close(leaf.key_grad, truth[1][:, :prompt], 1e-12)
    close(leaf.value_grad, truth[2][:, :prompt], 1e-12)


def test_merging_through_autograd_would_be_wrong():
    """The negative control: the same output, and gradients far off, because flash calls drop the
    gradient of their log-sum-exp."""

    class Flash(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v, spans, scoring):
            out, lse = CPUFlash().forward(q, k, v, spans, scoring)
            ctx.save_for_backward(q, k, v, out, lse)
            ctx.spans, ctx.scoring = spans, scoring
            return out, lse

        @staticmethod
        def backward(ctx, grad, _):
            return (
                *CPUFlash().backward(grad, *ctx.saved_tensors, ctx.spans, ctx.scoring),
                None,
                None,
            )

    layout = row_layout((), (6,), ((8, 7),), CPU)
    inputs = qkv(21)
    q, k, v = inputs
    rows, prompts = layout.completions, layout.prompts
    near, near_lse = Flash.apply(q, k, v, layout.own, Scoring(0.7, True))
    far, far_lse = Flash.apply(
        q[:, rows], k[:, prompts], v[:, prompts], layout.shared, Scoring(0.7, False)
    )
    total = torch.logaddexp(near_lse[:, rows], far_lse)
    mixed = near[:, rows] * (near_lse[:, rows] - total).exp()[..., None]
    mixed = mixed + far * (far_lse - total).exp()[..., None]
    naive = torch.cat([near[:, prompts], mixed], 1)
    expected = dense_attention(*inputs, visible((), (6,), ((8, 7),)), scale=0.7)
    close(naive, expected, 1e-12)
    above = torch.randn_like(expected)
    found = torch.autograd.grad(naive, inputs, above)
    exact = torch.autograd.grad(expected, inputs, above)
    for mine, theirs in zip(found[:2], exact[:2], strict=True):
        assert (mine - theirs).norm() > 0.05 * theirs.norm()


def test_autocast_around_a_call_is_the_call_on_cast_inputs():
    wide = qkv(len(visible(*ROW)), torch.float32)
    half = [x.detach().bfloat16().requires_grad_() for x in wide]

    def call(inputs):
        out, _ = packed_attention(
            SimpleNamespace(is_causal=True),
            *(x[None] for x in inputs),
            None,
            softcap=2.0,
            grpo_layout=row_layout(*ROW, CPU),
        )
        return out, *torch.autograd.grad(out.sum(), inputs)

    expected = call(half)
    with torch.autocast("cpu", torch.bfloat16):
        found = call(wide)
    assert found[0].dtype == torch.bfloat16
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.float(), other.float())


def call(layout=None, **given):
    q, k, v = (x[None] for x in qkv(len(visible(*ROW))))
    layer = SimpleNamespace(is_causal=given.pop("causal", True))
    keys = given.pop("keys", None)
    layout = row_layout(*ROW, CPU) if layout is None else layout
    mask = given.pop("attention_mask", None)
    return packed_attention(layer, q, k[:, :, :keys], v, mask, grpo_layout=layout, **given)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"s_aux": torch.zeros(HQ)}, "sinks"),
        ({"sinks": torch.zeros(HQ)}, "sinks"),
        ({"position_bias": torch.zeros(1)}, "a position bias"),
        ({"indices": torch.zeros(1)}, "keys that it picks itself"),
        ({"block_indices": torch.zeros(1)}, "keys that it picks itself"),
        ({"is_causal": False}, "not causally"),
        ({"causal": False}, "not causally"),
        ({"attention_mask": torch.zeros(1)}, "under a mask of its own"),
        ({"dropout": 0.1}, "drops attention weights"),
        ({"keys": 5}, "attends to 5 keys from 34 tokens"),
    ],
)
def test_what_is_not_computed_is_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        call(**given)


def test_what_changes_nothing_is_let_through():
    out, _ = call()
    for given in ({"s_aux": None}, {"is_causal": True, "position_ids": 1}, {"is_causal": None}):
        assert torch.equal(call(**given)[0], out)


@pytest.mark.parametrize(
    "config, windowed, words",
    [
        ({"sliding_window": 6}, 0, "sees 6 tokens by a mask of its own, and a sequence has 10"),
        ({"sliding_window": 6}, 2, None),
        ({"sliding_window": 10}, 0, None),
        ({"layer_types": ["chunked_attention"], "attention_chunk_size": 6}, 0, "sees 6 tokens"),
        ({"layer_types": ["chunked_attention"], "attention_chunk_size": 10}, 0, None),
        ({"num_hidden_layers": 3}, 0, "2 of the 3 layers"),
    ],
)
def test_layers_must_ask_for_attention_and_for_their_window(config, windowed, words):
    config = SimpleNamespace(**{"num_hidden_layers": 2} | config)
    model = SimpleNamespace(get_decoder=lambda: SimpleNamespace(config=config))
    layout = row_layout(*ROW, CPU)
    assert layout.longest == 10
    layout.layers, layout.windowed = 2, windowed
    if words is None:
        check_layers(model, layout)
    else:
        with pytest.raises(ConfigError, match=words):
            check_layers(model, layout)
