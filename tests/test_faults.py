"""The demo made sick on purpose: every fault's config, and some of them run for real."""

import importlib.util
import json
import re
from collections import Counter
from pathlib import Path

import pytest

from grpo_examples import arithmetic
from grpo_fast import reward_checks
from grpo_fast.cli import main, train_config
from grpo_fast.doctor import Doctor
from grpo_fast.doctor_rules import LIMITS, RULES
from grpo_fast.faults import heard, read_faults
from grpo_fast.rewards import load_rewards

FOLDER = Path(arithmetic.__file__).parent
FAULTS = read_faults(FOLDER)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=lambda fault: fault.name)
def test_a_fault_is_a_config_that_differs_from_the_demo_and_names_a_rule(fault):
    demo = ["--config", str(FOLDER / "demo.yaml")]
    healthy, sick = train_config(demo), train_config(demo, fault.change)
    assert sick != healthy
    assert sick.output_dir == f"runs/demo-fault-{fault.name}"
    assert sick.max_steps == 40
    assert sick.loss.beta == healthy.loss.beta
    assert fault.rule in {rule.id for rule in RULES}
    assert len(load_rewards(sick.reward, sick.reward_weights)) >= 1


def test_the_pitfalls_of_the_mission_are_there():
    """Group too small, hacking, KL, all alike, hidden variance, and what else needs a rule."""
    assert len(FAULTS) >= 12
    assert {"R2", "R11", "R3", "R14", "R12"} <= {fault.rule for fault in FAULTS.values()}


@pytest.mark.parametrize("arguments", [["--fault", "list"], ["--fault=list"]])
def test_the_list_has_a_line_for_each_fault(capsys, arguments):
    assert main(["demo", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[:2] for line in lines] == [[f.name, f.rule] for f in FAULTS.values()]
    assert all(len(line) <= 100 for line in lines)


def test_the_help_has_options_and_faults(capsys):
    assert main(["demo", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("usage: grpo-fast demo [--fault NAME]")
    assert "--group-size" in text
    assert "group-too-small" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fault", "grup-too-small"], "'grup-too-small': did you mean 'group-too-small'?"),
        (["--fault"], "--fault needs a name: `grpo-fast demo --fault list` names them all"),
        (["--fault", "--seed"], "--fault needs a name"),
        (["--fault", "too-easy", "--fault=too-hard"], "given twice (too-easy, too-hard)"),
    ],
)
def test_a_wrong_fault_is_one_line_and_2(capsys, words, message):
    assert main(["demo", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A model that has learned nothing: enough for a fault that is not about answers."""
    folder = tmp_path_factory.mktemp("base")
    arithmetic.base_model(folder, 0, steps=1)
    return str(folder)


SMALL = [
    "--token-budget",
    "256",
    "--prompts-per-step",
    "4",
    "--group-size",
    "4",
    "--eval-prompts",
    "4",
    "--device",
    "cpu",
]


@pytest.mark.parametrize("name", ["rewards-identical", "variance-hidden", "stale-sampler"])
def test_a_fault_runs_for_real_and_the_doctor_says_so(base, tmp_path, capsys, name):
    rule = FAULTS[name].rule
    given = ["--model", base, "--output-dir", str(tmp_path / "run"), "--max-steps", "8", *SMALL]
    if name == "stale-sampler":
        # The untrained model is never right, so that nothing would move it.
        given += ["--reward", f"{FOLDER}/faults.py:commonest_first"]
    assert main(["demo", "--fault", name, *given]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"doctor: .*{rule} .* \| expected of {name}: {rule} .*", last)
    (step,) = re.findall(r", found at step (\d+)$", last)
    live = [line for line in lines if re.match(rf"(warning|error) {rule} ", line)]
    assert f" at step {step}: " in live[0]
    assert main(["doctor", str(tmp_path / "run"), "--fail-on", "warning"]) == 1


@pytest.fixture(scope="module")
def matrix():
    """Real demos, trained by docs/doctor_matrix.py; what is missed stands in docs/doctor.md."""
    script = Path(__file__).resolve().parent.parent / "docs/doctor_matrix.py"
    spec = importlib.util.spec_from_file_location("doctor_matrix", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_recorded_runs_of_every_fault_are_found_within_25_steps_and_healthy_ones_are_silent(matrix):
    runs = matrix.outcomes()
    found = {
        (run.name, run.seed): run.alarms.get(FAULTS[run.name].rule, 99) <= 25
        for run in runs
        if run.name != "healthy"
    }
    assert {name for (name, _), seen in found.items() if seen} == set(FAULTS)
    assert min(Counter(name for name, _ in found).values()) >= 5
    assert sum(found.values()) / len(found) >= 0.95
    healthy = [run.alarms for run in runs if run.name == "healthy"]
    assert (len(healthy), [alarms for alarms in healthy if alarms]) == (20, [])
    assert matrix.RUNS.stat().st_size < 200_000


def test_the_end_is_seen_pushed_down_where_length_is_paid_and_in_no_healthy_run(matrix):
    seen = Counter()
    for name, seed, rows in matrix.recorded():
        if name not in ("length-explosion", "healthy"):
            continue
        doctor = Doctor(matrix.options(name, seed))
        for row in rows:
            doctor.feed(row)
            if "push/eos" in row and reward_checks.end_pushed_down(doctor.run, LIMITS):
                seen[name, seed] += 1
    assert {name for name, _ in seen} == {"length-explosion"}
    assert len(seen) == 5


def test_a_healthy_run_closes_with_nothing_above_info(tmp_path):
    rows = [{"step": k, "reward": 0.5, "grad_norm": 1.0} for k in range(5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert heard(tmp_path, None) == "doctor: nothing above info"
    missed = heard(tmp_path, FAULTS["kl-explosion"])
    assert missed.endswith("| expected of kl-explosion: R3 KL explosion, not found")
