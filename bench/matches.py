"""What everybody is timed at: the inputs, what float64 says about them, and the floor of the time.

Letters: `S` sequences of `L` tokens, `N = S L` rows, `D` hidden, `V` vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from grpo_fast import reference

from . import logits_peers, peers
from .bench_linear_grpo import compared_rows, exact_gradients
from .inputs import CHUNK
from .logits_peers import LogitsBatch, LogitsCalls, LogitsGradients, random_logits
from .peers import Batch, Calls, Gradients, gradients, random_batch
from .provider import CONFIG
from .timing import Column, checked_rows, copy_ceiling, dtype_name, matmul_ceiling

# Rows of a floor's products at a time: as large as products become fast, and no larger.
FLOOR_ROWS = 8192
Parts = dict[str, Tensor]
"""What is held against the oracle, by name."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """The loss from hidden states and head."""

    letters: ClassVar[str] = "NDV"
    heads: ClassVar[tuple] = ("trained", "frozen")
    floor_is: ClassVar[str] = "the bare matrix products, 3G with a trained head, 2G with a frozen"

    shape: tuple[int, int, int]
    """N, D, V."""
    dtype: torch.dtype
    head: str
    device: torch.device

    def __str__(self) -> str:
        return f"{sizes_text(self)}, head {self.head}"

    def sizes(self) -> dict:
        """As in a row of a results file."""
        return dict(zip(self.letters, self.shape, strict=True)) | {"head": self.head}

    def batch(self, *, bound: bool = False) -> Batch:
        """For a bound the batch whose gradient is that of the mean negative log-prob."""
        batch = random_batch(self.shape, self.dtype, self.device)
        if bound:
            ones = torch.ones_like(batch.advantages)
            batch = batch._replace(advantages=ones, old_logprobs=None)
        return batch

    def ready(self, calls: Calls, batch: Batch) -> Batch:
        return batch

    def run(self, calls: Calls, batch: Batch) -> Gradients:
        return gradients(calls, batch, frozen=self.head == "frozen")

    def kept_bytes(self, found: Gradients) -> int:
        return sum(x.nbytes for x in (found.dhidden, found.dweight) if x is not None)

    def compared(self, found: Gradients, batch: Batch) -> Parts:
        parts = found._asdict()
        if found.dweight is not None:
            rows = compared_rows(batch.targets.flatten(), len(found.dweight))
            parts["dweight"] = found.dweight[rows]
        return {name: part.cpu() for name, part in parts.items() if part is not None}

    def truth(self, *, bound: bool = False) -> dict[str, Parts]:
        """The oracle's results and the eager ones in the inputs' dtype, whose error is the
        measure."""
        batch = self.batch(bound=bound)
        found = exact_gradients(batch.rows())
        dweight = None if self.head == "frozen" else found.dweight
        exact = self.compared(Gradients(found.loss, found.logp, found.dhidden, dweight), batch)
        del found, dweight
        same = self.run(peers.eager(None, torch.float32), batch)
        return {"exact": exact, "eager": self.compared(same, batch)}

    def floor(self) -> Column:
        rows = self.batch().rows()
        weight, products = rows["weight"], []
        logits = rows["hidden"][:FLOOR_ROWS] @ weight.t()
        for hidden in rows["hidden"].split(FLOOR_ROWS):
            tile = logits[: len(hidden)]
            products += [(hidden, weight.t()), (tile, weight)]
            if self.head == "trained":
                products.append((tile.t(), hidden))
        return matmul_ceiling(products)


@dataclass(frozen=True, kw_only=True)
class LogitsMatch:
    """The loss from logits."""

    letters: ClassVar[str] = "NV"
    heads: ClassVar[tuple] = (None,)
    floor_is: ClassVar[str] = "a copy of the logits: one read and one write"

    shape: tuple[int, int]
    """N, V."""
    dtype: torch.dtype
    head: None = None
    device: torch.device

    def __str__(self) -> str:
        return sizes_text(self)

    def sizes(self) -> dict:
        """As in a row of a results file."""
        return dict(zip(self.letters, self.shape, strict=True)) | {"D": None, "head": self.head}

    def batch(self, *, bound: bool = False) -> LogitsBatch:
        return random_logits(self.shape, self.dtype, self.device)

    def ready(self, calls: LogitsCalls, batch: LogitsBatch) -> LogitsBatch:
        return calls.ready(batch)

    def run(self, calls: LogitsCalls, batch: LogitsBatch) -> LogitsGradients:
        return calls.gradients(batch)

    def kept_bytes(self, found: LogitsGradients) -> int:
        """None: whether the gradient takes memory of its own is what differs here."""
        return 0

    def compared(self, found: LogitsGradients, batch: LogitsBatch) -> Parts:
        """Of d(logits) some rows, and the norm of every row."""
        length, norms = batch.targets.shape[1], []
        some = checked_rows(batch.targets.numel(), self.device)
        for sequence in found.dlogits:
            norms += [part.double().norm(dim=-1) for part in sequence.split(CHUNK)]
        parts = {"loss": found.loss, "logp": found.logp, "dlogits norm": torch.cat(norms)}
        # As exact as what it sums.
        parts["dlogits norm"] = parts["dlogits norm"].to(found.dlogits.dtype)
        parts["dlogits"] = found.dlogits[some // length, some % length]
        return {name: part.cpu() for name, part in parts.items() if part is not None}

    def truth(self, *, bound: bool = False) -> dict[str, Parts]:
        """The oracle's results and the eager ones in the inputs' dtype, whose error is the
        measure."""
        batch = self.batch()
        same = self.run(logits_peers.eager_logsumexp(), batch)
        return {"exact": exact_logits(batch), "eager": self.compared(same, batch)}

    def floor(self) -> Column:
        n, v = self.shape
        return copy_ceiling(2 * n * v * self.dtype.itemsize, self.device)


def exact_logits(batch: LogitsBatch) -> Parts:
    """What the oracle says in float64, a few rows at a time: the parts that are compared."""
    rows = batch.rows()
    count = len(rows["targets"])
    some = checked_rows(count, rows["targets"].device)
    found: dict[str, list[Tensor]] = {"logp": [], "dlogits norm": [], "dlogits": []}
    loss = 0.0
    for start in range(0, count, CHUNK):
        logits, targets, advantages, old = (x[start : start + CHUNK] for x in rows.values())
        leaf = logits.double().requires_grad_()
        terms = reference.grpo_loss(
            leaf,
            targets,
            advantages.double(),
            mask=torch.ones_like(targets, dtype=torch.bool),
            cu_seqlens=torch.tensor([0, len(targets)], device=targets.device),
            old_logp=old.double(),
            denominator=count,
            config=CONFIG,
        )
        (gradient,) = torch.autograd.grad(terms.loss.sum(), leaf)
        loss += terms.loss.sum().detach()
        found["logp"].append(terms.logp.detach())
        found["dlogits norm"].append(gradient.norm(dim=-1))
        here = some[(some >= start) & (some < start + CHUNK)] - start
        found["dlogits"].append(gradient[here])
    return {"loss": loss.cpu()} | {name: torch.cat(parts).cpu() for name, parts in found.items()}


def sizes_text(match: Match | LogitsMatch) -> str:
    sizes = zip(match.letters, match.shape, strict=True)
    shape = " ".join(f"{letter}={size}" for letter, size in sizes)
    return f"{shape} {dtype_name(match.dtype)}"
