"""The kernel tests reject wrong kernels: each small mistake here must fail the suite's own check.

A mutant is the source of a kernel file with one piece of text changed, written with its neighbours
to a package of its own. The checks and their cases are those of `tests/kernels`, loaded from there.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

import grpo_kernels

KERNELS = Path(next(iter(grpo_kernels.__path__)))
TESTS = Path(__file__).parent / "kernels"


@dataclass(frozen=True)
class Mutant:
    file: str
    name: str
    old: str
    new: str
    op: str = ""
    """The op whose check must reject it: that of the file, unless the file serves several."""
    case: str = ""
    """The case that is tried first, where the mutant is about one late in the table."""

    def __str__(self) -> str:
        return f"{self.op or self.file}: {self.name}"


POLICY, LOGPROB = "policy_loss", "token_logprob"
SHARED, GROUP, SEGMENT = "online_softmax", "group_advantage", "segment_reduce"
MUTANTS = [
    Mutant(
        POLICY,
        "gradient of all columns but the target's zeroed",
        "b_gradient = tl.where(o_v == i_target, at_target, b_gradient)",
        "b_gradient = tl.where(o_v == i_target, at_target, 0.0)",
    ),
    Mutant(
        POLICY,
        "gradient x 1.45",
        "factor = slope * inv_temperature / total",
        "factor = 1.45 * slope * inv_temperature / total",
    ),
    Mutant(
        POLICY,
        "target's column x 1.45",
        "at_target = factor * others",
        "at_target = 1.45 * factor * others",
    ),
    Mutant(
        POLICY,
        "gradient lacks 1 / temperature",
        "factor = slope * inv_temperature / total",
        "factor = slope / total",
    ),
    Mutant(
        SHARED,
        "temperature dropped",
        "        return 1.0 / tl.cast(temperature, tl.float32)",
        "        return 1.0 / tl.cast(temperature * 0.0 + 1.0, tl.float32)",
        POLICY,
    ),
    Mutant(
        SHARED,
        "temperature of row 0 for all rows",
        "tl.load(p_temperature + i_row)",
        "tl.load(p_temperature + i_row * 0)",
        POLICY,
    ),
    Mutant(POLICY, "mask dropped", "if weight != 0.0:", "if weight == weight:"),
    Mutant(
        POLICY,
        "gradient of masked rows not written",
        "        zero_row(p_dlogits + i_row * stride_dlogits, v_size, BV)",
        "        pass",
    ),
    Mutant(POLICY, "weight missing from the gradient", "weight * slope,", "slope,"),
    Mutant(POLICY, "KL sign flipped", "loss += beta * kl", "loss -= beta * kl"),
    Mutant(POLICY, "KL slope flipped", "slope += beta * kl_slope", "slope -= beta * kl_slope"),
    Mutant(POLICY, "KL to the other side", "_expm1(-d)", "_expm1(d)", case="k3"),
    Mutant(
        POLICY,
        "k2 slope halved",
        "0.5\n        slope = d\n",
        "0.5\n        slope = d * 0.5\n",
        case="k2",
    ),
    Mutant(POLICY, "|d| without its sign", "kl = tl.where(d < 0.0, -d, d)", "kl = d", case="abs"),
    Mutant(
        POLICY, "slope of |d| without its sign", "tl.where(d < 0.0, -1.0, d)", "1.0", case="abs"
    ),
    Mutant(POLICY, "k1+ with the slope of k1", "if K2_SLOPE:", "if False:", case="k1+"),
    Mutant(
        POLICY,
        "bias-corrected KL without the ratio",
        "            kl *= ratio\n",
        "",
        case="k3, bias-corrected",
    ),
    Mutant(
        POLICY,
        "bias-corrected slope without the ratio's own",
        "(kl_slope + kl) * ratio",
        "kl_slope * ratio",
        case="k3, bias-corrected",
    ),
    Mutant(
        POLICY,
        "bias-corrected slope not times the ratio",
        "(kl_slope + kl) * ratio",
        "kl_slope + kl",
        case="k3, bias-corrected",
    ),
    Mutant(
        POLICY,
        "policy weight missing from the loss",
        "        loss *= policy_weight\n",
        "",
        case="policy weights",
    ),
    Mutant(
        POLICY,
        "policy weight missing from the gradient",
        "        slope *= policy_weight\n",
        "",
        case="policy weights",
    ),
    Mutant(
        POLICY,
        "policy weight on the KL too",
        "        loss *= policy_weight\n        slope *= policy_weight\n",
        "        weight *= policy_weight\n",
        case="policy weights",
    ),
    Mutant(
        POLICY,
        "KL not clamped",
        "tl.load(p_ref_logp + i_row), log_ratio_clamp)",
        "tl.load(p_ref_logp + i_row), 1e9)",
        case="narrow clamp",
    ),
    Mutant(
        POLICY,
        "ratio not clamped",
        "ratio = tl.exp(_clamped(logp - old_logp, log_ratio_clamp))",
        "ratio = tl.exp(logp - old_logp)",
        case="narrow clamp",
    ),
    Mutant(
        POLICY,
        "clip bounds swapped",
        "                low=float(low),\n                high=float(high),",
        "                low=float(high),\n                high=float(low),",
    ),
    Mutant(
        POLICY,
        "clipped rows still teach",
        "blocked = (advantage > 0.0) & ((ratio > high)",
        "blocked = (advantage > 0.0) & ((ratio < low)",
    ),
    Mutant(
        POLICY,
        "cap ignored",
        "capped = tl.where(ratio > cap, cap, ratio) * advantage",
        "capped = ratio * advantage",
        case="cap",
    ),
    Mutant(
        POLICY,
        "cap ignored in the slope",
        "beyond = (ratio < low) | (ratio > cap)",
        "beyond = (ratio < low)",
        case="cap",
    ),
    Mutant(
        POLICY,
        "dual clip ignored",
        "objective = tl.where(objective > most, most, objective)",
        "objective = objective",
        case="dual clip",
    ),
    Mutant(
        POLICY,
        "dual clip ignored in the slope",
        " | (ratio > dual_clip)",
        "",
        case="dual clip",
    ),
    Mutant(
        POLICY,
        "dual clip of positive advantages",
        "most = tl.where(advantage < 0.0,",
        "most = tl.where(advantage != 0.0,",
        case="dual clip",
    ),
    Mutant(
        POLICY,
        "cispo without its lower bound",
        "slope = -tl.where(ratio < low, low, bounded) * advantage",
        "slope = -bounded * advantage",
        case="cispo",
    ),
    Mutant(
        POLICY,
        "cispo without its upper bound",
        "bounded = tl.where(ratio > high, high, ratio)",
        "bounded = ratio",
        case="cispo",
    ),
    Mutant(
        POLICY,
        "cispo blocks a gradient",
        "return slope * logp, slope\n    elif",
        "return slope * logp, tl.where(ratio > high, 0.0, slope)\n    elif",
        case="cispo",
    ),
    Mutant(
        POLICY,
        "cispo without the log-prob",
        "return slope * logp, slope\n    elif",
        "return slope, slope\n    elif",
        case="cispo",
    ),
    Mutant(
        POLICY,
        "sapo temperatures swapped",
        "tau = tl.where(advantage > 0.0,",
        "tau = tl.where(advantage < 0.0,",
        case="sapo",
    ),
    Mutant(POLICY, "sapo without 4 / tau", "-4.0 / tau * gate", "-4.0 * gate", case="sapo"),
    Mutant(
        POLICY,
        "sapo slope without the ratio",
        "share * share * ratio * advantage",
        "share * share * advantage",
        case="sapo",
    ),
    Mutant(
        POLICY,
        "sapo slope without 1 - sigmoid",
        "-4.0 * tail * share * share * ratio",
        "-4.0 * gate * ratio",
        case="sapo",
    ),
    Mutant(
        POLICY,
        "sapo gate overflows",
        "tail = tl.exp(tl.where(x > 0.0, -x, x))",
        "tail = tl.exp(-x)",
        case="sapo, steep",
    ),
    Mutant(
        POLICY,
        "dppo_tv with the lower bound above",
        "above = p - p_old > high",
        "above = p - p_old > low",
        case="dppo_tv",
    ),
    Mutant(
        POLICY,
        "dppo_tv with the upper bound below",
        "below = p - p_old < -low",
        "below = p - p_old < -high",
        case="dppo_tv",
    ),
    Mutant(
        POLICY,
        "dppo blocks nothing",
        "slope = tl.where(blocked, 0.0, -tl",
        "slope = tl.where(blocked & False, 0.0, -tl",
        case="dppo_tv",
    ),
    Mutant(
        POLICY,
        "dppo without its cap",
        "-tl.where(ratio > cap, cap, ratio) * advantage",
        "-ratio * advantage",
        case="dppo_tv",
    ),
    Mutant(
        POLICY,
        "dppo_kl blocks what moves back",
        "below = (divergence > low) & (p < p_old)",
        "below = divergence > low",
        case="dppo_kl",
    ),
    Mutant(
        POLICY,
        "dppo_kl without the token's own part",
        "        divergence += p_old * (old_logp - logp)\n",
        "",
        case="dppo_kl",
    ),
    Mutant(
        POLICY,
        "dppo_kl without the other tokens' part",
        "divergence = others_old * tl.log(",
        "divergence = 0.0 * tl.log(",
        case="dppo_kl",
    ),
    Mutant(POLICY, "dro pushes away", "low * d - advantage", "-low * d - advantage", case="dro"),
    Mutant(POLICY, "dro not halved", "0.5 * low * d * d", "low * d * d", case="dro"),
    Mutant(
        POLICY,
        "reinforce uphill",
        "return -logp * advantage, -advantage",
        "return -logp * advantage, advantage",
        case="reinforce",
    ),
    Mutant(
        POLICY,
        "mass without the target's column",
        "tl.sqrt(others * others + squares)",
        "tl.sqrt(squares)",
    ),
    Mutant(
        POLICY,
        "mass without the other columns",
        "tl.sqrt(others * others + squares)",
        "others",
    ),
    Mutant(POLICY, "signed mass", "mass = tl.abs(slope)", "mass = slope"),
    Mutant(
        POLICY, "slope without its sign", "p_slope + i_row, slope", "p_slope + i_row, tl.abs(slope)"
    ),
    Mutant(
        POLICY,
        "mass lacks 1 / temperature",
        "mass = tl.abs(slope) * inv_temperature",
        "mass = tl.abs(slope)",
    ),
    Mutant(
        POLICY,
        "entropy costs",
        "loss -= entropy_weight * entropy",
        "loss += entropy_weight * entropy",
        case="entropy",
    ),
    Mutant(
        POLICY,
        "entropy gradient's sign",
        "curve = entropy_weight *",
        "curve = -entropy_weight *",
        case="entropy",
    ),
    Mutant(
        POLICY,
        "entropy gradient lacks a 1 / temperature",
        "curve = entropy_weight * inv_temperature * inv_temperature",
        "curve = entropy_weight * inv_temperature",
        case="everything",
    ),
    Mutant(
        POLICY,
        "entropy gradient lacks the mean",
        "curve * (b_d - mean)",
        "curve * b_d",
        case="entropy",
    ),
    Mutant(
        POLICY,
        "entropy gradient missing at the target",
        "        at_target += ",
        "        at_target += 0.0 * ",
        case="entropy",
    ),
    Mutant(
        POLICY,
        "entropy gradient of entries of probability 0",
        "tl.where(b_e == 0.0, 0.0, curve * (b_d - mean))",
        "curve * (b_d - mean)",
        case="first tile -inf",
    ),
    Mutant(
        POLICY,
        "rows with an entropy weight only are skipped",
        "if (slope == 0.0) & (entropy_weight == 0.0):",
        "if slope == 0.0:",
        case="entropy",
    ),
    Mutant(
        POLICY,
        "last entry's gradient not written",
        "            m_v = o_v < v_size\n",
        "            m_v = o_v < v_size - 1\n",
    ),
    Mutant(
        POLICY,
        "one entry too many written",
        "            m_v = o_v < v_size\n",
        "            m_v = o_v < v_size + 1\n",
    ),
    Mutant(
        SHARED,
        "block mask one short",
        "m_v = (o_v < v_size) & (o_v != i_target)",
        "m_v = (o_v < v_size - 1) & (o_v != i_target)",
        POLICY,
    ),
    Mutant(
        SHARED,
        "phantom entry past the row",
        "p_row + o_v, mask=o_v < v_size, other=-INF).to(tl.float32)\n        b_x = tl.where(m_v",
        "p_row + o_v, mask=o_v < v_size, other=0.0).to(tl.float32)\n"
        "        b_x = tl.where(o_v != i_target",
        POLICY,
    ),
    Mutant(
        SHARED,
        "sum not rescaled when the peak grows",
        "b_others = b_others * decay",
        "b_others = b_others",
        POLICY,
    ),
    Mutant(
        SHARED,
        "squares rescaled as the sum is",
        "b_squares * (decay * decay)",
        "b_squares * decay",
        POLICY,
    ),
    Mutant(SHARED, "sum in place of squares", "b_squares += b_e * b_e", "b_squares += b_e", POLICY),
    Mutant(
        SHARED,
        "-inf minus -inf",
        "growth = tl.where(peak == -INF, 0.0, peak - b_peak)",
        "growth = peak - b_peak",
        LOGPROB,
    ),
    Mutant(
        SHARED,
        "entropy sign",
        "entropy = log_total - weighted",
        "entropy = log_total + weighted",
        POLICY,
    ),
    Mutant(
        SHARED,
        "entropy lacks the rescaled part",
        "b_weighted = (b_weighted + b_others * growth) * decay",
        "b_weighted = b_weighted * decay",
        LOGPROB,
    ),
    Mutant(SHARED, "target counted twice", "& (o_v != i_target)\n", "\n", LOGPROB),
    Mutant(
        SHARED,
        "zeros of rows without gradient not all written",
        "mask=o_v < v_size)\n",
        "mask=o_v < v_size - 1)\n",
        LOGPROB,
    ),
    Mutant(
        LOGPROB,
        "gradient of the other columns zeroed",
        "tl.store(p_out + o_v, b_gradient.to(p_out.dtype.element_ty), mask=m_v)",
        "tl.store(p_out + o_v, (b_gradient * 0).to(p_out.dtype.element_ty), mask=m_v)",
    ),
    Mutant(
        LOGPROB,
        "gradient lacks 1 / temperature",
        "b_gradient = b_p * (-dlogp * inv_temperature)",
        "b_gradient = b_p * -dlogp",
    ),
    Mutant(
        LOGPROB,
        "entropy gradient's sign",
        "b_slope * (-dentropy * inv_temperature)",
        "b_slope * (dentropy * inv_temperature)",
    ),
    Mutant(
        LOGPROB,
        "entropy gradient missing at the target",
        "b_share = tl.where(o_v == i_target, b_slope, b_share)",
        "b_share = tl.where(o_v == i_target, 0.0, b_share)",
    ),
    Mutant(
        LOGPROB,
        "rows with an entropy gradient only are skipped",
        "live = live | (dentropy != 0.0)",
        "live = live | False",
    ),
    Mutant(
        LOGPROB,
        "log-sum-exp without the peak",
        "peak * inv_temperature + log_total",
        "log_total",
    ),
    Mutant(
        LOGPROB,
        "squares not normalised twice",
        "squares / (total * total)",
        "squares / total",
    ),
    Mutant(
        GROUP,
        "biased std",
        "        freedom = count - 1.0\n",
        "        freedom = count\n",
    ),
    Mutant(GROUP, "NaN counted", "tl.where(m_scored, 1.0, 0.0)", "tl.where(m_scored, 1.0, 1.0)"),
    Mutant(
        GROUP,
        "own reward left in the baseline",
        "factor = count / tl.where(count > 1.0, count - 1.0, 1.0)",
        "factor = count / count",
    ),
    Mutant(
        GROUP,
        "a shared top is a lead",
        "tl.where(tl.sum(b_best, 0) > 1.0, 0.0, high - tl.max(b_second, 0))",
        "high - tl.max(b_second, 0)",
    ),
    Mutant(GROUP, "lead over the top itself", "& (b_reward < high) &", "&"),
    Mutant(GROUP, "second of the last block only", "& (b_reward > b_second)\n", "\n"),
    Mutant(
        GROUP, "all members get the lead", "tl.where(b_reward == high, lead", "tl.where(True, lead"
    ),
    Mutant(GROUP, "a negative mean scales", "teaches & (mean > 0.0)", "teaches"),
    Mutant(GROUP, "not scaled by the mean", "tl.where(teaches, mean, 1.0)", "1.0"),
    Mutant(GROUP, "eps under the root", "(mean, std + eps,", "(mean, tl.sqrt(std * std + eps),"),
    Mutant(GROUP, "order ignored", "if p_order is not None:", "if False:"),
    Mutant(GROUP, "group one member too long", "m_s = o_s < end", "m_s = o_s < end + 1"),
    Mutant(SEGMENT, "segment one too long", "mask=o_t < end,", "mask=o_t < end + 1,"),
    Mutant(
        SEGMENT,
        "segment one late",
        "p_cu_seqlens + i_segment).to(tl.int64)",
        "p_cu_seqlens + i_segment).to(tl.int64) + 1",
    ),
    Mutant(SEGMENT, "mean over the padded block", "end - start, 1)", "end - start + 1, 1)"),
    Mutant(SEGMENT, "only the last block", "b_sum += tl", "b_sum = tl"),
]


def load_tests(op: str) -> ModuleType:
    """The file with an op's check and cases, which are used as they are."""
    file = {POLICY: "policy_loss_cases"}.get(op, f"test_{op}")
    spec = importlib.util.spec_from_file_location(f"checks_of_{op}", TESTS / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def check_of(op: str, module: ModuleType, guard: Callable, device, first: str = "") -> None:
    """Every case of the op's test against the kernels of `module`, until one fails."""
    tests = load_tests(op)
    names = {LOGPROB: ("token_logprob_fwd", "token_logprob_bwd")}.get(op, (op,))
    tiles = getattr(tests, "SMALL_TILES", None) or tests.SMALL_BLOCKS
    module.CONFIGS = tiles
    launchers = [guard(getattr(module, name)) for name in names]
    assert not first or first in tests.CASES, f"there is no case {first!r}"
    for name in sorted(tests.CASES, key=lambda name: name != first):
        getattr(tests, f"check_{op}")(*launchers, tests.CASES[name], device)


def package(folder: Path, name: str, replaced: dict[str, str]) -> None:
    """All kernel files as a package `name` in `folder`, some with another text."""
    (folder / name).mkdir()
    for path in KERNELS.glob("*.py"):
        text = replaced.get(path.stem, path.read_text(encoding="utf-8"))
        (folder / name / path.name).write_text(text, encoding="utf-8")


@pytest.fixture
def import_op(tmp_path, monkeypatch):
    """`import_op(op, replaced)` imports an op of a copy of the kernels."""
    monkeypatch.syspath_prepend(tmp_path)

    def imported(op: str, replaced: dict[str, str]) -> ModuleType:
        name = f"kernels_of_{tmp_path.name}"
        package(tmp_path, name, replaced)
        return importlib.import_module(f"{name}.{op}")

    yield imported
    for name in [name for name in sys.modules if name.startswith(f"kernels_of_{tmp_path.name}")]:
        del sys.modules[name]


@pytest.mark.parametrize("op", [POLICY, LOGPROB, GROUP, SEGMENT])
def test_an_unchanged_copy_passes(op, import_op, guard, device):
    check_of(op, import_op(op, {}), guard, device)


@pytest.mark.parametrize("mutant", MUTANTS, ids=str)
def test_a_wrong_kernel_is_rejected(mutant, import_op, guard, device):
    text = (KERNELS / f"{mutant.file}.py").read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, (
        f"{mutant}: its text is there {text.count(mutant.old)} times"
    )
    op = mutant.op or mutant.file
    module = import_op(op, {mutant.file: text.replace(mutant.old, mutant.new)})
    with pytest.raises(AssertionError):
        check_of(op, module, guard, device, mutant.case)
