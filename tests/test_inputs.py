"""Bad arguments of the public ops: each raises InputError naming the argument, what was found and
what was expected."""

import math

import pytest
import torch

from grpo_fast import InputError, LossConfig, grpo_loss, linear_grpo_loss, linear_logprob

S, L, D, V = 2, 3, 4, 5


def call(**changes):
    """linear_grpo_loss on a good batch with some arguments replaced."""
    arguments = {
        "hidden": torch.randn(S, L, D),
        "weight": torch.randn(V, D),
        "targets": torch.zeros(S, L, dtype=torch.long),
        "advantages": torch.ones(S),
    } | changes
    positional = [arguments.pop(name) for name in ("hidden", "weight", "targets", "advantages")]
    return linear_grpo_loss(*positional, **arguments)


def ids(**places) -> torch.Tensor:
    targets = torch.zeros(S, L, dtype=torch.long)
    for place, value in places.items():
        targets[int(place[1]), int(place[2])] = value
    return targets


PACKED = {
    "hidden": torch.randn(S * L, D),
    "targets": torch.zeros(S * L, dtype=torch.long),
}
ONES = torch.ones(S, L)

BAD = {
    "id-below": ({"targets": ids(t12=-100)}, r"targets\[1, 2\] = -100 is outside \[0, 5\).*mask"),
    "id-above": ({"targets": ids(t01=V)}, r"targets\[0, 1\] = 5 is outside \[0, 5\)"),
    "ids-float": ({"targets": torch.zeros(S, L)}, "targets is torch.float32, expected an int64"),
    "targets-shape": (
        {"targets": torch.zeros(S, L - 1, dtype=torch.long)},
        r"targets has shape \(2, 2\), expected \(2, 3\) like hidden",
    ),
    "hidden-1d": ({"hidden": torch.randn(D)}, r"hidden has shape \(4,\)"),
    "hidden-int": ({"hidden": torch.zeros(S, L, D).int()}, "hidden is .*int32.*float32"),
    "hidden-list": ({"hidden": [1.0]}, "hidden is list, expected a torch.Tensor"),
    "hidden-sparse": ({"hidden": torch.randn(S * L, D).to_sparse()}, "hidden is torch.sparse"),
    "weight-shape": ({"weight": torch.randn(V, D + 1)}, r"weight has shape \(5, 5\).*\(V, 4\)"),
    "bias-shape": ({"bias": torch.randn(V + 1)}, r"bias has shape \(6,\), expected \(5,\)"),
    "advantages-one": ({"advantages": torch.ones(1)}, r"advantages has shape \(1,\).*\(2,\)"),
    "advantages-column": ({"advantages": torch.ones(S, 1)}, r"advantages has shape \(2, 1\)"),
    "advantages-nan": ({"advantages": torch.tensor([1.0, math.nan])}, r"advantages.*\[1, 0\].*nan"),
    "advantages-inf": ({"advantages": torch.tensor([math.inf, 0.0])}, r"advantages.*\[0, 0\].*inf"),
    "advantages-grad": (
        {"advantages": torch.ones(S, requires_grad=True)},
        r"advantages.detach\(\)",
    ),
    "mask-half": ({"mask": ONES * 0.5}, r"mask must be 0 or 1, found 0.5 at \[0, 0\]"),
    "mask-two": ({"mask": torch.full((S, L), 2)}, "mask must be 0 or 1, found 2"),
    "mask-shape": ({"mask": torch.ones(S)}, r"mask has shape \(2,\), expected \(2, 3\)"),
    "old-shape": ({"old_logprobs": torch.zeros(S, L + 1)}, r"old_logprobs has shape \(2, 4\)"),
    "old-row": ({"old_logprobs": torch.zeros(S)}, r"old_logprobs has shape \(2,\)"),
    "old-grad": ({"old_logprobs": ONES.clone().requires_grad_()}, r"old_logprobs.detach\(\)"),
    "ref-missing": ({"config": LossConfig(beta=0.1)}, r"beta = 0.1 needs ref_logprobs \(2, 3\)"),
    "denominator-zero": ({"denominator": 0}, "denominator = 0, expected a finite number > 0"),
    "denominator-nan": ({"denominator": math.nan}, "denominator = nan"),
    "denominator-two": ({"denominator": torch.ones(2)}, r"denominator has shape \(2,\)"),
    "dr-grpo-constant": ({"config": LossConfig(loss_type="dr_grpo")}, "max_completion_length"),
    "cu-padded": ({"cu_seqlens": torch.tensor([0, L])}, "cu_seqlens goes with packed"),
    "cu-missing": (
        PACKED | {"config": LossConfig(loss_type="grpo"), "advantages": torch.ones(S * L)},
        r"loss_type 'grpo' \(sequence_mean\) works per sequence: pass cu_seqlens",
    ),
    "c1-cu-start": (
        PACKED | {"cu_seqlens": torch.tensor([1, 3, 6])},
        "from 1 to 6, expected from 0 to 6",
    ),
    "c1-cu-end": (
        PACKED | {"cu_seqlens": torch.tensor([0, 3, 5])},
        "from 0 to 5, expected from 0 to 6",
    ),
    "c1-cu-order": (
        PACKED | {"cu_seqlens": torch.tensor([0, 4, 3, 6])},
        r"cu_seqlens\[2\] = 3 is below cu_seqlens\[1\] = 4",
    ),
    "c1-cu-device": (
        PACKED | {"cu_seqlens": torch.tensor([0, 3, 6], device="meta")},
        r"cu_seqlens is on meta, expected cpu: move it with .to\('cpu'\)",
    ),
    "c1-cu-float": (PACKED | {"cu_seqlens": torch.tensor([0.0, 6.0])}, "int32 or int64"),
    "advantages-packed": (PACKED, r"advantages has shape \(2,\).*or cu_seqlens beside it"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD.keys())
def test_bad_argument_is_named(changes, message):
    with pytest.raises(InputError, match=message) as caught:
        call(**changes)
    assert "\n" not in str(caught.value)


def test_good_batch_is_accepted():
    assert call().loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int32, torch.int64, torch.float32])
