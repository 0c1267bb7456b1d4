"""policy_loss is the float64 oracle in every case, row by row, whatever lies under the mask."""

import math

import pytest
import torch
from policy_loss_cases import (
    BFLOAT16,
    CASES,
    CLIP,
    FLOAT32,
    OBJECTIVES,
    arguments,
    assert_same_bits,
    call,
    case,
    check_policy_loss,
    full_case,
)

from grpo_fast.testing import random_rows
from grpo_kernels import policy_loss as module


@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name, launcher, device):
    check_policy_loss(launcher, CASES[name], device)


@pytest.mark.parametrize("v", [257, 1040])
def test_own_tiles(v, guard, device):
    check_policy_loss(guard(module.policy_loss), full_case(n=2, v=v, beta=0.1), device)


def test_gradient_on_request_changes_no_result_and_in_place_no_bit(launcher, device):
    rows, _ = arguments(full_case(), device)
    apart = call(launcher, rows)
    without = launcher(**rows, **CLIP)
    assert_same_bits((without, apart[1]), apart)
    inside = launcher(**rows, **CLIP, dlogits=rows["logits"])
    assert_same_bits((inside, rows["logits"]), apart)


def test_rows_do_not_see_each_other(launcher, device):
    """Any batch, any order: the bits of a row are its own."""
    rows, _ = arguments(full_case(n=5), device)
    out, gradient = call(launcher, rows)
    part = {name: value[[3, 1]].contiguous() for name, value in rows.items()}
    few, few_gradient = call(launcher, part)
    assert torch.equal(few_gradient, gradient[[3, 1]])
    assert all(torch.equal(a, b[[3, 1]]) for a, b in zip(few, out, strict=True))


def test_no_rows(launcher, device):
    rows = random_rows(0, 5, device=device)
    out, gradient = call(launcher, rows)
    assert all(x.shape == (0,) and x.dtype == FLOAT32 for x in out)
    assert gradient.shape == (0, 5)


def test_masked_rows_are_zero_whatever_they_hold(launcher, device):
    rows, _ = arguments(full_case(n=4), device)
    rows = {name: value.clone() for name, value in rows.items()}
    for name, value in rows.items():
        value.fill_(math.nan if value.is_floating_point() else -100)
        if name == "weights":
            value.zero_()
    out, gradient = call(launcher, rows, beta=0.1)
    assert not gradient.any()
    assert not any(x.any() for x in out)


def test_a_row_of_weight_zero_is_masked_also_where_an_entropy_weight_is_left(launcher, device):
    rows, _ = arguments(case(n=2, bonus=True), device)
    rows["weights"][0] = 0.0
    rows["entropy_weights"][:] = 0.5
    out, gradient = call(launcher, rows)
    assert not gradient[0].any()
    assert not any(x[0] for x in out if x is not None)
    assert gradient[1].any()


def test_what_lies_under_the_mask_changes_no_bit(launcher, device):
    rows, _ = arguments(full_case(n=6), device)
    rows["weights"][[0, 2]] = 0.0
    clean = call(launcher, rows, beta=0.1)
    for name, value in rows.items():
        if name != "weights":
            value[0] = math.nan if value.is_floating_point() else -100
            value[2] = math.inf if value.is_floating_point() else 10**9
    assert_same_bits(call(launcher, rows, beta=0.1), clean)


@pytest.mark.parametrize(
    "name",
    [
        "logits",
        "logits at the target",
        "advantages",
        "old_logp",
        "ref_logp",
        "policy_weights",
        "entropy_weights",
    ],
)
def test_nan_in_a_live_row_is_seen_there_and_only_there(name, launcher, device):
    rows, _ = arguments(full_case(n=4), device)
    rows["weights"][:] = 0.5
    clean = call(launcher, rows, beta=0.1)
    where = int(rows["targets"][2]) if "target" in name else (int(rows["targets"][2]) + 1) % 37
    (rows["logits"][:, where] if "logits" in name else rows[name])[2] = math.nan
    out, gradient = call(launcher, rows, beta=0.1)
    assert out.loss[2].isnan()
    assert gradient[2].isnan().all()
    if "logits" in name:
        assert out.logp[2].isnan()
        assert out.entropy[2].isnan()
    others = [0, 1, 3]
    assert torch.equal(gradient[others], clean[1][others])
    assert all(torch.equal(a[others], b[others]) for a, b in zip(out, clean[0], strict=True))


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("advantage", [1.0, -1.0, 0.0])
def test_no_nan_is_laundered(advantage, old, objective, launcher, device):
    rows, _ = arguments(case(n=1, old=old), device)
    rows["advantages"][:] = advantage
    rows["logits"][0, 5] = math.nan
    out, gradient = call(launcher, rows, objective)
    assert out.loss.isnan()
    assert out.mass.isnan()
    # A slope that does not depend on the log-prob is 0 or known also where that is NaN.
    assert gradient.isnan().all() or advantage == 0


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("side", ["target", "old_logp"])
def test_an_impossible_token_gives_no_plausible_loss(side, objective, launcher, device):
    rows, _ = arguments(case(n=2), device)
    rows["weights"][:] = 1.0
    rows["advantages"][:] = torch.tensor([1.0, -1.0], device=device)
    if side == "target":
        rows["logits"][torch.arange(2), rows["targets"]] = -math.inf
    else:
        rows["old_logp"][:] = -math.inf
    out, _ = call(launcher, rows, objective)
    assert out.ratio.isnan().all()
    if side == "target" or objective != "reinforce":
        assert not out.loss.isfinite().any()


@pytest.mark.parametrize("target", [-100, -1, 37, 2**31 + 3, 2**32 + 3])
def test_a_target_outside_the_vocabulary_is_nan_and_never_read(target, launcher, device):
    rows, _ = arguments(case(n=3), device)
    rows["weights"][:] = 0.5
    clean = call(launcher, rows)
    rows["targets"][1] = target
    out, gradient = call(launcher, rows)
    assert out.loss[1].isnan()
    assert out.logp[1].isnan()
    assert gradient[1].isnan().all()
    assert torch.equal(gradient[[0, 2]], clean[1][[0, 2]])
    assert torch.equal(out.loss[[0, 2]], clean[0].loss[[0, 2]])


@pytest.mark.gpu
@pytest.mark.parametrize("n, v", [(70_000, 33), (16, 151_936), (3, 262_144), (5, 151_669)])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_real_sizes(n, v, dtype, device):
    check_policy_loss(module.policy_loss, full_case(n=n, v=v, dtype=dtype, beta=0.1), device)


@pytest.mark.gpu
def test_more_than_two_to_the_31_entries(device):
    n, v = 16_384, 131_088
    logits = torch.zeros(n, v, dtype=BFLOAT16, device=device)
    few = random_rows(8, v, BFLOAT16, device, masked=0.0)
    logits[-8:] = few["logits"]
    rows = {
        name: torch.cat([torch.zeros(n - 8, dtype=value.dtype, device=device), value])
        for name, value in few.items()
        if name != "logits"
    }
    out = module.policy_loss(logits, **rows, **CLIP, dlogits=logits)
    lone, gradient = call(module.policy_loss, few)
    assert torch.equal(logits[-8:], gradient)
    assert torch.equal(out.loss[-8:], lone.loss)
    assert not logits[:8].any()
