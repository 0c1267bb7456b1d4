"""The oracle's other ops: log-probs, a loss with its head, advantages, sums of segments."""

from math import exp, log, sqrt, tanh

import pytest
import torch
from by_hand import INF, NAN, entropy, near, vector

from grpo_fast import LossConfig, reference

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_token_that_cannot_be_drawn_by_hand():
    logits = vector([[log(0.25), -INF, log(0.75)]]).requires_grad_()
    rows = reference.token_logprob(logits, torch.tensor([0]))
    assert rows.logp.tolist() == near([log(0.25)])
    assert rows.entropy.tolist() == near([entropy(0.25)])
    (gradient,) = torch.autograd.grad(rows.logp + rows.entropy, logits)
    slopes = [q * (log(q) + entropy(q)) for q in (0.25, 0.75)]
    assert gradient.tolist() == [near([0.75 - slopes[0], 0, -0.75 - slopes[1]])]


def test_linear_grpo_loss_by_hand():
    """One token of two: logits 2 tanh(3 (h w + b) / 2)."""
    hidden, weight = vector([[0.5]]), vector([[0.2], [-0.4]])
    bias = vector([0.1, 0.3])
    rows = reference.linear_grpo_loss(
        hidden,
        weight,
        torch.tensor([1]),
        vector([1.0]),
        mask=torch.tensor([True]),
        bias=bias,
        softcap=2.0,
        logit_scale=3.0,
        config=LossConfig(loss_type="reinforce"),
    )
    first, second = (2 * tanh(3 * x / 2) for x in (0.5 * 0.2 + 0.1, 0.5 * -0.4 + 0.3))
    assert float(rows.logp) == near(second - log(exp(first) + exp(second)))
    assert float(rows.loss) == near(-float(rows.logp))


def test_group_advantage_by_hand():
    rewards = torch.tensor([1.0, 0.0, NAN, 2.0, 2.0], dtype=torch.float64)
    ids = torch.tensor([7, 7, 7, 3, 3])
    out = reference.group_advantage(rewards, ids, eps=0.0)
    half = 1 / sqrt(2)
    assert torch.allclose(out.advantages, torch.tensor([half, -half, 0, 0, 0]).double())
    assert out.mean.tolist() == [2.0, 0.5]
    assert out.degenerate.tolist() == [True, False]
    loo = reference.group_advantage(rewards, ids, baseline="leave_one_out", scale="none")
    assert loo.advantages.tolist() == [1.0, -1.0, 0.0, 0.0, 0.0]


def test_segment_reduce_by_hand():
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    cu = torch.tensor([0, 1, 1, 4])
    assert reference.segment_reduce(x, cu).tolist() == [1.0, 0.0, 9.0]
    assert reference.segment_reduce(x, cu, reduce="mean").tolist() == [1.0, 0.0, 3.0]
