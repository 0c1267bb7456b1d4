"""A run keeps its steps token by token: of the last inner iteration, within its budget, the same
after a resume, in little time."""

import dataclasses
import os
import signal
import statistics
import time
from pathlib import Path

import numpy as np
import pytest

from grpo_fast import ConfigError, LossConfig, session, token_log, train, trainer
from grpo_fast.config import TrainConfig
from grpo_fast.records import open_records
from grpo_fast.runlog import read_metrics
from grpo_fast.tiny import tiny_tokenizer
from grpo_fast.token_log import (
    COLUMNS,
    MORE_COLUMNS,
    read_token_step,
    read_token_steps,
    read_vocabulary,
)


def config_of(world: Path, output: Path, **changes) -> TrainConfig:
    options = {
        "model": str(world / "model"),
        "dataset": str(world / "data.jsonl"),
        "reward": (f"{world}/rewards.py:many_a",),
        "output_dir": str(output),
        "prompts_per_step": 6,
        "group_size": 4,
        "max_completion_length": 8,
        "learning_rate": 1e-2,
        "max_steps": 3,
        "eval_prompts": 2,
        "eval_every": 0,
        "save_every": 2,
        "device": "cpu",
    }
    return TrainConfig(**options | changes)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "tokens").iterdir()}


def test_a_run_keeps_its_tokens(world, tmp_path):
    rewards = tuple(f"{world}/rewards.py:{name}" for name in ("many_a", "short"))
    config = config_of(
        world,
        tmp_path / "run",
        reward=rewards,
        loss=LossConfig(beta=0.01),
        num_iterations=2,
        scale_rewards="none",
    )
    train(config)
    records = open_records(tmp_path / "run")
    assert records.tokens.steps() == [1, 2, 3]
    step = records.tokens.read(2)
    meta = step.meta
    assert meta["iteration"] == 1
    assert meta["loss"] == dataclasses.asdict(config.step_loss)
    assert meta["advantage"]["scale_rewards"] == "none"
    assert meta["eos_token_id"] == 1
    # The second iteration: the policy has moved, and is compared with what it was.
    ratio = step.arrays["ratio"][step.arrays["mask"] == 1]
    assert (ratio != 1).any()
    log_ratio = step.arrays["logprobs"] - step.arrays["old_logprobs"]
    assert np.allclose(np.exp(log_ratio[step.arrays["mask"] == 1]), ratio, atol=1e-5)
    assert step.arrays.keys() >= {"ref_logprobs", "kl", "sampler_logprobs"}
    vocabulary = records.tokens.vocabulary()
    tokenizer = tiny_tokenizer()
    for group in meta["groups"]:
        for c in group["completions"]:
            ids = step.arrays["token_ids"][c["start"] : c["stop"]].tolist()
            text = "".join(vocabulary[i] for i in ids)
            assert text == tokenizer.decode(ids)
            assert c["rewards"].keys() == {"many_a", "short"}
            assert (c["finish_reason"] == "length") == (ids[-1] != 1)
    row = records.rows[2]
    assert row["push/eos"] == meta["push"]["eos"]
    assert row["kl/old_k3"] > 0
    assert row["kl/sampler_k3"] < 1e-9, "sampler and trainer disagree"
    assert [r["tokens/steps_kept"] for r in records.rows[1:]] == [0, 1, 3], (
        "what is on disk: a step's own file is written while the next one is made, the last waits"
    )
    assert row["time/token_log"] > 0


def test_what_is_not_measured_has_no_entry(world, tmp_path):
    train(config_of(world, tmp_path / "run", max_steps=1))
    row = open_records(tmp_path / "run").rows[1]
    assert not row.keys() & {"kl", "kl/old_k3"}
    assert "old_logprobs" not in read_token_step(tmp_path / "run", 1).arrays


def test_zero_keeps_none(world, tmp_path):
    train(config_of(world, tmp_path / "run", log_tokens_mb=0, max_steps=1))
    assert not (tmp_path / "run/tokens").exists()
    records = open_records(tmp_path / "run")
    assert records.tokens is None
    assert "push/eos" in records.rows[1]
    assert not any(name.startswith("tokens/") for name in records.rows[1])


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), True])
def test_a_budget_that_is_none_is_refused(world, tmp_path, value):
    with pytest.raises(ConfigError, match=f"log_tokens_mb = {value}"):
        config_of(world, tmp_path, log_tokens_mb=value)


def test_the_log_changes_no_bit_of_the_run(world, tmp_path):
    def weights(name: str, **changes) -> bytes:
        train(config_of(world, tmp_path / name, num_iterations=2, **changes))
        return (tmp_path / name / "checkpoints/step-000003/model.safetensors").read_bytes()

    assert weights("with") == weights("without", log_tokens_mb=0)


