"""docs/host_tests.md and the table in docs/integrations.md: the hosts' own tests, with their code
and with the drop-in in its place.

    .venv/bin/python docs/host_tests.py openrlhf=FOLDER verl=FOLDER liger=FOLDER trl=FOLDER

A folder is a checkout of the host's release, or its sdist unpacked, for the tests in it; the host
itself is what PYTHONPATH has, or else what `make test` installed.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path(__file__).with_suffix(".md")
SUMMARY = PAGE.with_name("integrations.md")
PEERS = Path(sys.prefix) / "peers"
OUTCOMES = ("passed", "failed", "not run")
FILES = {
    "trl": ["tests/test_grpo_trainer.py"],
    "liger": ["test/chunked_loss/test_grpo_loss.py"],
    "verl": [
        "tests/trainer/ppo/test_dynamic_policy_losses_on_cpu.py",
        "tests/trainer/ppo/test_rollout_corr_integration.py",
    ],
    "openrlhf": ["tests/test_loss_aggregation.py"],
}
# Its large shapes would take hours on a CPU.
CHOSEN = {"liger": "not 1024-4096"}


HEAD = """# The hosts' own tests

What trainers test of the parts that a drop-in replaces, with their own code and with the drop-in in
its place: passed, failed, and not run with the reason. One row a test function. A test that fails
with the trainer's own code too says nothing of the drop-in. This page and the table in
[integrations.md](integrations.md) are written by `docs/host_tests.py`, which says how; nothing of
the trainers is in this repository.
"""
TABLE = "| host and its tests | replaced in them | stock | drop-in |\n|---|---|---|---|\n"
COLUMNS = "| test | stock | drop-in | why not |\n|---|---|---|---|\n"


class Result(NamedTuple):
    outcome: str
    """One of OUTCOMES."""
    reason: str


class Run(NamedTuple):
    version: str
    results: dict[str, Result]
    replaced: str
    """The names that the drop-in takes over, as far as the file has them."""


def run(host: str, folder: Path, file: str, *, drop_in: bool) -> Run:
    """Every test of one file of the host."""
    with tempfile.TemporaryDirectory() as place:
        report = Path(place, "report.xml")
        path = [ROOT / "tests/hosts", folder, *os.environ.get("PYTHONPATH", "").split(":"), PEERS]
        environment = os.environ | {
            "PYTHONPATH": ":".join(str(part) for part in path if str(part)),
            "HOST_TESTS": f"{host}:{'drop-in' if drop_in else ''}",
            "HF_HUB_OFFLINE": "1",
            # Liger compiles its loss, and its tests on a CPU would wait for that for hours.
            "TORCHDYNAMO_DISABLE": "1",
        }
        command = [sys.executable, "-m", "pytest", "-c", "/dev/null", "-p", "swap"]
        command += [f"--rootdir={folder}", f"--junitxml={report}", str(folder / file)]
        command += ["-k", CHOSEN.get(host, "")]
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
        line = re.search("^(.*) with, in place: (.*)$", done.stdout, re.MULTILINE)
        if done.returncode > 1 or line is None:
            sys.exit(f"pytest did not run {file}: {(done.stdout + done.stderr)[-2000:]}")
        results = dict(map(result, ElementTree.parse(report).iter("testcase")))
        return Run(line[1], results, line[2])


def result(case: ElementTree.Element) -> tuple[str, Result]:
    _, _, kind = case.get("classname", "").rpartition(".")
    name = f"{kind}.{case.get('name')}" if kind.startswith("Test") else case.get("name", "")
    for tag, outcome in (("failure", "failed"), ("error", "failed"), ("skipped", "not run")):
        found = case.find(tag)
        if found is not None:
            return name, Result(outcome, found.get("message", "").split("\n")[0])
    return name, Result("passed", "")


def rows(stock: dict[str, Result], ours: dict[str, Result]) -> list[str]:
    """One line a test function: cases of either outcome with stock and with the drop-in."""
    functions: dict[str, list[str]] = {}
    for name in stock:
        functions.setdefault(name.partition("[")[0], []).append(name)
    lines = []
    for function, names in functions.items():
        reasons = {ours[name].reason for name in names} | {stock[name].reason for name in names}
        why = "; ".join(sorted(shown(reason) for reason in reasons if reason))
        cells = (counted([found[name] for name in names]) for found in (stock, ours))
        lines.append(f"| `{function}` | {' | '.join(cells)} | {why} |")
    return lines


def shown(reason: str) -> str:
    return re.sub(r"/tmp/\S+", "...", reason).replace("|", "\\|")[:160]


def counted(results: list[Result]) -> str:
    counts = Counter(result.outcome for result in results)
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in OUTCOMES if counts[outcome])


def summary(title: str, stock: Run, ours: Run) -> str:
    cells = " | ".join(counted(list(run.results.values())) for run in (stock, ours))
    return f"| {title} | {ours.replaced or 'nothing'} | {cells} |"


def worse(stock: dict[str, Result], ours: dict[str, Result]) -> list[str]:
    """What passes with the host's own code and does not with the drop-in."""
    return [
        f"{name}: {ours[name].outcome}, {ours[name].reason}"
        for name in stock
        if stock[name].outcome == "passed" and ours[name].outcome != "passed"
    ]


def sections(page: str) -> dict[str, str]:
    """Its headings of the second level, and what stands under them."""
    parts = page.split("\n## ")[1:]
    return {part.partition("\n")[0]: part.partition("\n")[2].strip() for part in parts}


def write(found: dict[str, tuple[Run, Run]]) -> None:
    """Both pages, in which what was not run now stays as it is."""
    known = sections(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {}
    page = SUMMARY.read_text(encoding="utf-8")
    before, table, after = re.split(f"({re.escape(TABLE)}(?:[|].*\n)*)", page)
    lines = {line.split(" | ")[0]: line for line in table.removeprefix(TABLE).splitlines()}
    for title, (stock, ours) in found.items():
        known[title] = COLUMNS + "\n".join(rows(stock.results, ours.results))
        lines[f"| {title}"] = summary(title, stock, ours)
    text = "\n".join(f"## {title}\n\n{known[title]}\n" for title in sorted(known))
    PAGE.write_text(f"{HEAD}\n{text}", encoding="utf-8")
    listed = "".join(f"{lines[key]}\n" for key in sorted(lines))
    SUMMARY.write_text(f"{before}{TABLE}{listed}{after}", encoding="utf-8")


def main(arguments: list[str]) -> int:
    found, lost = {}, []
    for argument in arguments:
        host, _, folder = argument.partition("=")
        for file in FILES[host]:
            stock, ours = (run(host, Path(folder), file, drop_in=on) for on in (False, True))
            title = f"{ours.version}: `{file}`"
            found[title] = (stock, ours)
            lost += worse(stock.results, ours.results)
            print(summary(title, stock, ours), *rows(stock.results, ours.results), sep="\n")
    write(found)
    print("worse with the drop-in:", *(lost or ["nothing"]), sep="\n")
    return int(bool(lost))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
