"""policy_loss against the float64 oracle: six results a row and the gradient in the logits.

Grid: tiles of 16 entries, so that a row of 37 has two full ones and a part of a third (one of 64
only full ones, one of 9 a single part); every option at least once with and once without its
neighbours. Truth is float64 on the same logits, the baseline float32 arithmetic on them.
"""

import dataclasses
import inspect
import itertools
import math
import os
import subprocess
import sys

import pytest
import torch

from grpo_fast import reference
from grpo_fast.testing import assert_close_to_oracle, random_rows
from grpo_kernels import policy_loss as module

SMALL_TILES = [{"BV": 16, "num_warps": 1}]
CLIP = {"low": 0.8, "high": 1.28}
# Bounds with rows on both sides of each in the cases below.
OBJECTIVES = {
    "clip": CLIP,
    "cispo": {"low": 0.7, "high": 1.3},
    "sapo": {"low": 1.4, "high": 0.7},
    "dppo_tv": {"low": 0.02, "high": 0.16, "cap": 1.3},
    "dppo_kl": {"low": 0.005, "high": 0.07, "cap": 1.3},
    "dro": {"low": 0.7},
    "reinforce": {},
}
ESTIMATORS = ("k1", "k2", "k3", "abs", "k1+", "k3+", "abs+")
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Arguments of one call; what is not said is the plain on-policy loss in float32."""

    n: int = 7
    v: int = 37
    dtype: torch.dtype = FLOAT32
    gradient_dtype: torch.dtype | None = None
    """None = in place, over the logits."""
    row_stride: int | None = None
    old: bool = True
    ref: bool = False
    policy: bool = False
    """Weights of the policy term."""
    bonus: bool = False
    """Weights of the entropy."""
    temperature_rows: bool = False
    targets: torch.dtype = torch.int64
    peaked: bool = True
    apart: float = 0.0
    """Old log-probs this much higher and lower, in turn."""
    hidden_block: bool = False
    """The first tile of every row is -inf, and so is all but the target in row 0."""
    options: tuple[tuple[str, object], ...] = ()


def case(**fields) -> Case:
    names = {field.name for field in dataclasses.fields(Case)}
    options = tuple((name, value) for name, value in fields.items() if name not in names)
    return Case(
        **{name: value for name, value in fields.items() if name in names},
        options=options,
    )


CASES = {
    "plain": case(gradient_dtype=FLOAT32),
    "in place": case(),
    "temperature, bfloat16": case(dtype=BFLOAT16, temperature=0.7),
    "temperature a row": case(temperature_rows=True, ref=True, beta=0.1),
    "aligned": case(v=64, temperature=1.6),
    "one part of a tile": case(v=9, row_stride=11, targets=torch.int32),
    "one row": case(n=1, v=65, peaked=False),
    "one entry": case(n=3, v=1, ref=True, beta=0.1),
    "two entries": case(n=9, v=2, temperature=0.5),
    "strided, float16": case(dtype=FLOAT16, row_stride=40, gradient_dtype=FLOAT16),
    "strided in place": case(row_stride=39, targets=torch.int32),
    "wider gradient": case(dtype=BFLOAT16, gradient_dtype=FLOAT32),
    "narrower gradient": case(gradient_dtype=BFLOAT16),
    "flat": case(n=9, peaked=False),
    "on policy": case(old=False),
    "on policy, cap, k3": case(old=False, ref=True, beta=0.3, cap=1.5),
    "KL measured only": case(ref=True, beta=0.0),
    "asymmetric clip": case(n=16, v=9, apart=0.4, low=0.95, high=1.5),
    "cap": case(n=16, v=9, apart=0.6, cap=1.35),
    "dual clip": case(n=16, v=9, apart=0.6, dual_clip=1.5),
    "dual clip below the cap": case(n=16, v=9, apart=0.6, cap=1.9, dual_clip=1.4),
    "narrow clamp": case(n=12, v=9, ref=True, beta=0.5, log_ratio_clamp=0.25),
    "first tile -inf": case(hidden_block=True, ref=True, beta=0.1, bonus=True),
    "policy weights": case(n=9, policy=True, ref=True, beta=0.5),
    "entropy": case(n=16, v=9, apart=0.5, bonus=True),
    "entropy, temperature a row, bfloat16": case(
        dtype=BFLOAT16, bonus=True, temperature_rows=True, gradient_dtype=FLOAT32
    ),
    "entropy, one entry": case(n=3, v=1, bonus=True),
    "entropy, one row, ragged": case(n=1, v=65, row_stride=70, bonus=True),
    "sapo, steep": case(n=16, v=9, apart=0.6, objective="sapo", low=150.0, high=120.0),
    "everything": case(
        n=16,
        apart=0.5,
        ref=True,
        policy=True,
        bonus=True,
        temperature_rows=True,
        beta=0.5,
        kl_estimator="k3+",
        bias_corrected_kl=True,
        **CLIP | {"cap": 1.6, "dual_clip": 1.5},
    ),
}
for name, bounds in OBJECTIVES.items():
    CASES[name] = case(n=20, v=9, apart=0.5, temperature=1.3, objective=name, **bounds)
    CASES[f"{name}, on policy, weighted"] = case(
        old=False, policy=True, bonus=True, objective=name, **bounds
    )
for name in ESTIMATORS:
    CASES[name] = case(n=9, ref=True, beta=0.5, kl_estimator=name)
    CASES[f"{name}, bias-corrected"] = case(
        n=9, ref=True, beta=0.5, kl_estimator=name, bias_corrected_kl=True
    )


def arguments(case: Case, device) -> tuple[dict, dict]:
    """(rows, options): tensors, then numbers, of a call."""
    rows = random_rows(case.n, case.v, case.dtype, device, seed=case.n, peaked=case.peaked)
    # One live row at least, one masked one where there is room.
    rows["weights"][-1] = 0.5 / case.n
    rows["weights"][: case.n // 5] = 0.0
    rows["targets"] = rows["targets"].to(case.targets)
    rows["old_logp"] += case.apart * (1 - 2 * (torch.arange(case.n, device=device) % 2))
    rows["old_logp"].clamp_(max=0.0)
    if case.hidden_block:
        rows["targets"] = rows["targets"].clamp(min=20)
        rows["logits"][:, :16] = -math.inf
        rows["weights"][0] = 0.3
        target = int(rows["targets"][0])
        rows["logits"][0] = -math.inf
        rows["logits"][0, target] = 3.0
        rows["old_logp"][0] = 0.1
        rows["ref_logp"][0] = -0.1
    if case.row_stride:
        wide = torch.full((case.n, case.row_stride), 7.0, dtype=case.dtype, device=device)
        wide[:, : case.v] = rows["logits"]
        rows["logits"] = wide[:, : case.v]
    if case.temperature_rows:
        rows["temperature"] = torch.rand(case.n, device=device) + 0.5
    rows = {
        name: value
        for name, value in rows.items()
        if name not in {"old_logp", "ref_logp"} or getattr(case, name[:3])
    }
    generator = torch.Generator().manual_seed(case.n)
    live = rows["weights"] != 0
    if case.policy:
        # As corrections and masks have them: around 1, some 0.
        weights = torch.rand(case.n, generator=generator) * 2
        rows["policy_weights"] = torch.where(weights < 0.4, 0.0, weights).to(device)
    if case.bonus:
        weights = torch.rand(case.n, generator=generator) / case.n
        weights[case.n // 2] = 0.0
        rows["entropy_weights"] = torch.where(live, weights.to(device), 0.0)
    options = dict(case.options)
    return rows, options if "objective" in options else CLIP | options


def expected(rows: dict, options: dict, dtype: torch.dtype) -> tuple:
    """Results of the reference in `dtype`, and d(sum(loss)) / d(logits)."""
    rows = {
        name: value.to(dtype) if value.is_floating_point() else value
        for name, value in rows.items()
    }
    leaf = rows["logits"] = rows["logits"].detach().clone().requires_grad_()
    out = reference.policy_loss(**rows, **options)
    (gradient,) = torch.autograd.grad(out.loss.sum(), leaf)
    return *(None if x is None else x.detach() for x in out), gradient


def check_policy_loss(policy_loss, case: Case, device) -> None:
    """The comparison of this file, for any launcher."""
    rows, options = arguments(case, device)
    eager, oracle = (expected(rows, options, dtype) for dtype in (FLOAT32, torch.float64))
    if case.gradient_dtype is None:
        gradient = rows["logits"]
    else:
        gradient = torch.full_like(rows["logits"], math.nan, dtype=case.gradient_dtype)
    out = policy_loss(**rows, **options, dlogits=gradient)
    assert (out.kl is not None) == case.ref
    names = ("loss", "logp", "entropy", "ratio", "kl", "mass", "slope", "dlogits")
    for name, mine, same, exact in zip(names, (*out, gradient), eager, oracle, strict=True):
        if mine is not None:
            same = same.to(mine.dtype)
            assert_close_to_oracle(mine, same, exact, name=name)
    masked = rows["weights"] == 0
    for found in (*out, gradient):
        assert found is None or not found[masked].any()


@pytest.fixture
def launcher(monkeypatch, guard):
    """policy_loss in small tiles, each argument between canaries."""
    monkeypatch.setattr(module, "CONFIGS", SMALL_TILES)
    return guard(module.policy_loss)


def call(launcher, rows: dict, objective: str = "clip", **options):
    """(results, gradient in other memory than the logits)."""
    gradient = torch.full_like(rows["logits"], math.nan)
    options = OBJECTIVES[objective] | options
    return launcher(**rows, objective=objective, **options, dlogits=gradient), gradient


def full_case(**fields) -> Case:
    """Every optional vector is there."""
    return case(ref=True, policy=True, bonus=True, **fields)


def assert_same_bits(found, wanted) -> None:
    (rows, gradient), (other_rows, other_gradient) = found, wanted
    for name, a, b in zip(rows._fields, rows, other_rows, strict=True):
        assert a is b is None or torch.equal(a, b), name
    assert torch.equal(gradient, other_gradient)


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


def test_a_row_of_impossible_tokens_is_nan(launcher, device):
    rows, _ = arguments(case(n=1), device)
    rows["logits"][:] = -math.inf
    out, gradient = call(launcher, rows)
    assert out.logp.isnan().all()
    assert out.loss.isnan().all()
    assert gradient.isnan().all()


def test_vocabulary_of_one(launcher, device):
    rows = random_rows(3, 1, device=device, masked=0.0)
    out, gradient = call(launcher, rows)
    assert not out.logp.any()
    assert not out.entropy.any()
    assert not out.mass.any()
    assert not gradient.any()


def test_extreme_logits(launcher, device):
    rows = random_rows(4, 37, device=device, masked=0.0)
    rows["entropy_weights"] = torch.full((4,), 40.0, device=device)
    rows["logits"][0] *= 1e37
    rows["logits"][1] = 3e38
    rows["logits"][2] = -3e38
    rows["logits"][3, 4] = 3e38
    rows["targets"][:] = 4
    rows["old_logp"][:] = -3.0
    out, gradient = call(launcher, rows)
    assert gradient.isfinite().all()
    assert all(x.isfinite().all() for x in out if x is not None)
    assert out.logp[1:3].tolist() == pytest.approx([-math.log(37)] * 2)
    assert float(out.logp[3]) == 0.0


def test_confident_tokens_keep_their_digits(launcher, device):
    """p = 1 - 1e-9: log p, entropy and gradient right to six digits, where 1 - p would be 0."""
    v = 37
    logits = torch.full((1, v), -24.0, dtype=FLOAT32, device=device)
    logits[0, 20] = 0.0
    rows = {
        "logits": logits,
        "targets": torch.tensor([20], device=device),
        "advantages": torch.ones(1, device=device),
        "weights": torch.ones(1, device=device),
    }
    out, gradient = call(launcher, rows)
    others = 36 * math.exp(-24.0)
    assert float(out.mass) == pytest.approx(others * math.sqrt(1 + 1 / 36), rel=1e-6)
    assert float(out.logp) == pytest.approx(-others, rel=1e-6)
    assert float(out.entropy) == pytest.approx(others * 25, rel=1e-6)
    assert float(gradient[0, 20]) == pytest.approx(-others, rel=1e-6)
    assert float(gradient[0, 0]) == pytest.approx(math.exp(-24.0), rel=1e-6)
    rows["advantages"][:] = 0.0
    rows["entropy_weights"] = torch.ones(1, device=device)
    out, gradient = call(launcher, rows)
    assert not out.mass.any()
    # p (log p + H): H is 25 others, and log p is -others at the target and -24 elsewhere.
    assert float(gradient[0, 20]) == pytest.approx(24 * others, rel=1e-6)
    assert float(gradient[0, 0]) == pytest.approx(-24 * math.exp(-24.0), rel=1e-6)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_mass_is_the_norm_of_the_gradient_without_its_entropy_part(objective, launcher, device):
    rows, _ = arguments(case(ref=True, temperature_rows=True, policy=True), device)
    kept = {"beta": 0.3, "bias_corrected_kl": True}
    out, gradient = call(launcher, rows, objective, **kept)
    assert_close_to_oracle(out.mass, out.mass, gradient.double().norm(dim=1), name="mass")
    rows["entropy_weights"] = torch.full_like(rows["weights"], 0.7)
    more, other_gradient = call(launcher, rows, objective, **kept)
    assert torch.equal(more.mass, out.mass)
    assert not torch.equal(other_gradient, gradient)


@pytest.mark.parametrize("shift", [100.0, 1e4])
def test_far_off_log_ratios(shift, launcher, device):
    """Finite everywhere; clipped rows teach exactly nothing, the others at the clamp's limit."""
    signs = list(itertools.product((1.0, -1.0), (1.0, -1.0, 0.0)))
    rows = random_rows(len(signs), 9, device=device, masked=0.0, peaked=False)
    rows["advantages"] = torch.tensor([advantage for _, advantage in signs], device=device)
    logp = reference.token_logprob(rows["logits"], rows["targets"]).logp
    rows["old_logp"] = logp - torch.tensor([sign for sign, _ in signs], device=device) * shift
    del rows["ref_logp"]
    out, gradient = call(launcher, rows)
    assert gradient.isfinite().all()
    assert all(x.isfinite().all() for x in out if x is not None)
    for row, (sign, advantage) in enumerate(signs):
        # Ratio far above with A > 0, or far below with A < 0: clipped.
        live = advantage != 0 and sign * advantage < 0
        assert bool(gradient[row].any()) == live
        wanted = math.exp(20.0 * sign)
        assert float(out.ratio[row]) == pytest.approx(wanted, rel=1e-5)
    loss = float(out.loss[1]) / float(rows["weights"][1])
    assert loss == pytest.approx(math.exp(20.0), rel=1e-5)


