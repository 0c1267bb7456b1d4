"""Trackers: the same rows under the same names, one note where one fails, closed in any case; and
the real packages, where `make test` brought them."""

import dataclasses
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from grpo_fast import train
from grpo_fast.config import TrainConfig
from grpo_fast.errors import ConfigError
from grpo_fast.runlog import read_completions, read_metrics
from grpo_fast.tiny import save_tiny
from grpo_fast.track import PACKAGES, Trackers

# As in conftest.py.
PLACE = Path(sys.prefix) / "track"


class Fake:
    """A tracker that remembers, and fails in the call it is told."""

    made: list["Fake"]
    failing = ""

    def __init__(self, folder, options, first_step):
        self._fail("start")
        self.calls, self.where, self.first_step = [], "look here", first_step
        Fake.made.append(self)

    def _fail(self, name):
        if name == Fake.failing:
            raise RuntimeError("no\nmore disk")

    def __getattr__(self, name):
        def call(*given):
            self._fail(name)
            self.calls.append((name, *given))

        return call


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setitem(sys.modules, "grpo_fast.track_trackio", SimpleNamespace(Tracker=Fake))
    monkeypatch.setitem(PACKAGES, "trackio", "json")
    monkeypatch.setattr(Fake, "made", [], raising=False)
    monkeypatch.setattr(Fake, "failing", "")
    return Fake


@pytest.fixture
def config(tmp_path):
    save_tiny(tmp_path / "model")
    rows = [{"prompt": "abcdefgh"[k] + "b", "answer": "c"} for k in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "reward.py").write_text(
        "def zero(completions, **columns):\n    return [0.0] * len(completions)\n"
    )
    return TrainConfig(
        model=str(tmp_path / "model"),
        dataset=str(tmp_path / "data.jsonl"),
        reward=(f"{tmp_path}/reward.py:zero",),
        output_dir=str(tmp_path / "run"),
        prompts_per_step=2,
        group_size=2,
        max_completion_length=4,
        max_steps=11,
        eval_prompts=2,
        device="cpu",
        track=("trackio",),
    )


def test_a_tracker_sees_every_row_the_completions_and_the_findings(config, fake, capsys):
    train(config)
    (tracker,) = fake.made
    logged = [call[1:] for call in tracker.calls if call[0] == "log"]
    rows = read_metrics(config.output_dir)
    assert [step for step, _ in logged] == [row["step"] for row in rows] == list(range(12))
    for (_, metrics), row in zip(logged, rows, strict=True):
        assert metrics.keys() == row.keys() - {"step"}
    tables = [call for call in tracker.calls if call[0] == "table"]
    assert len(tables) == 11
    answers = [row for row in read_completions(config.output_dir) if row["step"] == 1]
    assert tables[0][1] == 1
    assert [cells[1] for cells in tables[0][3]] == [row["completion"] for row in answers]
    alerts = [call for call in tracker.calls if call[0] == "alert"]
    assert ("R14 reward plumbing", "error") in [(call[2], call[4]) for call in alerts]
    assert tracker.calls[-1] == ("close",)
    assert "trackio: look here" in capsys.readouterr().out


@pytest.mark.parametrize("failing", ["start", "log", "table", "alert", "close"])
def test_a_failing_tracker_is_one_note_and_off(fake, tmp_path, failing):
    fake.failing = failing
    notes = []
    trackers = Trackers(["trackio"], tmp_path, {}, first_step=1, note=notes.append)
    rule = SimpleNamespace(id="R3", name="KL explosion")
    finding = SimpleNamespace(rule=rule, steps=[1], line=str, severity="error")
    for step in (1, 2):
        trackers.log(step, {"reward": 0.5})
        trackers.log_completions([{"step": step}])
        trackers.alert(finding)
    trackers.close()
    trackers.close()
    off = [note for note in notes if "is off" in note]
    assert off == ["trackio is off, the run goes on: RuntimeError: no more disk"]


