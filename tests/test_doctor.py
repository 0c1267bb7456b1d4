"""The doctor on synthetic runs: healthy ones, and one sick in exactly one way for each fault."""

import dataclasses
import importlib.util
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest

from grpo_fast import doctor_command, train
from grpo_fast.cli import main
from grpo_fast.config import TrainConfig
from grpo_fast.doctor import Doctor, diagnose, ranges
from grpo_fast.doctor_rules import LIMITS, RULES
from grpo_fast.errors import ConfigError, InputError
from grpo_fast.history import Series
from grpo_fast.loss_config import LossConfig
from grpo_fast.report import write_report
from grpo_fast.reward_checks import all_equal, needed_group
from grpo_fast.tiny import save_tiny

SCRIPT = Path(__file__).resolve().parent.parent / "docs/doctor.py"
SEEDS = range(20)
STEPS, START = 120, 60
GAP = "sampling/sampling_logp_difference/mean"
CONFIG = {
    "group_size": 8,
    "prompts_per_step": 32,
    "num_iterations": 2,
    "max_steps": 400,
    "max_completion_length": 256,
    "scale_rewards": "group",
    "loss": {"beta": 0.01},
}


def healthy(seed: int, steps: int = STEPS) -> list[dict[str, Any]]:
    """A run that learns: reward .35 -> .65, entropy and lengths drift, everything is noisy."""
    rng = random.Random(seed)
    noise = lambda size: rng.gauss(0, size)  # noqa: E731
    rows = [{"step": 0, "eval_reward": 0.3 + noise(0.02)}]
    for step in range(1, steps + 1):
        t = step / steps
        p = min(max(0.35 + 0.3 * t + noise(0.03), 0.02), 0.98)
        seconds = 10 * math.exp(noise(0.1))
        row = {
            "step": step,
            "reward": p,
            "reward_std": math.sqrt(p * (1 - p)),
            "frac_reward_zero_std": min(max(0.12 + noise(0.05), 0), 1),
            "groups/std_mean": 0.4 + noise(0.02),
            "advantage/abs_mean": 0.7 + noise(0.03),
            "unscored_frac": 0.0,
            "rewards/answer/mean": p,
            "rewards/answer/std": math.sqrt(p * (1 - p)),
            "rewards/format/mean": 0.9 + noise(0.02),
            "rewards/format/std": 0.3,
            "completions/mean_length": 120 + 20 * t + noise(5),
            "completions/clipped_ratio": abs(noise(0.01)),
            "kl": 0.03 * t * math.exp(noise(0.15)) + 1e-4,
            "clip_ratio/region_mean": abs(noise(0.01)),
            "clip_ratio/low_mean": abs(noise(0.005)),
            "clip_ratio/high_mean": abs(noise(0.005)),
            "clip_ratio/first_mean": 0.0,
            "entropy": 0.8 - 0.25 * t + noise(0.02),
            "loss": noise(0.05) + 0.02,
            "grad_norm": math.exp(noise(0.25)),
            "learning_rate": 1e-5,
            "skipped_updates": 0.0,
            GAP: 0.002 + abs(noise(0.0005)),
            "step_time": seconds,
            "tokens_per_second": 20_000 / seconds,
            "time/rollout": 0.5 * seconds,
            "time/update": 0.4 * seconds,
            "time/reward": 0.05 * seconds,
        }
        if step % 5 == 0:
            row["eval_reward"] = 0.3 + 0.3 * t + noise(0.02)
        rows.append(row)
    return rows


class Fault(NamedTuple):
    name: str
    rule: str
    says: tuple[str, ...]
    """In the finding's evidence."""
    key: str
    change: Callable[[dict, int], dict]
    """(row, steps since the fault's start, at least 0) -> what is different."""
    options: Mapping[str, Any] = MappingProxyType({})
    start: int = START
    severity: str = "warning"
    """Of the finding, at least."""


def _flat(row: dict) -> dict:
    """The reward stands still, to noise."""
    return {"reward": 0.5 + 0.03 * math.sin(2.4 * row["step"])}


