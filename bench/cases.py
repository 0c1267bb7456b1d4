"""`grpo-fast bench --cases`: what this project aims at on a GPU, case by case, and what the result
files say about it.

Reads the files that `make gpu` left and measures nothing. `make gpu ARGS="--only A"` measures case
A. A ratio below 1 is faster; the floor is the bare matrix products or copy of the same run."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from .options import Parser
from .record import named_records
from .report import RESULTS
from .timing import align

Rows = list[dict[str, Any]]
OURS = "grpo-fast triton"
BFLOAT16 = "--device cuda --dtype bfloat16"
MODEL = f"{BFLOAT16} --model qwen2.5-1.5b"


class Aim(NamedTuple):
    what: str
    value: Callable[[Rows], float | None]
    least: float | None = None
    most: float | None = None

    def __str__(self) -> str:
        return f"{self.what} {'>=' if self.most is None else '<='} {self.bound:g}"

    @property
    def bound(self) -> float:
        return self.least if self.most is None else self.most

    def verdict(self, rows: Rows | None) -> tuple[str, str]:
        """(what was found, met or missed)."""
        value = None if rows is None else self.value(rows)
        if value is None:
            return "-", "no result yet" if rows is None else "not measured there"
        met = value >= self.bound if self.most is None else value <= self.bound
        return f"{value:.3g}", "met" if met else "MISSED"


class Case(NamedTuple):
    question: str
    part: str
    """Of `make gpu`, whose result it is judged by."""
    aims: tuple[Aim, ...]


def row_of(rows: Rows, provider: str, **where: Any) -> dict | None:
    """The provider's row with a number, of that shape."""
    for row in rows:
        at = all(row.get(name) == value for name, value in where.items())
        if row.get("provider") == provider and at and row.get("seconds"):
            return row
    return None


def of_floor(**where: Any) -> Callable[[Rows], float | None]:
    def value(rows: Rows) -> float | None:
        mine = row_of(rows, OURS, **where)
        return mine and mine["of_floor"]

    return value


def over(peer: str, mine: str = OURS, **where: Any) -> Callable[[Rows], float | None]:
    """Our time over the peer's."""

    def value(rows: Rows) -> float | None:
        pair = [row_of(rows, name, **where) for name in (mine, peer)]
        return pair[0]["seconds"] / pair[1]["seconds"] if all(pair) else None

    return value


def timed(label: str, name: str, **where: Any) -> Callable[[Rows], float | None]:
    """A field of the timing table."""

    def value(rows: Rows) -> float | None:
        for row in rows:
            if row["label"] == label and all(row.get(k) == v for k, v in where.items()):
                return row.get(name)
        return None

    return value


def half_over_full(rows: Rows) -> float | None:
    """Time with half of the rows without a gradient over the full time, at the same shape."""
    half = [row for row in rows if row["label"].endswith("half of the rows") and row["columns"]]
    for row in half:
        for full in rows:
            same = all(row[letter] == full.get(letter) for letter in "NDV")
            if same and full["label"] == "loss + gradient" and full["columns"]:
                return row["columns"]["ours"]["seconds"] / full["columns"]["ours"]["seconds"]
    return None


def largest_extra(rows: Rows) -> float | None:
    found = [row["extra_bytes"] / 1e9 for row in rows if row["provider"] == OURS and row["seconds"]]
    return max(found, default=None)


def growth(rows: Rows) -> float | None:
    """The largest extra memory over the smallest; with one size there is nothing to say."""
    found = [row["extra_bytes"] for row in rows if row["provider"] == OURS and row["seconds"]]
    return max(found) / min(found) if len(found) > 1 else None


def step_speed(rows: Rows) -> float | None:
    slower = over("TRL accumulated", "shared")(rows)
    return slower and 1 / slower


def field(provider: str, name: str) -> Callable[[Rows], float | None]:
    def value(rows: Rows) -> float | None:
        found = row_of(rows, provider)
        return found and found[name]

    return value


def largest_group(rows: Rows) -> float | None:
    """Of the layouts that keep to the budget."""
    found = [r["G"] for r in rows if r["provider"] in ("budget", "recomputed") and not r["error"]]
    return max(found, default=None)


