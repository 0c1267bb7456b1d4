"""A provider: who computes the loss, how it is loaded, and why there may be no number from it.

Letters: `N` rows. `peers.py` and `logits_peers.py` hold the two tables of them.
"""

import importlib.machinery
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from grpo_fast import LossConfig

CONFIG = LossConfig(loss_type="dapo", epsilon=0.2, epsilon_high=0.28)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
# Liger goes a sequence at a time: few and long ones are the best it can be given.
SEQUENCES = 4


class Gap(Exception):
    """Why a provider has no number here, in one line."""


@dataclass(frozen=True, kw_only=True)
class Provider:
    name: str
    computes: str
    load: Callable[[], object]
    """Imports what it needs and returns its table's `Calls`. Sent to other processes, so a
    module's function or a partial of it."""
    package: str = "grpo-fast"
    """The distribution whose version is reported."""
    install: str | None = None
    """How to get it; None: `pip install` of the package."""
    half_only: bool = False
    """In float32 it is what `eager` is."""
    bound: bool = False
    """Its gradient is that of the mean negative log-prob, which the loss has on policy where all
    advantages are 1: held against that, and a bound on time rather than the loss."""
    timed_on: tuple[str, ...] = ("cpu", "cuda")
    """Device types where its time means something."""
    compiled_on: tuple[str, ...] = ()
    """Device types where a first call compiles for many seconds."""
    needs_gpu: bool = False
    """It does not run in Triton's interpreter either."""

    @property
    def version(self) -> str | None:
        try:
            return importlib.metadata.version(self.package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def calls(self):
        """Import the provider; Gap where it is missing or broken. Ours has no excuse."""
        if self.package == "grpo-fast":
            return self.load()
        if self.version is None:
            how = self.install or f"pip install {self.package}"
            raise Gap(f"{self.package} is not installed: {how}")
        if self.needs_gpu and not torch.cuda.is_available():
            raise Gap(f"{self.package} {self.version} needs a GPU")
        try:
            return self.load()
        except Exception as error:  # whatever a package does on import
            raise Gap(f"{self.package} {self.version} does not import: {said(error)}") from error


def said(error: BaseException) -> str:
    """An error of somebody else's code in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


class LogProbs(NamedTuple):
    logp: Tensor
    """[N]."""
    entropy: Tensor | None
    """[N]; None where it was not asked for, or the provider has none."""


class Loss(NamedTuple):
    loss: Tensor
    logp: Tensor | None
    """[N]; None where the provider keeps them to itself."""


def clipped_loss(logp: Tensor, rows: dict[str, Tensor | None]) -> Tensor:
    """CONFIG's loss in eager PyTorch, from log-probs [N] and a batch's rows."""
    old, advantages = rows["old_logprobs"], rows["advantages"]
    ratio = (logp - (logp.detach() if old is None else old)).exp()
    clipped = ratio.clamp(1 - CONFIG.epsilon, 1 + CONFIG.clip_high)
    return -torch.minimum(ratio * advantages, clipped * advantages).mean()


def compiled(function: Callable) -> Callable:
    """By torch.compile, for each shape anew."""
    import torch._dynamo

    # A sweep has more shapes than the eight after which it gives up.
    torch._dynamo.config.recompile_limit = 1000
    return torch.compile(function, fullgraph=True, dynamic=False)


def folder_of(package: str) -> Path:
    """Where a package lies, without importing it."""
    # Past sys.modules, where another test may have left a part of it.
    found = importlib.machinery.PathFinder.find_spec(package)
    if found is None:
        raise ModuleNotFoundError(f"No module named {package!r}")
    return Path(found.submodule_search_locations[0])


def module_at(path: Path) -> ModuleType:
    """A file of a package whose own import does more than is wanted here."""
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