FAULTS = (
    Fault(
        "prompts too easy",
        "R1",
        ("90% of the groups", "29 of 32"),
        "dataset",
        lambda row, k: {"frac_reward_zero_std": 0.9, "reward": 0.97, "eval_reward": 0.95},
        start=1,
        severity="error",
    ),
    Fault(
        "prompts too hard",
        "R1",
        ("of the groups", "mean reward 0.03"),
        "dataset",
        lambda row, k: {"frac_reward_zero_std": 0.8, "reward": 0.03, "eval_reward": 0.03},
        start=1,
    ),
    Fault(
        "half the prompts solved, half never",
        "R1",
        ("bought no gradient",),
        "dataset",
        lambda row, k: {"frac_reward_zero_std": 0.8},
    ),
    Fault(
        "group of 4",
        "R2",
        ("group_size 4", "p = 0.1", "measured 5"),
        "group_size",
        lambda row, k: (
            {"reward": 0.15 + row["reward"] / 50, "frac_reward_zero_std": 0.52}
            | ({"eval_reward": 0.15} if "eval_reward" in row else {})
        ),
        {"group_size": 4},
        start=1,
    ),
    Fault(
        "group of 2",
        "R2",
        ("group_size 2", "0.71"),
        "group_size",
        lambda row, k: {},
        {"group_size": 2},
        start=1,
    ),
    Fault(
        "KL explodes",
        "R3",
        ("kl ", "learning_rate 1e-05"),
        "learning_rate",
        lambda row, k: {"kl": row["kl"] * 1.3**k},
        severity="error",
    ),
    Fault(
        "KL jumps once",
        "R3",
        ("jumped to 0.3", "median"),
        "learning_rate",
        lambda row, k: {"kl": 0.3} if k == 3 else {},
    ),
    Fault(
        "KL rises, reward stands still",
        "R4",
        ("kl went", "reward went"),
        "loss.beta",
        lambda row, k: _flat(row) | {"kl": row["kl"] + 0.006 * k},
    ),
    Fault(
        "sampler keeps old weights",
        "R5",
        ("a token",),
        "dtype",
        lambda row, k: {GAP: 0.002 + 0.012 * k},
    ),
    Fault(
        "first iteration clips",
        "R6",
        ("18.0%",),
        "dtype",
        lambda row, k: {"clip_ratio/first_mean": 0.18, "clip_ratio/region_mean": 0.2},
        severity="error",
    ),
    Fault(
        "a rollout used too long",
        "R7",
        ("low 15.0%", "high 15.0%"),
        "num_iterations",
        lambda row, k: (
            {f"clip_ratio/{side}_mean": 0.15 for side in ("low", "high")}
            | {"clip_ratio/region_mean": 0.30}
        ),
    ),
    Fault(
        "rising tokens clipped",
        "R7",
        ("high 25.0%",),
        "loss.epsilon_high",
        lambda row, k: {"clip_ratio/high_mean": 0.25, "clip_ratio/region_mean": 0.26},
    ),
    Fault(
        "entropy collapses",
        "R8",
        ("entropy", "of its start"),
        "loss.epsilon_high",
        lambda row, k: _flat(row) | {"entropy": row["entropy"] * 0.85**k},
        severity="error",
    ),
    Fault(
        "policy falls into noise",
        "R8",
        ("entropy rose", "reward fell"),
        "learning_rate",
        lambda row, k: {
            "reward": max(row["reward"] - 0.02 * k, 0.05),
            "entropy": row["entropy"] * min(1 + 0.15 * k, 4),
        },
    ),
    Fault(
        "completions cut off",
        "R9",
        ("cut off at 256 tokens",),
        "max_completion_length",
        lambda row, k: {"completions/clipped_ratio": min(0.05 * k, 1)},
        severity="error",
    ),
    Fault(
        "padding for reward",
        "R10",
        ("mean length", "correlation"),
        "reward",
        lambda row, k: {
            "completions/mean_length": row["completions/mean_length"] * (1 + 0.06 * k),
            "reward": 0.5 + min(0.004 * k, 0.1),
            **({"eval_reward": 0.45} if "eval_reward" in row else {}),
        },
    ),
    Fault(
        "completions shrink to nothing",
        "R10",
        ("mean length", "not rising"),
        "reward",
        lambda row, k: _flat(row) | {"completions/mean_length": max(130 * 0.85**k, 2)},
    ),
    Fault(
        "held-out reward stays behind",
        "R11",
        ("held-out", "gap of 0."),
        "reward",
        lambda row, k: (
            {"reward": min(0.5 + 0.02 * k, 0.8)}
            | ({"eval_reward": 0.45} if "eval_reward" in row else {})
        ),
    ),
    Fault(
        "one reward part eats the other",
        "R11",
        ("'format' went", "'answer' went"),
        "reward_weights",
        lambda row, k: {
            "rewards/format/mean": 0.2 + min(0.03 * k, 0.7),
            "rewards/answer/mean": max(0.5 - 0.02 * k, 0),
        },
    ),
    Fault(
        "noise normalised to advantages",
        "R12",
        ("std of 0.0005", "amplified"),
        "scale_rewards",
        lambda row, k: {"groups/std_mean": 4e-4, "frac_reward_zero_std": 0.2},
        severity="error",
    ),
    Fault(
        "gradient not finite",
        "R13",
        ("not finite in ",),
        "max_grad_norm",
        lambda row, k: {"grad_norm": math.nan, "skipped_updates": 1.0} if k % 3 == 0 else {},
        severity="error",
    ),
    Fault(
        "gradient spikes",
        "R13",
        ("grad_norm 40",),
        "max_grad_norm",
        lambda row, k: {"grad_norm": 40.0} if k == 4 else {},
    ),
    Fault(
        "parameters frozen",
        "R13",
        ("exactly 0", "groups to learn from"),
        "model",
        lambda row, k: {"grad_norm": 0.0},
        severity="error",
    ),
    Fault(
        "all rewards identical",
        "R14",
        ("all rewards were 0", "every advantage is 0"),
        "reward",
        lambda row, k: (
            {name: 0.0 for name in row if name.startswith("reward")}
            | {"frac_reward_zero_std": 1.0, "groups/std_mean": 0.0, "advantage/abs_mean": 0.0}
            | {"grad_norm": 0.0}
        ),
        severity="error",
    ),
    Fault(
        "rewards lost",
        "R14",
        ("got no reward",),
        "reward",
        lambda row, k: {"unscored_frac": 0.2},
        severity="error",
    ),
    Fault(
        "a part that never varies",
        "R14",
        ("'format' was 0.5",),
        "reward",
        lambda row, k: {"rewards/format/mean": 0.5, "rewards/format/std": 0.0},
        start=1,
    ),
    Fault(
        "sampler has another model",
        "R15",
        ("in the first 3 rows",),
        "temperature",
        lambda row, k: {GAP: 0.4},
        start=1,
        severity="error",
    ),
    Fault(
        "learning rate 0",
        "R17",
        ("learning_rate 0 in 3 rows",),
        "max_steps",
        lambda row, k: {"learning_rate": 0.0},
    ),
    Fault(
        "reward functions slow",
        "R18",
        ("reward functions take 8",),
        "reward",
        lambda row, k: (
            {"time/reward": 0.85 * row["step_time"], "time/rollout": 0.1} | {"time/update": 0.05}
        ),
    ),
    Fault(
        "the run slows down",
        "R18",
        ("tokens a second",),
        "token_budget",
        lambda row, k: {"tokens_per_second": row["tokens_per_second"] / 4},
    ),
)


