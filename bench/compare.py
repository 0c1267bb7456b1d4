"""`grpo-fast bench --peers`: time and memory of the loss from hidden states, forward and backward;
with `--logits` of the loss from logits.

Every provider works in a process of its own and they take turns, one call each a round, in an order
that moves on by one: a machine that is shared slows all of them down, and the ratios of a round
hold. A provider is held against the oracle first; one that is wrong or missing has no number.

  time            median of one call: wall clock with all threads (CUDA: waited for), or process
                  time with one: compares on a machine that others use too
  spread          the middle three fifths of the calls over the median; a difference below is noise
  / eager, / ours median of the ratios within a round to the fastest of the eager rows and to ours;
                  below 1 is faster
  of floor        the same, how much of a call the row `floor` would take: the bare matrix products
                  (from logits: a copy of them), which are no loss and held against nothing
  CPU             median of the CPU seconds of a call, all threads together
  extra           most memory at once beyond what was there before and beyond the gradients (from
                  logits: with the gradient, which some make in the logits' place)"""

import itertools
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from .isolated import Absent, Call, FloorSeat, Worker, give_back
from .logits_peers import LOGITS_PROVIDERS
from .matches import LogitsMatch, Match
from .options import Parser
from .peers import PROVIDERS
from .provider import DTYPES, SEQUENCES, Gap, Provider
from .record import about, written
from .timing import align, dtype_name, seconds_text, summary

QUICK_ROUNDS = 2
FLOOR = "floor"
LEAST_ROUNDS, MOST_ROUNDS = 5, 100
Times = dict[str, list[Call]]
OURS = {"cpu": "grpo-fast torch", "cuda": "grpo-fast triton"}


def rounds_of(
    workers: list[Worker], *, least: int, seconds: float, label: str = ""
) -> tuple[Times, dict[str, str]]:
    """Calls of each provider in turns, by name, `least` rounds or about `seconds`; and who dropped
    out, why. Progress goes to stderr under `label`."""
    times: Times = {worker.provider.name: [] for worker in workers}
    lost: dict[str, str] = {}
    count, done = least, 0
    while done < count:
        if label:
            print(f"{label}: round {done + 1} of {count} ...", file=sys.stderr, flush=True)
        start = done % max(len(workers), 1)
        for worker in workers[start:] + workers[:start]:
            name = worker.provider.name
            if name in lost:
                continue
            try:
                times[name].append(worker.ask("time"))
            except Gap as gap:
                lost[name] = str(gap)
                del times[name]
        done += 1
        if done == 1:
            one_round = sum(calls[0].seconds for calls in times.values())
            count = max(least, min(MOST_ROUNDS, int(seconds / max(one_round, 1e-9))))
    return times, lost


def fastest_eager(times: Times) -> str | None:
    """No baseline is made of an eager form that the machine happens to be bad at."""
    medians = {
        name: statistics.median(call.seconds for call in calls)
        for name, calls in times.items()
        if name.startswith("eager")
    }
    return min(medians, key=medians.get, default=None)


def row(match: Match, provider: Provider, error: str | None, times: Times, ours: str) -> dict:
    """One line of a results file."""
    name, eager = provider.name, fastest_eager(times)
    calls = times.get(name, [])

    def ratio(above: str, below: str | None) -> float | None:
        if above not in times or below not in times:
            return None
        pairs = zip(times[above], times[below], strict=True)
        return statistics.median(a.seconds / b.seconds for a, b in pairs)

    timed = summary([call.seconds for call in calls]) if calls else {}
    extra = [call.extra for call in calls if call.extra is not None]
    return {
        "provider": name,
        "role": FLOOR if name == FLOOR else "bound" if provider.bound else "loss",
        "version": provider.version,
        "computes": provider.computes,
        **match.sizes(),
        "S": SEQUENCES,
        "dtype": dtype_name(match.dtype),
        "seconds": timed.get("seconds"),
        "spread": timed.get("spread"),
        "rounds": timed.get("rounds"),
        "cpu_seconds": statistics.median(call.cpu for call in calls) if calls else None,
        "fastest_eager": eager,
        "over_eager": ratio(name, eager),
        "over_ours": ratio(name, ours),
        "of_floor": ratio(FLOOR, name),
        "extra_bytes": max(extra, default=None),
        "error": error,
    }


def play(match: Match, workers: list[Worker], scratch: Path, ours: str, **rounds) -> list[dict]:
    """The rows of one match."""
    truth = scratch / "truth.pt"
    print(f"{match}: the oracle ...", file=sys.stderr, flush=True)
    kinds = {worker.provider.bound for worker in workers}
    torch.save({bound: match.truth(bound=bound) for bound in kinds}, truth)
    give_back()
    errors: dict[str, str | None] = {}
    for worker in workers:
        name = worker.provider.name
        print(f"{match}: {name} ...", file=sys.stderr, flush=True)
        try:
            errors[name] = worker.ask("open", match, truth)
        except Gap as gap:
            errors[name] = str(gap)
    right = [worker for worker in workers if errors[worker.provider.name] is None]
    times, lost = rounds_of(right, label=str(match), **rounds)
    errors |= lost
    return [row(match, w.provider, errors[w.provider.name], times, ours) for w in workers]


