"""The run folder: what is written, what is refused, and what a killed run leaves behind."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_fast.config import TrainConfig
from grpo_fast.errors import ConfigError, InputError
from grpo_fast.runlog import RunLog, open_run, read_completions, read_metrics, read_saved_config


def config(folder, **options) -> TrainConfig:
    return TrainConfig(
        model="m", dataset="d.jsonl", reward=("r.py:f",), output_dir=str(folder), **options
    )


def started(folder, **options) -> RunLog:
    run = open_run(config(folder, **options))
    run.start()
    return run


def finished_run(folder, steps=3) -> Path:
    with started(folder) as run:
        for step in range(steps + 1):
            run.log(step, {"reward": step / 10})
            run.log_completions([{"step": step, "completion": f"answer {step}"}] * 2)
    return folder


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_new_run_has_its_config_and_rows_come_back(tmp_path):
    folder = finished_run(tmp_path / "a" / "run")
    assert [row["step"] for row in read_metrics(folder)] == [0, 1, 2, 3]
    assert read_metrics(folder)[2] == {"step": 2, "reward": 0.2}
    assert len(read_completions(folder)) == 8
    saved = read_saved_config(folder)
    assert saved["reward"] == ["r.py:f"]
    assert saved["loss"]["loss_type"] == "dapo"
    assert set(tree(folder)) == {"config.json", "metrics.jsonl", "completions.jsonl"}


def test_a_row_is_on_disk_before_the_run_is_closed(tmp_path):
    with started(tmp_path) as run:
        run.log(1, {"loss": 0.5})
        run.log_completions([{"step": 1, "completion": "x"}])
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 0.5}]
        assert read_completions(tmp_path) == [{"step": 1, "completion": "x"}]


def test_lines_are_strict_json_whatever_the_numbers_and_the_text(tmp_path):
    text = "lone \ud800, line \u2028 separator, 数, \x00"
    with started(tmp_path) as run:
        run.log(1, {"kl": math.nan, "grad_norm": math.inf, "reward": 1.5})
        run.log_completions([{"step": 1, "completion": text, "rewards": {"f": math.nan}}])

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    for name in ("metrics.jsonl", "completions.jsonl"):
        for line in (tmp_path / name).read_bytes().split(b"\n")[:-1]:
            json.loads(line, parse_constant=refuse)
    row = read_metrics(tmp_path)[0]
    assert math.isnan(row["kl"])
    assert math.isnan(row["grad_norm"])
    assert row["reward"] == 1.5
    assert read_completions(tmp_path) == [{"step": 1, "completion": text, "rewards": {"f": None}}]


def test_an_existing_run_is_refused_with_three_ways_out_and_left_alone(tmp_path):
    folder = finished_run(tmp_path / "run")
    before = tree(folder)
    with pytest.raises(ConfigError) as error:
        open_run(config(folder))
    for way_out in (str(folder), "--resume", "--output-dir", "--existing move"):
        assert way_out in str(error.value)
    assert tree(folder) == before


def test_move_puts_everything_aside_but_the_base_model_and_says_so(tmp_path):
    folder = finished_run(tmp_path / "run")
    (folder / "base_model").mkdir()
    (folder / "base_model" / "model.safetensors").write_bytes(b"weights")
    (folder / "my notes.txt").write_text("keep")
    before = {name: data for name, data in tree(folder).items() if "base_model" not in name}
    with open_run(config(folder, existing="move")) as run:
        assert run.start() == tmp_path / "run.1"
        run.log(0, {"reward": 9.0})
    assert tree(tmp_path / "run.1") == before
    assert (folder / "base_model" / "model.safetensors").read_bytes() == b"weights"
    assert read_metrics(folder) == [{"step": 0, "reward": 9.0}]
    with open_run(config(folder, existing="move")) as run:
        assert run.start() == tmp_path / "run.2"
    assert tree(tmp_path / "run.1") == before


def test_a_run_that_never_started_is_written_over_in_silence(tmp_path):
    (tmp_path / "base_model").mkdir()
    started(tmp_path, seed=1).close()
    with open_run(config(tmp_path, seed=2)) as run:
        assert run.start() is None
    assert read_saved_config(tmp_path)["seed"] == 2


def test_until_it_starts_a_run_touches_nothing(tmp_path):
    folder = finished_run(tmp_path / "run")
    before = tree(folder)
    for options in ({"existing": "move"}, {"resume": True}):
        open_run(config(folder, seed=5, **options)).close()
        assert tree(tmp_path) == {f"run/{name}": data for name, data in before.items()}


def test_what_a_stopped_run_was_writing_is_ours(tmp_path):
    for name in (".base_model.writing", ".report.html.writing"):
        (tmp_path / name).mkdir()
    started(tmp_path).close()
    assert (tmp_path / "metrics.jsonl").is_file()


@pytest.mark.parametrize("existing", ["refuse", "move"])
def test_foreign_files_are_neither_written_over_nor_moved(tmp_path, existing):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match=r"thesis\.tex.*--output-dir"):
        open_run(config(tmp_path, existing=existing))
    assert tree(tmp_path) == {"thesis.tex": b"years of work"}


def test_resume_without_a_run_says_what_was_looked_for(tmp_path):
    with pytest.raises(ConfigError, match=r"no run in .*metrics\.jsonl.*checkpoints"):
        open_run(config(tmp_path / "nothing", resume=True))
    assert not (tmp_path / "nothing").exists()


def test_resume_cuts_both_logs_and_goes_on(tmp_path):
    folder = finished_run(tmp_path)
    with open_run(config(folder, resume=True, max_steps=7)) as run:
        assert read_saved_config(folder)["max_steps"] == 200
        run.truncate_after(1)
        run.log(2, {"reward": 0.9})
        run.log_completions([{"step": 2, "completion": "new"}])
    assert [(row["step"], row["reward"]) for row in read_metrics(folder)] == [
        (0, 0.0),
        (1, 0.1),
        (2, 0.9),
    ]
    assert [row["step"] for row in read_completions(folder)] == [0, 0, 1, 1, 2]
    assert read_saved_config(folder)["max_steps"] == 7


def test_resume_drops_tokens_of_later_steps_and_move_takes_all_along(tmp_path):
    folder = finished_run(tmp_path / "run")
    for step in (1, 2, 3):
        (folder / f"tokens/step-{step:06d}.npz").write_bytes(b"")
    with open_run(config(folder, resume=True)) as run:
        assert run.tokens is None
        run.truncate_after(1)
        assert run.tokens.folder == folder / "tokens"
    assert [path.name for path in (folder / "tokens").iterdir()] == ["step-000001.npz"]
    with open_run(config(folder, existing="move", log_tokens_mb=0)) as run:
        run.start()
        assert run.tokens is None
    assert not (folder / "tokens").exists()
    assert (tmp_path / "run.1/tokens/step-000001.npz").exists()


def test_truncating_after_minus_one_drops_the_evaluation_before_training_too(tmp_path):
    folder = finished_run(tmp_path)
    with open_run(config(folder, resume=True)) as run:
        run.truncate_after(-1)
    assert read_metrics(folder) == read_completions(folder) == []


def test_a_cut_last_line_is_left_out_and_mended_by_resume(tmp_path):
    folder = finished_run(tmp_path)
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + '{"step": 4, "name": "ü'.encode()[:-1])
    assert [row["step"] for row in read_metrics(folder)] == [0, 1, 2, 3]
    with open_run(config(folder, resume=True)) as run:
        run.truncate_after(3)
        run.log(4, {"reward": 0.4})
    assert [row["step"] for row in read_metrics(folder)] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("line", ["{", "[1]", '{"reward": 1}', '{"step": "one"}'])
def test_a_broken_middle_line_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 0}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: "):
        read_metrics(tmp_path)


def test_a_broken_last_line_that_is_finished_is_named_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": \n')
    with pytest.raises(InputError, match=r"metrics\.jsonl:2: not JSON"):
        read_metrics(tmp_path)


def test_no_run_and_a_broken_config_are_input_errors(tmp_path):
    with pytest.raises(InputError, match=r"no run in .*metrics\.jsonl"):
        read_metrics(tmp_path)
    assert read_completions(tmp_path) == []
    assert read_saved_config(tmp_path) == {}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        read_saved_config(tmp_path)


@pytest.mark.parametrize("folder", ["file", "file/run"])
def test_a_file_in_the_way_is_named(tmp_path, folder):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"output_dir .*file.*--output-dir"):
        open_run(config(tmp_path / folder))
    assert (tmp_path / "file").read_text() == "x"


def test_a_folder_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    # Tests may run as root, whom no mode bits stop.
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match=r"cannot be written \(Permission denied\)"):
        open_run(config(tmp_path / "run"))


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of tmp_path/run, with one row logged."""
    script = (
        "import sys, types, time\n"
        # The package pulls in torch, which the lock does not need.
        "package = types.ModuleType('grpo_fast'); package.__path__ = [sys.argv[1]]\n"
        "sys.modules['grpo_fast'] = package\n"
        "from grpo_fast.config import TrainConfig\n"
        "from grpo_fast.runlog import open_run\n"
        "need = {'model': 'm', 'dataset': 'd', 'reward': ('r',)}\n"
        "run = open_run(TrainConfig(**need, output_dir=sys.argv[2]))\n"
        "run.start()\n"
        "run.log(0, {'reward': 0.5})\n"
        "print('locked', flush=True)\n"
        "time.sleep(60)\n"
    )
    package = Path(sys.modules[TrainConfig.__module__].__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(package), str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("options", [{}, {"resume": True}, {"existing": "move"}], ids=str)
def test_a_live_run_is_protected_and_its_pid_named(tmp_path, holder, options):
    with pytest.raises(ConfigError, match=rf"in use by pid {holder.pid} on "):
        open_run(config(tmp_path / "run", **options))
    assert read_metrics(tmp_path / "run") == [{"step": 0, "reward": 0.5}]


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "run" / "run.lock").exists()
    with open_run(config(tmp_path / "run", resume=True)):
        assert f"pid {os.getpid()} " in (tmp_path / "run" / "run.lock").read_text()
    assert not (tmp_path / "run" / "run.lock").exists()


def test_the_lock_also_holds_within_one_process(tmp_path):
    with open_run(config(tmp_path)) as run:
        with pytest.raises(ConfigError, match=f"in use by pid {os.getpid()}"):
            open_run(config(tmp_path))
        run.close()
        open_run(config(tmp_path)).close()
