"""The command line: options from files and flags, one-line errors, exit codes. The trainer is a
stub here."""

import contextlib
import dataclasses
import io
import math
import os
import re
import subprocess
import sys
import types
import warnings
from typing import NamedTuple

import pytest

import grpo_fast
from grpo_fast import cli
from grpo_fast.config import LossConfig, TrainConfig
from grpo_fast.errors import ConfigError, RewardError

NEEDED = ["--model", "m", "--dataset", "d.jsonl", "--reward", "r.py:f"]


class Ran(NamedTuple):
    code: int
    out: str
    err: str


class Utf8(io.StringIO):
    """Where tyro draws its frames with box characters; on other streams it uses dashes."""

    encoding = "utf-8"


def run(*arguments: str, stream: type[io.StringIO] = Utf8) -> Ran:
    out, err = stream(), stream()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(arguments)
    return Ran(code, out.getvalue(), err.getvalue())


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: from-file\n"
        "dataset: d.jsonl\n"
        "reward: r.py:f\n"
        "group-size: 4\n"
        "learning_rate: 1e-3\n"
        "loss:\n  beta: 0.25\n  epsilon: 0.1\n"
    )
    return str(path)


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """The configs `train` was called with; the result is `trained.result`, or what it raises."""
    calls = types.SimpleNamespace(configs=[], result=None)
    calls.result = types.SimpleNamespace(
        output_dir="runs/demo",
        eval_before=0.406,
        eval_after=0.953,
        seconds=96.6,
        interrupted=False,
        step=200,
        report="runs/demo/report.html",
    )

    def train(config):
        calls.configs.append(config)
        if isinstance(calls.result, BaseException):
            raise calls.result
        return calls.result

    trainer = types.ModuleType("grpo_fast.trainer")
    trainer.train = train
    monkeypatch.setitem(sys.modules, "grpo_fast.trainer", trainer)
    monkeypatch.setattr(grpo_fast, "trainer", trainer, raising=False)
    return calls


def test_a_file_alone_and_a_file_with_flags(file):
    alone = cli.train_config(["--config", file])
    assert alone.model == "from-file"
    assert alone.reward == ("r.py:f",)
    assert (alone.group_size, alone.learning_rate) == (4, 1e-3)
    assert alone.loss == LossConfig(beta=0.25, epsilon=0.1)
    both = cli.train_config(["--seed", "7", f"--config={file}", "--loss.beta", "0.5", "--resume"])
    assert both == dataclasses.replace(
        alone, seed=7, resume=True, loss=LossConfig(beta=0.5, epsilon=0.1)
    )


def test_flags_alone_give_the_defaults_of_the_dataclasses():
    config = cli.train_config(NEEDED)
    assert config == TrainConfig(model="m", dataset="d.jsonl", reward=("r.py:f",))
    assert type(config) is TrainConfig
    assert type(config.loss) is LossConfig


def test_several_rewards_underscores_and_equals_signs():
    arguments = [*NEEDED[:4], "--reward", "a:f", "b:g", "--reward_weights", "1", "-0.5", "--seed=3"]
    config = cli.train_config(arguments)
    assert config.reward == ("a:f", "b:g")
    assert config.reward_weights == (1.0, -0.5)
    assert config.seed == 3


