"""token_logprob against the float64 oracle: log-prob, log-sum-exp, entropy, and both gradients.

Grid: tiles of 16 entries, so that a row of 37 has two full ones and a part of a third; the forward
and the gradient of each case. Truth is float64 on the same logits, the baseline float32 arithmetic.
"""

import ast
import dataclasses
import inspect
import math
from pathlib import Path

import pytest
import torch

from grpo_fast import reference
from grpo_fast.testing import assert_close_to_oracle, random_rows
from grpo_kernels import token_logprob as module

SMALL_TILES = [{"BV": 16, "num_warps": 1}]
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    n: int = 7
    v: int = 37
    dtype: torch.dtype = FLOAT32
    gradient_dtype: torch.dtype | None = None
    """None = in place, over the logits."""
    row_stride: int | None = None
    temperature: float | str = 1.0
    """`rows` = one a row."""
    targets: torch.dtype = torch.int64
    entropy: bool = True
    squares: bool = True
    peaked: bool = True
    hidden_block: bool = False
    """The first tile of every row is -inf, with the target of row 1 in it."""


CASES = {
    "plain": Case(gradient_dtype=FLOAT32),
    "log-prob only": Case(entropy=False, squares=False),
    "squares only": Case(entropy=False),
    "temperature, bfloat16": Case(dtype=BFLOAT16, temperature=0.7),
    "temperature a row": Case(temperature="rows"),
    "aligned": Case(v=64, temperature=1.6),
    "one part of a tile": Case(v=9, row_stride=11, targets=torch.int32),
    "one row": Case(n=1, v=65, peaked=False),
    "one entry": Case(n=3, v=1),
    "two entries": Case(n=9, v=2, temperature=0.5, entropy=False),
    "strided, float16": Case(dtype=FLOAT16, row_stride=40, gradient_dtype=FLOAT16),
    "wider gradient": Case(dtype=BFLOAT16, gradient_dtype=FLOAT32),
    "narrower gradient": Case(gradient_dtype=BFLOAT16, entropy=False),
    "flat": Case(n=9, peaked=False),
    "first tile -inf": Case(hidden_block=True),
}


