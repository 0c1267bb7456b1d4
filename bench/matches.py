"""What everybody is timed at: the inputs, what float64 says about them, and the floor of the time.

Letters: `S` sequences of `L` tokens, `N = S L` rows, `D` hidden, `V` vocabulary.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from . import logits_peers, peers
from .bench_linear_grpo import compared_rows, exact_gradients, oracle_terms
from .inputs import CHUNK
from .logits_peers import LogitsBatch, LogitsCalls, LogitsGradients, random_logits
from .peers import Batch, Calls, Gradients, gradients, random_batch
from .timing import Column, checked_rows, copy_ceiling, dtype_name, matmul_ceiling

# Rows of a floor's products at a time: as large as products become fast, and no larger.
FLOOR_ROWS = 8192
# Rows of logits that eager, the measure of an error, holds at a time.
EAGER_ROWS = 8192
Parts = dict[str, Tensor]
"""What is held against the oracle, by name."""


@dataclass(frozen=True, kw_only=True)
class Match:
    """The loss from hidden states and head."""

    # Small, for a quick look also where bfloat16 products are slow; 1024 896 151936 is a real one.
    usual: ClassVar[tuple[int, ...]] = (128, 128, 8192)
    quick: ClassVar[tuple[int, ...]] = (32, 64, 2048)
    letters: ClassVar[str] = "NDV"
    heads: ClassVar[tuple] = ("trained", "frozen")
    floor_is: ClassVar[str] = "the bare matrix products, 3G with a trained head, 2G with a frozen"

    shape: tuple[int, ...]
    """By `letters`."""
    dtype: torch.dtype
    device: torch.device
    head: str | None

    def __str__(self) -> str:
        sizes = zip(self.letters, self.shape, strict=True)
        words = [f"{letter}={size}" for letter, size in sizes] + [dtype_name(self.dtype)]
        return " ".join(words) + (f", head {self.head}" if self.head else "")

    def sizes(self) -> dict:
        """As in a row of a results file; None for what it has not."""
        shape = zip(self.letters, self.shape, strict=True)
        return dict.fromkeys("NDV") | dict(shape) | {"head": self.head}

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

    def exact(self, batch: Batch) -> Parts:
        """What the oracle says in float64, of what is compared."""
        found = exact_gradients(batch.rows())
        dweight = None if self.head == "frozen" else found.dweight
        return self.compared(Gradients(found.loss, found.logp, found.dhidden, dweight), batch)

    def eagers(self) -> tuple:
        """What trainers write: the worst error of theirs in the inputs' dtype is the measure of
        everybody's."""
        return (peers.eager(None, torch.float32),)

    def truth(self, *, bound: bool = False) -> dict[str, Parts]:
        batch = self.batch(bound=bound)
        exact = self.exact(batch)
        runs = [self.compared(self.run_in_pieces(calls, batch), batch) for calls in self.eagers()]

        def worst(name: str) -> Tensor:
            return max((run[name] for run in runs), key=lambda part: (part - exact[name]).norm())

        return {"exact": exact, "eager": {name: worst(name) for name in exact}}

    def run_in_pieces(self, calls: Calls, batch: Batch) -> Gradients:
        """A few rows at a time: the logits of all might not fit."""
        sequences, length = batch.targets.shape
        width, old = max(EAGER_ROWS // sequences, 1), batch.old_logprobs
        dweight = torch.zeros_like(batch.weight, dtype=torch.float32)
        loss, logp, dhidden = torch.zeros((), device=self.device), [], []
        for start in range(0, length, width):
            part = slice(start, start + width)
            some = batch._replace(
                hidden=batch.hidden[:, part],
                targets=batch.targets[:, part],
                old_logprobs=None if old is None else old[:, part],
            )
            found, share = self.run(calls, some), some.targets.shape[1] / length
            loss += share * found.loss
            logp.append(found.logp.view(sequences, -1))
            dhidden.append(share * found.dhidden.view(sequences, -1, batch.hidden.shape[-1]))
            if found.dweight is not None:
                dweight += share * found.dweight
        trained = None if found.dweight is None else dweight.to(batch.weight.dtype)
        return Gradients(
            loss, torch.cat(logp, 1).flatten(), torch.cat(dhidden, 1).flatten(0, 1), trained
        )

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
class LogitsMatch(Match):
    """The loss from logits."""

    usual: ClassVar[tuple[int, ...]] = (128, 32768)
    quick: ClassVar[tuple[int, ...]] = (32, 4096)
    letters: ClassVar[str] = "NV"
    heads: ClassVar[tuple] = (None,)
    floor_is: ClassVar[str] = "a copy of the logits: one read and one write"

    head: None = None

    def batch(self, *, bound: bool = False) -> LogitsBatch:
        return random_logits(self.shape, self.dtype, self.device)

    def ready(self, calls: LogitsCalls, batch: LogitsBatch) -> LogitsBatch:
        return calls.ready(batch)

    def run(self, calls: LogitsCalls, batch: LogitsBatch) -> LogitsGradients:
        return calls.gradients(batch)

    def run_in_pieces(self, calls: LogitsCalls, batch: LogitsBatch) -> LogitsGradients:
        return self.run(calls, self.ready(calls, batch))

    def kept_bytes(self, found: LogitsGradients) -> int:
        """Nothing: whether the gradient takes memory of its own is what differs here."""
        return 0

    def compared(self, found: LogitsGradients, batch: LogitsBatch) -> Parts:
        """Of d(logits) some rows, and the norm of every row, as exact as what it sums."""
        length, norms = batch.targets.shape[1], []
        some = checked_rows(batch.targets.numel(), self.device)
        for sequence in found.dlogits:
            norms += [part.double().norm(dim=-1) for part in sequence.split(CHUNK)]
        parts = {"loss": found.loss, "logp": found.logp}
        parts["dlogits norm"] = torch.cat(norms).to(found.dlogits.dtype)
        parts["dlogits"] = found.dlogits[some // length, some % length]
        return {name: part.cpu() for name, part in parts.items() if part is not None}

    def exact(self, batch: LogitsBatch) -> Parts:
        """A few rows at a time: all of the gradient would take four times the logits."""
        rows, loss = batch.rows(), 0.0
        some = checked_rows(len(rows["targets"]), self.device)
        found: dict[str, list[Tensor]] = {"logp": [], "dlogits norm": [], "dlogits": []}
        for start in range(0, len(rows["targets"]), CHUNK):
            part = slice(start, start + CHUNK)
            leaf = rows["logits"][part].double().requires_grad_()
            terms = oracle_terms(leaf, rows, part)
            (gradient,) = torch.autograd.grad(terms.loss.sum(), leaf)
            loss += terms.loss.sum().detach()
            found["logp"].append(terms.logp.detach())
            found["dlogits norm"].append(gradient.norm(dim=-1))
            here = some[(some >= start) & (some < start + CHUNK)] - start
            found["dlogits"].append(gradient[here])
        parts = {name: torch.cat(pieces).cpu() for name, pieces in found.items()}
        return parts | {"loss": loss.cpu()}

    def eagers(self) -> tuple:
        """log-softmax is worse at log-probs of a large vocabulary, logsumexp, the form of most
        kernels, at gradients of confident rows."""
        return logits_peers.eager(), logits_peers.eager_logsumexp()

    def floor(self) -> Column:
        n, v = self.shape
        return copy_ceiling(2 * n * v * self.dtype.itemsize, self.device)