def compare_table(rows: list[dict]) -> list[str]:
    """Rows of one match as lines to print, what is missing or wrong named below."""
    titles = ["provider", "version", "time", "spread", "/ eager", "/ ours", "of floor", "CPU"]
    titles += ["extra"]

    def form(value: float | None, text: str) -> str:
        return "-" if value is None else text.format(value)

    table = [
        [
            r["provider"],
            r["version"] or "-",
            seconds_text(r["seconds"]),
            form(r["spread"], "{:.0%}"),
            form(r["over_eager"], "{:.2f}"),
            form(r["over_ours"], "{:.2f}"),
            form(r["of_floor"], "{:.2f}"),
            seconds_text(r["cpu_seconds"]),
            "-" if r["extra_bytes"] is None else f"{r['extra_bytes'] / 2**20:.0f} MiB",
        ]
        for r in rows
    ]
    below = [f"{r['provider']}: {r['computes']}" for r in rows if r["role"] != "loss"]
    below += [f"{r['provider']}: {r['error']}" for r in rows if r["error"]]
    return align([titles, *table]) + below


def matches_of(kind: type[Match], options, shapes, device) -> list:
    """Every dtype and head of every shape; with `--quick` each of them once."""
    dtypes, heads = options.dtype or list(DTYPES), options.head or kind.heads
    pairs = list(itertools.product(dtypes, heads))
    if options.quick:
        turns = range(max(len(dtypes), len(heads)))
        pairs = [(dtypes[i % len(dtypes)], heads[i % len(heads)]) for i in turns]
    return [
        kind(shape=shape, dtype=DTYPES[dtype], device=device, head=head)
        for shape, (dtype, head) in itertools.product(shapes, pairs)
    ]


def parser(kind: type[Match], providers: Sequence[Provider]) -> Parser:
    names = [f"  {p.name:27}  {p.computes}" for p in providers]
    parsed = Parser("grpo-fast bench --peers", __doc__, "\n".join(["who is asked:", *names]))
    parsed.add_argument("--logits", action="store_true", help="the loss from logits instead")
    parsed.add_shape(kind.usual, kind.letters, sweep=True)
    parsed.add_argument("--dtype", choices=DTYPES, action="append", help="may be given again")
    heads = [head for head in kind.heads if head is not None]
    if heads:
        parsed.add_argument("--head", choices=heads, action="append", help="may be given again")
    parsed.set_defaults(head=None)
    parsed.add_argument(
        "--only", metavar="NAME", action="append", help="of those below; may be given again"
    )
    parsed.add_argument(
        "--threads",
        type=int,
        default=torch.get_num_threads(),
        help=f"of each call (default here: {torch.get_num_threads()})",
    )
    parsed.add_argument(
        "--rounds",
        type=int,
        default=LEAST_ROUNDS,
        help=f"fewest calls of each provider (default: {LEAST_ROUNDS})",
    )
    parsed.add_argument(
        "--seconds", type=float, default=5.0, help="time for more rounds (default: 5)"
    )
    parsed.add_argument(
        "--quick",
        action="store_true",
        help=f"for CI: {QUICK_ROUNDS} rounds, each dtype and head once, who compiles left out, "
        f"default shape {' '.join(map(str, kind.quick))}",
    )
    parsed.add_place()
    return parsed


def compare(
    matches: list[Match],
    providers: list[Provider],
    *,
    ours: str,
    threads: int,
    quick: bool = False,
    **rounds,
) -> Iterator[list[dict]]:
    """The rows of match after match; `rounds` are `least` and `seconds`."""
    device = matches[0].device.type
    workers = [
        Absent(provider, "left out by --quick: it compiles for many seconds")
        if quick and device in provider.compiled_on
        else Worker(provider, threads)
        for provider in providers
    ]
    says = f"{matches[0].floor_is}; not a loss, held against nothing"
    floor = Provider(name=FLOOR, computes=says, load=FloorSeat, package="torch")
    workers.append(Worker(floor, threads, FloorSeat))
    try:
        for match in matches:
            narrow = match.dtype != torch.float32
            seated = [worker for worker in workers if narrow or not worker.provider.half_only]
            with tempfile.TemporaryDirectory() as scratch:
                yield play(match, seated, Path(scratch), ours, **rounds)
    finally:
        for worker in workers:
            worker.close()


def main(argv: list[str]) -> int:
    """Exit code 0; 1 when ours has no number; 2 for a wrong option."""
    logits = "--logits" in argv
    kind, providers = (LogitsMatch, LOGITS_PROVIDERS) if logits else (Match, PROVIDERS)
    command = parser(kind, providers)
    options = command.parse_args(argv)
    shapes = command.shapes(options, kind.letters, SEQUENCES)
    shapes = shapes or [kind.quick if options.quick else kind.usual]
    device = command.device(options.device)
    if options.quick:
        options.rounds, options.seconds = QUICK_ROUNDS, 0.0
    if options.rounds < 2 or options.threads < 1:
        command.error("--rounds from 2, --threads from 1")
    there = {p.name: p for p in providers if device.type in p.timed_on}
    for name in set(options.only or ()) - set(there):
        command.error(f"--only {name!r}: on {device.type} there are {', '.join(there)}")
    matches = matches_of(kind, options, shapes, device)
    facts = about(device, "--peers", argv, threads=options.threads)
    if device.type == "cuda" or options.threads > 1:
        facts["clock"] = "wall clock"
    print(f"{facts['device']}, torch {facts['torch']}, commit {facts['commit']}")
    rows: list[dict] = []
    compared = compare(
        matches,
        [there[name] for name in options.only or there],
        ours=OURS[device.type],
        threads=options.threads,
        quick=options.quick,
        least=options.rounds,
        seconds=options.seconds,
    )
    for match, fresh in zip(matches, compared, strict=True):
        rows += fresh
        print(f"\n{match}")
        print("\n".join(compare_table(fresh)), flush=True)
        # Whole after each match: a time limit keeps what is done.
        written(options.json, "peers", facts, rows)
    print(f"\nload of the machine {facts['load_before']:.1f} to {facts['load_after']:.1f}")
    wrong = [r for r in rows if r["provider"].startswith("grpo-fast") and r["error"]]
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
