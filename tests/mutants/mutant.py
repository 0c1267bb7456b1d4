"""A small mistake in a kernel, which its tests must reject, and the files it may be in."""

from dataclasses import dataclass

POLICY, LOGPROB = "policy_loss", "token_logprob"
SHARED, GROUP, SEGMENT = "online_softmax", "group_advantage", "segment_reduce"


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
