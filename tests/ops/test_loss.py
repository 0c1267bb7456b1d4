"""Public losses against the float64 oracle: values and every gradient, padded and packed.

Grid: every loss type x level x KL x delta through the torch chunks; one row of it through the
Triton kernels, which tests/kernels covers one by one (the interpreter takes a tenth of a second a
launch).
"""

import itertools

import pytest
import torch
from loss_checks import (
    DTYPES,
    IMPLS,
    LEVELS,
    LOSS_TYPES,
    D,
    L,
    S,
    V,
    check_linear,
    config_of,
    loss_arguments,
    oracle,
)

from grpo_fast import GRPOLoss, InputError, chunked, grpo_loss, linear_grpo_loss, reference
from grpo_fast.testing import assert_close_to_oracle, random_sequences


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_linear_grpo_loss(loss_type, level, dtype, device):
    grid = itertools.product((0.0, 0.2), ("k1", "k2", "k3"), (None, 1.5), (True, False))
    for k, (beta, kl, delta, old) in enumerate(grid):
        if beta or kl == "k3":
            config = config_of(loss_type, level, beta, kl, delta)
            check_linear(config, dtype, "torch", device, old=old, packed=k % 2 == 0)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_linear_grpo_loss_triton(level, dtype, device):
    config = config_of("grpo", level, beta=0.2, delta=1.5)
    check_linear(config, dtype, "triton", device, old=True, packed=False)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("level", LEVELS)
def test_grpo_loss_from_logits(level, impl, device):
    config = config_of("dr_grpo", level, beta=0.2)
    batch = random_sequences(S, L, D, V, device=device)
    logits = (batch["hidden"] @ batch["weight"].T).requires_grad_()
    before = logits.detach().clone()
    kwargs = loss_arguments(batch, config, old=True, packed=False)
    output = grpo_loss(logits, batch["targets"], batch["advantages"], impl=impl, **kwargs)
    output.loss.backward()
    assert torch.equal(logits, before), "the logits were written to"
    results = []
    for dtype in (torch.float32, torch.float64):
        flat = before.to(dtype).reshape(-1, V).requires_grad_()
        rows = reference.grpo_loss(
            flat,
            batch["targets"].reshape(-1),
            batch["advantages"].to(dtype).repeat_interleave(L),
            mask=batch["mask"].reshape(-1),
            cu_seqlens=torch.arange(S + 1, device=device) * L,
            old_logp=batch["old_logprobs"].to(dtype).reshape(-1),
            ref_logp=batch["ref_logprobs"].to(dtype).reshape(-1),
            config=config,
        )
        rows.loss.sum().backward()
        results.append((rows.loss.sum(), flat.grad.reshape(S, L, V)))
    assert_close_to_oracle(output.loss, results[0][0], results[1][0], name="loss")
    assert_close_to_oracle(logits.grad, results[0][1], results[1][1], name="dlogits")