def sick(fault: Fault, seed: int) -> tuple[list[dict], dict]:
    rows = [
        row | (fault.change(row, row["step"] - fault.start) if row["step"] >= fault.start else {})
        for row in healthy(seed)
    ]
    return rows, CONFIG | dict(fault.options)


class Outcome(NamedTuple):
    alarms: dict[str, int]
    """Rule -> step of its first warning or error."""
    doctor: Doctor


def watch(rows: list[dict], options: dict) -> Outcome:
    doctor, alarms = Doctor(options), {}
    for row in rows:
        for found in doctor.feed(row):
            if found.severity != "info":
                alarms.setdefault(found.rule.id, row["step"])
    return Outcome(alarms, doctor)


def rank(severity: str) -> int:
    return ("info", "warning", "error").index(severity)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_healthy_run_has_no_alarm_and_every_rule_was_asked(seed):
    outcome = watch(healthy(seed), CONFIG)
    assert outcome.alarms == {}
    assert [rule.id for rule in RULES if outcome.doctor.missing(rule)] == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_raises_its_own_rule_and_no_other_within_25_steps(fault):
    for seed in (0, 1, 2):
        rows, options = sick(fault, seed)
        alarms, doctor = watch(rows, options)
        assert set(alarms) == {fault.rule}
        assert fault.start <= alarms[fault.rule] <= fault.start + 25
        found = doctor.findings[fault.rule]
        assert rank(found.severity) >= rank(fault.severity)
        assert found.key == fault.key
        for words in fault.says:
            assert words in found.seen.evidence


