"""Checkpoints: whole or invisible, damage named, nothing that executes."""

import json

import pytest
import torch

from grpo_fast import CheckpointError
from grpo_fast.checkpoint import load_optimizer, newest_checkpoint, save_checkpoint
from grpo_fast.tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def parts():
    torch.manual_seed(0)
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(2):
        model(torch.tensor([[1, 2, 3]])).logits.square().mean().backward()
        optimizer.step()
    return {"model": model, "tokenizer": tiny_tokenizer(), "optimizer": optimizer}


def save(folder, step, parts, keep=3):
    return save_checkpoint(folder, step, state={"seconds": float(step)}, keep=keep, **parts)


def test_newest_comes_back_with_its_state(parts, tmp_path):
    for step in (5, 10):
        save(tmp_path, step, parts)
    found, problems = newest_checkpoint(tmp_path)
    assert (found.step, found.state, problems) == (10, {"seconds": 10.0}, [])
    assert found.path.name == "step-000010"


def test_optimizer_comes_back_bit_for_bit(parts, tmp_path):
    path = save(tmp_path, 1, parts)
    fresh = torch.optim.AdamW(parts["model"].parameters(), lr=1e-2)
    load_optimizer(path, parts["model"], fresh)
    for parameter in parts["model"].parameters():
        before, after = parts["optimizer"].state[parameter], fresh.state[parameter]
        assert set(before) == set(after)
        assert all(torch.equal(before[key], after[key]) for key in before)


def test_only_the_newest_are_kept(parts, tmp_path):
    for step in range(1, 5):
        save(tmp_path, step, parts, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003", "step-000004"]


def test_nothing_pickled(parts, tmp_path):
    path = save(tmp_path, 1, parts)
    kinds = {file.suffix for file in path.iterdir()}
    assert kinds <= {".json", ".safetensors", ".jinja"}


def test_a_save_that_was_killed_is_not_seen(parts, tmp_path):
    save(tmp_path, 1, parts)
    (tmp_path / ".step-000002.writing").mkdir()
    assert newest_checkpoint(tmp_path)[0].step == 1
    save(tmp_path, 2, parts)
    assert not list(tmp_path.glob(".step*"))


DAMAGE = {
    "cut": (lambda p: (p / "model.safetensors").write_bytes(b"12"), "model.safetensors does not"),
    "gone": (lambda p: (p / "optimizer.safetensors").unlink(), "optimizer.safetensors is missing"),
    "state": (lambda p: (p / "state.json").write_text("{"), "state.json is missing or not"),
    "empty": (lambda p: (p / "state.json").write_text("{}"), "state.json is missing or not"),
}


@pytest.mark.parametrize("damage, message", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_checkpoint_is_passed_over_and_named(parts, tmp_path, damage, message):
    save(tmp_path, 1, parts)
    damage(save(tmp_path, 2, parts))
    found, problems = newest_checkpoint(tmp_path)
    assert found.step == 1
    assert len(problems) == 1
    assert problems[0].startswith("step-000002/" + message)
    damage(tmp_path / "step-000001")
    with pytest.raises(CheckpointError, match="no checkpoint in .* is intact"):
        newest_checkpoint(tmp_path)


def test_one_flipped_bit_is_found(parts, tmp_path):
    path = save(tmp_path, 1, parts) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="sha256"):
        newest_checkpoint(tmp_path)


def test_no_checkpoint_at_all(tmp_path):
    assert newest_checkpoint(tmp_path) == (None, [])


def test_optimizer_of_another_model(parts, tmp_path):
    path = save(tmp_path, 1, parts)
    other = torch.nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="which the model does not have"):
        load_optimizer(path, other, torch.optim.AdamW(other.parameters()))


def test_state_is_json(parts, tmp_path):
    record = json.loads((save(tmp_path, 3, parts) / "state.json").read_text())
    assert record["step"] == 3
    assert set(record["files"]) >= {"model.safetensors", "optimizer.safetensors", "config.json"}
