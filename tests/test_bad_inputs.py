"""Bad inputs and hard numbers, one test a case: each is refused by name or gives what float64
gives.

A: what goes into a loss. B: its options. Values and gradients of good input are in test_losses.py.
"""

import math
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from grpo_fast import (
    ConfigError,
    InputError,
    LossConfig,
    chunked,
    grpo_loss,
    linear_grpo_loss,
    linear_logprob,
    products,
    reference,
    token_logprob,
)
from grpo_fast.testing import random_sequences

S, L, D, V = 3, 4, 8, 37
IMPLS = ("torch", "triton")
NAN, INF = math.nan, math.inf


@pytest.fixture
def batch(device) -> dict:
    return random_sequences(S, L, D, V, device=device) | {
        "mask": torch.ones(S, L, dtype=torch.bool, device=device),
        "targets": torch.arange(S * L, device=device).reshape(S, L),
        "old_logprobs": torch.full((S, L), -2.0, device=device),
        "ref_logprobs": torch.full((S, L), -2.5, device=device),
    }


def call(batch: dict, *, impl: str = "auto", config: LossConfig | None = None, **changes):
    """(output, d(hidden), d(weight)) of `linear_grpo_loss` on the batch with `changes`."""
    given = {name: value for name, value in batch.items() if name != "ref_logprobs"} | changes
    for name in ("hidden", "weight"):
        given[name] = given[name].detach().clone().requires_grad_()
    output = linear_grpo_loss(**given, config=config or LossConfig(), impl=impl)
    grads = torch.autograd.grad(output.loss, (given["hidden"], given["weight"]))
    return output, *grads


def bits(*tensors: torch.Tensor) -> list[bytes]:
    return [tensor.detach().cpu().numpy().tobytes() for tensor in tensors]


def at(tensor: torch.Tensor, place: tuple, value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed[place] = value
    return changed


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


def test_a21_masks_of_any_dtype(batch):
    mask = at(batch["mask"], (0, 1), False)
    expected = call(batch, mask=mask)[0].loss
    for dtype in (torch.bool, torch.int8, torch.int32, torch.int64, torch.float32, torch.bfloat16):
        assert torch.equal(call(batch, mask=mask.to(dtype))[0].loss, expected)
    with pytest.raises(InputError, match=r"mask must be 0 or 1, found 0.5 at \[0, 3\]"):
        call(batch, mask=at(batch["mask"].float(), (0, 3), 0.5))


@pytest.mark.parametrize("impl", IMPLS)
def test_a22_a31_any_layout_of_hidden_and_head(batch, impl):
    plain = call(batch, impl=impl)
    strange = {
        "hidden": batch["hidden"].transpose(0, 1).contiguous().transpose(0, 1),
        "weight": batch["weight"].t().contiguous().t(),
        "advantages": batch["advantages"].repeat_interleave(2)[::2],
        "old_logprobs": torch.full((1, 1), -2.0, device=plain[1].device).expand(S, L),
        "mask": torch.ones(S, 2 * L, dtype=torch.bool, device=plain[1].device)[:, ::2],
    }
    found = call(batch, impl=impl, **strange)
    assert torch.allclose(found[0].loss, plain[0].loss, rtol=1e-6)
    for got, expected in zip(found[1:], plain[1:], strict=True):
        assert torch.allclose(got, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "name, shape, said",
    [
        ("old_logprobs", (S, L - 1), r"old_logprobs has shape \(3, 3\), expected \(3, 4\) like"),
        ("old_logprobs", (S, L + 1), r"old_logprobs has shape \(3, 5\), expected \(3, 4\) like"),
        ("old_logprobs", (S, 1), r"old_logprobs has shape \(3, 1\), expected \(3, 4\) like"),
        ("old_logprobs", (S,), r"old_logprobs has shape \(3,\), expected \(3, 4\) like"),
        ("advantages", (1,), r"advantages has shape \(1,\), expected \(3,\) \(one a sequence\)"),
        ("advantages", (S, 1), r"advantages has shape \(3, 1\), expected"),
        ("weight", (V, D + 1), r"weight has shape \(37, 9\), expected \(V, 8\)"),
        ("hidden", (S, L + 1, D), r"targets has shape \(3, 4\), expected \(3, 5\)"),
    ],
)
def test_a23_wrong_shapes(batch, name, shape, said):
    with pytest.raises(InputError, match=said):
        call(batch, **{name: torch.zeros(shape, device=batch["hidden"].device)})


def test_a24_devices_layouts_and_constants(batch):
    with pytest.raises(InputError, match="advantages is on meta, expected cpu|cuda"):
        call(batch, advantages=torch.zeros(S, device="meta"))
    with pytest.raises(InputError, match=r"weight is torch.sparse_coo .*, expected a dense tensor"):
        linear_grpo_loss(**(batch | {"weight": batch["weight"].to_sparse()}))
    for name in ("old_logprobs", "ref_logprobs", "advantages"):
        learned = batch[name].clone().requires_grad_()
        with pytest.raises(InputError, match=rf"{name} requires grad, expected constants"):
            call(batch, **{name: learned})


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_a25_dtypes_that_no_loss_has(batch, dtype):
    with pytest.raises(
        InputError, match=r"hidden is torch.strided torch\.\w+, expected .* float32"
    ):
        linear_grpo_loss(**(batch | {"hidden": batch["hidden"].to(dtype)}))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.float32])