def test_every_rule_has_a_fault_but_the_one_that_never_alarms():
    assert {fault.rule for fault in FAULTS} == {rule.id for rule in RULES} - {"R16"}
    assert [rule.id for rule in RULES] == [f"R{k}" for k in range(1, 19)] == list(LIMITS)


def test_the_loss_near_0_is_explained_and_is_no_alarm():
    rows = [row | {"loss": 1e-4} for row in healthy(0)]
    alarms, doctor = watch(rows, CONFIG)
    assert alarms == {}
    assert doctor.findings["R16"].severity == "info"
    assert "its norm is" in doctor.findings["R16"].seen.evidence


def test_a_run_that_solved_its_prompts_is_no_alarm():
    """Reward to 1, groups alike, entropy near 0: that is success."""
    rows = healthy(3)
    for row in rows:
        done = min(row["step"] / 60, 1)
        if row["step"]:
            row |= {"reward": 0.4 + 0.58 * done, "entropy": 0.8 - 0.75 * done}
            row |= {
                "rewards/answer/mean": row["reward"],
                "frac_reward_zero_std": 0.1 + 0.8 * done**4,
            }
        if "eval_reward" in row:
            row["eval_reward"] = 0.4 + 0.6 * done
    alarms, doctor = watch(rows, CONFIG)
    assert alarms == {}
    assert "too easy" in doctor.findings["R1"].cause


def test_the_probability_of_an_all_equal_group_is_the_formula():
    assert all_equal(0.2, 8) == pytest.approx(0.8**8 + 0.2**8)
    assert needed_group(0.2, 0.10) == 11  # .8^10 = .107, .8^11 = .086
    assert needed_group(1e-6, 0.10) is None
    rows, options = sick(FAULTS[3], 0)
    found = watch(rows, options).doctor.findings["R2"]
    p = sum(row["reward"] for row in rows[-10:]) / 10
    assert f"{all_equal(p, 4):.0%} of the groups" in found.seen.evidence
    assert found.change.startswith(f"group_size (TRL: num_generations): {needed_group(p, 0.1)}:")


def test_a_rule_without_its_metrics_is_skipped_by_name():
    rows = [{k: v for k, v in row.items() if k not in ("kl", "entropy")} for row in healthy(0)]
    doctor = diagnose(rows, {})
    skipped = {r.id: doctor.missing(r) for r in RULES if doctor.status(r) == "skipped"}
    assert skipped == {
        "R2": ["option group_size"],
        "R3": ["kl"],
        "R4": ["kl"],
        "R8": ["entropy"],
    }


def test_keys_are_options_of_train():
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    known |= {f"loss.{field.name}" for field in dataclasses.fields(LossConfig)}
    assert {rule.key for rule in RULES} - {""} <= known
    assert {fault.key for fault in FAULTS} <= known


def test_live_and_afterwards_are_the_same_words(tmp_path):
    rows, options = sick(FAULTS[5], 0)
    live = watch(rows, options).doctor.findings["R3"]
    later = diagnose(rows, options).findings["R3"]
    assert (live.seen, live.steps) == (later.seen, later.steps)


def test_a_finding_comes_once_and_again_only_when_it_gets_worse():
    rows, options = sick(FAULTS[5], 0)
    doctor = Doctor(options)
    said = [(f.rule.id, f.severity) for row in rows for f in doctor.feed(row) if f.rule.id == "R3"]
    assert said == [("R3", "warning"), ("R3", "error")]


ODD = (math.nan, math.inf, -math.inf, None, 0, 0.0, -1.0, 1e149, 1e300, 10**400, "x", True, [])


