"""A1 to A20: ids and numbers in the rows of a loss, and how many rows and entries there are."""

import math

import pytest
import torch
from changed_call import IMPLS, INF, NAN, D, L, S, V, at, bits, call

from grpo_fast import InputError, LossConfig, grpo_loss, linear_grpo_loss, reference, token_logprob


@pytest.mark.parametrize("bad", [-100, V, V + 60])
def test_a1_a2_ids_outside_the_vocabulary(batch, bad):
    if batch["targets"].is_cuda:
        output = call(batch, targets=at(batch["targets"], (1, 2), bad))[0]
        assert output.loss.isnan()
        with pytest.raises(InputError, match=r"token \[1, 2\] is nan"):
            output.check()
        return
    with pytest.raises(InputError, match=rf"targets\[1, 2\] = {bad} is outside \[0, {V}\): mask"):
        call(batch, targets=at(batch["targets"], (1, 2), bad))


@pytest.mark.parametrize("impl", IMPLS)
def test_a3_a5_whatever_lies_under_the_mask_changes_no_bit(batch, impl):
    mask = at(batch["mask"], (1, 2), False)
    config = LossConfig(beta=0.1, importance_sampling_correction="token_mask")
    advantages = torch.ones(S, L, device=mask.device)
    rows = {"ref_logprobs": batch["ref_logprobs"], "sampler_logprobs": batch["old_logprobs"] + 0.1}
    plain = call(batch, impl=impl, config=config, mask=mask, advantages=advantages, **rows)
    for junk in (NAN, INF, -INF, 1e30):
        dirty = {name: at(rows[name], (1, 2), junk) for name in rows}
        dirty |= {"old_logprobs": at(batch["old_logprobs"], (1, 2), junk)}
        dirty |= {"advantages": at(advantages, (1, 2), junk)}
        dirty |= {"hidden": at(batch["hidden"], (1, 2), junk)}
        dirty |= {"targets": at(batch["targets"], (1, 2), -100)}
        found = call(batch, impl=impl, config=config, mask=mask, **dirty)
        assert bits(found[0].loss, *found[1:]) == bits(plain[0].loss, *plain[1:]), junk
        assert bits(found[0].logprobs) == bits(plain[0].logprobs)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a4_nan_in_a_live_row_is_named(batch, impl, level):
    config = LossConfig(importance_sampling_level=level)
    output = call(batch, impl=impl, config=config, hidden=at(batch["hidden"], (2, 1, 0), NAN))[0]
    assert output.loss.isnan()
    with pytest.raises(InputError, match=r"log-prob of token \[2, 1\] is nan, expected"):
        output.check()


