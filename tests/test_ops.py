"""Public losses and log-probs against the float64 oracle: values and every gradient, padded and
packed.

Grid: every loss type x level x KL x delta through the torch chunks; one row of it through the
Triton kernels, which tests/kernels covers one by one (the interpreter takes a tenth of a second a
launch).
"""

import itertools
import math

import pytest
import torch

from grpo_fast import (
    GRPOLoss,
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
from grpo_fast.testing import assert_close_to_oracle, random_sequences

S, L, D, V = 4, 6, 8, 37
LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo")
LEVELS = ("token", "sequence")
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
IMPLS = ("torch", "triton")


def config_of(loss_type="dapo", level="token", beta=0.0, kl="k3", delta=None) -> LossConfig:
    return LossConfig(
        loss_type=loss_type,
        importance_sampling_level=level,
        beta=beta,
        kl_estimator=kl,
        delta=delta,
        epsilon=0.15,
        epsilon_high=0.28,
        temperature=0.8,
        max_completion_length=9,
    )


def loss_arguments(batch: dict, config: LossConfig, *, old: bool, packed: bool) -> dict:
    """Keywords of the public call for a padded batch, or the same tokens packed."""
    names = ["mask"] + (["old_logprobs"] if old else []) + (["ref_logprobs"] if config.beta else [])
    kwargs = {name: batch[name] for name in names}
    if packed:
        kwargs = {name: value.reshape(-1) for name, value in kwargs.items()}
        kwargs["cu_seqlens"] = torch.arange(S + 1, device=batch["mask"].device) * L
    return kwargs | {"config": config}


def oracle(batch: dict, config: LossConfig, *, old: bool, dtype=torch.float64, denominator=None):
    """reference.linear_grpo_loss in `dtype`: (loss, rows, gradients of hidden and weight)."""
    hidden = batch["hidden"].to(dtype).reshape(-1, D).clone().requires_grad_()
    weight = batch["weight"].to(dtype).clone().requires_grad_()
    rows = reference.linear_grpo_loss(
        hidden,
        weight,
        batch["targets"].reshape(-1),
        batch["advantages"].to(dtype).repeat_interleave(L),
        mask=batch["mask"].reshape(-1),
        cu_seqlens=torch.arange(S + 1, device=hidden.device) * L,
        old_logp=batch["old_logprobs"].to(dtype).reshape(-1) if old else None,
        ref_logp=batch["ref_logprobs"].to(dtype).reshape(-1) if config.beta else None,
        denominator=denominator,
        config=config,
    )
    rows.loss.sum().backward()
    return rows.loss.sum(), rows, hidden.grad.reshape(S, L, D), weight.grad


def check_linear(config: LossConfig, dtype: torch.dtype, impl: str, device, *, old: bool, packed):
    # this seed has rows clipped on either side
    batch = random_sequences(S, L, D, V, dtype, device, seed=2)
    hidden, weight = batch["hidden"].clone().requires_grad_(), batch["weight"].clone()
    weight.requires_grad_()
    shape = (S * L,) if packed else (S, L)
    output = linear_grpo_loss(
        hidden.reshape(*shape, D),
        weight,
        batch["targets"].reshape(shape),
        batch["advantages"],
        impl=impl,
        **loss_arguments(batch, config, old=old, packed=packed),
    )
    # grad_output other than 1 must scale and nothing else
    (output.loss * 2).backward()
    truth = oracle(batch, config, old=old)
    eager = oracle(batch, config, old=old, dtype=dtype)
    found = (output.loss, None, hidden.grad / 2, weight.grad / 2)
    for name, got, base, true in zip(("loss", "", "dH", "dW"), found, eager, truth, strict=True):
        if name:
            assert_close_to_oracle(got, base, true, name=name)
    flat = output.logprobs.reshape(-1), output.entropy.reshape(-1)
    assert_close_to_oracle(flat[0], eager[1].logp, truth[1].logp, name="logprobs")
    assert_close_to_oracle(flat[1], eager[1].entropy, truth[1].entropy, name="entropy")
    assert output.logprobs.shape == shape
    return output, truth[1], batch


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


@pytest.mark.parametrize("level", LEVELS)
def test_inplace_takes_the_logits_memory_and_gives_the_same(level, device):
    batch = random_sequences(S, L, D, V, device=device)
    leaf = batch["hidden"].clone().requires_grad_()
    kwargs = {"mask": batch["mask"], "config": config_of("dapo", level)}
    grads = []
    for inplace in (False, True):
        logits = leaf @ batch["weight"].T
        pointer = logits.data_ptr()
        before = logits.detach().clone()
        output = grpo_loss(logits, batch["targets"], batch["advantages"], inplace=inplace, **kwargs)
        assert torch.equal(logits, before) != inplace
        assert logits.data_ptr() == pointer
        (grad,) = torch.autograd.grad(output.loss, leaf)
        grads.append(grad)
    assert torch.equal(*grads)
    # Somebody else who saved the logits gets an error, not a wrong gradient.
    logits = leaf @ batch["weight"].T
    other = logits.square().sum()
    output = grpo_loss(logits, batch["targets"], batch["advantages"], inplace=True, **kwargs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (output.loss + other).backward()


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


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("v", [300, 2500, 9000])
def test_log_probs_of_another_op_give_a_ratio_of_exactly_one(v, impl, device):
    """As when old log-probs come from a pass of their own: no phantom clip, in any tile."""
    batch = random_sequences(2, 3, D, v, torch.bfloat16, device=device)
    names = ("hidden", "weight", "targets")
    rows = {name: batch[name] for name in names} | {"targets": batch["targets"].clamp(min=0)}
    old = linear_logprob(**rows, impl=impl).logprobs
    output = linear_grpo_loss(**rows, advantages=batch["advantages"], old_logprobs=old, impl=impl)
    assert (output.tokens.ratio == 1).all()


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


def test_logits_never_exist_whole(device, monkeypatch):
    """The largest tensor of the call is one tile, an eighth of [N, V], not [N, V]."""
    n, v = 64, 1000
    monkeypatch.setattr(chunked, "WORKSPACE_BYTES", {"cpu": 4 * v * 8, "cuda": 4 * v * 8})
    hidden = torch.randn(n, D, device=device, requires_grad=True)
    weight = torch.randn(v, D, device=device, requires_grad=True)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for item in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(item, torch.Tensor):
                    largest = max(largest, item.numel())
            return result

    targets = torch.zeros(n, dtype=torch.long, device=device)
    with Watch():
        output = linear_grpo_loss(hidden, weight, targets, torch.ones(n, device=device))
        output.loss.backward()
    assert largest == max(8 * v, v * D)


@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_inputs_get_no_gradient(impl, device):
    batch = random_sequences(S, L, D, V, device=device)
    config = config_of()
    full = oracle(batch, config, old=False)
    for train_hidden, train_weight in ((True, False), (False, True), (False, False)):
        hidden = batch["hidden"].clone().requires_grad_(train_hidden)
        weight = batch["weight"].clone().requires_grad_(train_weight)
        kwargs = loss_arguments(batch, config, old=False, packed=False)
        output = linear_grpo_loss(
            hidden, weight, batch["targets"], batch["advantages"], impl=impl, **kwargs
        )
        assert output.loss.requires_grad == (train_hidden or train_weight)
        if output.loss.requires_grad:
            output.loss.backward()
        assert (hidden.grad is not None) == train_hidden
        assert (weight.grad is not None) == train_weight
        if train_hidden:
            assert torch.allclose(hidden.grad.double(), full[2], rtol=1e-4, atol=1e-7)


def test_no_gradient_work_under_no_grad(device, monkeypatch):
    batch = random_sequences(S, L, D, V, device=device)
    monkeypatch.setattr(
        products.HeadProducts, "add", lambda *_: pytest.fail("a gradient was made under no_grad")
    )
    with torch.no_grad():
        output = linear_grpo_loss(
            batch["hidden"].requires_grad_(),
            batch["weight"].requires_grad_(),
            batch["targets"],
            batch["advantages"],
            mask=batch["mask"],
        )
    assert not output.loss.requires_grad


def test_second_backward_gives_the_same_and_double_backward_is_refused(device):
    batch = random_sequences(S, L, D, V, device=device)
    hidden = batch["hidden"].requires_grad_()
    output = linear_grpo_loss(
        hidden, batch["weight"], batch["targets"], batch["advantages"], mask=batch["mask"]
    )
    (first,) = torch.autograd.grad(output.loss, hidden, retain_graph=True)
    (second,) = torch.autograd.grad(output.loss, hidden, retain_graph=True)
    assert torch.equal(first, second)
    # Later would be too late: autograd takes a gradient without a graph for a constant.
    with pytest.raises(InputError, match="create_graph is set"):
        torch.autograd.grad(output.loss, hidden, create_graph=True)


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


@pytest.mark.parametrize("impl", IMPLS)
def test_logprobs_and_their_gradients(impl, device):
    batch = random_sequences(S, L, D, V, device=device)
    targets = batch["targets"].clamp(min=0)
    temperature = torch.rand(S, L, device=device) + 0.5
    bias = torch.randn(V, device=device)
    coefficient = torch.randn(S, L, device=device)
    for options in (
        {},
        {"bias": bias, "temperature": temperature, "softcap": 5.0, "logit_scale": 0.5},
    ):
        results = []
        for dtype, chosen in (
            (None, impl),
            (torch.float32, "reference"),
            (torch.float64, "reference"),
        ):
            leaves = [batch["hidden"], batch["weight"]]
            leaves = [
                (x if dtype is None else x.to(dtype)).clone().requires_grad_() for x in leaves
            ]
            cast = {
                k: v if dtype is None or not isinstance(v, torch.Tensor) else v.to(dtype)
                for k, v in options.items()
            }
            out = linear_logprob(*leaves, targets, return_entropy=True, impl=chosen, **cast)
            loss = (out.logprobs * coefficient + out.entropy * coefficient.square()).sum()
            loss.backward()
            results.append((out.logprobs, out.entropy, *(leaf.grad for leaf in leaves)))
        for name, got, base, true in zip(("logp", "entropy", "dH", "dW"), *results, strict=True):
            assert_close_to_oracle(got, base, true, name=name)
    assert linear_logprob(batch["hidden"], batch["weight"], targets).entropy is None


@pytest.mark.parametrize("impl", IMPLS)
def test_token_logprob_and_its_gradient(impl, device):
    batch = random_sequences(S, L, D, V, device=device)
    logits = batch["hidden"] @ batch["weight"].T
    targets = batch["targets"].clamp(min=0)
    results = []
    for dtype, chosen in (
        (torch.float32, impl),
        (torch.float32, "reference"),
        (torch.float64, "reference"),
    ):
        leaf = logits.to(dtype).clone().requires_grad_()
        out = token_logprob(leaf, targets, temperature=0.7, return_entropy=True, impl=chosen)
        (out.logprobs.sum() + out.entropy.square().sum()).backward()
        results.append((out.logprobs, out.entropy, leaf.grad))
    for name, got, base, true in zip(("logp", "entropy", "dlogits"), *results, strict=True):
        assert_close_to_oracle(got, base, true, name=name)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_confident_token_keeps_its_digits(impl, device):
    """1 - p from 1e-2 down to 1e-8: each row's gradient to a relative 1e-5, not to its own 1."""
    logits = torch.randn(13, 300, device=device)
    targets = torch.arange(13, device=device)
    logits[range(13), range(13)] += torch.linspace(10, 25, 13, device=device)
    leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got = token_logprob(leaf, targets, impl=impl).logprobs
    truth = reference.token_logprob(exact, targets).logp
    assert ((got - truth) / truth).abs().max() < 1e-5
    (grad,), (expected,) = (
        torch.autograd.grad(x.sum(), y) for x, y in ((got, leaf), (truth, exact))
    )
    assert ((grad - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-5


def test_logits_in_any_layout(device):
    logits = torch.randn(L, V, S, device=device).permute(2, 0, 1)
    assert logits.stride(-1) != 1
    targets = torch.randint(0, V, (S, L), device=device)
    expected = logits.log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    for impl in IMPLS:
        found = token_logprob(logits, targets, impl=impl).logprobs
        assert torch.allclose(found, expected, atol=1e-5)


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


def test_triton_on_a_cpu_tensor_says_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="TRITON_INTERPRET=1"):
        token_logprob(torch.randn(1, 3), torch.zeros(1, dtype=torch.long), impl="triton")