def test_a_run_goes_on_without_its_tracker(config, fake, capsys):
    fake.failing = "log"
    assert train(dataclasses.replace(config, max_steps=1)).step == 1
    assert capsys.readouterr().out.count("trackio is off, the run goes on") == 1


def test_a_tracker_is_closed_when_the_run_breaks(config, fake, monkeypatch):
    import grpo_fast.trainer as trainer

    def interrupted(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "rollout", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config)
    assert fake.made[0].calls[-1] == ("close",)


def test_a_missing_package_is_said_before_anything_is_loaded(config, monkeypatch):
    monkeypatch.setitem(PACKAGES, "trackio", "not_there_at_all")
    config = dataclasses.replace(config, model="nowhere")
    with pytest.raises(ConfigError, match="track = 'trackio' needs .*: pip install not_there_at_"):
        train(config)


def test_an_unknown_tracker_is_refused(config):
    with pytest.raises(ConfigError, match="track = 'trakio' is not available: did you mean 'track"):
        dataclasses.replace(config, track=("trakio",))


SCRIPT = """
import sys
sys.path.append({place!r})
from pathlib import Path
from types import SimpleNamespace
from grpo_fast.track import Trackers
folder = Path({folder!r})
for first in (1, 3):
    trackers = Trackers([{name!r}], folder, {{"seed": 0}}, first_step=first, note=print)
    for step in (first, first + 1):
        trackers.log(step, {{"reward": step / 10, "kl": float("nan"), "rewards/a b/mean": 1}})
        row = {{"step": step, "prompt": "<b>p</b>", "completion": "# c", "reward": None}}
        trackers.log_completions([row])
    rule = SimpleNamespace(id="R3", name="KL explosion")
    line = lambda: "kl is high"
    trackers.alert(SimpleNamespace(rule=rule, steps=[first], line=line, severity="error"))
    trackers.close()
"""


def real(name: str, folder: Path) -> str:
    """What is printed by two parts of a run in the real tracker."""
    folder.mkdir()
    script = SCRIPT.format(place=str(PLACE), folder=str(folder), name=name)
    env = os.environ | {
        "TRACKIO_DIR": str(folder.parent / "trackio"),
        "WANDB_MODE": "offline",
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True
    )
    assert " is off" not in done.stdout, done.stdout
    return done.stdout


@pytest.mark.track("tensorboard")
def test_the_real_tensorboard(tmp_path):
    said = real("tensorboard", tmp_path / "run")
    assert f"tensorboard --logdir {tmp_path / 'run' / 'tensorboard'}" in said
    sys.path.append(str(PLACE))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(e.step, round(e.value, 4)) for e in events.Scalars("reward")] == [
        (step, step / 10) for step in (1, 2, 3, 4)
    ]
    sys.path.remove(str(PLACE))


@pytest.mark.track("trackio")
def test_the_real_trackio(tmp_path):
    said = real("trackio", tmp_path / "run")
    assert said.count("trackio show --project grpo-fast") == 2
    assert "Run finished" not in said
    database = sqlite3.connect(tmp_path / "trackio" / "grpo-fast.db")
    rows = [
        (step, json.loads(x)) for step, x in database.execute("SELECT step, metrics FROM metrics")
    ]
    rewards = [(step, row["reward"]) for step, row in rows if "reward" in row]
    # A resumed run goes on under its name.
    assert rewards == [(1, 0.1), (2, 0.2), (3, 0.3), (4, 0.4)]
    (table,) = [row["completions"] for step, row in rows if "completions" in row and step == 3]
    assert table["_value"][0]["completion"] == "# c"
    alerts = database.execute("SELECT title, level FROM alerts").fetchall()
    assert alerts == [("R3 KL explosion", "error")] * 2
    database.close()


@pytest.mark.track("wandb")
def test_the_real_wandb(tmp_path):
    said = real("wandb", tmp_path / "run")
    assert "offline, in" in said
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*"))) == 2