@pytest.mark.parametrize("shift", [100.0, -100.0, 1e4, -1e4])
@pytest.mark.parametrize("objective", ["cispo", "sapo", "dppo_tv", "dppo_kl", "dro", "reinforce"])
def test_far_off_log_ratios_of_other_objectives(objective, shift, launcher, device):
    """Finite, and the sides on which a row still teaches are the objective's."""
    rows = random_rows(3, 9, device=device, masked=0.0, peaked=False)
    rows["advantages"] = torch.tensor([1.0, -1.0, 0.0], device=device)
    # A token that has come from nothing, or has gone there.
    rows["logits"][torch.arange(3), rows["targets"]] = 5.0 if shift > 0 else shift
    logp = reference.token_logprob(rows["logits"], rows["targets"]).logp
    rows["old_logp"] = logp - shift if shift > 0 else torch.full_like(logp, -0.5)
    del rows["ref_logp"]
    out, gradient = call(launcher, rows, objective)
    assert gradient.isfinite().all()
    assert all(x.isfinite().all() for x in out if x is not None)
    teaches = {
        "cispo": [True, True, False],
        # The gate is flat where the ratio is large.
        "sapo": [shift < 0, shift < 0, False],
        "dppo_tv": [shift < 0, shift > 0, False],
        "dppo_kl": [shift < 0, shift > 0, False],
        # It pulls back whatever the advantage.
        "dro": [True, True, True],
        "reinforce": [True, True, False],
    }
    assert gradient.any(1).tolist() == teaches[objective]


