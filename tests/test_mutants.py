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
        "                    factor * others,\n",
        "                    1.45 * factor * others,\n",
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
        "            zero_row(p_dlogits + i_row * stride_dlogits, v_size, BV)",
        "            pass",
    ),
    Mutant(POLICY, "weight missing from the gradient", "        slope *= weight\n", ""),
    Mutant(POLICY, "KL sign flipped", "loss += beta * kl", "loss -= beta * kl"),
    Mutant(POLICY, "KL slope flipped", "slope += beta * kl_slope", "slope -= beta * kl_slope"),
    Mutant(POLICY, "KL to the other side", "        y = -d\n", "        y = d\n"),
    Mutant(POLICY, "k2 slope halved", "return d * d * 0.5, d\n", "return d * d * 0.5, d * 0.5\n"),
    Mutant(
        POLICY,
        "KL not clamped",
        "tl.load(p_ref_logp + i_row), log_ratio_clamp)",
        "tl.load(p_ref_logp + i_row), 1e9)",
    ),
    Mutant(
        POLICY,
        "ratio not clamped",
        "ratio = tl.exp(_clamped(logp - old_logp, log_ratio_clamp))",
        "ratio = tl.exp(logp - old_logp)",
    ),
    Mutant(
        POLICY,
        "clip bounds swapped",
        "                ratio_low=1.0 - epsilon,\n                ratio_high=1.0 + epsilon_high,",
        "                ratio_low=1.0 - epsilon_high,\n                ratio_high=1.0 + epsilon,",
    ),
    Mutant(
        POLICY,
        "clipped rows still teach",
        "blocked = (advantage > 0.0) & ((ratio > ratio_high)",
        "blocked = (advantage > 0.0) & ((ratio < ratio_low)",
    ),
    Mutant(
        POLICY,
        "delta ignored",
        "capped = tl.where(ratio > delta, delta, ratio) * advantage",
        "capped = ratio * advantage",
    ),
    Mutant(
        POLICY,
        "delta ignored in the slope",
        "((ratio < ratio_low) | (ratio > delta))",
        "(ratio < ratio_low)",
    ),
    Mutant(
        POLICY,
        "last entry's gradient not written",
        "        m_v = o_v < v_size\n",
        "        m_v = o_v < v_size - 1\n",
    ),
    Mutant(
        POLICY,
        "one entry too many written",
        "        m_v = o_v < v_size\n",
        "        m_v = o_v < v_size + 1\n",
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
    Mutant(GROUP, "eps under the root", "std + eps)", "tl.sqrt(std * std + eps))"),
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
    """The test file of an op, whose check and cases are used as they are."""
    spec = importlib.util.spec_from_file_location(f"checks_of_{op}", TESTS / f"test_{op}.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def check_of(op: str, module: ModuleType, guard: Callable, device) -> None:
    """Every case of the op's test against the kernels of `module`, until one fails."""
    tests = load_tests(op)
    names = {LOGPROB: ("token_logprob_fwd", "token_logprob_bwd")}.get(op, (op,))
    tiles = getattr(tests, "SMALL_TILES", None) or tests.SMALL_BLOCKS
    module.CONFIGS = tiles
    launchers = [guard(getattr(module, name)) for name in names]
    for case in tests.CASES.values():
        getattr(tests, f"check_{op}")(*launchers, case, device)


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
        check_of(op, module, guard, device)
