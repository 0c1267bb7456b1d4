"""What the adapters share: a host of a known version, its names exchanged for ours and put back,
and a head that the loss can train."""

import importlib
import inspect
import re
import sys
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..chunked import Head
from ..errors import ConfigError
from ..model import head
from ..vocab_parallel import is_dtensor


def version_of(package: str, *, tested: str) -> str:
    """The installed version; ConfigError where the package is missing, or not of the release
    (`1.2` of `1.2.3`) that was tested."""
    try:
        found = metadata.version(package)
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"{package} is not installed: pip install '{package}=={tested}'"
        ) from None
    if _release(found) != _release(tested):
        kind = "older" if _release(found) < _release(tested) else "newer"
        raise ConfigError(
            f"{package} {found} is {kind} than {tested}, which this adapter was tested with: "
            f"pip install '{package}=={tested}'"
        )
    return found


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version)[:2])


def host_module(name: str, *, install: str) -> ModuleType:
    """Import a module of a host that may be missing."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{name} does not import ({error}): {install}") from None


def holders(name: str, value: Any) -> list[ModuleType]:
    """Loaded modules in which `name` is `value`: `from a import b` copies, so there are several."""
    return [
        module
        for module in list(sys.modules.values())
        if isinstance(module, ModuleType) and vars(module).get(name) is value
    ]


class Exchange:
    """Names of one host, exchanged for ours until `undo`."""

    def __init__(self, host: str) -> None:
        self.host = host
        self.before: list[tuple[Any, str, Any]] = []

    def apply(self, *exchanged: tuple[Any, str, Any]) -> None:
        """Each an owner, a name and what the name shall mean; all of them or none.

        Raises ConfigError when they are exchanged already, or where a host takes other arguments.
        """
        if self.before:
            raise ConfigError(
                f"grpo-fast is registered in {self.host} already: call unregister() before "
                "registering again"
            )
        for owner, name, ours in exchanged:
            self.check(getattr(owner, name), ours, name)
        self.before = [(owner, name, getattr(owner, name)) for owner, name, _ in exchanged]
        for owner, name, ours in exchanged:
            setattr(owner, name, ours)

    def undo(self) -> None:
        """Put everything back; nothing where nothing was exchanged."""
        while self.before:
            setattr(*self.before.pop())

    def check(self, theirs: Any, ours: Any, name: str) -> None:
        """Raise ConfigError where a host takes other arguments."""
        for there, here in _calls(theirs, ours):
            found, known = _parameters(there), _parameters(here)
            # The apply of an autograd function does not say what it takes.
            if found not in (known, ["args", "kwargs"]):
                raise ConfigError(
                    f"{name} of {self.host} takes ({', '.join(found)}) here, and this adapter was "
                    f"tested where it takes ({', '.join(known)}): install a version named in "
                    "docs/integrations.md"
                )


def _calls(theirs: Any, ours: Any) -> list[tuple[Any, Any]]:
    """What of the two must have the same parameters."""
    if not isinstance(theirs, type):
        return [(theirs, ours)]
    return [(theirs.__init__, ours.__init__), (theirs.forward, ours.forward)]


def _parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


def trained_head(model: nn.Module) -> Head:
    """`model.head` of a model inside a host; ConfigError for a head with an adapter, a quantised
    one, or one whose rows are on other ranks."""
    found = head(model)
    weight = found.weight
    plain = is_dtensor(weight) or type(weight) in (Tensor, nn.Parameter)
    if not plain or not weight.is_floating_point():
        raise ConfigError(
            f"the output head of {type(model).__name__} is quantised ({type(weight).__name__}, "
            f"{weight.dtype}): leave it out, llm_int8_skip_modules=['lm_head']"
        )
    if not weight.numel():
        raise ConfigError(
            f"the output head of {type(model).__name__} is empty here, as under ZeRO-3: use ZeRO "
            "stage 2 or less"
        )
    return found


def no_gradient(tensor: Tensor | None) -> Tensor | None:
    """Hosts pass as constants what may carry a gradient."""
    return None if tensor is None else tensor.detach()


def float_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of the live entries, 0 where there is none, whatever stands under the mask."""
    kept = torch.where(mask, values.float(), 0.0)
    return kept.sum() / mask.sum().clamp(min=1)
