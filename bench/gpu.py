"""`make gpu OUT=DIR`: everything worth knowing about a GPU machine, in one JSON file.

Parts in processes and under time limits of their own, so that one that fails leaves the others: the
tests of kernels, attention and packed steps un-interpreted, every op timed against eager and its
ceiling, the demo, a whole step by layout, and its memory against the size of the group.
Needs the project installed (`make gpu` does that) and no network. This file is also run by its
path, hence the absolute imports.
"""

import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import torch
import yaml

from grpo_bench.main import OPS, time_ops
from grpo_bench.options import Parser
from grpo_bench.timing import header, timing_table
from grpo_fast.config_file import read_config

ROOT = Path(__file__).resolve().parent.parent
# Seconds a part may take, each below the eight minutes that a machine is often lent for.
LIMITS = {"kernels": 240, "timing": 170, "demo": 130, "step": 400, "memory": 300}
TESTS = (
    "tests/kernels",
    "tests/test_ops.py",
    "tests/test_attention_gpu.py",
    "tests/test_families.py::test_in_the_dtypes_of_training_a_step_is_as_exact_as_the_loop",
)
# Of Qwen2.5-0.5B: the float64 oracle is still quick, and the trunk is most of the work.
MODEL = ("--device", "cuda", "--dtype", "bfloat16", "--model", "qwen2.5-0.5b")
TABLES = {
    "step": ("--step", *MODEL, "--shape", "1024", "512", "16", "--rounds", "5", "--seconds", "20"),
    "memory": (
        "--memory",
        *MODEL,
        "--shape",
        "1024",
        "256",
        "--largest",
        "512",
        "--budget",
        "8192",
    ),
}
# What a part says when it fails, kept in the results.
TAIL_CHARACTERS = 6000
SCHEMA = 1


