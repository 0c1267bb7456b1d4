"""The launchers in plain PyTorch against the float64 oracle: the cases and checks of the Triton
kernels' own tests, whole and in blocks of a few entries, rows or vocabulary side by side.
"""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from grpo_fast import reference, torch_kernels
from grpo_fast.testing import assert_close_to_oracle, random_rows


def load(op: str) -> ModuleType:
    path = Path(__file__).parent / f"kernels/test_{op}.py"
    spec = importlib.util.spec_from_file_location(f"checks_of_{op}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


LOGPROB, POLICY = load("token_logprob"), load("policy_loss")


@pytest.fixture(params=["whole", "blocks"])
def blocks(request, monkeypatch) -> None:
    """As they are, or 2 rows x 4 columns of a row of 37: full blocks and part of one."""
    if request.param == "blocks":
        monkeypatch.setattr(torch_kernels, "ENTRIES_PER_CORE", 4)
        monkeypatch.setattr(torch_kernels, "BLOCK_ROWS", 2)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def by_vocabulary(launcher):
    """The launcher on matrices whose rows are strided: the layout of a tile on a CPU."""

    def strided(value):
        matrix = isinstance(value, torch.Tensor) and value.dim() == 2
        return value.t().contiguous().t() if matrix else value

    def call(*args, **kwargs):
        copies = {id(x): strided(x) for x in (*args, *kwargs.values())}
        result = launcher(
            *(copies[id(x)] for x in args), **{k: copies[id(x)] for k, x in kwargs.items()}
        )
        for x in (*args, *kwargs.values()):
            if isinstance(x, torch.Tensor) and x is not copies[id(x)]:
                x.copy_(copies[id(x)])
        given = [x for x in (*args, *kwargs.values()) if copies[id(x)] is result]
        return given[0] if given else result

    return call


@pytest.fixture(params=["rows", "vocabulary"])
def layout(request):
    return by_vocabulary if request.param == "vocabulary" else lambda launcher: launcher


@pytest.mark.parametrize("name", LOGPROB.CASES)
def test_token_logprob(name, blocks, layout):
    launchers = (torch_kernels.token_logprob_fwd, torch_kernels.token_logprob_bwd)
    LOGPROB.check_token_logprob(*map(layout, launchers), LOGPROB.CASES[name], "cpu")


@pytest.mark.parametrize("name", POLICY.CASES)
def test_policy_loss(name, blocks, layout):
    POLICY.check_policy_loss(layout(torch_kernels.policy_loss), POLICY.CASES[name], "cpu")


def test_masked_rows_are_zero_whatever_they_hold(blocks, layout):
    launcher = layout(torch_kernels.policy_loss)
    POLICY.test_masked_rows_are_zero_whatever_they_hold(launcher, "cpu")
    POLICY.test_what_lies_under_the_mask_changes_no_bit(launcher, "cpu")


@pytest.mark.parametrize("name", ["logits", "logits at the target", "old_logp", "ref_logp"])
def test_nan_in_a_live_row_is_seen_there_and_only_there(name, blocks, layout):
    launcher = layout(torch_kernels.policy_loss)
    POLICY.test_nan_in_a_live_row_is_seen_there_and_only_there(name, launcher, "cpu")


def test_log_probs_of_odd_rows(blocks, layout):
    launchers = tuple(
        map(layout, (torch_kernels.token_logprob_fwd, torch_kernels.token_logprob_bwd))
    )
    LOGPROB.test_nan_is_seen_in_its_row_and_only_there(True, launchers, "cpu")
    LOGPROB.test_nan_is_seen_in_its_row_and_only_there(False, launchers, "cpu")
    LOGPROB.test_impossible_target(launchers, "cpu")
    LOGPROB.test_a_row_of_impossible_tokens_is_nan(launchers, "cpu")
    LOGPROB.test_vocabulary_of_one(launchers, "cpu")
    LOGPROB.test_confident_tokens_keep_their_digits(launchers, "cpu")
    LOGPROB.test_no_rows(launchers, "cpu")


def test_rows_without_incoming_gradient_are_zero(blocks):
    rows = LOGPROB.arguments(LOGPROB.Case(n=3, v=20), "cpu")
    rows["dlogp"][:] = torch.tensor([0.0, -0.0, 1.0])
    rows["dentropy"][:] = 0.0
    rows["logits"][0] = math.nan
    rows["logits"][1] = math.inf
    launchers = (torch_kernels.token_logprob_fwd, torch_kernels.token_logprob_bwd)
    _, gradient = LOGPROB.both(launchers, rows)
    assert not gradient[:2].any()
    assert gradient[2].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_row_statistics(dtype, blocks):
    """sum of p^2, on which the gradient's norm rests, and e in a tensor of its own."""
    rows = random_rows(7, 37, dtype)
    logits, index = rows["logits"], rows["targets"][:, None]
    exact = torch.promote_types(dtype, torch.float32)
    exps = torch.empty(7, 37, dtype=exact)
    out = torch_kernels.row_statistics(logits, rows["targets"], 0.7, squares=True, exps=exps)
    total = out.others + out.target.exp()
    found = {
        "p": exps / total[:, None],
        "others": out.others / total,
        "squares": out.squares / total.square(),
    }
    wanted = []
    for kind in (exact, torch.float64):
        p = (logits.to(kind) / 0.7).softmax(-1).scatter(1, index, 0.0)
        wanted.append({"p": p, "others": p.sum(-1), "squares": p.square().sum(-1)})
    for name, value in found.items():
        assert_close_to_oracle(value, wanted[0][name], wanted[1][name], name=name)
    assert torch.equal(logits, random_rows(7, 37, dtype)["logits"])
    bare = torch_kernels.row_statistics(logits, rows["targets"], 0.7, entropy=False)
    assert bare.weighted is bare.squares is None


def test_a_gradient_in_place_of_exps_is_that_of_the_logits(blocks):
    rows = random_rows(7, 37)
    logits, targets, slope = rows["logits"], rows["targets"], rows["advantages"].clone()
    slope[2], logits[2, 5] = 0.0, math.nan
    exps = logits.clone()
    out = torch_kernels.row_statistics(exps, targets, 0.7, exps=exps)
    assert torch_kernels.gradient_(exps, targets, out, slope, 0.7) is exps
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = torch.nan_to_num(logits).to(dtype).requires_grad_()
        logp = reference.token_logprob(leaf, targets, temperature=0.7).logp
        found += torch.autograd.grad((logp * slope.to(dtype)).sum(), leaf)
    assert_close_to_oracle(exps, *found, name="gradient")
    assert not exps[2].any()