def test_dppo_kl_takes_an_old_log_prob_that_was_rounded_above_0_as_0(launcher, device):
    """Such a token was certain; one that is not any more has moved too far down."""
    rows = random_rows(2, 9, device=device, masked=0.0, peaked=False)
    del rows["ref_logp"]
    rows["advantages"] = torch.tensor([-1.0, 1.0], device=device)
    rows["old_logp"][:] = 1e-6
    _, gradient = call(launcher, rows, "dppo_kl")
    assert gradient.any(1).tolist() == [False, True]


@pytest.mark.parametrize("ratio, blocked", [(1.49, False), (1.51, True)])
def test_dual_clip_bounds_what_a_negative_advantage_costs(ratio, blocked, launcher, device):
    rows = random_rows(2, 9, device=device, masked=0.0, peaked=False)
    rows["advantages"] = torch.tensor([-1.0, 1.0], device=device)
    rows["weights"][:] = 1.0
    logp = reference.token_logprob(rows["logits"], rows["targets"]).logp
    rows["old_logp"] = logp - math.log(ratio)
    del rows["ref_logp"]
    out, gradient = call(launcher, rows, high=2.0, dual_clip=1.5)
    assert float(out.loss[0]) == pytest.approx(min(ratio, 1.5), rel=1e-5)
    assert bool(gradient[0].any()) != blocked
    assert gradient[1].any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shift", [100.0, -100.0])
