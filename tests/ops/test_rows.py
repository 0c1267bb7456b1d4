"""Rows of a loss that are masked, teach nothing or are not finite."""

import math

import pytest
import torch
from loss_checks import IMPLS, LEVELS, D, L, S, V, config_of, loss_arguments

from grpo_fast import InputError, LossConfig, linear_grpo_loss, products
from grpo_fast.testing import random_sequences


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_teach_nothing_enter_no_product_and_are_named(impl, device, monkeypatch):
    batch = random_sequences(S, L, D, V, device=device)
    advantages = torch.tensor([1.0, 0.0, -1.0, 0.0], device=device)[:, None].expand(S, L).clone()
    advantages[2, 3] = 0.0
    live = batch["mask"] & (advantages != 0)
    rows, make = [], products.HeadProducts.logits
    monkeypatch.setattr(
        products.HeadProducts, "logits", lambda self, h: rows.append(len(h)) or make(self, h)
    )
    found = {}
    for skip in (True, False):
        hidden = batch["hidden"].clone().requires_grad_()
        output = linear_grpo_loss(
            hidden,
            batch["weight"],
            batch["targets"],
            advantages,
            mask=batch["mask"],
            old_logprobs=batch["old_logprobs"],
            config=LossConfig(skip_zero_advantage=skip),
            impl=impl,
        )
        output.loss.backward()
        found[skip] = output, hidden.grad
    assert rows == [int(live.sum()), int(batch["mask"].sum())]
    (skipping, ours), (whole, theirs) = found[True], found[False]
    assert torch.allclose(skipping.loss, whole.loss, rtol=1e-6)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-9)
    assert skipping.logprobs[batch["mask"] & ~live].isnan().all()
    assert torch.allclose(skipping.logprobs[live], whole.logprobs[live], rtol=1e-5, atol=1e-6)
    assert not skipping.logprobs[~batch["mask"]].any()
    metrics = skipping.metrics
    assert metrics["n_tokens"] == batch["mask"].sum()
    assert metrics["n_tokens_skipped"] == (batch["mask"] & ~live).sum()
    assert metrics["entropy"].item() == pytest.approx(whole.entropy[live].mean().item(), rel=1e-5)
    assert skipping.check() is skipping


def test_a_sequence_is_skipped_whole_or_not_at_all(device):
    """At sequence level a token of advantage 0 is part of its sequence's ratio."""
    batch = random_sequences(S, L, D, V, torch.float64, device=device)
    advantages = batch["advantages"][:, None].expand(S, L).double().clone()
    advantages[1] = 0.0
    advantages[2, ::2] = 0.0
    grads = []
    for skip in (True, False):
        hidden = batch["hidden"].clone().requires_grad_()
        linear_grpo_loss(
            hidden,
            batch["weight"],
            batch["targets"],
            advantages,
            mask=batch["mask"],
            old_logprobs=batch["old_logprobs"].double(),
            config=LossConfig(loss_type="gspo", skip_zero_advantage=skip),
        ).loss.backward()
        grads.append(hidden.grad)
    assert torch.allclose(*grads, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_first_bad_token_is_named_at_the_next_sync(impl, device):
    batch = random_sequences(S, L, D, V, device=device)
    where = batch["mask"].nonzero()[3].tolist()
    hidden = batch["hidden"].clone()
    hidden[tuple(where)] = torch.nan
    output = linear_grpo_loss(
        hidden,
        batch["weight"],
        batch["targets"],
        batch["advantages"],
        mask=batch["mask"],
        impl=impl,
    )
    assert output.loss.isnan()
    with pytest.raises(InputError, match=rf"log-prob of token \[{where[0]}, {where[1]}\] is nan"):
        output.check()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("level", LEVELS)
def test_what_lies_under_the_mask_changes_no_bit(level, impl, device):
    config = config_of("grpo", level, beta=0.2)
    batch = random_sequences(S, L, D, V, device=device)
    results = []
    for garbage in (0.0, math.nan, math.inf):
        dirty = {k: v.clone() for k, v in batch.items()}
        hole = ~batch["mask"]
        dirty["hidden"][hole] = garbage
        dirty["targets"][hole] = 10**6 if garbage else -100
        dirty["old_logprobs"][hole] = garbage
        dirty["ref_logprobs"][hole] = garbage
        hidden = dirty["hidden"].requires_grad_()
        weight = dirty["weight"].requires_grad_()
        output = linear_grpo_loss(
            hidden,
            weight,
            dirty["targets"],
            dirty["advantages"],
            impl=impl,
            **loss_arguments(dirty, config, old=True, packed=False),
        )
        output.loss.backward()
        results.append((output.loss, output.logprobs, output.entropy, hidden.grad, weight.grad))
        assert not hidden.grad[hole].any()
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_in_a_live_row_gives_a_nan_loss(impl, device):
    batch = random_sequences(S, L, D, V, device=device)
    row = tuple(batch["mask"].nonzero()[0].tolist())
    batch["hidden"][row] = math.nan
    output = linear_grpo_loss(
        batch["hidden"],
        batch["weight"],
        batch["targets"],
        batch["advantages"],
        mask=batch["mask"],
        old_logprobs=batch["old_logprobs"],
        impl=impl,
    )
    assert output.loss.isnan()
    assert output.logprobs[row].isnan()
    assert int(output.logprobs.isnan().sum()) == 1


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
@pytest.mark.parametrize("level", LEVELS)
def test_nothing_to_learn_from(level, impl, device):
    """No rows, and rows that are all masked: loss and gradients exactly 0, no NaN in any metric."""
    config = config_of("grpo", level)
    for rows in (0, 3):
        hidden = torch.randn(2, rows, D, device=device, requires_grad=True)
        weight = torch.randn(V, D, device=device, requires_grad=True)
        output = linear_grpo_loss(
            hidden,
            weight,
            torch.full((2, rows), -100, device=device),
            torch.ones(2, device=device),
            mask=torch.zeros(2, rows, device=device),
            config=config,
            impl=impl,
        )
        output.loss.backward()
        assert float(output.loss) == 0.0
        assert not hidden.grad.any()
        assert not weight.grad.any()
        assert all(value.isfinite() for value in output.metrics.values())


def test_zero_advantage_teaches_nothing_even_when_the_ratio_overflows(device):
    hidden = torch.randn(3, D, device=device, requires_grad=True)
    weight = torch.randn(V, D, device=device)
    targets = torch.zeros(3, dtype=torch.long, device=device)
    advantages = torch.tensor([0.0, 1.0, -1.0], device=device)
    old = torch.full((3,), -1e4, device=device)
    for impl in IMPLS:
        hidden.grad = None
        output = linear_grpo_loss(hidden, weight, targets, advantages, old_logprobs=old, impl=impl)
        output.loss.backward()
        assert output.loss.isfinite()
        assert not hidden.grad[:2].any()
        assert hidden.grad[2].isfinite().all()
        assert hidden.grad[2].any()
        assert float(output.metrics["ratio/clamped_frac"]) == 1.0