TRL, LIGER, SCALED = "TRL", "Liger", "Liger ScaledCE"
CASES = {
    "A": Case(
        "hidden in, head trained, N=4096 D=4096 V=131072",
        "A",
        (
            Aim("of the 3G floor", of_floor(head="trained"), least=0.88),
            Aim("time over TRL", over(TRL), most=0.72),
            Aim("time over Liger ScaledCE", over(SCALED), most=0.80),
            Aim("time over Liger", over(LIGER), most=0.30),
        ),
    ),
    "B": Case(
        "the same at D=896 and 1536, V=151936, N=32768",
        "B",
        (
            Aim("of the 3G floor, D=896", of_floor(D=896), least=0.68),
            Aim("of the 3G floor, D=1536", of_floor(D=1536), least=0.78),
            Aim("time over TRL, D=896", over(TRL, D=896), most=0.70),
            Aim("time over TRL, D=1536", over(TRL, D=1536), most=0.70),
        ),
    ),
    "C": Case(
        "head frozen, N=4096 D=4096 V=131072",
        "C",
        (
            Aim("of the 2G floor", of_floor(head="frozen"), least=0.85),
            Aim("time over TRL", over(TRL), most=0.70),
        ),
    ),
    "D": Case(
        "half of the rows with zero coefficient",
        "linear",
        (Aim("time over all rows", half_over_full, most=0.60),),
    ),
    "E": Case(
        "log-probs only, no gradient",
        "linear",
        (Aim("of the 1G floor", timed("log-probs", "fraction_of_ceiling"), least=0.85),),
    ),
    "F": Case(
        "logits in, N=8192 V=151936",
        "F",
        (
            Aim("of the bandwidth floor", of_floor(), least=0.85),
            Aim("time over Liger's Triton GRPO", over(LIGER), most=0.60),
        ),
    ),
    "G": Case(
        "extra memory, N = 4096 ... 1,048,576",
        "G",
        (
            Aim("GB beyond the gradients", largest_extra, most=1.0),
            Aim("largest over smallest", growth, most=1.1),
        ),
    ),
    "H": Case(
        "update step, Qwen2.5-1.5B shape, P=1024, log-normal C (mean 512), G=64",
        "H",
        (
            Aim("times TRL's tokens a second", step_speed, least=4.0),
            Aim("of the measured matmul rate", field("shared", "of_rate"), least=0.4),
        ),
    ),
    **{
        f"I{size}": Case(
            f"largest G in {size} GB, Qwen2.5-1.5B shape, P=C=1024",
            f"I{size}",
            (Aim("completions of the group", largest_group, least=512),),
        )
        for size in (24, 80, 139)
    },
    "J": Case(
        "rollout, Qwen2.5-1.5B shape, G=64, P=C=1024",
        "J",
        (
            Aim("times HF generate's tokens a second", field("grpo-fast", "over_hf"), least=10),
            Aim("of the decode roofline", field("grpo-fast", "of_roof"), least=0.5),
        ),
    ),
}
# By part: options of `grpo-fast bench`.
COMMANDS = {
    "A": f"--peers --shape 4096 4096 131072 {BFLOAT16} --head trained",
    "B": f"--peers --shape 32768 896 151936 --shape 32768 1536 151936 {BFLOAT16} --head trained "
    f"--only '{OURS}' --only TRL",
    "C": f"--peers --shape 4096 4096 131072 {BFLOAT16} --head frozen",
    "linear": "--op linear_grpo --device cuda --seconds 2",
    "F": f"--peers --logits --shape 8192 151936 {BFLOAT16}",
    "G": f"--peers --shape 4096 896 151936 --shape 65536 896 151936 --shape 1048576 896 151936 "
    f"{BFLOAT16} --head trained --only '{OURS}' --rounds 2 --seconds 0",
    "H": f"--step {MODEL} --shape 1024 512 64 --lengths lognormal --pieces 16 --only accumulated "
    "--only shared --only 'TRL accumulated' --rounds 3 --seconds 0",
    **{
        f"I{size}": f"--memory {MODEL} --shape 1024 1024 --largest 512 --budget 4096 --limit {size}"
        for size in (24, 80, 139)
    },
    "J": f"--rollout {MODEL} --shape 1024 1024 64 --rounds 2 --seconds 0",
}


def newest(folder: Path, part: str) -> dict | None:
    """The newest record that `make gpu` left of a part."""
    found = [
        record
        for name, record in named_records(folder).items()
        if name.startswith("gpu-") and name.endswith(f"-{part}")
    ]
    return max(found, key=lambda record: record["about"]["date"], default=None)


def case_rows(folder: Path) -> list[list[str]]:
    """A line for each aim: case, question, aim, found, verdict, where and when."""
    lines = []
    for letter, case in CASES.items():
        record = newest(folder, case.part)
        rows = record and record["rows"]
        where = f"{record['about']['device']}, {record['about']['date'][:10]}" if record else "-"
        for k, aim in enumerate(case.aims):
            head = [letter, case.question] if k == 0 else ["", ""]
            lines.append([*head, str(aim), *aim.verdict(rows), where])
    return lines


def case_table(folder: Path) -> list[str]:
    return align([["case", "question", "aim", "found", "verdict", "where"], *case_rows(folder)])


def parser() -> Parser:
    listed = [f"  {part:7} grpo-fast bench {words}" for part, words in COMMANDS.items()]
    epilog = "\n".join(['the parts of `make gpu ARGS="--only PART"`:', *listed])
    parsed = Parser("grpo-fast bench --cases", __doc__, epilog)
    parsed.add_argument("--results", type=Path, default=RESULTS, metavar="DIR")
    return parsed


def main(argv: list[str]) -> int:
    """Exit code 0; 2 for a wrong option."""
    options = parser().parse_args(argv)
    print("\n".join(case_table(options.results)))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