def test_far_off_reference(estimator, shift, launcher, device):
    rows = random_rows(2, 9, device=device, masked=0.0, peaked=False)
    del rows["old_logp"]
    logp = reference.token_logprob(rows["logits"], rows["targets"]).logp
    rows["ref_logp"] = logp - shift
    rows["advantages"][:] = 0.0
    out, gradient = call(launcher, rows, beta=0.5, kl_estimator=estimator)
    d = math.copysign(20.0, shift)
    wanted = {"k1": d, "k2": 200.0, "k3": math.exp(-d) - 1 + d, "abs": 20.0}
    assert out.kl.tolist() == pytest.approx([wanted[estimator.removesuffix("+")]] * 2, rel=1e-5)
    # Descent on a policy above its reference lowers the token, and the other way round.
    at_target = gradient[torch.arange(2), rows["targets"]]
    assert (torch.sign(at_target) == math.copysign(1.0, d if estimator != "k1" else 1.0)).all()


def test_own_log_probs_as_old_ones_are_no_old_ones(launcher, device):
    rows, _ = arguments(case(old=False), device)
    alone = call(launcher, rows)
    assert (alone[0].ratio[rows["weights"] != 0] == 1.0).all()
    rows["old_logp"] = alone[0].logp
    assert_same_bits(call(launcher, rows), alone)