@pytest.mark.parametrize("seed", range(60))
def test_no_row_stops_a_run(seed):
    rng = random.Random(seed)
    rows = healthy(0, 45)
    names = sorted(set(rows[5]) - {"step"})
    for row in rows[1:]:
        if rng.random() < 0.4:
            row |= {name: rng.choice(ODD) for name in rng.sample(names, rng.randint(1, len(names)))}
        for name in rng.sample(names, rng.randint(0, 2)):
            row.pop(name, None)
    doctor = diagnose(rows, CONFIG)
    json.dumps(doctor_command.as_dict(doctor, Path("run"), []), allow_nan=False)


def test_means_and_variances_of_a_series_are_those_of_its_values():
    series = Series()
    values = [random.Random(0).gauss(3, 2) for _ in range(50)]
    for step, value in enumerate(values):
        series.append(2 * step, value)
    assert series.mean(10, 30) == pytest.approx(sum(values[10:30]) / 20)
    middle = sum(values[10:30]) / 20
    assert series.variance(10, 30) == pytest.approx(
        sum((v - middle) ** 2 for v in values[10:30]) / 20
    )
    assert series.around(21, 3) == pytest.approx(sum(values[8:11]) / 3)
    assert series.around(-1, 3) == pytest.approx(sum(values[:3]) / 3)


@pytest.mark.parametrize(
    ("steps", "found"),
    [([3], [(3, 3)]), ([1, 2, 3, 9], [(1, 3), (9, 9)]), ([10, 20, 30, 60], [(10, 30), (60, 60)])],
)
def test_steps_are_told_as_ranges(steps, found):
    assert ranges(steps) == found


# The command.


