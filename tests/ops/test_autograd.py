"""The loss in autograd: whose memory it takes, what it keeps, which gradients it makes."""

import pytest
import torch
from loss_checks import IMPLS, LEVELS, D, L, S, V, config_of, loss_arguments, oracle

from grpo_fast import InputError, chunked, grpo_loss, linear_grpo_loss, products
from grpo_fast.testing import random_sequences


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