def test_resumed_tokens_are_those_of_the_whole_run(world, tmp_path, monkeypatch):
    """From a step that was saved, after one that was not, under a budget that keeps some steps."""
    changes = {"max_steps": 6, "save_every": 2, "log_tokens_mb": 0.04}
    train(config_of(world, tmp_path / "whole", **changes))
    real = trainer.rollout

    def dies(config, parts, step, watch):
        if step == 6:
            raise RuntimeError("power cut")
        return real(config, parts, step, watch)

    monkeypatch.setattr(trainer, "rollout", dies)
    with pytest.raises(RuntimeError, match="power cut"):
        train(config_of(world, tmp_path / "parts", **changes))
    monkeypatch.undo()
    assert max(read_token_steps(tmp_path / "parts")) == 5
    train(config_of(world, tmp_path / "parts", resume=True, **changes))
    assert 2 <= len(read_token_steps(tmp_path / "whole")) < 6
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    names = ("push/eos", "tokens/mb", "tokens/steps_kept")
    ours, theirs = (open_records(tmp_path / name).rows[1:] for name in ("parts", "whole"))
    assert [[row[n] for n in names] for row in ours] == [[row[n] for n in names] for row in theirs]


def test_a_checkpoint_s_tokens_are_there_before_it_is(world, tmp_path, monkeypatch):
    """However long writing takes: a resumed run would lack them."""
    saved, encode = {}, token_log._encode

    def slowly(*of):
        time.sleep(0.2)
        return encode(*of)

    def save(folder, step, **of):
        saved[step] = read_token_steps(tmp_path / "run")

    monkeypatch.setattr(token_log, "_encode", slowly)
    monkeypatch.setattr(session, "save_checkpoint", save)
    train(config_of(world, tmp_path / "run"))
    assert saved == {2: [1, 2], 3: [1, 2, 3]}


@pytest.mark.parametrize("bad, rows", [(1, 2), (3, 3)])
def test_tokens_that_cannot_be_written_end_the_run(world, tmp_path, monkeypatch, bad, rows):
    """By the next step at the latest, and the folder is free again."""
    real = Path.write_bytes

    def full(path, data):
        if path.name == f".step-{bad:06d}.npz.writing":
            raise OSError(28, "No space left on device", str(path))
        return real(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    config = config_of(world, tmp_path / "run", save_every=0)
    with pytest.raises(OSError, match="No space left on device"):
        train(config)
    monkeypatch.undo()
    assert read_token_steps(tmp_path / "run") == list(range(1, bad))
    assert not (tmp_path / "run/run.lock").exists()
    assert len(read_metrics(tmp_path / "run")) == rows, "from step 0"


def test_an_older_run_s_tokens_move_with_it(world, tmp_path):
    train(config_of(world, tmp_path / "run", max_steps=2))
    before = files(tmp_path / "run")
    train(config_of(world, tmp_path / "run", max_steps=1, existing="move"))
    assert files(tmp_path / "run.1") == before
    assert read_token_steps(tmp_path / "run") == [1]


def test_an_interrupted_run_can_be_read(world, tmp_path, monkeypatch):
    real = trainer.rollout

    def interrupted(config, parts, step, watch):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return real(config, parts, step, watch)

    monkeypatch.setattr(trainer, "rollout", interrupted)
    assert train(config_of(world, tmp_path / "run")).interrupted
    assert read_token_steps(tmp_path / "run") == [1, 2]
    assert read_vocabulary(tmp_path / "run")


def test_the_log_takes_a_small_part_of_a_step(world, tmp_path, one_thread):
    """1 to 2 % of a third of a second, the shortest step there is; docs/log_cost.py measures real
    ones. The bound is for a machine that others use."""
    train(config_of(world, tmp_path / "run", group_size=16, max_completion_length=64, max_steps=4))
    rows = open_records(tmp_path / "run").rows[1:]
    share = statistics.median(row["time/token_log"] / row["step_time"] for row in rows)
    assert share < 0.06


def test_the_snippet_of_the_docs_runs_on_a_run(world, tmp_path, capsys):
    train(config_of(world, tmp_path / "run", max_steps=1))
    page = (Path(__file__).parent.parent / "docs/tokens.md").read_text(encoding="utf-8")
    code = page.partition("```python\n")[2].partition("```")[0]
    exec(code.replace("runs/mine", str(tmp_path / "run")), {})
    assert "[1. 1." in capsys.readouterr().out


def test_the_docs_name_every_entry_of_a_step(world, tmp_path):
    train(config_of(world, tmp_path / "run", max_steps=1, num_iterations=2))
    page = (Path(__file__).parent.parent / "docs/tokens.md").read_text(encoding="utf-8")
    step = read_token_step(tmp_path / "run", 1)
    group = step.meta["groups"][0]
    for names in (step.arrays, step.meta, group, group["completions"][0], COLUMNS, MORE_COLUMNS):
        assert [name for name in names if f"`{name}`" not in page] == []
