"""One provider in a process of its own: its memory is its own, and what goes wrong in it is a line
of a table.
"""

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch

from grpo_fast.memory import Meter

from .matches import Match
from .provider import Gap, Provider, said
from .timing import assert_right


class Call(NamedTuple):
    """What one call took."""

    seconds: float
    """Wall clock, waited for; of one CPU thread its process time (`by_process_time`)."""
    cpu: float
    """Seconds of all threads together."""
    extra: int | None
    """Bytes beyond what was held before and beyond the gradients; None: says nothing."""


def by_process_time(device: torch.device) -> bool:
    """One thread's process time is its work, whatever else the machine does."""
    return device.type == "cpu" and torch.get_num_threads() == 1


def measured(run: Callable[[], object], device: torch.device) -> tuple[Call, object]:
    """One call of `run`, its gradients counted; and what it returns."""
    meter = Meter(device)
    wall, cpu = time.perf_counter(), time.process_time()
    found = run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Call(cpu if by_process_time(device) else wall, cpu, meter.bytes()), found


def give_back() -> None:
    """What this process's allocator keeps of a GPU that all of them share."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def turn(once: Callable[[], Call], device: torch.device) -> Call:
    """One call; on a GPU the second of two, as memory was given back."""
    if device.type == "cuda":
        once()
    call = once()
    give_back()
    return call


class Seat:
    """One provider in its own process: what it can be asked."""

    def __init__(self, provider: Provider):
        self.bound, self.calls = provider.bound, provider.calls()

    def open(self, match: Match, truth: Path) -> str | None:
        """Make the inputs and hold the results against the truth: what is wrong, or None."""
        self.match, self.batch = match, None
        self.batch = match.batch(bound=self.bound)
        known = torch.load(truth)[self.bound]
        found = match.run(self.calls, match.ready(self.calls, self.batch))
        parts = match.compared(found, self.batch)
        del found
        give_back()
        if self.bound:
            del parts["loss"]
        try:
            for name, part in parts.items():
                assert_right(part, known["eager"][name], known["exact"][name], name=name)
        except AssertionError as error:
            return f"wrong result, not timed: {' '.join(str(error).split())}"
        return None

    def time(self) -> Call:
        """Forward and backward once."""
        return turn(self._once, self.match.device)

    def _once(self) -> Call:
        match, ready = self.match, self.match.ready(self.calls, self.batch)
        call, found = measured(lambda: match.run(self.calls, ready), match.device)
        return call._replace(extra=call.extra - match.kept_bytes(found))


class FloorSeat:
    """The floor of a match, in turns with those who compute the loss."""

    def __init__(self, provider: Provider):
        self.provider = provider

    def open(self, match: Match, truth: Path) -> None:
        self.device, self.column = match.device, None
        self.column = match.floor()
        self.column(0)

    def time(self) -> Call:
        """The bare work once."""
        return turn(self._once, self.device)

    def _once(self) -> Call:
        return measured(lambda: self.column(0), self.device)[0]._replace(extra=None)


def serve(pipe, provider: Provider, threads: int, seat_of: type) -> None:
    """The loop of a provider's process: (method, arguments) in, its answer or a Gap out."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, who ends this process
    # A pool of compilers would leave semaphores behind when this process is ended.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
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
        if isinstance(answer, Gap):
            give_back()
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


class Absent:
    """In the place of a worker: why there is none."""

    def __init__(self, provider: Provider, reason: str):
        self.provider, self.reason = provider, reason

    def ask(self, method: str, *arguments) -> NoReturn:
        raise Gap(self.reason)

    def close(self) -> None:
        pass


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
