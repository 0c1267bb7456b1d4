"""policy_loss at hard numbers: impossible and certain tokens, far ratios, bounds."""

import itertools
import math

import pytest
import torch
from policy_loss_cases import (
    ESTIMATORS,
    FLOAT32,
    OBJECTIVES,
    arguments,
    assert_same_bits,
    call,
    case,
)

from grpo_fast import reference
from grpo_fast.testing import assert_close_to_oracle, random_rows


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