@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_metrics_match_the_oracle_rows(impl, device):
    config = config_of("dapo", beta=0.2)
    batch = random_sequences(S, L, D, V, device=device, seed=2)
    kwargs = loss_arguments(batch, config, old=True, packed=False)
    sampler = batch["old_logprobs"] + 0.1
    output = linear_grpo_loss(
        batch["hidden"],
        batch["weight"],
        batch["targets"],
        batch["advantages"],
        sampler_logprobs=sampler,
        impl=impl,
        **kwargs,
    )
    rows = oracle(batch, config, old=True)[1]
    mask = batch["mask"].reshape(-1)
    ratio, kl = rows.ratio[mask], rows.kl[mask]
    advantages = batch["advantages"].repeat_interleave(L)[mask]
    low = ((ratio < 0.85) & (advantages < 0)).double().mean()
    high = ((ratio > 1.28) & (advantages > 0)).double().mean()
    expected = {
        "n_tokens": mask.sum().double(),
        "kl": kl.mean(),
        "entropy": rows.entropy[mask].mean(),
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
        "ratio/mean": ratio.mean(),
        "ratio/min": ratio.min(),
        "ratio/max": ratio.max(),
        "ratio/clamped_frac": torch.zeros(()),
        "ratio/ess": ratio.mean().square() / ratio.square().mean(),
        "kl/clamped_frac": torch.zeros(()),
        "gradient_mass/mean": rows.mass[mask].mean(),
        "gradient_mass/max": rows.mass.max(),
        "n_tokens_skipped": torch.zeros(()),
        "n_tokens_unscorable": torch.zeros(()),
        "sampling/sampling_logp_difference/mean": torch.tensor(0.1),
        "sampling/sampling_logp_difference/max": torch.tensor(0.1),
    }
    assert set(output.metrics) == set(expected)
    assert low > 0
    assert high > 0
    for name, value in expected.items():
        assert output.metrics[name].item() == pytest.approx(value.item(), rel=1e-4), name
    for name in ("ratio", "kl"):
        assert torch.allclose(
            getattr(output.tokens, name).reshape(-1).double(), getattr(rows, name)
        )
    assert output.tokens.first_bad == -1
    assert output.check() is output


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("level", LEVELS)
def test_on_policy_ratio_is_exactly_one(level, impl, device):
    config = config_of("grpo", level)
    batch = random_sequences(S, L, D, V, device=device)
    arguments = (batch["hidden"], batch["weight"], batch["targets"], batch["advantages"])
    own = linear_grpo_loss(*arguments, mask=batch["mask"], config=config, impl=impl).logprobs
    for old in (None, own):
        output = linear_grpo_loss(
            *arguments, mask=batch["mask"], old_logprobs=old, config=config, impl=impl
        )
        for name in ("ratio/mean", "ratio/min", "ratio/max"):
            assert float(output.metrics[name]) == 1.0, name
        assert float(output.metrics["clip_ratio/region_mean"]) == 0.0


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_micro_batches_add_up(loss_type, device):
    config = config_of(loss_type, beta=0.2)
    batch = random_sequences(S, L, D, V, torch.float64, device)
    tokens, sequences = float(batch["mask"].sum()), float(S)
    denominator = {"grpo": sequences, "dr_grpo": sequences * 9}.get(loss_type, tokens)
    whole = oracle(batch, config, old=True)
    hidden = batch["hidden"].requires_grad_()
    weight = batch["weight"].requires_grad_()
    total = 0.0
    for part in (slice(0, 1), slice(1, 4)):
        kwargs = loss_arguments(batch, config, old=True, packed=False)
        kwargs = {k: v[part] if k != "config" else v for k, v in kwargs.items()}
        output = linear_grpo_loss(
            hidden[part],
            weight,
            batch["targets"][part],
            batch["advantages"][part],
            denominator=denominator,
            **kwargs,
        )
        output.loss.backward()
        total += output.loss.detach()
    assert torch.allclose(total, whole[0], rtol=1e-12)
    assert torch.allclose(hidden.grad, whole[2], rtol=1e-9, atol=1e-15)
    assert torch.allclose(weight.grad, whole[3], rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("impl", IMPLS)
def test_chunks_change_nothing(impl, device, monkeypatch):
    config = config_of("dapo", beta=0.2)
    whole, *_ = check_linear(config, torch.float32, impl, device, old=True, packed=False)
    monkeypatch.setattr(chunked, "WORKSPACE_BYTES", {"cpu": 4 * V * 5, "cuda": 4 * V * 5})
    assert len(chunked.chunks(S * L, V, torch.device("cpu"))) == 5
    parts, *_ = check_linear(config, torch.float32, impl, device, old=True, packed=False)
    assert torch.allclose(whole.loss, parts.loss, rtol=1e-6)
    assert torch.allclose(whole.logprobs, parts.logprobs, rtol=1e-6, atol=1e-6)


def test_module_is_the_function(device):
    batch = random_sequences(S, L, D, V, device=device)
    config = config_of("grpo")
    arguments = (batch["hidden"], batch["weight"], batch["targets"], batch["advantages"])
    module = GRPOLoss(config)
    expected = linear_grpo_loss(*arguments, mask=batch["mask"], config=config)
    assert torch.equal(module(*arguments, mask=batch["mask"]).loss, expected.loss)
    assert "loss_type='grpo'" in repr(module)


def test_default_loss_has_a_gradient_of_the_right_sign(device):
    """A two-token bandit: rewarding token 1 must raise its logit."""
    logits = torch.zeros(2, 2, device=device, requires_grad=True)
    targets = torch.tensor([0, 1], device=device)
    grpo_loss(logits, targets, torch.tensor([-1.0, 1.0], device=device)).loss.backward()
    step = -logits.grad
    assert (step[:, 1] > 0).all()
    assert (step[:, 0] < 0).all()


def test_impl_is_chosen_or_refused(device):
    hidden, weight = torch.randn(2, D, device=device), torch.randn(V, D, device=device)
    targets, advantages = (
        torch.zeros(2, dtype=torch.long, device=device),
        torch.ones(2, device=device),
    )
    with pytest.raises(InputError, match=r"impl = 'tritn'.*did you mean 'triton'"):
        linear_grpo_loss(hidden, weight, targets, advantages, impl="tritn")
    with pytest.raises(InputError, match="float64"):
        linear_grpo_loss(hidden.double(), weight.double(), targets, advantages, impl="triton")