@pytest.mark.parametrize("impl", IMPLS)
def test_a6_a_first_block_of_minus_inf(impl, device):
    logits = torch.randn(2, 5000, device=device)
    logits[:, :4500] = -INF
    targets = torch.tensor([4600, 4999], device=device)
    got = token_logprob(logits, targets, impl=impl, return_entropy=True)
    truth = reference.token_logprob(logits.double(), targets)
    assert torch.allclose(got.logprobs.double(), truth.logp, rtol=1e-6)
    assert torch.allclose(got.entropy.double(), truth.entropy, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_a7_a8_impossible_tokens_are_named(impl, device):
    advantages = torch.ones(2, device=device)
    targets = torch.tensor([1, 2], device=device)
    whole = torch.zeros(2, 5, device=device).index_fill_(0, torch.tensor([1], device=device), -INF)
    target = at(torch.zeros(2, 5, device=device), (1, 2), -INF)
    for logits, said in ((whole, "nan"), (target, "-inf")):
        output = grpo_loss(logits, targets, advantages, impl=impl)
        assert not output.loss.isfinite()
        with pytest.raises(InputError, match=rf"token \[1\] is {said}, expected .* -inf"):
            output.check()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "big, dtype", [(3e38, torch.float32), (-3e38, torch.float32), (65504.0, torch.float16)]
)
def test_a9_the_largest_finite_logits(big, dtype, impl, device):
    logits = at(torch.zeros(2, 9, device=device, dtype=dtype), (0, 3), big)
    targets = torch.tensor([3, 1], device=device)
    got = token_logprob(logits, targets, impl=impl).logprobs
    truth = reference.token_logprob(logits.double(), targets).logp
    assert torch.allclose(got.double(), truth, rtol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("gap", [100.0, 1e4, -1e4])
def test_a10_far_log_ratios(batch, gap, sign, impl):
    """Clipped tokens teach exactly nothing; the others at the clamp's limit, and are counted."""
    own = call(batch, impl=impl)[0].logprobs
    advantages = torch.full((S,), sign, device=own.device)
    output, dhidden, _ = call(batch, impl=impl, advantages=advantages, old_logprobs=own - gap)
    assert output.loss.isfinite()
    assert dhidden.isfinite().all()
    assert output.metrics["ratio/clamped_frac"] == 1
    clipped = (gap > 0) == (sign > 0)
    assert dhidden.any().item() != clipped
    if gap > 0:
        assert output.metrics["ratio/max"].item() == pytest.approx(math.exp(20), rel=1e-4)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs", "k3+"])
@pytest.mark.parametrize("gap", [100.0, -100.0])
def test_a11_a_far_reference(batch, gap, estimator, impl):
    config = LossConfig(beta=0.04, kl_estimator=estimator)
    own = call(batch, impl=impl)[0].logprobs
    nothing = torch.zeros(S, device=own.device)
    rows = {"ref_logprobs": own + gap, "advantages": nothing, "old_logprobs": own}
    output, dhidden, _ = call(batch, impl=impl, config=config, **rows)
    assert output.metrics["kl"].isfinite()
    assert output.metrics["kl/clamped_frac"] == 1
    assert dhidden.isfinite().all()
    # One step against the gradient moves the log-probs towards the reference.
    if estimator != "k1":
        moved = call(batch, impl=impl, hidden=batch["hidden"] - 1e-3 * dhidden.sign())[0].logprobs
        assert ((moved - own).sum() > 0).item() == (gap > 0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("v", [1, 2, 31, 32_001, 129_920, 151_669])
def test_a12_a13_any_vocabulary_size(v, impl, device):
    logits = torch.randn(2, v, device=device).requires_grad_()
    targets = torch.tensor([0, v - 1], device=device)
    got = token_logprob(logits, targets, impl=impl).logprobs
    (grad,) = torch.autograd.grad(got.sum(), logits)
    exact = logits.detach().double().requires_grad_()
    truth = reference.token_logprob(exact, targets).logp
    (expected,) = torch.autograd.grad(truth.sum(), exact)
    assert torch.allclose(got.double(), truth, rtol=1e-6, atol=1e-7)
    assert torch.allclose(grad.double(), expected, rtol=1e-5, atol=1e-9)
    if v == 1:
        assert not got.any()
        assert not grad.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a14_softcap_scale_and_bias_with_an_odd_vocabulary(batch, impl):
    extra = {"softcap": 5.0, "logit_scale": 0.7, "bias": torch.linspace(-1, 1, V)}
    extra["bias"] = extra["bias"].to(batch["hidden"].device)
    found = call(batch, impl=impl, **extra)
    doubled = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    extra["bias"] = extra["bias"].double()
    truth = call(doubled, impl="reference", **extra)
    for got, expected in zip((found[0].loss, *found[1:]), (truth[0].loss, *truth[1:]), strict=True):
        assert torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.gpu
def test_a15_more_than_two_to_the_31_logits(device):
    v = 151_936
    n = 2**31 // v + 2
    logits = torch.randn(n, v, device=device, dtype=torch.bfloat16)
    targets = torch.randint(v, (n,), device=device)
    leaf = logits.requires_grad_()
    got = grpo_loss(leaf, targets, torch.ones(n, device=device), inplace=False)
    (grad,) = torch.autograd.grad(got.loss, leaf)
    for part in (slice(0, 8), slice(n - 8, n)):
        exact = logits[part].detach().double().requires_grad_()
        truth = reference.token_logprob(exact, targets[part]).logp
        (expected,) = torch.autograd.grad(-truth.sum() / n, exact)
        assert torch.allclose(got.logprobs[part].double(), truth, atol=1e-4)
        assert (grad[part].double() - expected).norm() <= 4e-3 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("n", [65_535, 65_536, 1_000_000])
def test_a17_many_rows_on_a_gpu(n, device):
    logits = torch.randn(n, 40, device=device)
    targets = torch.randint(40, (n,), device=device)
    got = token_logprob(logits, targets).logprobs
    assert torch.allclose(got, logits.log_softmax(-1).gather(1, targets[:, None])[:, 0], atol=1e-5)


def test_a17_many_rows_and_sequences(device):
    """Also sequence after sequence: 70,000 of one token each."""
    n = 70_000
    hidden = torch.randn(n, 1, 2, device=device)
    weight = torch.randn(3, 2, device=device)
    targets = torch.randint(3, (n, 1), device=device)
    rows = (hidden, weight, targets, torch.ones(n, device=device))
    config = LossConfig(loss_type="gspo")
    got = linear_grpo_loss(*rows, config=config)
    truth = linear_grpo_loss(*rows[:2], targets, rows[3], config=LossConfig(loss_type="dapo"))
    assert torch.equal(got.logprobs, truth.logprobs)
    assert got.loss.item() == pytest.approx(-1.0)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_a18_no_rows(shape, level, impl, device):
    hidden = torch.randn(*shape, D, device=device, requires_grad=True)
    weight = torch.randn(V, D, device=device, requires_grad=True)
    targets = torch.zeros(shape, dtype=torch.long, device=device)
    config = LossConfig(importance_sampling_level=level, loss_type="grpo")
    output = linear_grpo_loss(
        hidden, weight, targets, torch.ones(shape[0], device=device), config=config, impl=impl
    )
    output.loss.backward()
    assert output.loss == 0
    assert output.check().logprobs.shape == shape
    assert hidden.grad.shape == hidden.shape
    assert weight.grad.shape == weight.shape
    assert not weight.grad.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a19_everything_masked(batch, impl):
    output, *grads = call(batch, impl=impl, mask=torch.zeros_like(batch["mask"]))
    assert output.loss == 0
    assert not any(grad.any() for grad in grads)
    assert output.metrics["n_tokens"] == 0
    assert all(value.isfinite() for value in output.metrics.values())


@pytest.mark.parametrize("impl", IMPLS)
def test_a20_a_masked_sequence_changes_no_bit_of_the_others(batch, impl):
    mask = at(batch["mask"], (1,), False)
    config = LossConfig(loss_type="grpo")
    masked = call(batch, impl=impl, config=config, mask=mask)
    others = torch.tensor([0, 2], device=mask.device)
    rows = {name: batch[name][others] for name in batch if name != "weight"}
    alone = call(rows | {"weight": batch["weight"]}, impl=impl, config=config, denominator=S)
    assert bits(masked[0].loss, masked[2]) == bits(alone[0].loss, alone[2])
    assert bits(masked[1][others]) == bits(alone[1])