def arguments(case: Case, device) -> dict:
    """logits, targets, temperature, dlogp and dentropy (None without) of a case."""
    rows = random_rows(case.n, case.v, case.dtype, device, seed=case.n, peaked=case.peaked)
    logits, targets = rows["logits"], rows["targets"].to(case.targets)
    if case.hidden_block:
        targets = targets.clamp(min=20)
        targets[1] = 5
        logits[:, :16] = -math.inf
    if case.row_stride:
        wide = torch.full((case.n, case.row_stride), 7.0, dtype=case.dtype, device=device)
        wide[:, : case.v] = logits
        logits = wide[:, : case.v]
    temperature = case.temperature
    if temperature == "rows":
        temperature = torch.rand(case.n, device=device) + 0.5
    dlogp, dentropy = rows["advantages"], rows["old_logp"].cos()
    # A row without any gradient, and rows with one of the two.
    dlogp[: case.n // 3] = 0.0
    dentropy[: case.n // 6] = 0.0
    dentropy[case.n // 2 :] *= (torch.arange(case.n - case.n // 2, device=device) % 2).float()
    return {
        "logits": logits,
        "targets": targets,
        "temperature": temperature,
        "dlogp": dlogp,
        "dentropy": dentropy if case.entropy else None,
    }


def expected(rows: dict, dtype: torch.dtype) -> tuple:
    """logp, lse, entropy, squares and the gradient of the reference in `dtype`."""
    logits = rows["logits"].detach().to(dtype)
    scale = rows["temperature"]
    scale = scale.to(dtype) if isinstance(scale, torch.Tensor) else scale
    # Autograd's slope of p log p at p = 0 is NaN: -1e30 has the same probability, 0.
    leaf = logits.clamp(min=-1e30).requires_grad_()
    out = reference.token_logprob(leaf, rows["targets"], temperature=scale)
    total = (out.logp * rows["dlogp"].to(dtype)).sum()
    if rows["dentropy"] is not None:
        total = total + (out.entropy * rows["dentropy"].to(dtype)).sum()
    (gradient,) = torch.autograd.grad(total, leaf)
    return *reference.token_logprob(logits, rows["targets"], temperature=scale), gradient


def check_token_logprob(token_logprob_fwd, token_logprob_bwd, case: Case, device) -> None:
    """The comparison of this file, for any pair of launchers."""
    rows = arguments(case, device)
    eager, oracle = (expected(rows, dtype) for dtype in (FLOAT32, torch.float64))
    call = {"temperature": rows["temperature"]}
    wanted = {"return_entropy": case.entropy, "return_squares": case.squares}
    out = token_logprob_fwd(rows["logits"], rows["targets"], **call, **wanted)
    assert (out.entropy is not None) == case.entropy
    assert (out.other_squares is not None) == case.squares
    gradient = rows["logits"]
    if case.gradient_dtype is not None:
        gradient = torch.full_like(gradient, math.nan, dtype=case.gradient_dtype)
    returned = token_logprob_bwd(
        rows["dlogp"],
        rows["dentropy"],
        rows["logits"],
        rows["targets"],
        out.lse,
        out.entropy,
        **call,
        out=gradient,
    )
    assert returned is gradient
    names = ("logp", "lse", "entropy", "other_squares", "gradient")
    for name, mine, same, exact in zip(names, (*out, gradient), eager, oracle, strict=True):
        if mine is not None:
            assert_close_to_oracle(mine, same.to(mine.dtype), exact, name=name)


@pytest.fixture
def launchers(monkeypatch, guard):
    """Forward and backward in small tiles, each argument between canaries."""
    for name in ("CONFIGS", "GRADIENT_CONFIGS"):
        monkeypatch.setattr(module, name, SMALL_TILES)
    return guard(module.token_logprob_fwd), guard(module.token_logprob_bwd)


def both(launchers, rows: dict, **options):
    """Forward results, and the gradient as the launcher allocates it."""
    forward, backward = launchers
    call = {"temperature": rows["temperature"]} | options
    out = forward(rows["logits"], rows["targets"], **call, return_squares=True)
    gradient = backward(
        rows["dlogp"],
        rows["dentropy"],
        rows["logits"],
        rows["targets"],
        out.lse,
        out.entropy,
        **call,
    )
    return out, gradient


@pytest.mark.parametrize("name", CASES)
def test_against_the_oracle(name, launchers, device):
    check_token_logprob(*launchers, CASES[name], device)


@pytest.mark.parametrize("v", [257, 2064])
def test_own_tiles(v, guard, device):
    launchers = (guard(module.token_logprob_fwd), guard(module.token_logprob_bwd))
    check_token_logprob(*launchers, Case(n=2, v=v), device)


def test_gradient_is_allocated_like_logits_and_in_place_changes_no_bit(launchers, device):
    rows = arguments(Case(dtype=BFLOAT16, row_stride=41), device)
    out, apart = both(launchers, rows)
    assert apart.dtype == BFLOAT16
    assert apart.shape == (7, 37)
    inside = launchers[1](
        rows["dlogp"],
        rows["dentropy"],
        rows["logits"],
        rows["targets"],
        out.lse,
        out.entropy,
        out=rows["logits"],
    )
    assert inside is rows["logits"]
    assert torch.equal(inside, apart)


def test_squares_on_request_change_no_bit_and_are_off_by_default(launchers, device):
    rows = arguments(Case(), device)
    out, _ = both(launchers, rows)
    less = launchers[0](rows["logits"], rows["targets"])
    assert less.other_squares is None
    assert all(torch.equal(a, b) for a, b in zip(less[:3], out[:3], strict=True))


def test_rows_do_not_see_each_other(launchers, device):
    rows = arguments(Case(n=5), device)
    out, gradient = both(launchers, rows)
    part = {
        name: value[[3, 1]] if isinstance(value, torch.Tensor) else value
        for name, value in rows.items()
    }
    few, few_gradient = both(launchers, part)
    assert torch.equal(few_gradient, gradient[[3, 1]])
    assert all(torch.equal(a, b[[3, 1]]) for a, b in zip(few, out, strict=True))


def test_one_temperature_is_many_equal_ones(launchers, device):
    rows = arguments(Case(n=3, temperature=0.7), device)
    one = both(launchers, rows)
    many = both(launchers, rows, temperature=torch.full((3,), 0.7, device=device))
    assert_close_to_oracle(many[1], one[1], one[1], name="gradient")
    assert_close_to_oracle(many[0].logp, one[0].logp, one[0].logp, name="logp")


def test_no_rows(launchers, device):
    rows = arguments(Case(n=0, v=5), device)
    out, gradient = both(launchers, rows)
    assert all(x.shape == (0,) and x.dtype == FLOAT32 for x in out)
    assert gradient.shape == (0, 5)


def test_rows_without_incoming_gradient_are_zero_and_unread(launchers, device):
    rows = arguments(Case(n=3, v=20), device)
    rows["dlogp"][:] = torch.tensor([0.0, -0.0, 1.0])
    rows["dentropy"][:] = 0.0
    rows["logits"][:2] = math.nan
    rows["targets"][:2] = -100
    _, gradient = both(launchers, rows)
    assert not gradient[:2].any()
    assert gradient[2].any()


@pytest.mark.parametrize("at_target", [True, False])
def test_nan_is_seen_in_its_row_and_only_there(at_target, launchers, device):
    rows = arguments(Case(n=3), device)
    rows["dlogp"][:] = 1.0
    clean, clean_gradient = both(launchers, rows)
    target = int(rows["targets"][1])
    rows["logits"][1, target if at_target else (target + 1) % 37] = math.nan
    out, gradient = both(launchers, rows)
    assert all(x[1].isnan() for x in out)
    assert gradient[1].isnan().all()
    others = [0, 2]
    assert all(torch.equal(a[others], b[others]) for a, b in zip(out, clean, strict=True))
    assert torch.equal(gradient[others], clean_gradient[others])


@pytest.mark.parametrize("target", [-100, -1, 37, 2**32 + 3])
def test_a_target_outside_the_vocabulary_is_nan_and_never_read(target, launchers, device):
    rows = arguments(Case(n=2), device)
    rows["dlogp"][:] = 1.0
    rows["targets"][1] = target
    out, gradient = both(launchers, rows)
    assert out.logp[1].isnan()
    assert gradient[1].isnan().all()
    assert out.logp[0].isfinite()
    assert gradient[0].isfinite().all()


def test_impossible_target(launchers, device):
    """Its log-prob is -inf, no other row's and no NaN."""
    rows = arguments(Case(n=2, entropy=False), device)
    rows["logits"][1, int(rows["targets"][1])] = -math.inf
    out, _ = both(launchers, rows)
    assert out.logp[1] == -math.inf
    assert out.lse.isfinite().all()
    assert out.entropy.isfinite().all()


def test_a_row_of_impossible_tokens_is_nan(launchers, device):
    rows = arguments(Case(n=1), device)
    rows["dlogp"][:] = 1.0
    rows["logits"][:] = -math.inf
    out, gradient = both(launchers, rows)
    assert out.logp.isnan()
    assert out.entropy.isnan()
    assert gradient.isnan().all()


def test_vocabulary_of_one(launchers, device):
    rows = arguments(Case(n=3, v=1), device)
    out, gradient = both(launchers, rows)
    assert not out.logp.any()
    assert not out.entropy.any()
    assert not out.other_squares.any()
    assert not gradient.any()
    assert torch.equal(out.lse, rows["logits"][:, 0])


def test_confident_tokens_keep_their_digits(launchers, device):
    """p = 1 - 1e-9: log p, entropy and gradient right to six digits, where 1 - p would be 0."""
    logits = torch.full((1, 37), -24.0, device=device)
    logits[0, 20] = 0.0
    rows = {
        "logits": logits,
        "targets": torch.tensor([20], device=device),
        "temperature": 1.0,
        "dlogp": torch.ones(1, device=device),
        "dentropy": None,
    }
    out, gradient = both(launchers, rows)
    others = 36 * math.exp(-24.0)
    assert float(out.logp) == pytest.approx(-others, rel=1e-6)
    assert float(out.entropy) == pytest.approx(others * 25, rel=1e-6)
    assert float(out.other_squares) == pytest.approx(36 * math.exp(-48.0), rel=1e-6)
    assert float(gradient[0, 20]) == pytest.approx(others, rel=1e-6)
    assert float(gradient[0, 0]) == pytest.approx(-math.exp(-24.0), rel=1e-6)


def test_expanded_rows_are_read(monkeypatch, device):
    """Row stride 0: one row of logits, scored against many targets."""
    for name in ("CONFIGS", "GRADIENT_CONFIGS"):
        monkeypatch.setattr(module, name, SMALL_TILES)
    row = torch.randn(1, 20, device=device)
    targets = torch.arange(4, device=device)
    options = {"return_squares": True}
    found = module.token_logprob_fwd(row.expand(4, 20), targets, **options)
    wanted = module.token_logprob_fwd(row.expand(4, 20).contiguous(), targets, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_lengths_and_temperature_are_run_time_arguments():
    for kernel in (module._token_logprob_fwd_kernel, module._token_logprob_bwd_kernel):
        parameters = inspect.signature(kernel.fn).parameters
        assert {"v_units", "stride_logits", "temperature"} <= parameters.keys()
        constants = {name for name, p in parameters.items() if p.annotation is not p.empty}
        assert constants == {"UNIT", "BV"}


KERNELS = sorted(Path(module.__file__).parent.glob("*.py"))


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_program_ids_are_widened_before_they_meet_a_stride(path):
    """Row x stride passes 2^31 at 14,000 rows of a large vocabulary; int32 would wrap silently."""
    source = ast.unparse(ast.parse(path.read_text(encoding="utf-8")))
    assert source.count("tl.program_id(") == source.count("tl.program_id(0).to(tl.int64)")


@pytest.mark.gpu
def test_other_lengths_and_temperatures_compile_nothing(device):
    kernels = (module._token_logprob_fwd_kernel, module._token_logprob_bwd_kernel)

    def compiled() -> int:
        return sum(len(caches[0]) for k in kernels for caches in k.device_caches.values())

    launchers = (module.token_logprob_fwd, module.token_logprob_bwd)
    both(launchers, arguments(Case(n=4, v=1024), device))
    before = compiled()
    for k in range(1, 6):
        both(launchers, arguments(Case(n=4 + k, v=1024 + 16 * k, temperature=k), device))
    assert compiled() == before


@pytest.mark.gpu
@pytest.mark.parametrize("n, v", [(70_000, 33), (16, 151_936), (3, 262_144), (5, 151_669)])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
def test_real_sizes(n, v, dtype, device):
    launchers = (module.token_logprob_fwd, module.token_logprob_bwd)
    check_token_logprob(*launchers, Case(n=n, v=v, dtype=dtype), device)


BAD_FORWARD = {
    "targets has shape (4,), expected (3,)": {"targets": torch.zeros(4, dtype=torch.int64)},
    "targets is torch.strided torch.float32, expected": {"targets": torch.zeros(3)},
    "logits has shape (5,), expected [N, V]": {"logits": torch.zeros(5)},
    "logits is torch.strided torch.float64, expected": {"logits": torch.zeros(3, 5).double()},
    "logits has strides (1, 3), expected 1": {"logits": torch.zeros(5, 3).t()},
    "temperature is nan, expected": {"temperature": math.nan},
}


@pytest.mark.parametrize("message", BAD_FORWARD)
def test_a_wrong_argument_of_the_forward_is_named(message, device):
    good = {"logits": torch.zeros(3, 5), "targets": torch.zeros(3, dtype=torch.int64)}
    spoiled = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in (good | BAD_FORWARD[message]).items()
    }
    with pytest.raises(ValueError) as raised:  # noqa: PT011  the message is compared below
        module.token_logprob_fwd(spoiled.pop("logits"), spoiled.pop("targets"), **spoiled)
    assert str(raised.value).startswith(message)


def test_a_wrong_argument_of_the_backward_is_named(device):
    rows = arguments(Case(n=3, v=5), device)
    lse = torch.zeros(3, device=device)

    def call(**changed):
        names = ("dlogp", "dentropy", "logits", "targets", "lse", "entropy")
        given = rows | {"lse": lse, "entropy": lse} | changed
        module.token_logprob_bwd(*(given[name] for name in names), out=changed.get("out"))

    with pytest.raises(ValueError, match=r"dlogp has shape \(2,\), expected \(3,\)"):
        call(dlogp=lse[:2])
    with pytest.raises(ValueError, match="lse is torch.strided torch.float16"):
        call(lse=lse.half())
    with pytest.raises(ValueError, match="entropy is NoneType, expected a torch.Tensor"):
        call(entropy=None)
    with pytest.raises(ValueError, match="out has row stride 0, expected at least 5"):
        call(out=torch.zeros(5, device=device).expand(3, 5))
