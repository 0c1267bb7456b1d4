"""`make gpu OUT=DIR`: everything worth knowing about a GPU machine, in one JSON file.

Parts in processes and under time limits of their own, so that one that fails leaves the others: the
tests of kernels, attention and packed steps un-interpreted, every op timed against eager and its
ceiling, the demo, a whole step by layout, its memory against the size of the group, and the cases
of `grpo-fast bench --cases`, whose verdicts come last.
Needs the project installed (`make gpu` does that) and no network; peers come as wheels in a folder
(--wheels; `make wheels` fills one). This file is also run by its path, hence the absolute imports.
"""

import datetime
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from xml.etree import ElementTree

import torch
import yaml

from grpo_bench.cases import COMMANDS, case_table
from grpo_bench.options import Parser
from grpo_bench.timing import header
from grpo_fast.config_file import read_config

ROOT = Path(__file__).resolve().parent.parent
# Seconds a part may take, each below the eight minutes that a machine is often lent for.
LIMITS = {"kernels": 240, "timing": 170, "demo": 130, "step": 400, "memory": 300}
LIMITS |= {"A": 300, "B": 300, "C": 240, "linear": 120, "F": 240, "G": 240, "H": 470}
LIMITS |= {"drop-in": 300}
LIMITS |= {"I24": 300, "I80": 300, "I139": 300, "J": 400}
TESTS = (
    "tests/kernels",
    "tests/ops",
    "tests/test_attention_gpu.py",
    "tests/test_families.py::test_in_the_dtypes_of_training_a_step_is_as_exact_as_the_loop",
)
# Of Qwen2.5-0.5B: the float64 oracle is still quick, and the trunk is most of the work.
MODEL = "--device cuda --dtype bfloat16 --model qwen2.5-0.5b"
TABLES = {
    "timing": "--device cuda --seconds 2",
    "step": f"--step {MODEL} --shape 1024 512 16 --rounds 5 --seconds 20",
    "memory": f"--memory {MODEL} --shape 1024 256 --largest 512 --budget 8192",
    "drop-in": f"--drop-in {MODEL} --shape 1024 256 16 --shape 1024 256 64 --rounds 3 --seconds 0",
    **COMMANDS,
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
    parser.add_argument(
        "--minutes",
        type=float,
        default=25.0,
        help="no part starts later, or goes on for longer (default: 25)",
    )
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="wheels of the peers, installed for this run"
    )
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
    words = (*shlex.split(TABLES[name]), "--json", str(found))
    part = run_part(python("-m", "grpo_bench.main", *words), limit)
    return part | ({"result": json.loads(found.read_text())} if found.is_file() else {})


PARTS = {"kernels": kernels_part, "demo": demo_part}
PARTS |= {name: partial(table_part, name) for name in TABLES}


def install_wheels(folder: Path, target: Path) -> None:
    """The peers, for the processes of this run alone."""
    wheels = sorted(str(path) for path in folder.glob("*.whl"))
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(target), *wheels], check=True)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(target), *([before] if before else [])])


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
        if key not in ("status", "seconds", "limit_seconds", "output", "result")
    }
    print(
        f"{name}: {part['status']} in {part['seconds']} s", *(f"{k}={v}" for k, v in facts.items())
    )
    if part["status"] != "ok" or "result" in part:
        print(part["output"])
    sys.stdout.flush()


def main(argv: list[str]) -> int:
    """Exit code 0; 1 when a part failed or ran out of time; 2 without a GPU or for a wrong
    option."""
    chosen = options(argv)
    about = header(torch.device("cuda"), ROOT)
    chosen.out.mkdir(parents=True, exist_ok=True)
    path = chosen.out / file_name(about["device"], about["date"])
    result = {"schema": SCHEMA, "about": about, "parts": parts_so_far(path, about["commit"])}
    asked, end, left_out = chosen.only or list(LIMITS), time.monotonic() + 60 * chosen.minutes, []
    with tempfile.TemporaryDirectory() as peers:
        if chosen.wheels:
            install_wheels(chosen.wheels, Path(peers))
        for name in asked:
            limit = min(LIMITS[name], int(end - time.monotonic()))
            if limit <= 0:
                left_out.append(name)
                continue
            with tempfile.TemporaryDirectory() as scratch:
                part = result["parts"][name] = PARTS[name](Path(scratch), limit)
            if "result" in part:
                # What runs is installed, and does not know the checkout it came from.
                part["result"]["about"]["commit"] = about["commit"]
            # Written after each part: what was measured survives whatever comes next.
            path.write_text(json.dumps(result, indent=1) + "\n")
            print_part(name, result["parts"][name])
    print("\n".join(case_table(chosen.out)))
    if left_out:
        words = " ".join(f"--only {name}" for name in left_out)
        print(f"not run, {chosen.minutes:g} minutes are over: make gpu ARGS='{words}'")
    print(f"{about['device']}, commit {about['commit']}: {path}")
    done = [result["parts"][name]["status"] for name in asked if name not in left_out]
    return 0 if all(status == "ok" for status in done) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
