"""The kernel tests reject wrong kernels: each small mistake must fail the suite's own check.

A mutant is the source of a kernel file with one piece of text changed, written with its neighbours
to a package of its own. The checks and their cases are those of `tests/kernels`, loaded from there.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import other_mutants
import policy_loss_mutants
import pytest
from mutant import GROUP, LOGPROB, POLICY, SEGMENT

import grpo_kernels

KERNELS = Path(next(iter(grpo_kernels.__path__)))
TESTS = Path(__file__).parents[1] / "kernels"
MUTANTS = policy_loss_mutants.MUTANTS + other_mutants.MUTANTS


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
