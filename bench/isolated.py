"""One provider in a process of its own: its memory is its own, and what goes wrong in it is a line
of a table.

Letters: `N` tokens, `D` hidden, `V` vocabulary.
"""

import multiprocessing
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from grpo_fast.memory import Meter

from .bench_linear_grpo import compared_rows, exact_gradients
from .peers import PROVIDERS, Batch, Gap, Gradients, Provider, gradients, random_batch, said
from .timing import assert_right, dtype_name


@dataclass(frozen=True, kw_only=True)
class Match:
    """What everybody is timed at."""

    shape: tuple[int, int, int]
    """N, D, V."""
    dtype: torch.dtype
    head: str
    device: torch.device

    def batch(self) -> Batch:
        return random_batch(self.shape, self.dtype, self.device)

    def __str__(self) -> str:
        n, d, v = self.shape
        return f"N={n} D={d} V={v} {dtype_name(self.dtype)}, head {self.head}"


def to_compare(found: Gradients, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """What is held against the oracle."""
    parts = found._asdict()
    if found.dweight is not None:
        parts["dweight"] = found.dweight[compared_rows(targets, len(found.dweight))]
    return {name: part.cpu() for name, part in parts.items() if part is not None}


def write_truth(match: Match, path: Path) -> None:
    """The oracle's results and the eager ones in the inputs' dtype, whose error is the measure."""
    batch = match.batch()
    targets, frozen = batch.targets.flatten(), match.head == "frozen"
    exact = exact_gradients(batch.rows())
    dweight = None if frozen else exact.dweight
    truth = to_compare(Gradients(exact.loss, exact.logp, exact.dhidden, dweight), targets)
    del exact, dweight
    eager = next(provider for provider in PROVIDERS if provider.name == "eager")
    same = to_compare(gradients(eager.calls(), batch, frozen=frozen), targets)
    torch.save({"exact": truth, "eager": same}, path)


class Call(NamedTuple):
    """What one call took."""

    wall: float
    """Seconds, waited for."""
    cpu: float
    """Seconds of all threads together."""
    extra: int
    """Bytes beyond what was held before and beyond the gradients."""


class Seat:
    """One provider in its own process: what it can be asked."""

    def __init__(self, provider: Provider):
        self.calls = provider.calls()

    def open(self, match: Match, truth: Path) -> str | None:
        """Make the inputs and hold the results against the truth: what is wrong, or None."""
        self.match, self.batch = match, None
        self.batch = match.batch()
        known = torch.load(truth)
        found = to_compare(self._run(), self.batch.targets.flatten())
        try:
            for name, part in found.items():
                assert_right(part, known["eager"][name], known["exact"][name], name=name)
        except AssertionError as error:
            return f"wrong result, not timed: {' '.join(str(error).split())}"
        return None

    def _run(self) -> Gradients:
        return gradients(self.calls, self.batch, frozen=self.match.head == "frozen")

    def time(self) -> Call:
        """Forward and backward once."""
        meter = Meter(self.match.device)
        wall, cpu = time.perf_counter(), time.process_time()
        found = self._run()
        if self.match.device.type == "cuda":
            torch.cuda.synchronize(self.match.device)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        kept = (found.dhidden, found.dweight)
        extra = meter.bytes() - sum(x.nbytes for x in kept if x is not None)
        return Call(wall, cpu, extra)


def serve(pipe, provider: Provider, threads: int, seat_of: type) -> None:
    """The loop of a provider's process: (method, arguments) in, its answer or a Gap out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends this process
    torch.set_num_threads(threads)
    seat = None
    for method, arguments in iter(pipe.recv, None):
        try:
            if seat is None:
                seat = seat_of(provider)
            answer = getattr(seat, method)(*arguments)
        except Gap as gap:
            answer = gap
        except Exception as error:  # whatever a peer does becomes a line of the table
            answer = Gap(f"fails: {said(error)}")
        pipe.send(answer)


class Worker:
    """The parent's end of a provider's process, in which `seat_of(provider)` is asked."""

    def __init__(self, provider: Provider, threads: int, seat_of: type = Seat):
        # A fork would inherit threads that do not exist in it.
        spawn = multiprocessing.get_context("spawn")
        self.provider = provider
        self.pipe, theirs = spawn.Pipe()
        arguments = (theirs, provider, threads, seat_of)
        self.process = spawn.Process(target=serve, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, method: str, *arguments):
        try:
            self.pipe.send((method, arguments))
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise Gap(f"its process ended with exit code {self.process.exitcode}") from None
        if isinstance(answer, Gap):
            raise answer
        return answer

    def close(self) -> None:
        self.process.terminate()
        self.process.join()


class Inline:
    """The same in this process: for times alone, where a process has luck of its own with its
    pages that is as large as what is compared."""

    def __init__(self, provider: Provider, threads: int, seat_of: type = Seat):
        torch.set_num_threads(threads)
        self.provider, self.seat_of, self.seat = provider, seat_of, None

    def ask(self, method: str, *arguments):
        try:
            if self.seat is None:
                self.seat = self.seat_of(self.provider)
            return getattr(self.seat, method)(*arguments)
        except Gap:
            raise
        except Exception as error:  # as in `serve`
            raise Gap(f"fails: {said(error)}") from error

    def close(self) -> None:
        self.seat = None