def options(argv: list[str]):
    parser = Parser("bench/gpu.py", __doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results", metavar="DIR")
    parser.add_argument(
        "--only",
        choices=LIMITS,
        action="append",
        help="this part; may be given again. Parts of one commit and day end in one file",
    )
    parser.add_argument("--rows", type=Path, metavar="FILE", help="used by the timing part itself")
    parsed = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no CUDA device here, which is all that this program measures")
    return parsed


def run_part(command: list[str], limit: int) -> dict:
    """Run a command at the root of the checkout: `status` (ok, failed, timeout), `seconds`,
    `output` (its end)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    start = time.perf_counter()
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=limit,
            check=False,
        )
        status, output = ("failed" if done.returncode else "ok"), done.stdout
    except subprocess.TimeoutExpired as expired:
        status, output = "timeout", expired.stdout or b""
    text = output.decode(errors="replace")
    return {
        "status": status,
        "seconds": round(time.perf_counter() - start, 1),
        "limit_seconds": limit,
        "output": text[-TAIL_CHARACTERS:],
    }


def python(*words: str) -> list[str]:
    # -P: the checkout stays off the path, so that what was installed is what runs.
    return [sys.executable, "-P", *words]


def outcome_counts(junit: Path) -> dict[str, int]:
    """Tests by outcome from pytest's report; empty where it never wrote one."""
    if not junit.is_file():
        return {}
    suites = ElementTree.parse(junit).getroot().iter("testsuite")
    totals = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    for suite in suites:
        for name in totals:
            totals[name] += int(suite.get(name, 0))
    return totals


def kernels_part(scratch: Path, limit: int) -> dict:
    junit = scratch / "tests.xml"
    words = ("-m", "pytest", *TESTS, "-q", "-p", "no:cacheprovider", "--durations=5")
    part = run_part(python(*words, f"--junit-xml={junit}"), limit)
    return part | outcome_counts(junit)


def timing_part(scratch: Path, limit: int) -> dict:
    rows = scratch / "rows.json"
    part = run_part(python("-m", "grpo_bench.gpu", "--rows", str(rows)), limit)
    found = json.loads(rows.read_text()) if rows.is_file() else []
    if any(not row["columns"] for row in found):
        part["status"] = "failed"
    return part | {"rows": found}


def write_rows(path: Path, ops: list[str]) -> None:
    """Time op after op; the file is whole after each, so that a time limit keeps what is done."""
    rows: list[dict] = []
    for op in ops:
        rows += time_ops(torch.device("cuda"), [op], seconds=2.0)
        fresh = path.with_suffix(".part")
        fresh.write_text(json.dumps(rows))
        fresh.replace(path)


def demo_config(scratch: Path) -> Path:
    """examples/demo.yaml with its output in `scratch`, as a file: flags need a package that a GPU
    machine may lack."""
    values = read_config(ROOT / "examples/demo.yaml")
    values |= {"output_dir": str(scratch / "demo"), "device": "cuda", "existing": "refuse"}
    plain = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
    path = scratch / "demo.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


def demo_rewards(metrics: Path) -> dict[str, float | int]:
    """Held-out reward before and after, and the steps taken, from a run's metrics."""
    if not metrics.is_file():
        return {}
    lines = [json.loads(line) for line in metrics.read_text().splitlines() if line.endswith("}")]
    rewards = [line["eval_reward"] for line in lines if "eval_reward" in line]
    if not rewards:
        return {}
    return {"reward_before": rewards[0], "reward_after": rewards[-1], "steps": lines[-1]["step"]}


def demo_part(scratch: Path, limit: int) -> dict:
    config = demo_config(scratch)
    part = run_part(python("-m", "grpo_fast.cli", "train", "--config", str(config)), limit)
    return part | demo_rewards(scratch / "demo/metrics.jsonl")


def table_part(name: str, scratch: Path, limit: int) -> dict:
    """A table of `grpo-fast bench` with a model of real size."""
    found = scratch / "table.json"
    part = run_part(python("-m", "grpo_bench.main", *TABLES[name], "--json", str(found)), limit)
    return part | ({"result": json.loads(found.read_text())} if found.is_file() else {})


PARTS = {
    "kernels": kernels_part,
    "timing": timing_part,
    "demo": demo_part,
    "step": partial(table_part, "step"),
    "memory": partial(table_part, "memory"),
}


def file_name(device: str, moment: str) -> str:
    """`gpu-h100-80gb-hbm3-2026-11-24.json`, from the device's name and an ISO date."""
    words = re.sub(r"[^a-z0-9]+", "-", device.lower().removeprefix("nvidia")).strip("-")
    return f"gpu-{words}-{datetime.datetime.fromisoformat(moment).date()}.json"


def parts_so_far(path: Path, commit: str) -> dict:
    """Of an earlier call on the same commit."""
    if not path.is_file():
        return {}
    before = json.loads(path.read_text())
    return before["parts"] if before["about"]["commit"] == commit else {}


def print_part(name: str, part: dict) -> None:
    facts = {
        key: value
        for key, value in part.items()
        if key not in ("status", "seconds", "limit_seconds", "output", "rows", "result")
    }
    print(
        f"{name}: {part['status']} in {part['seconds']} s", *(f"{k}={v}" for k, v in facts.items())
    )
    if part["status"] != "ok" or "result" in part:
        print(part["output"])
    if part.get("rows"):
        print("\n".join(timing_table(part["rows"])))
    sys.stdout.flush()


def main(argv: list[str]) -> int:
    """Exit code 0; 1 when a part failed or ran out of time; 2 without a GPU or for a wrong
    option."""
    chosen = options(argv)
    if chosen.rows:
        write_rows(chosen.rows, list(OPS))
        return 0
    about = header(torch.device("cuda"), ROOT)
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / file_name(about["device"], about["date"])
    result = {"schema": SCHEMA, "about": about, "parts": parts_so_far(path, about["commit"])}
    asked = chosen.only or list(PARTS)
    for name in asked:
        with tempfile.TemporaryDirectory() as scratch:
            result["parts"][name] = PARTS[name](Path(scratch), LIMITS[name])
        # Written after each part: what was measured survives whatever comes next.
        path.write_text(json.dumps(result, indent=1) + "\n")
        print_part(name, result["parts"][name])
    print(f"{about['device']}, commit {about['commit']}: {path}")
    return 0 if all(result["parts"][name]["status"] == "ok" for name in asked) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