def write(folder: Path, rows: list[dict], config: dict | None = CONFIG, answers=()) -> Path:
    folder.mkdir(exist_ok=True)
    strict = [
        {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        for row in rows
    ]
    for name, lines in (("metrics.jsonl", strict), ("completions.jsonl", answers)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def fault(name: str) -> Fault:
    return next(fault for fault in FAULTS if fault.name == name)


@pytest.fixture
def run_of(tmp_path):
    def make(name: str | None, **more) -> str:
        rows, options = (healthy(0), CONFIG) if name is None else sick(fault(name), 0)
        return str(write(tmp_path / "run", rows, options, **more))

    return make


@pytest.mark.parametrize(
    ("name", "options", "code"),
    [
        (None, [], 0),
        (None, ["--fail-on", "warning"], 0),
        ("group of 2", [], 0),
        ("group of 2", ["--fail-on", "warning"], 1),
        ("KL explodes", [], 1),
        ("KL explodes", ["--set", "R3.error=1e9", "--set", "R3.warning=1e9"], 0),
    ],
)
def test_exit_codes(run_of, capsys, name, options, code):
    assert main(["doctor", run_of(name), *options]) == code
    assert capsys.readouterr().err == ""


def test_the_table_says_what_where_why_and_which_key(run_of, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    answers = [
        {"step": step, "group": 7, "finish_reason": reason, "advantage": 0.5}
        for step, reason in ((30, "length"), (70, "stop"), (80, "length"))
    ]
    assert main(["doctor", run_of("completions cut off", answers=answers)]) == 1
    text = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "ERROR R9 truncation" in lines
    assert any(line.startswith("seen steps ") and line.endswith("121 rows)") for line in lines)
    assert "evidence 100% of the completions were cut off at 256 tokens: every" in text.replace(
        "evidence   ", "evidence "
    )
    assert any(line.startswith("change max_completion_length: raise it") for line in lines)
    assert "shown by step 80 group 7 in completions.jsonl" in lines
    assert sum(line.startswith(("ok R", "skipped R", "ERROR", "INFO")) for line in lines) == 18


def test_json_has_every_rule(run_of, capsys):
    assert main(["doctor", run_of("group of 4"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["schema"], said["rows"], said["last_step"]) == (1, 121, 120)
    assert [rule["id"] for rule in said["rules"]] == [rule.id for rule in RULES]
    (found,) = [rule for rule in said["rules"] if rule["id"] == "R2"]
    assert (found["status"], found["key"], found["trl_key"]) == (
        "warning",
        "group_size",
        "num_generations",
    )
    assert found["steps"][-1][1] == found["last_step"] == 120


def test_limits_from_a_file_and_an_option_that_overrides_it(tmp_path, run_of, capsys):
    file = tmp_path / "limits.yaml"
    file.write_text("R9: {error: 2, warning: 2, info: 2}\n")
    run = run_of("completions cut off")
    assert main(["doctor", run, "--limits", str(file)]) == 0
    assert main(["doctor", run, "--limits", str(file), "--set", "R9.error=0.5"]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "R1.eror=1"], "unknown limit 'R1.eror': did you mean 'R1.error'?"),
        (["--set", "R1.error=much"], "limit R1.error = 'much': expected a finite number"),
        (["--set", "R1.error"], "expected RULE.LIMIT=NUMBER"),
        (["--given", "8"], "expected KEY=VALUE"),
        (["--limits", "nowhere.yaml"], "nowhere.yaml cannot be read"),
        (["--fail-on", "never"], "invalid choice: 'never'"),
    ],
)
def test_a_wrong_option_is_one_line_and_2(run_of, capsys, words, message):
    assert main(["doctor", run_of(None), *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_a_log_of_trl_has_the_same_findings(tmp_path, capsys):
    rows, _ = sick(fault("KL explodes"), 0)
    history = [row for row in rows if row["step"]]
    # TRL logs an evaluation as a row of its own, and the end of training as another.
    history.insert(50, {"step": history[49]["step"], "eval_reward": 0.4, "eval_loss": 0.1})
    history.append({"step": 120, "train_runtime": 12.0})
    folder = tmp_path / "outputs"
    folder.mkdir()
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    lines = tmp_path / "log.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in history))
    said = []
    for path in (folder, folder / "trainer_state.json", lines):
        assert main(["doctor", str(path), "--json", "--given", "num_generations=8"]) == 1
        said.append(json.loads(capsys.readouterr().out)["rules"])
    assert said[0] == said[1] == said[2]
    assert {r["id"] for r in said[0] if r["status"] == "error"} == {"R3"}
    assert next(r for r in said[0] if r["id"] == "R2")["status"] == "ok"


def test_a_run_that_is_still_writing_says_so(run_of, capsys):
    folder = run_of(None)
    with (Path(folder) / "metrics.jsonl").open("a") as file:
        file.write('{"step": 121, "rew')
    assert main(["doctor", folder]) == 0
    text = capsys.readouterr().out
    assert "note: the last line is not finished" in text
    assert "121 rows to step 120" in text


def test_nan_metrics_are_named(tmp_path, capsys):
    rows = [row | ({"kl": math.nan} if row["step"] == 9 else {}) for row in healthy(0)]
    assert main(["doctor", str(write(tmp_path / "run", rows))]) == 0
    assert "note: not finite in some rows, left out there: kl" in capsys.readouterr().out


def _make_folder(path: Path) -> None:
    path.mkdir()


BAD = {
    "nothing there": (lambda path: None, "no run at"),
    "a folder that is no run": (_make_folder, "no run in"),
    "an empty run": (lambda path: write(path, []), "has no rows yet: wait for the first step"),
    "an empty file": (lambda path: path.write_text(""), "has no rows yet"),
    "a newer schema": (lambda path: write(path, healthy(0, 2), {"schema": 7}), "has schema 7"),
    "a newer schema in rows": (
        lambda path: write(path, [{"schema": 2, **healthy(0, 2)[1]}]),
        "has schema 2, this version reads 1",
    ),
    "other JSON": (lambda path: path.write_text('{"step": 1, "a": 2}\n'), "it is no run"),
    "a list of numbers": (lambda path: path.write_text("[1, 2]"), "row 1 is no object"),
    "text": (lambda path: path.write_text("hello\nworld\n"), ":1: not JSON"),
    "bytes": (lambda path: path.write_bytes(b"\xff\xfe\x00"), "is not text"),
    "a step that is no number": (
        lambda path: path.write_text('{"step": "one", "reward": 1}\n'),
        "has step 'one', expected a whole number",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_run_is_refused_in_one_sentence(tmp_path, capsys, name):
    make, message = BAD[name]
    make(tmp_path / "x")
    assert main(["doctor", str(tmp_path / "x")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def test_control_characters_of_a_log_do_not_reach_the_terminal(tmp_path, capsys):
    rows = [row | {"rewards/\x1b[2Jx/mean": 0.0, "rewards/\x1b[2Jx/std": 0.0} for row in healthy(0)]
    main(["doctor", str(write(tmp_path / "run", rows))])
    text = capsys.readouterr().out
    assert "x' was 0 for every completion" in text
    assert "\x1b" not in text


def test_10_000_steps_take_seconds_and_no_torch(tmp_path):
    folder = write(tmp_path / "run", healthy(0, 10_000))
    code = (
        "import sys, time; from grpo_fast.doctor_command import main; t = time.process_time(); "
        f"main([{str(folder)!r}]); print(time.process_time() - t, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, torch = done.stdout.split()[-2:]
    # 1.7 on a shared core.
    assert float(seconds) < 4
    assert torch == "False"


def test_a_step_costs_less_than_a_millisecond():
    rows = healthy(0, 2000)
    started = time.process_time()
    diagnose(rows, CONFIG)
    assert (time.process_time() - started) / len(rows) < 1e-3


def test_the_page_shows_findings_above_the_charts_and_escapes_them(tmp_path):
    rows, options = sick(fault("KL explodes"), 0)
    names = {"rewards/<b>x</b>/mean": 0.0, "rewards/<b>x</b>/std": 0.0}
    page = write_report(write(tmp_path / "run", [row | names for row in rows], options)).read_text()
    found = diagnose(rows, options).findings["R3"]
    assert page.index("What the doctor says") < page.index(
        found.seen.evidence.replace("'", "&#39;")
    )
    assert page.index(found.change) < page.index("How it went")
    assert "&lt;b&gt;x&lt;/b&gt;" in page
    assert "<b>x</b>" not in page


def test_training_says_a_finding_once_and_a_resumed_run_does_not_say_it_again(tmp_path, capsys):
    save_tiny(tmp_path / "model")
    prompts = [{"prompt": a + b} for a in "abcd" for b in "abcd"]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    (tmp_path / "rewards.py").write_text(
        "def length(completions, **columns):\n    return [len(text) / 9 for text in completions]\n"
    )
    config = TrainConfig(
        model=str(tmp_path / "model"),
        dataset=str(tmp_path / "data.jsonl"),
        reward=(f"{tmp_path}/rewards.py:length",),
        output_dir=str(tmp_path / "run"),
        prompts_per_step=2,
        group_size=2,
        max_completion_length=4,
        eval_prompts=2,
        max_steps=3,
        device="cpu",
    )
    train(config)
    said = [line for line in capsys.readouterr().out.splitlines() if " R2 " in line]
    assert len(said) == 1
    assert said[0].startswith("warning R2 group too small at step 1: group_size 2")
    assert "| group_size (TRL: num_generations): " in said[0]
    train(dataclasses.replace(config, resume=True, max_steps=4))
    assert " R2 " not in capsys.readouterr().out


def test_the_limits_of_a_call_are_its_own():
    changed = doctor_command.read_limits(None, ["R1.warning=0.9"])
    assert changed["R1"]["warning"] == 0.9
    assert LIMITS["R1"]["warning"] == 0.5
    with pytest.raises(ConfigError, match="unknown limit"):
        doctor_command.read_limits(None, ["R1.x=1"])
    with pytest.raises(InputError, match="no run at"):
        doctor_command.read_run(Path("nowhere"))


def test_docs_have_the_rules_limits_and_the_measured_matrix():
    spec = importlib.util.spec_from_file_location("doctor_page", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    hint = "write it again: .venv/bin/python docs/doctor.py"
    assert script.PAGE.read_text(encoding="utf-8") == script.page(), hint


def test_steps_are_those_of_the_severity_that_is_named():
    rows = healthy(0, 60)
    for row in rows[20:]:
        row["completions/clipped_ratio"] = 0.2 if row["step"] < 40 else 0.9
    found = diagnose(rows, CONFIG).findings["R9"]
    assert found.severity == "error"
    assert 40 <= found.steps[0] < 50
    assert found.steps[-1] == rows[-1]["step"]