def test_a26_ids_are_int32_or_int64(batch, dtype):
    assert torch.equal(call(batch, targets=batch["targets"].int())[1], call(batch)[1])
    with pytest.raises(InputError, match=r"targets is torch\.\w+, expected an int64 or int32"):
        call(batch, targets=batch["targets"].to(dtype))


def test_a27_backward_twice_and_twice_differentiated(batch):
    hidden = batch["hidden"].clone().requires_grad_()
    output = linear_grpo_loss(**(batch | {"hidden": hidden}))
    first = torch.autograd.grad(output.loss, hidden, retain_graph=True)[0]
    again = torch.autograd.grad(output.loss, hidden, retain_graph=True)[0]
    assert torch.equal(first, again)
    with pytest.raises(InputError, match="create_graph is set"):
        torch.autograd.grad(output.loss, hidden, create_graph=True)


def test_a28_editing_inputs_before_the_backward(batch):
    """A loss has its gradient already; log-probs that need their inputs again notice."""
    hidden = batch["hidden"].clone().requires_grad_()
    expected = call(batch)[1]
    output = linear_grpo_loss(
        **{k: v for k, v in batch.items() if k != "ref_logprobs"} | {"hidden": hidden}
    )
    rows = linear_logprob(hidden, batch["weight"], batch["targets"])
    with torch.no_grad():
        hidden.add_(1.0)
    assert torch.equal(torch.autograd.grad(output.loss, hidden)[0], expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(rows.logprobs.sum(), hidden)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("trained", [("hidden",), ("weight",), ("bias",), ("weight", "bias"), ()])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a29_frozen_parts_get_nothing_and_the_others_the_same(batch, level, trained, impl, device):
    names = ("hidden", "weight", "bias")
    given = {name: value for name, value in batch.items() if name != "ref_logprobs"}
    given["bias"] = torch.linspace(-1, 1, V, device=device)
    grads = {}
    for which in (names, trained):
        leaves = {name: given[name].clone().requires_grad_(name in which) for name in names}
        config = LossConfig(importance_sampling_level=level)
        output = linear_grpo_loss(**(given | leaves), config=config, impl=impl)
        if which:
            output.loss.backward()
        grads[which] = {name: leaf.grad for name, leaf in leaves.items()}
    for name in names:
        if name not in trained:
            assert grads[trained][name] is None
        else:
            assert torch.allclose(grads[trained][name], grads[names][name], rtol=1e-5, atol=1e-8)


def test_a30_recomputed_under_gradient_checkpointing(batch):
    hidden = batch["hidden"].clone().requires_grad_()
    rows = {name: batch[name] for name in ("targets", "advantages", "mask", "old_logprobs")}

    def loss(states):
        return linear_grpo_loss(torch.tanh(states), batch["weight"], **rows).loss

    plain = torch.autograd.grad(loss(hidden), hidden)[0]
    again = torch.autograd.grad(checkpoint(loss, hidden, use_reentrant=False), hidden)[0]
    assert torch.equal(plain, again)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("factor", [0.0, 1e-6, 1e6, -1.0])
def test_a32_linear_in_what_comes_from_above(batch, factor, impl):
    hidden = batch["hidden"].clone().requires_grad_()
    rows = {name: value for name, value in batch.items() if name not in ("hidden", "ref_logprobs")}
    one = call(batch, impl=impl)[1]
    output = linear_grpo_loss(hidden, **rows, impl=impl)
    (got,) = torch.autograd.grad(output.loss, hidden, torch.tensor(factor, device=hidden.device))
    assert torch.allclose(got, one * factor, rtol=1e-6)
    output = linear_grpo_loss(hidden, **rows, impl=impl)
    (got,) = torch.autograd.grad(output.loss, hidden, torch.tensor(NAN, device=hidden.device))
    assert got.isnan().all()


def test_a34_threads_do_not_disturb_one_another(batch):
    expected = [call(batch, config=LossConfig(epsilon=e))[1] for e in (0.1, 0.3)]
    found = [[], []]

    def work(k: int) -> None:
        for _ in range(10):
            found[k].append(call(batch, config=LossConfig(epsilon=(0.1, 0.3)[k]))[1])

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for k in range(2):
        assert len(found[k]) == 10
        assert all(torch.allclose(grad, expected[k], rtol=1e-6) for grad in found[k])


def test_a35_out_of_memory_leaves_nothing_behind(batch, monkeypatch):
    expected = call(batch)
    make = products.HeadProducts.logits

    def full(self, hidden):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(products.HeadProducts, "logits", full)
    with pytest.raises(torch.OutOfMemoryError):
        call(batch)
    monkeypatch.setattr(products.HeadProducts, "logits", make)
    monkeypatch.setitem(chunked.WORKSPACE_BYTES, batch["hidden"].device.type, 4 * V * 2)
    again = call(batch)
    assert torch.allclose(again[1], expected[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "options, said",
    [
        ({"epsilon": 1.0}, r"epsilon = 1.0 is out of range: expected 0 <= epsilon < 1"),
        ({"epsilon": NAN}, r"epsilon = nan is out of range"),
        ({"epsilon_high": -0.1}, r"epsilon_high = -0.1 is out of range"),
        ({"delta": 1.1}, r"delta = 1.1 is out of range: expected more than 1 \+ epsilon_high"),
        ({"dual_clip": 0.9}, r"dual_clip = 0.9 is out of range: expected more than 1"),
        ({"beta": -0.1}, r"beta = -0.1 is out of range"),
        ({"beta": NAN}, r"beta = nan is out of range"),
        ({"temperature": 0.0}, r"temperature = 0.0 is out of range.*greedy"),
        ({"temperature": -1.0}, r"temperature = -1.0 is out of range"),
        ({"temperature": INF}, r"temperature = inf is out of range"),
        ({"loss_type": "gpro"}, r"loss_type = 'gpro' is not available: did you mean 'grpo'"),
        ({"loss_type": "cispo"}, r"loss_type 'cispo' needs epsilon_high"),
        ({"loss_type": "dro"}, r"dro_beta = None is out of range.*needs it"),
        ({"loss_type": "sapo", "delta": 4.0}, r"delta = 4.0 has no effect with loss_type 'sapo'"),
        ({"sapo_temperature_pos": 2.0}, r"sapo_temperature_pos = 2.0 has no effect"),
        ({"use_bias_correction_kl": True}, r"use_bias_correction_kl has no effect with beta = 0"),
        ({"entropy_target": 0.5}, r"entropy_target has no effect without use_adaptive_entropy"),
        ({"importance_sampling_max": 2.0}, r"importance_sampling_max has no effect with"),
        ({"importance_sampling_level": "word"}, r"choose one of token, sequence, sequence_token"),
        ({"kl_estimator": "k4"}, r"choose one of k1, k2, k3, abs"),
        ({"log_ratio_clamp": 100.0}, r"log_ratio_clamp = 100.0 .*88"),
        ({"max_completion_length": 0}, r"max_completion_length = 0 is out of range"),
        ({"objective": 3}, r"objective is int, expected a function"),
        ({"top_entropy_quantile": 1.5}, r"top_entropy_quantile = 1.5 is out of range"),
    ],
)
def test_b2_b3_b4_b7_b14_options_are_checked_when_set(options, said):
    with pytest.raises(ConfigError, match=said):
        LossConfig(**options)


def test_b3_a_kl_that_is_not_measured_is_not_zero(batch):
    with pytest.raises(InputError, match=r"beta = 0.1 needs ref_logprobs \(3, 4\)"):
        call(batch, config=LossConfig(beta=0.1))
    assert "kl" not in call(batch)[0].metrics
    assert "kl" in call(batch, ref_logprobs=batch["ref_logprobs"])[0].metrics


def test_b4_temperature_divides_the_logits(batch):
    found = call(batch, config=LossConfig(temperature=0.7))[0].logprobs
    logits = batch["hidden"] @ batch["weight"].T / 0.7
    expected = logits.log_softmax(-1).gather(-1, batch["targets"][..., None])[..., 0]
    assert torch.allclose(found, expected, atol=1e-5)
    for bad in (0.0, -1.0, NAN, INF):
        with pytest.raises(InputError, match="temperature = .* expected a finite number > 0"):
            call(batch, temperature=bad)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_b5_b6_on_policy_is_exact(batch, level, impl):
    config = LossConfig(importance_sampling_level=level)
    without, dhidden, _ = call(batch, impl=impl, config=config, old_logprobs=None)
    with_own, same, _ = call(batch, impl=impl, config=config, old_logprobs=without.logprobs)
    for output in (without, with_own):
        assert (output.tokens.ratio == 1).all()
        assert output.metrics["clip_ratio/region_mean"] == 0
    assert bits(dhidden) == bits(same)


@pytest.mark.parametrize("impl", IMPLS)
def test_b8_advantages_at_the_edge(batch, impl):
    far = torch.full((S, L), -1e4, device=batch["hidden"].device)
    for zero in (0.0, -0.0):
        rows = {"advantages": torch.full((S,), zero, device=far.device), "old_logprobs": far}
        config = LossConfig(skip_zero_advantage=False)
        output, *grads = call(batch, impl=impl, config=config, **rows)
        assert output.loss == 0
        assert not any(grad.any() for grad in grads)
    if far.is_cuda:
        return
    for bad in (INF, -INF, NAN):
        advantages = at(batch["advantages"], (1,), bad)
        with pytest.raises(
            InputError, match=r"advantages at token \[1, 0\] is -?(inf|nan), expected"
        ):
            call(batch, advantages=advantages)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("side", [1.0, -1.0])
def test_b9_a_ratio_at_the_bound_still_teaches(side, impl, device):
    """p = 1/2, old = p / bound in powers of two: the ratio is the bound, to the bit."""
    hidden = torch.zeros(1, 1, 2, device=device, requires_grad=True)
    weight = torch.eye(2, device=device)
    targets = torch.zeros(1, 1, dtype=torch.long, device=device)
    bound = 2.0 if side > 0 else 0.5
    own = linear_grpo_loss(
        hidden, weight, targets, torch.ones(1, device=device), impl=impl
    ).logprobs
    config = LossConfig(epsilon=0.5, epsilon_high=1.0)
    old = own - math.log(bound)
    output = linear_grpo_loss(
        hidden,
        weight,
        targets,
        torch.full((1,), side, device=device),
        old_logprobs=old,
        config=config,
        impl=impl,
    )
    (grad,) = torch.autograd.grad(output.loss, hidden)
    ratio = output.tokens.ratio.item()
    assert ratio == pytest.approx(bound, rel=1e-6)
    inside = ratio <= bound if side > 0 else ratio >= bound
    assert grad.any().item() == inside


@pytest.mark.parametrize("bad", [0.0, -2.0, NAN, INF])
def test_b10_denominators(batch, bad):
    with pytest.raises(InputError, match=r"denominator = .*, expected a finite number > 0"):
        call(batch, denominator=bad)
    with pytest.raises(InputError, match="entropy_denominator = .*, expected a finite number > 0"):
        call(batch, entropy_denominator=bad)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "luspo"])
