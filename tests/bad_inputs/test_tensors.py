"""A21 to A35: shapes, dtypes, layouts and devices of tensors, autograd, threads, out of memory."""

import threading

import pytest
import torch
from changed_call import IMPLS, NAN, D, L, S, V, at, call
from torch.utils.checkpoint import checkpoint

from grpo_fast import InputError, LossConfig, chunked, linear_grpo_loss, linear_logprob, products


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
