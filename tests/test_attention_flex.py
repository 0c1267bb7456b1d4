"""FlexAttention as a backend: its block mask token by token, and PyTorch's own eager flex, whose
ban on gradients on a CPU is of its compiled kernels alone, in value and gradient."""

import functools
import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention as flex_module
from torch.nn.attention.flex_attention import flex_attention

from grpo_fast import attention_flex
from grpo_fast.attention import MergedAttention
from grpo_fast.attention_backends import Scoring, Tiles
from grpo_fast.attention_flex import BLOCK, Flex, block_mask
from grpo_fast.layout import Leaf, PromptLeaves, Spans, chunk_layout, row_layout

CPU = torch.device("cpu")
HQ, HK, D = 4, 2, 8
# Lone sequences, prompts, completions of each, across the blocks of the mask; a prompt whose
# completions are all empty, too.
ROW = ((130, 5), (140, 2, 3), ((90, 60, 1), (0, 0), (5, 0, 133)))


@pytest.fixture
def eager(monkeypatch):
    monkeypatch.setattr(flex_module, "_validate_device", lambda q, k, v: None)
    monkeypatch.setattr(flex_module, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(attention_flex, "compiled", lambda: flex_attention)


def spans(queries, keys) -> Spans:
    return Spans.of(queries, keys, CPU)


def qkv(queries: int, keys: int, dtype=torch.float64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(heads, tokens, D, generator=generator, dtype=dtype)
        for heads, tokens in ((HQ, queries), (HK, keys), (HK, keys))
    ]


def close(found, expected, tolerance=1e-12):
    found, expected = found.detach(), expected.detach()
    assert found.shape == expected.shape
    # At least 1: with a window of one token the gradient of the queries is exactly 0.
    assert (found - expected).norm() <= tolerance * max(expected.norm(), 1.0)


CASES = [
    ((3, 200, 1, 130), None, True, None),
    ((3, 200, 1, 130), None, True, 1),
    ((3, 200, 1, 130), None, True, 70),
    ((257,), None, True, 129),
    ((151, 0, 138), (140, 2, 3), False, None),
    ((1, 0), (1, 2), False, None),
]


@pytest.mark.parametrize("queries, keys, causal, window", CASES)
def test_the_mask_is_the_definition_token_by_token(queries, keys, causal, window):
    keys = queries if keys is None else keys
    total, key_total = sum(queries), sum(keys)
    expected = torch.zeros(total, key_total, dtype=torch.bool)
    for rows, columns in spans(queries, keys).ranges():
        for at, q in enumerate(range(rows.start, rows.stop)):
            for key_at, k in enumerate(range(columns.start, columns.stop)):
                near = window is None or at - key_at < window
                expected[q, k] = not causal or (key_at <= at and near)
    mask = block_mask(spans(queries, keys), causal, window)
    query, key = torch.arange(total)[:, None], torch.arange(key_total)[None]
    assert torch.equal(mask.mask_mod(0, 0, query, key), expected)
    assert mask.shape == (1, 1, total, key_total)
    padding = (0, -key_total % BLOCK, 0, -total % BLOCK)
    blocks = torch.nn.functional.pad(expected, padding).unflatten(1, (-1, BLOCK))
    blocks = blocks.unflatten(0, (-1, BLOCK)).any(3).any(1)
    # Never too few, and none too many, in both directions.
    assert torch.equal(mask.to_dense()[0, 0].bool(), blocks)
    assert torch.equal(mask.q_num_blocks[0, 0], blocks.sum(0).to(torch.int32))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("queries, keys, causal, window", CASES)
def test_forward_and_backward_are_those_of_tiles(queries, keys, causal, window, softcap, eager):
    """Also with an out and lse that were merged with another part's."""
    there = spans(queries, queries if keys is None else keys)
    scoring = Scoring(1.3, causal, softcap, window)
    inputs = qkv(sum(there.queries), sum(there.keys))
    out, lse = Flex().forward(*inputs, there, scoring)
    expected, expected_lse = Tiles().forward(*inputs, there, scoring)
    close(out, expected)
    close(lse, expected_lse)
    generator = torch.Generator().manual_seed(1)
    grad, other = (torch.randn(out.shape, generator=generator, dtype=out.dtype) for _ in range(2))
    for share in (1.0, 0.3):
        merged = share * expected + (1 - share) * other
        merged_lse = expected_lse - math.log(share)
        given = (grad, *inputs, merged, merged_lse, there, scoring)
        truth = Tiles().backward(*given)
        for mine, theirs in zip(Flex().backward(*given), truth, strict=True):
            close(mine, theirs)


def test_a_shared_row_is_that_of_tiles(eager):
    layout = row_layout(*ROW, CPU)
    tokens = sum(ROW[0]) + sum(ROW[1]) + sum(map(sum, ROW[2]))
    inputs = [x.requires_grad_() for x in qkv(tokens, tokens)]
    scoring = Scoring(0.9, True)
    found, expected = (
        MergedAttention.apply(*inputs, layout, None, backend, scoring)
        for backend in (Flex(), Tiles())
    )
    close(found, expected)
    generator = torch.Generator().manual_seed(1)
    above = torch.randn(found.shape, generator=generator, dtype=found.dtype)
    truth = torch.autograd.grad(expected, inputs, above)
    for mine, theirs in zip(torch.autograd.grad(found, inputs, above), truth, strict=True):
        close(mine, theirs)


def test_chunks_leave_what_those_of_tiles_leave(eager):
    leaves = []
    for backend in (Flex(), Tiles()):
        q, k, v = (x.requires_grad_() for x in qkv(150, 150))
        _, key, value = qkv(0, 140)
        leaf = Leaf(key, value)
        layout = chunk_layout((90, 60), PromptLeaves(trained=True), 140, CPU)
        out = MergedAttention.apply(q, k, v, layout, leaf, backend, Scoring(0.9, True))
        leaves.append((leaf, torch.autograd.grad(out.sin().sum(), (q, k, v))))
    (found, mine), (expected, theirs) = leaves
    close(found.key_grad, expected.key_grad)
    close(found.value_grad, expected.value_grad)
    for a, b in zip(mine, theirs, strict=True):
        close(a, b)


def test_values_of_another_width_than_keys(eager):
    there, scoring = spans((3, 140), (3, 140)), Scoring(1.3, True)
    q, k, v = qkv(143, 143)
    v = torch.cat([v, v.flip(-1).sin()], -1)
    found, expected = (x.forward(q, k, v, there, scoring) for x in (Flex(), Tiles()))
    grad = found[0].cos()
    downs, truth = (x.backward(grad, q, k, v, *expected, there, scoring) for x in (Flex(), Tiles()))
    for mine, theirs in zip((*found, *downs), (*expected, *truth), strict=True):
        close(mine, theirs)


def test_new_lengths_and_masks_are_not_compiled_again(monkeypatch):
    """Traced as on a GPU, in one graph each, and run eagerly."""
    graphs = CompileCounter()
    monkeypatch.setattr(flex_module, "_validate_device", lambda q, k, v: None)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=graphs))
    once = attention_flex.compiled.__wrapped__()
    monkeypatch.setattr(attention_flex, "compiled", lambda: once)
    counts = []
    for lengths in ((130, 5), (90, 60, 7), (300,), (20,), (31, 29), (7, 800)):
        for causal, window in ((True, None), (False, None), (True, 30)):
            keys = lengths if causal else tuple(n + 3 for n in lengths)
            there, scoring = spans(lengths, keys), Scoring(0.3, causal, 2.0, window)
            inputs = qkv(sum(lengths), sum(keys), torch.float32)
            merged = Tiles().forward(*inputs, there, scoring)
            given = (merged[0].cos(), *inputs, *merged, there, scoring)
            found = (*Flex().forward(*inputs, there, scoring), *Flex().backward(*given))
            truth = (*merged, *Tiles().backward(*given))
            for mine, theirs in zip(found, truth, strict=True):
                close(mine, theirs, 2e-6)
        counts.append(graphs.frame_count)
    # More than PyTorch's own limit; then none.
    assert counts[-1] == counts[3] > 8


def test_layers_of_a_row_share_a_mask():
    row = spans((3, 4), (3, 4))
    assert block_mask(row, True, None) is block_mask(row, True, None)
    assert block_mask(row, True, None) is not block_mask(spans((3, 4), (3, 4)), True, None)
