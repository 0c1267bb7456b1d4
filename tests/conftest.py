"""One suite for both kinds of machine: kernels on a GPU, or in Triton's interpreter on a CPU."""

import functools
import importlib.util
import json
import os
import sys
from pathlib import Path

# Threads that spin while they wait take the cores from whatever else runs; read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

# Trackers, apart from the venv's packages: no user needs them.
TRACK = Path(sys.prefix) / "track"
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Read when a kernel is defined, so it must be there before the first import of one.
    os.environ["TRITON_INTERPRET"] = "1"
torch.set_num_threads(2)
# An assert in a module that tests share says what it compared, as one in a test does.
pytest.register_assert_rewrite("loss_checks", "policy_loss_cases", "trl_training")

# Of `world`.
REWARD = '''
def many_a(completions, **columns):
    """Share of the letter a: any policy can get better at it."""
    return [text.count("a") / 8 for text in completions]

def short(completions, completion_ids, **columns):
    return [None if len(ids) == 8 else 1.0 for ids in completion_ids]

def broken(completions, **columns):
    raise KeyError("answer")

def too_few(completions, **columns):
    return [1.0]
'''

# Entries before and after a guarded tensor; a multiple of 16 bytes keeps its alignment.
MARGIN = 64


def pytest_configure(config):
    # The interpreter evaluates both sides of a tl.where, the one that is not taken included.
    where = "triton.runtime.interpreter"
    config.addinivalue_line("filterwarnings", f"ignore::RuntimeWarning:{where}")


def pytest_collection_modifyitems(config, items):
    deselected = [item for item in items if not can_run(item)]
    items[:] = [item for item in items if can_run(item)]
    if deselected:
        config.hook.pytest_deselected(items=deselected)


def can_run(item) -> bool:
    """Whether this machine has what a test is about."""
    tracker = item.get_closest_marker("track")
    if tracker is not None:
        name = tracker.args[0]
        return (TRACK / name).is_dir() or importlib.util.find_spec(name) is not None
    return HAS_GPU or item.get_closest_marker("gpu") is None


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    """For tensors so small that handing them to a second thread takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A model directory, a data file and a reward file, as a user brings them."""
    from grpo_fast.tiny import save_tiny

    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    save_tiny(folder / "model")
    letters = "abcdefgh"
    prompts = [{"prompt": a + b} for a in letters for b in letters]
    lines = "".join(json.dumps(row) + "\n" for row in prompts)
    (folder / "data.jsonl").write_text(lines, encoding="utf-8")
    (folder / "rewards.py").write_text(REWARD, encoding="utf-8")
    return folder


@pytest.fixture(autouse=True)
def poisoned_empty(request, monkeypatch) -> None:
    """Kernel tests: what `torch.empty` returns is NaN, -1 or True, so unwritten output shows."""
    if request.path.parent.name != "kernels" and request.path.stem != "test_mutants":
        return

    def poisoned(make):
        @functools.wraps(make)
        def call(*args, **kwargs):
            return poison(make(*args, **kwargs))

        return call

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


def poison(tensor: torch.Tensor) -> torch.Tensor:
    """NaN, or the number that no index and no flag should be."""
    if tensor.is_floating_point():
        return tensor.fill_(torch.nan)
    return tensor.fill_(True if tensor.dtype == torch.bool else -1)


def guarded_copy(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(buffer, view): `tensor` with its strides inside a poisoned buffer, gaps poisoned too."""
    span = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    span = span if tensor.numel() else 0
    buffer = poison(torch.zeros(span + 2 * MARGIN, dtype=tensor.dtype, device=tensor.device))
    view = buffer.as_strided(tensor.shape, tensor.stride(), MARGIN)
    return buffer, view.copy_(tensor)


@pytest.fixture
def guard():
    """`guard(launcher)` calls it on copies of its tensors, each inside a poisoned buffer.

    Reading outside a tensor brings NaN into the result, writing outside it fails here; what was
    written inside is copied back, and a tensor given twice stays one tensor.
    """

    def guarded(launcher):
        @functools.wraps(launcher)
        def call(*args, **kwargs):
            copies = {}

            def place(value):
                if not isinstance(value, torch.Tensor):
                    return value
                if id(value) not in copies:
                    copies[id(value)] = (value, *guarded_copy(value))
                return copies[id(value)][2]

            args = [place(value) for value in args]
            kwargs = {name: place(value) for name, value in kwargs.items()}
            before = {key: buffer.clone() for key, (_, buffer, _) in copies.items()}
            result = launcher(*args, **kwargs)
            for key, (original, buffer, view) in copies.items():
                original.copy_(view)
                view.copy_(before[key].as_strided(view.shape, view.stride(), MARGIN))
                same = torch.equal(buffer.view(torch.uint8), before[key].view(torch.uint8))
                assert same, f"{launcher.__name__} wrote outside a tensor {tuple(view.shape)}"
            returned = [original for original, _, view in copies.values() if view is result]
            return returned[0] if returned else result

        return call

    return guarded
