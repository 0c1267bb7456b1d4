"""Every error a user can cause, one family: what is wrong, where, what was expected, what to do."""

import difflib
from collections.abc import Iterable


class GrpoFastError(Exception):
    """Base of all errors raised on purpose; the command line prints it as one line and exits with
    2."""


class InputError(GrpoFastError, ValueError):
    """A tensor, a prompt or a data file is not what the call needs."""


class ConfigError(GrpoFastError, ValueError):
    """An option is unknown, out of range, or contradicts another one."""


class RewardError(GrpoFastError, RuntimeError):
    """A reward function could not be loaded, raised, or returned something that is no reward."""


class CheckpointError(GrpoFastError, RuntimeError):
    """A checkpoint is missing, damaged, or belongs to another run."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'? ` when a known word is close to `word`, else the empty string."""
    close = difflib.get_close_matches(word, list(known), n=5, cutoff=0.5)
    # Letters that changed places are the likeliest slip: 'gpro' is 'grpo', not 'gspo'.
    close.sort(key=lambda other: sorted(other) != sorted(word))
    return f"did you mean '{close[0]}'? " if close else ""
