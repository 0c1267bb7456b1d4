"""Frozen values by number: what a compiled graph is handed in place of an object.

torch.compile makes each field that it reads a constant of the graph, and compiles again when one
changes. A float becomes an input of the graph at its first change, wherever it was read from (an
int only as a local), and no later change compiles anything.
"""

import contextlib
import itertools
from dataclasses import fields
from typing import Any

from .errors import InputError

_counter = itertools.count()
_numbers: dict[Any, float] = {}
_values: dict[float, Any] = {}


class Numbered:
    """Base of a frozen dataclass: `number`, which is no field, is the same for equal values.

    A value stays known for the life of the process, since a graph may ask for it at any time.
    """

    __slots__ = ("number",)

    def assign_number(self) -> None:
        """Once every field has its value: the last line of `__post_init__`."""
        number = float(next(_counter))
        # TypeError: a field has no hash, and the value is equal to nothing but itself.
        with contextlib.suppress(TypeError):
            number = _numbers.setdefault(self, number)
        _values.setdefault(number, self)
        object.__setattr__(self, "number", number)

    def __reduce__(self) -> tuple:
        # Copies and unpickled values are constructed: another process has other numbers.
        return _construct, (type(self), {f.name: getattr(self, f.name) for f in fields(self)})


def _construct(kind: type, values: dict[str, Any]) -> Any:
    return kind(**values)


def value_of(number: Any) -> Any:
    """The value that has this number, which may be a 0-d tensor."""
    try:
        return _values[float(number)]
    except KeyError:
        raise InputError(
            "config is made inside torch.compile, expected outside: make it before, and pass it in"
        ) from None
