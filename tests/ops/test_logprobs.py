"""Public log-probs against the float64 oracle, and what a ratio makes of them."""

import pytest
import torch
from loss_checks import IMPLS, D, L, S, V

from grpo_fast import InputError, linear_grpo_loss, linear_logprob, reference, token_logprob
from grpo_fast.testing import assert_close_to_oracle, random_sequences


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


def test_triton_on_a_cpu_tensor_says_what_to_do(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="TRITON_INTERPRET=1"):
        token_logprob(torch.randn(1, 3), torch.zeros(1, dtype=torch.long), impl="triton")
