"""The run folder that TRL's trainer writes: its own numbers, for report and doctor."""

import json
import logging
import math

import pytest
from trl_training import MARKS, drop_in, host_class, recorded

from grpo_bench.hosts import PEERS
from grpo_fast.cli import main
from grpo_fast.errors import ConfigError
from grpo_fast.records import open_records

pytestmark = MARKS


@pytest.mark.parametrize("kind", [host_class, drop_in], ids=["TRL", "drop-in"])
def test_a_training_is_a_run_folder(model, tmp_path, capsys, kind):
    folder = tmp_path / "run"
    trainer = recorded(model, folder, kind(), eval_strategy="steps", eval_steps=2)
    records = open_records(folder)
    assert records.source == "grpo-fast run"
    assert [row["step"] for row in records.rows] == [1, 2, 3]
    merged = {}
    for row in trainer.state.log_history:
        merged[row["step"]] = merged.get(row["step"], {}) | row
    # transformers' own printer takes it out of what the callbacks behind it see.
    del merged[3]["total_flos"]
    for row in records.rows:
        for name, value in merged[row["step"]].items():
            assert row[name] == value or (math.isnan(row[name]) and value is None), name
        assert row["advantage/winners"] > 0
    assert "eval_reward" in records.rows[1]
    assert "train_runtime" in records.rows[2]
    assert (records.config["group_size"], records.config["loss"]["beta"]) == (4, 0.04)
    assert records.config["prompts_per_step"] == 2
    assert records.config["trl"]["num_generations"] == 4
    first = [row for row in records.completions if row["step"] == 1]
    assert sorted(row["group"] for row in first) == [0] * 4 + [1] * 4
    mean = sum(row["reward"] for row in first) / 8
    assert mean == pytest.approx(records.rows[0]["reward"], rel=1e-6)
    assert (folder / "report.html").is_file()
    assert not (folder / "run.lock").exists()
    assert main(["doctor", str(folder)]) == 0
    assert "ok       R2" in capsys.readouterr().out
    assert main(["report", str(folder)]) == 0
    assert main(["diff", str(folder), str(folder)]) == 0


def test_whole_groups_of_the_widest_rewards_are_kept(model, tmp_path):
    recorded(model, tmp_path / "run", max_steps=1, more={"log_completions": 5})
    rows = open_records(tmp_path / "run").completions
    assert len(rows) == 4
    assert len({row["prompt"] for row in rows}) == 1


def test_a_resumed_training_goes_on_in_its_folder(model, tmp_path):
    folder = tmp_path / "run"
    recorded(model, folder, save_strategy="steps", save_steps=1, max_steps=3)
    checkpoint = str(tmp_path / "trl" / "checkpoint-2")
    recorded(model, folder, resume=checkpoint, max_steps=4)
    records = open_records(folder)
    assert [row["step"] for row in records.rows] == [1, 2, 3, 4]
    assert {row["step"] for row in records.completions} == {1, 2, 3, 4}
    with pytest.raises(ConfigError, match="already holds a run"):
        recorded(model, folder, max_steps=1)
    recorded(model, folder, max_steps=1, more={"existing": "move"})
    assert len(open_records(folder).rows) == 1
    assert len(open_records(tmp_path / "run.1").rows) == 4


def test_the_doctor_speaks_while_it_trains(model, tmp_path, caplog):
    def same(completion_ids, **columns):
        return [0.0] * len(completion_ids)

    caplog.set_level(logging.INFO, "grpo_fast")
    recorded(model, tmp_path / "run", reward=(same,), max_steps=12)
    lines = [record.getMessage() for record in caplog.records]
    assert any("R14 reward plumbing at step" in line for line in lines), lines
    assert lines[-1] == f"report: {tmp_path / 'run' / 'report.html'}"
    values = json.loads((tmp_path / "run" / "config.json").read_text())
    assert values["schema"] == 1


def test_the_host_is_the_installed_one():
    assert PEERS.is_dir()
