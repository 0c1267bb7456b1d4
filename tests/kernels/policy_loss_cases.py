"""Calls of policy_loss and their comparison with the float64 oracle: six results a row and the
gradient in the logits.

Grid: tiles of 16 entries, so that a row of 37 has two full ones and a part of a third (one of 64
only full ones, one of 9 a single part); every option at least once with and once without its
neighbours. Truth is float64 on the same logits, the baseline float32 arithmetic on them.
"""

import dataclasses
import math

import torch

from grpo_fast import reference
from grpo_fast.testing import assert_close_to_oracle, random_rows

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
