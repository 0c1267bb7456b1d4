"""`grpo-fast doctor`: tables, JSON and exit codes; logs of any origin, and what is none; a run that
goes on, and the report."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_bench.doctor_cases import FAULTS, Fault, sick
from grpo_bench.doctor_logs import CONFIG, healthy
from grpo_fast import doctor_command, train
from grpo_fast.cli import main
from grpo_fast.config import TrainConfig
from grpo_fast.doctor import diagnose
from grpo_fast.doctor_rules import LIMITS, RULES
from grpo_fast.errors import ConfigError, InputError
from grpo_fast.report import write_report
from grpo_fast.tiny import save_tiny


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


def test_10_000_steps_need_no_torch(tmp_path):
    folder = write(tmp_path / "run", healthy(0, 10_000))
    code = (
        "import sys; from grpo_fast.doctor_command import main; "
        f"main([{str(folder)!r}]); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "10001 rows to step 10000" in done.stdout
    assert done.stdout.split()[-1] == "False"


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