def test_a_ratio_on_the_bound_still_teaches(launcher, device):
    rows = random_rows(2, 9, device=device, masked=0.0, peaked=False)
    rows = {name: value for name, value in rows.items() if name not in {"old_logp", "ref_logp"}}
    rows["advantages"] = torch.tensor([1.0, -1.0], device=device)
    _, gradient = call(launcher, rows, low=1.0, high=1.0, cap=1.0, dual_clip=1.0)
    assert gradient.any(1).all()


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_zero_advantage_reads_no_logits_for_its_gradient(objective, launcher, device):
    rows, _ = arguments(case(n=2, v=9, old=False), device)
    rows["weights"][:] = 1.0
    rows["advantages"][:] = torch.tensor([0.0, -0.0], device=device)
    _, gradient = call(launcher, rows, objective)
    assert not gradient.any()
    # Positive zeros: no bit of the buffer is set.
    assert not torch.signbit(gradient).any()


NUMBERS = (
    "v_units",
    "stride_logits",
    "stride_dlogits",
    "temperature",
    "low",
    "high",
    "cap",
    "dual_clip",
    "beta",
    "log_ratio_clamp",
)


def test_hyper_parameters_and_lengths_are_run_time_arguments():
    kernel = module._policy_loss_kernel
    parameters = inspect.signature(kernel.fn).parameters
    assert set(NUMBERS) <= parameters.keys()
    constants = {name for name, p in parameters.items() if p.annotation is not p.empty}
    flags = {"OBJECTIVE", "ESTIMATOR", "K2_SLOPE", "BIAS_CORRECTED"}
    assert constants == flags | {"UNIT", "BV"}


@pytest.mark.gpu
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_other_hyper_parameters_and_lengths_compile_nothing(objective, device):
    kernel = module._policy_loss_kernel

    def compiled() -> int:
        return sum(len(caches[0]) for caches in kernel.device_caches.values())

    rows = random_rows(4, 1024, device=device)
    call(module.policy_loss, rows, objective, beta=0.1)
    before = compiled()
    for k in range(1, 6):
        rows = random_rows(3 + k, 1024 + 16 * k, device=device)
        call(
            module.policy_loss,
            rows,
            objective,
            beta=k,
            low=1 / k,
            high=k,
            cap=2 + k,
            dual_clip=1 + k,
            temperature=k,
            log_ratio_clamp=k,
        )
    assert compiled() == before


