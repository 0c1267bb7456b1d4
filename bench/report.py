"""`grpo-fast bench --report`: pictures and tables of the results, made from their files alone.

Every NAME.json of the folder that knows its command gets a NAME.png beside it and a section of the
folder's README.md. Where the folder is bench/results of a checkout, the figures between the two
marks of the project's README are made anew too. Nothing is measured."""

import sys
from pathlib import Path
from typing import Any

from .charts import draw
from .options import Parser
from .record import ROOT, named_records
from .tables import source, table

RESULTS = ROOT / "bench/results"
# In the order in which they are shown.
TITLES = {
    "peers": "The loss beside its peers",
    "accuracy": "Exactness",
    "step": "A whole step, by layout",
    "memory": "Memory and speed against the size of the group",
    "drop_in": "TRL's trainer and the one that takes its place",
    "rollout": "Rollouts",
    "plan": "The cost model against measurement",
    "timing": "Each op against eager and its ceiling",
    "static": "What the kernels compile to",
}
# What the project's README shows, by file, and whether with its table: for people who decide, not
# for those who tune.
SHOWN = {"cpu-peers": False, "cpu-step": True, "cpu-memory": True, "cpu-drop-in": True}
BEGIN, END = "<!-- figures: made by `grpo-fast bench --report` -->", "<!-- end of figures -->"


def section(
    head: str, record: dict[str, Any], picture: str | None, *, whole: bool = True
) -> list[str]:
    """Heading, picture, and the table or its last line alone."""
    lines = [head, ""]
    if picture:
        lines += [f"![{TITLES[record['kind']]}]({picture})", ""]
    return [*lines, *(table(record) if whole else [source(record)]), ""]


def page(records: dict[str, dict], drawn: set[str]) -> str:
    """The README of a folder of results."""
    lines = [
        "# Results",
        "",
        "Made by `grpo-fast bench --report` from the JSON files beside it, which hold every figure "
        "with its spread. A table's last line names machine, versions and commit, and the command "
        "that measures it again. Peers are those of the user's environment: "
        "`PYTHONPATH=.venv/peers` after `make test`.",
        "",
    ]
    for name, record in records.items():
        picture = f"{name}.png" if name in drawn else None
        lines += section(f"## {TITLES[record['kind']]}: {name}", record, picture)
    return "\n".join(lines).rstrip() + "\n"


def figures(records: dict[str, dict], drawn: set[str]) -> str:
    """What stands between the marks of the project's README."""
    lines = []
    for name, whole in SHOWN.items():
        if name in records:
            record = records[name]
            picture = f"bench/results/{name}.png" if name in drawn else None
            lines += section(f"### {TITLES[record['kind']]}", record, picture, whole=whole)
    return "\n".join(lines).rstrip()


def with_figures(readme: str, made: str) -> str:
    before, _, rest = readme.partition(BEGIN)
    _, mark, after = rest.partition(END)
    return f"{before}{BEGIN}\n\n{made}\n\n{END}{after}" if mark else readme


def shown_records(folder: Path) -> dict[str, dict]:
    """Those with a command, by name, in the order of TITLES."""
    order = list(TITLES)
    found = {
        name: record
        for name, record in named_records(folder).items()
        if record.get("kind") in TITLES and record["about"].get("command")
    }
    return dict(sorted(found.items(), key=lambda pair: (order.index(pair[1]["kind"]), pair[0])))


def report(folder: Path) -> dict[Path, str]:
    """Draw the pictures; the text of every page that belongs to them."""
    records = shown_records(folder)
    drawn = {name for name, record in records.items() if draw(record, folder / f"{name}.png")}
    pages = {folder / "README.md": page(records, drawn)}
    readme = ROOT / "README.md"
    if folder.resolve() == RESULTS.resolve() and readme.is_file():
        pages[readme] = with_figures(readme.read_text(), figures(records, drawn))
    return pages


def parser() -> Parser:
    parsed = Parser("grpo-fast bench --report", __doc__)
    parsed.add_argument(
        "--results",
        type=Path,
        default=RESULTS,
        metavar="DIR",
        help="folder of JSON files (default: bench/results of the checkout)",
    )
    return parsed


def main(argv: list[str]) -> int:
    """Exit code 0; 2 for a folder without a result."""
    command = parser()
    options = command.parse_args(argv)
    if not shown_records(options.results):
        command.error(f"--results {options.results}: no result of `grpo-fast bench` lies there")
    for path, text in report(options.results).items():
        path.write_text(text)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
