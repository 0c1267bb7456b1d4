"""What the tests of the oracle share: a loss worked out by hand.

Tokens by hand have a vocabulary of two, so that a log-prob is set by its probability and the slope
of the loss in it can be read off the gradient of the logits.
"""

import math

import pytest
import torch

from grpo_fast import LossConfig, reference

NAN, INF = math.nan, math.inf


def vector(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logs(probabilities) -> torch.Tensor | None:
    return None if probabilities is None else vector(probabilities).log()


def by_hand(p, advantages, *, old=None, ref=None, sampler=None, lengths=None, **options):
    """(rows, d(sum(loss)) / d(log p)) of tokens with probabilities p, all of weight 1.

    `options` are those of a LossConfig, or mask, weights and temperature of the call.
    """
    p = vector(p)
    scale = vector(options.pop("temperature", 1.0))
    logits = (torch.stack([p.log(), (1 - p).log()], 1) * scale.reshape(-1, 1)).requires_grad_()
    rows = reference.policy_rows(
        logits,
        torch.zeros(len(p), dtype=torch.long),
        vector(advantages),
        vector(options.pop("weights", [1.0] * len(p))),
        mask=torch.tensor(options.pop("mask", [True] * len(p))),
        cu_seqlens=torch.tensor([0, *(lengths or [len(p)])]).cumsum(0),
        old_logp=logs(old),
        ref_logp=logs(ref),
        sampler_logp=logs(sampler),
        entropy_denominator=options.pop("entropy_denominator", None),
        temperature=scale if scale.dim() else float(scale),
        config=LossConfig(**options),
    )
    (gradient,) = torch.autograd.grad(rows.loss.sum(), logits)
    rows = reference.PolicyRows(*(None if x is None else x.detach() for x in rows))
    # The logits are T log p.
    return rows, (gradient[:, 0] / (1 - p) * scale).tolist()


def near(expected):
    return pytest.approx(expected, rel=1e-12, abs=1e-12)


def entropy(p: float) -> float:
    return -p * math.log(p) - (1 - p) * math.log(1 - p)
