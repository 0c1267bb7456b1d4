"""What report and doctor open: a run folder, and in one sentence what is none."""

import json
import math

import pytest

from grpo_fast.config import TrainConfig
from grpo_fast.doctor_command import read_run
from grpo_fast.errors import InputError
from grpo_fast.records import open_records
from grpo_fast.report import write_report
from grpo_fast.runlog import open_run


@pytest.fixture
def folder(tmp_path):
    config = TrainConfig(
        model="m", dataset="d", reward=("r.py:f",), output_dir=str(tmp_path / "my run")
    )
    with open_run(config) as run:
        run.start()
        run.log(0, {"eval_reward": 0.1})
        run.log(1, {"reward": 0.5, "kl": math.nan, "loss": 0.0})
        run.log_completions([{"step": 1, "completion": "x", "reward": 1.0}])
    return tmp_path / "my run"


def keep_tokens(folder) -> None:
    import numpy as np

    from grpo_fast.token_log import COLUMNS, TokenLog

    arrays = {name: np.ones(2) for name in COLUMNS}
    completion = {"index": 0, "start": 0, "stop": 2}
    meta = {"kept": "all", "groups": [{"prompt_ids": [1], "completions": [completion]}]}
    TokenLog(folder, budget_mb=1, max_steps=2).write(1, meta, arrays, str)


def test_a_run_folder_is_opened(folder):
    found = open_records(folder)
    assert (found.name, found.source) == ("my run", "grpo-fast run")
    assert [row["step"] for row in found.rows] == [0, 1]
    assert math.isnan(found.rows[1]["kl"])
    assert found.completions[0]["completion"] == "x"
    assert found.config["schema"] == 1
    assert found.config["group_size"] == 8
    assert found.tokens is None


def test_tokens_are_read_when_asked_for(folder):
    keep_tokens(folder)
    tokens = open_records(str(folder)).tokens
    assert tokens.steps() == [1]
    assert tokens.read(1).meta["step"] == 1
    assert tokens.vocabulary() == {1: "1"}


def test_a_run_of_before_there_was_a_schema_opens(folder):
    path = folder / "config.json"
    values = json.loads(path.read_text())
    assert values.pop("schema") == 1
    path.write_text(json.dumps(values))
    assert len(open_records(folder).rows) == 2
    path.unlink()
    assert open_records(folder).config == {}


@pytest.mark.parametrize("read", [open_records, read_run, write_report])
@pytest.mark.parametrize("schema", [7, None, "1"])
def test_another_schema_is_refused_in_one_sentence(folder, read, schema):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": schema}))
    with pytest.raises(InputError) as error:
        read(folder)
    said = f"{path} has schema {schema!r}, this version reads 1: pip install -U grpo-fast"
    assert str(error.value) == said


def test_a_run_of_another_schema_is_not_resumed(folder):
    (folder / "config.json").write_text('{"schema": 7}')
    config = TrainConfig(model="m", dataset="d", reward=("r",), output_dir=str(folder), resume=True)
    with pytest.raises(InputError, match="has schema 7"):
        open_run(config)
    assert (folder / "config.json").read_text() == '{"schema": 7}'


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda f: (f / "metrics.jsonl").unlink(), "metrics.jsonl not found"),
        (
            lambda f: (f / "metrics.jsonl").write_text('{"step": 0}\n{\n'),
            "metrics.jsonl:2: not JSON",
        ),
        (lambda f: (f / "config.json").write_text("[]"), "config.json holds list"),
    ],
)
def test_a_broken_run_is_named(folder, change, said):
    change(folder)
    with pytest.raises(InputError) as error:
        open_records(folder)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_run_still_writing_has_its_finished_rows(folder):
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    assert [row["step"] for row in open_records(folder).rows] == [0, 1]


def test_an_empty_run_says_so(folder):
    (folder / "metrics.jsonl").write_text("")
    for read in (open_records, read_run, write_report):
        with pytest.raises(InputError, match="no rows yet: wait for the first step"):
            read(folder)


def test_no_run_is_no_run(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(InputError, match="no run (at|in)"):
            open_records(path)


def test_ten_thousand_steps_open(folder):
    with (folder / "metrics.jsonl").open("a") as file:
        for step in range(2, 10_002):
            file.write(json.dumps({"step": step, "reward": step / 1e4, "loss": 0.0}) + "\n")
    assert len(open_records(folder).rows) == 10_002
    assert read_run(folder)[0][-1]["step"] == 10_001
    assert write_report(folder).is_file()