def test_rows_are_counted_on_the_first_grid_dimension(monkeypatch):
    """CUDA's other dimensions end at 65,535."""
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(module, "_policy_loss_kernel", Recorder())
    rows = {
        name: value.expand(70_000, *value.shape[1:]).contiguous()
        for name, value in random_rows(1, 1).items()
    }
    module.policy_loss(**rows, **CLIP)
    assert grids == [(70_000,)]


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


def wrong(rows: dict, name: str, device) -> dict:
    """Rows with one argument spoiled."""
    n, v = rows["logits"].shape
    spoiled = {
        "shape": {"advantages": torch.zeros(n + 1, device=device)},
        "dtype": {"targets": rows["targets"].to(torch.int16)},
        "float64": {"logits": rows["logits"].double()},
        "half vector": {"weights": rows["weights"].half()},
        "stride": {"logits": torch.zeros(v, n, device=device).t()},
        "vector stride": {"old_logp": torch.zeros(2 * n, device=device)[::2]},
        "policy weights": {"policy_weights": torch.zeros(n, 1, device=device)},
        "entropy weights": {"entropy_weights": torch.zeros(n, device=device).half()},
        "device": {"ref_logp": torch.zeros(n, device="meta")},
        "no tensor": {"weights": 1.0},
        "one dimension": {"logits": rows["logits"][0]},
        "no entries": {"logits": rows["logits"][:, :0]},
        "overlap": {"dlogits": torch.zeros(v, device=device).expand(n, v)},
        "gradient shape": {"dlogits": torch.zeros(n, v + 1, device=device)},
        "temperature": {"temperature": 0.0},
        "temperature shape": {"temperature": torch.ones(n, 1, device=device)},
        "objective": {"objective": "ppo"},
        "estimator": {"kl_estimator": "k2+"},
    }
    return rows | spoiled[name]


@pytest.mark.parametrize(
    "name, message",
    [
        ("shape", r"advantages has shape \(4,\), expected \(3,\)"),
        (
            "dtype",
            "targets is torch.strided torch.int16, expected a dense tensor of int64 or int32",
        ),
        ("float64", "logits is torch.strided torch.float64, expected .* float32 or bfloat16"),
        ("half vector", "weights is torch.strided torch.float16, expected .* float32"),
        ("stride", r"logits has strides \(1, 3\), expected 1 in the last dimension"),
        ("vector stride", r"old_logp has strides \(2,\), expected 1"),
        ("device", "ref_logp is on meta, expected "),
        ("no tensor", "weights is float, expected a torch.Tensor"),
        ("one dimension", r"logits has shape \(5,\), expected \[N, V\]"),
        ("no entries", r"logits has shape \(3, 0\), expected \[N, V\] with V >= 1"),
        ("overlap", "dlogits has row stride 0, expected at least 5"),
        ("gradient shape", r"dlogits has shape \(3, 6\), expected \(3, 5\)"),
        ("temperature", "temperature is 0.0, expected a finite number > 0"),
        ("temperature shape", r"temperature has shape \(3, 1\), expected \(3,\)"),
        ("policy weights", r"policy_weights has shape \(3, 1\), expected \(3,\)"),
        ("entropy weights", "entropy_weights is torch.strided torch.float16"),
        ("objective", "objective is 'ppo', expected one of"),
        ("estimator", "kl_estimator is 'k2\\+', expected one of"),
    ],
)
def test_a_wrong_argument_is_named(name, message, device):
    rows = wrong(random_rows(3, 5, device=device), name, device)
    with pytest.raises(ValueError, match=message):
        module.policy_loss(**rows, **CLIP)


def test_beta_without_reference(device):
    rows = random_rows(3, 5, device=device)
    del rows["ref_logp"]
    with pytest.raises(ValueError, match="ref_logp is None, expected .* for beta = 0.1"):
        module.policy_loss(**rows, **CLIP, beta=0.1)


def test_a_cpu_tensor_without_the_interpreter_says_what_to_do():
    code = (
        "import torch; from grpo_kernels.policy_loss import policy_loss; x = torch.ones(1); "
        "policy_loss(torch.ones(1, 2), torch.zeros(1).long(), x, x)"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: logits is on cpu, expected a CUDA tensor")
    assert "TRITON_INTERPRET=1" in last
    assert "impl='torch'" in last