def test_a_flag_supplies_what_the_file_lacks_and_mends_what_it_has_wrong(tmp_path):
    path = tmp_path / "part.yaml"
    path.write_text(
        "model: m\nreward: r.py:f\ngroup_size: 1\nimpl: tritron\nloss:\n  epsilon: -1\n"
    )
    mend = ["--dataset", "d", "--group-size", "2", "--impl", "torch", "--loss.epsilon", "0.3"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = cli.train_config(["--config", str(path), *mend])
    assert (config.dataset, config.group_size, config.impl, config.loss.epsilon) == (
        "d",
        2,
        "torch",
        0.3,
    )


def test_every_field_has_a_flag():
    wanted = TrainConfig(
        model="m",
        dataset="d.jsonl",
        reward=("r.py:f",),
        reward_weights=(2.0,),
        eval_dataset="e.jsonl",
        existing="move",
        resume=True,
        scale_rewards="none",
        baseline="leave_one_out",
        mask_truncated_completions=True,
        lr_scheduler_type="cosine",
        dtype="float32",
        device="cpu",
        impl="torch",
        loss=LossConfig(
            loss_type="grpo",
            objective="o.py:f",
            aggregation="sequence_sum",
            epsilon_high=0.3,
            delta=2.0,
            dual_clip=3.0,
            dro_beta=0.1,
            beta=0.1,
            kl_estimator="k2",
            use_bias_correction_kl=True,
            importance_sampling_level="sequence",
            importance_sampling_correction="token_mask",
            importance_sampling_min=0.5,
            off_policy_mask_threshold=0.5,
            use_adaptive_entropy=True,
            max_completion_length=256,
        ),
    )
    arguments = []
    for prefix, part in (("--", wanted), ("--loss.", wanted.loss)):
        for field in dataclasses.fields(part):
            value = getattr(part, field.name)
            if field.name == "loss":
                continue
            arguments.append(prefix + field.name.replace("_", "-"))
            if not isinstance(value, bool):
                arguments += map(str, value if isinstance(value, tuple) else [value])
    assert cli.train_config(arguments) == wanted


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "unknown command 'trian': did you mean 'train'? commands are train, demo"),
        (["train"], "model, dataset, reward not given"),
        (["train", "--model", "m"], "--dataset"),
        (["train", *NEEDED, "--group-sise", "4"], "--group-sise: did you mean '--group-size'?"),
        (["train", *NEEDED, "--num-generations=4"], "did you mean '--group-size'?"),
        (["train", *NEEDED, "--loss.bta=4"], "--loss.bta: did you mean '--loss.beta'?"),
        (["train", *NEEDED, "--group-size", "four"], "--group-size = 'four', expected a whole"),
        (["train", *NEEDED, "--loss.beta", "x"], "--loss.beta = 'x', expected a number"),
        (["train", *NEEDED, "--group-size", "1"], "group_size = 1 is out of range: expected at"),
        (["train", *NEEDED, "--temperature", "0"], "temperature = 0.0 is out of range"),
        (["train", *NEEDED, "--loss.epsilon", "-1"], "epsilon = -1.0 is out of range"),
        (["train", *NEEDED, "--impl", "tritron"], "'tritron' for argument '--impl'"),
        (["train", *NEEDED, "--model"], "Missing value for argument '--model'"),
        (["train", *NEEDED, "--seed", "1", "stray"], "stray"),
        (["train", "--config"], "--config needs a file"),
        (["train", "--config", "--resume"], "--config needs a file"),
        (["train", "--config", "a.yaml", "--config=b.yaml"], "--config given twice"),
        (["train", "--config", "gone.yaml"], "config file gone.yaml does not exist"),
        (["train", *NEEDED, "--reward=s.py:g"], "--reward given twice: put all values after one"),
        (["report"], "report takes one run folder"),
        (["report", "gone"], "no run at gone: no such file"),
        (["env", "now"], "env takes no arguments, found 'now'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("stream", [Utf8, io.StringIO])
def test_a_wrong_command_line_is_one_line_and_exit_code_two(trained, arguments, expected, stream):
    ran = run(*arguments, stream=stream)
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("error: ")
    assert ran.err.count("\n") == 1
    assert expected in ran.err
    assert not re.search("[│╭─╰\x1b]|---|  ", ran.err)
    assert trained.configs == []
    # the flag is enough, its explanation is for --help
    assert "JSONL" not in ran.err


def test_the_last_line_of_a_run(trained, file):
    ran = run("train", "--config", file)
    assert ran == Ran(0, "demo: reward 0.41 -> 0.95 in 97 s | report: runs/demo/report.html\n", "")
    assert trained.configs[0].model == "from-file"


def test_an_interrupted_run_says_how_to_go_on(trained, file):
    trained.result.interrupted, trained.result.step = True, 17
    trained.result.eval_after = math.nan
    ran = run("train", "--config", file, "--seed", "3", "--no-resume")
    assert ran.code == 130
    line = f"resume with: grpo-fast train --config {file} --seed 3 --resume"
    assert ran.out == f"interrupted after step 17: {line}\n"


@pytest.mark.parametrize("on_path", [False, True])
def test_the_resume_command_is_called_as_this_one_was(
    trained, file, tmp_path, monkeypatch, on_path
):
    """`make` runs .venv/bin/grpo-fast, which a shell does not find under its bare name."""
    called = tmp_path / "bin" / "grpo-fast"
    called.parent.mkdir()
    called.touch(mode=0o755)
    monkeypatch.setattr(sys, "argv", [str(called)])
    monkeypatch.setenv("PATH", str(called.parent if on_path else tmp_path))
    trained.result.interrupted = True
    program = "grpo-fast" if on_path else called
    assert f"resume with: {program} train --config" in run("train", "--config", file).out


def test_a_second_interrupt_points_at_the_checkpoints_if_there_are_any(trained, file, tmp_path):
    trained.result = KeyboardInterrupt()
    command = ["train", "--config", file, "--output-dir", str(tmp_path / "run")]
    assert run(*command) == Ran(130, "interrupted, nothing was saved yet\n", "")
    (tmp_path / "run" / "checkpoints" / "step-000001").mkdir(parents=True)
    assert "resume with: grpo-fast train --config" in run(*command).out


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (RewardError("f raised\n  ValueError"), 2, "error: f raised ValueError\n"),
        (
            ZeroDivisionError("division\nby zero"),
            1,
            "internal error: ZeroDivisionError: division by zero "
            "(run with --debug for the traceback)\n",
        ),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_a_command_are_one_line(monkeypatch, raised, code, line):
    def fail(arguments):
        raise raised

    monkeypatch.setitem(cli.COMMANDS, "env", fail)
    assert run("env") == Ran(code, "", line)


@pytest.mark.parametrize("arguments", [("--debug", "env"), ("env", "--debug")])
@pytest.mark.parametrize(("raised", "code"), [(ConfigError("x"), 2), (ZeroDivisionError(), 1)])
def test_debug_anywhere_shows_the_traceback(monkeypatch, arguments, raised, code):
    def fail(arguments):
        assert arguments == []
        raise raised

    monkeypatch.setitem(cli.COMMANDS, "env", fail)
    ran = run(*arguments)
    assert ran.code == code
    assert "Traceback (most recent call last)" in ran.err
    assert "in fail" in ran.err


def test_without_tyro_a_file_works_and_flags_say_what_to_install(monkeypatch, file):
    monkeypatch.setitem(sys.modules, "tyro", None)
    assert cli.train_config(["--config", file]).group_size == 4
    ran = run("train", "--config", file, "--seed", "1")
    assert ran.code == 2
    assert "pip install 'tyro>=1.0'" in ran.err


def test_train_help_explains_every_field_with_its_default(file):
    ran = run("train", "--help")
    assert (ran.code, ran.err) == (0, "")
    for owner, prefix in ((TrainConfig, "--"), (LossConfig, "--loss.")):
        for field in dataclasses.fields(owner):
            if field.name != "loss":
                assert prefix + field.name.replace("_", "-") in ran.out
    words = " ".join(ran.out.replace("│", " ").split())
    assert "--config FILE.yaml is read first" in words
    assert "Completions per prompt (TRL: num_generations). (default: 8)" in words
    assert "Weight of the KL to the reference policy" in words
    with_file = " ".join(run("train", "--config", file, "--help").out.replace("│", " ").split())
    assert "Completions per prompt (TRL: num_generations). (default: 4)" in with_file


def test_help_lists_every_command_with_a_line():
    ran = run("--help")
    assert ran.code == 0
    for name, command in cli.COMMANDS.items():
        assert f"\n  {name:<8} {command.__doc__}\n" in ran.out
        assert "\n" not in command.__doc__
    assert run().out == ran.out
    assert run().code == 2
    assert run("report", "--help").out.startswith("grpo-fast report: ")


def test_version_and_env():
    assert run("--version") == Ran(0, f"grpo-fast {grpo_fast.__version__}\n", "")
    ran = run("env")
    assert ran.code == 0
    rows = dict(line.split(None, 1) for line in ran.out.splitlines() if "impl" not in line)
    assert rows["python"] == sys.version.split()[0]
    assert rows["grpo-fast"] == grpo_fast.__version__
    assert {"torch", "triton", "transformers", "device"} <= set(rows)
    assert ran.out.splitlines()[-1] in ("impl auto     torch", "impl auto     triton")


def test_report_prints_the_path_it_wrote(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval_reward": 0.5}\n')
    assert run("report", str(tmp_path)) == Ran(0, f"{tmp_path}/report.html\n", "")
    assert (tmp_path / "report.html").stat().st_size > 1000


def test_bench_hands_its_arguments_on_and_its_exit_code_back(monkeypatch):
    seen = []
    main = types.ModuleType("grpo_bench.main")
    main.main = lambda argv: seen.append(argv) or 1
    monkeypatch.setitem(sys.modules, "grpo_bench.main", main)
    assert run("bench", "--static", "--help").code == 1
    assert seen == [["--static", "--help"]]


def test_demo_is_train_with_the_installed_file(monkeypatch, trained, tmp_path, file):
    folder = tmp_path / "examples"
    folder.mkdir()
    (folder / "demo.yaml").write_text((tmp_path / "run.yaml").read_text())
    spec = types.SimpleNamespace(submodule_search_locations=[str(folder)])
    monkeypatch.setattr(cli.importlib.util, "find_spec", lambda name: spec)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 0.5}\n')
    ran = run("demo", "--seed", "5", "--output-dir", str(tmp_path))
    assert ran.code == 0
    assert ran.out.splitlines()[-1] == "doctor: nothing above info"
    assert (trained.configs[0].seed, trained.configs[0].group_size) == (5, 4)


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_error(unbuffered):
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "grpo_fast.cli", "--help"],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            check=False,
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (cli.READER_LEFT, "")


def test_the_command_line_imports_nothing_heavy():
    code = (
        "import sys\n"
        "from grpo_fast import cli\n"
        "assert cli.main(['--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'tyro', 'rich', 'matplotlib', 'jinja2'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