def test_b11_b12_neither_cuts_nor_order_change_the_step(loss_type, device):
    batch = random_sequences(8, 6, D, V, torch.float64, device=device)
    config = LossConfig(loss_type=loss_type, max_completion_length=6, entropy_coef=0.01)
    tokens = float(batch["mask"].sum())
    total = {"grpo": 8.0, "dapo": tokens, "dr_grpo": 48.0, "luspo": 8.0}[loss_type]
    names = ("hidden", "targets", "advantages", "mask", "old_logprobs")
    results = []
    for order in (list(range(8)), [3, 1, 7, 0, 2, 6, 5, 4]):
        for size in (8, 4, 1):
            weight = batch["weight"].clone().requires_grad_()
            for k in range(0, 8, size):
                rows = {name: batch[name][order[k : k + size]] for name in names}
                linear_grpo_loss(
                    weight=weight,
                    **rows,
                    config=config,
                    denominator=total,
                    entropy_denominator=tokens,
                ).loss.backward()
            results.append(weight.grad)
    for grad in results[1:]:
        assert torch.allclose(grad, results[0], rtol=1e-9, atol=1e-14)


def test_b13_the_default_loss_learns_a_bandit(device):
    hidden = torch.ones(2, 1, 1, device=device)
    weight = torch.zeros(2, 1, device=device, requires_grad=True)
    targets = torch.tensor([[0], [1]], device=device)
    loss = linear_grpo_loss(hidden, weight, targets, torch.tensor([1.0, -1.0], device=device)).loss
    loss.backward()
    assert weight.grad[0] < 0 < weight.grad[1]