def test_mask_in_every_dtype(dtype):
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]])
    torch.manual_seed(0)
    hidden, weight = torch.randn(S, L, D), torch.randn(V, D)
    expected = call(hidden=hidden, weight=weight, mask=mask.bool()).loss
    assert torch.equal(call(hidden=hidden, weight=weight, mask=mask.to(dtype)).loss, expected)


def test_masked_ids_may_be_anything():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert call(targets=ids(t02=-100), mask=mask).loss.isfinite()


def test_int32_ids():
    hidden, weight = torch.randn(S, L, D), torch.randn(V, D)
    targets = torch.randint(0, V, (S, L))
    long = call(hidden=hidden, weight=weight, targets=targets).loss
    assert torch.equal(call(hidden=hidden, weight=weight, targets=targets.int()).loss, long)


def test_per_token_advantages_equal_per_sequence_ones():
    hidden, weight = torch.randn(S, L, D), torch.randn(V, D)
    per_sequence = torch.tensor([0.5, -1.0])
    spread = per_sequence[:, None].expand(S, L)
    one = call(hidden=hidden, weight=weight, advantages=per_sequence).loss
    assert torch.equal(call(hidden=hidden, weight=weight, advantages=spread).loss, one)


def test_devices_must_agree():
    with pytest.raises(InputError, match=r"weight is on meta, expected cpu"):
        call(weight=torch.randn(V, D, device="meta"))


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, math.inf, "hot"])
def test_temperature_must_be_positive(temperature):
    with pytest.raises(InputError, match="temperature = .*expected a finite number > 0"):
        linear_logprob(
            torch.randn(2, D), torch.randn(V, D), torch.zeros(2).long(), temperature=temperature
        )


def test_temperature_tensor_must_fit():
    with pytest.raises(InputError, match=r"temperature has shape \(3,\), expected \(2,\)"):
        linear_logprob(
            torch.randn(2, D), torch.randn(V, D), torch.zeros(2).long(), temperature=torch.ones(3)
        )


def test_logits_shape():
    with pytest.raises(InputError, match=r"logits has shape \(5,\)"):
        grpo_loss(torch.randn(V), torch.zeros(1).long(), torch.ones(1))
