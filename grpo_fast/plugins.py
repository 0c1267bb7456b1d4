"""Functions a user brings: `file.py:function` or `package.module:function` to a callable."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from .errors import ConfigError, nearest


def load_function(spec: str) -> Callable[..., Any]:
    """`getattr(import_module(...), name)` for `file.py:name` or `package.module:name`.

    A file is imported once a process, under a name of its own; its folder joins the end of
    `sys.path`, so that it can import its neighbours. Raises ConfigError naming file, line or the
    nearest function.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise ConfigError(
            f"'{spec}' names no function: expected `file.py:function` or `package.module:function`"
        )
    module = _import_file(Path(place)) if place.endswith(".py") else _import_module(place, name)
    if not hasattr(module, name):
        known = _functions(module)
        raise ConfigError(
            f"{place} has no function '{name}': {nearest(name, known)}"
            f"functions there: {', '.join(known) or 'none'}"
        )
    function = getattr(module, name)
    if inspect.isclass(function) or not callable(function):
        kind = "a class" if inspect.isclass(function) else f"of type {type(function).__name__}"
        raise ConfigError(f"'{name}' in {place} is {kind}, expected a function")
    return function


def raised_at(error: BaseException, file: str) -> str:
    """`name.py:12`, the deepest line of `file` on the way to `error`; empty when it has none."""
    if isinstance(error, SyntaxError) and error.filename == file:
        return f"{Path(file).name}:{error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    return f"{Path(file).name}:{lines[-1]}" if lines else ""


def describe(error: BaseException) -> str:
    """`KeyError: 'answer'` on one line, as the last line of a traceback."""
    text = error.msg if isinstance(error, SyntaxError) else str(error)
    message = " ".join(str(text).split())
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        near = nearest(path.name, (p.name for p in path.parent.glob("*.py")))
        raise ConfigError(f"{path} does not exist: {near}expected a Python file")
    path = path.resolve()
    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"grpo_fast_plugin_{digest}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    # At the end: a neighbour called random.py must not hide the standard library.
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise _import_error(str(path), error, str(path)) from error
    return module


def _import_module(place: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{place}.".startswith(f"{error.name}."):
            raise _import_error(place, error, _module_file(place)) from error
        file = Path(*place.split(".")).with_suffix(".py")
        hint = f"did you mean '{file}:{name}'?" if file.is_file() else "name a file as file.py"
        raise ConfigError(f"no module '{error.name}' for '{place}:{name}': {hint}") from error
    except (Exception, SystemExit) as error:
        raise _import_error(place, error, _module_file(place)) from error


def _import_error(place: str, error: BaseException, file: str) -> ConfigError:
    where = raised_at(error, file)
    return ConfigError(
        f"{place} cannot be imported: {describe(error)}{f' ({where})' if where else ''}"
    )


def _module_file(place: str) -> str:
    try:
        found = importlib.util.find_spec(place)
    except Exception:  # the parent package is what is broken
        found = None
    return str(found.origin) if found else ""


def _functions(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if callable(value) and not inspect.isclass(value) and not name.startswith("_")
    ]
