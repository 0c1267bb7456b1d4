"""Every attention backend of a GPU that is there, against one float64 softmax over a dense mask."""

import pytest
import torch

from grpo_fast.attention import MergedAttention
from grpo_fast.attention_backends import Scoring
from grpo_fast.attention_choice import BACKENDS, Needs
from grpo_fast.layout import row_layout
from grpo_fast.reference_attention import dense_attention, visible

HQ, HK = 4, 2
# Lone sequences, prompts, completions of each. Past one block of any kernel; completions of one
# token, where flash-attn 2 would decode; a prompt whose completions are all empty.
SHARED = {
    "long": ((130, 5), (140, 2, 3), ((90, 60, 1), (0, 0), (5, 0, 133))),
    "short": ((1,), (1, 2), ((0, 0), (1, 0))),
}
CASES = [
    *((row, None, None, 64, 64) for row in SHARED.values()),
    (SHARED["long"], 2.0, None, 64, 64),
    (((300, 1, 140), (), ()), None, 70, 64, 64),
    (((300, 1, 140), (), ()), 2.0, 1, 64, 64),
    (SHARED["long"], None, None, 192, 128),
    (SHARED["long"], None, None, 512, 512),
]


def errors(found, truth) -> list[float]:
    """A share of entries of size 1: a query of one key has the gradient 0."""
    return [
        float((x.double() - y).norm() / y.numel() ** 0.5) for x, y in zip(found, truth, strict=True)
    ]


def check(backend, dtype, device, row, scoring, head_dim, value_dim):
    """At most twice as far from float64 as eager PyTorch in the same dtype, gradients too."""
    generator = torch.Generator().manual_seed(0)
    layout = row_layout(*row, torch.device(device))
    tokens = sum(row[0]) + sum(row[1]) + sum(map(sum, row[2]))

    def random(heads, width):
        x = torch.randn(tokens, heads, width, generator=generator).to(device, dtype)
        return x.transpose(0, 1)

    inputs = [random(HQ, head_dim), random(HK, head_dim), random(HK, value_dim)]
    above = random(HQ, value_dim)

    def run(attend, kind):
        leaves = [x.to(kind).requires_grad_() for x in inputs]
        out = attend(*leaves)
        return out.detach(), *torch.autograd.grad(out, leaves, above.to(kind))

    seen = visible(*row, window=scoring.window)

    def oracle(q, k, v):
        return dense_attention(q, k, v, seen, scale=scoring.scale, softcap=scoring.softcap)

    truth = run(oracle, torch.float64)
    eager = errors(run(oracle, dtype), truth)
    found = run(lambda *x: MergedAttention.apply(*x, layout, None, backend, scoring), dtype)
    slack = 2 * torch.finfo(dtype).eps
    for mine, theirs in zip(errors(found, truth), eager, strict=True):
        assert mine <= 2 * theirs + slack


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [x for x in BACKENDS if BACKENDS[x].device == "cuda"])
def test_a_backend_of_a_gpu_is_one_softmax(name, dtype, case):
    row, softcap, window, head_dim, value_dim = case
    problem = BACKENDS[name].why_not(
        Needs("cuda", dtype, head_dim, value_dim, softcap is not None, window)
    )
    if problem is not None:
        pytest.skip(problem)
    scoring = Scoring(head_dim**-0.5, True, softcap, window)
    check(BACKENDS[name].make(), dtype, "cuda", row, scoring, head_dim, value_dim)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_same_check_of_tiles_on_a_cpu(dtype, case):
    row, softcap, window, head_dim, value_dim = case
    scoring = Scoring(head_dim**-0.5, True, softcap, window)
    check(BACKENDS["tiles"].make(), dtype, "cpu", row, scoring, head_dim, value_dim)
