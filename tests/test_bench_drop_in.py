"""TRL's trainer beside the one that takes its place: everybody has the oracle's gradients, and who
is wrong, or went to another depth, has no number."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers

from grpo_bench import drop_in, hosts, main
from grpo_bench.drop_in import DropInSeat, play
from grpo_bench.isolated import Inline
from grpo_bench.provider import Provider
from grpo_bench.steps import StepMatch

TINY = StepMatch(shape=(9, 5, 4), lengths="lognormal", model="tiny")
pytestmark = [
    pytest.mark.host,
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
assert hosts  # puts TRL onto the path


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    """Seats sit in processes of their own, and change what is the whole process's."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield
    transformers.utils.logging.enable_progress_bar()


def off_by_a_thousandth():
    right = drop_in.trainer("packed")

    def prepare(model, group, pieces):
        step = right(model, group, pieces)

        def spoiled():
            loss = step()
            model.get_input_embeddings().weight.grad *= 1.001
            return loss

        return spoiled

    return prepare


def rows_of(folder: Path, *providers: Provider) -> dict[str, dict]:
    workers = [Inline(provider, 1, DropInSeat) for provider in providers]
    return {row["provider"]: row for row in play(TINY, workers, folder, least=2, seconds=0)}


def test_everybody_is_right_and_timed_beside_trl(tmp_path):
    rows = rows_of(tmp_path, *drop_in.PROVIDERS)
    assert list(rows) == ["TRL", *drop_in.DEPTHS]
    tokens = 4 * 9 + sum(TINY.completions())
    for row in rows.values():
        assert row["error"] is None
        assert max(row["loss_error"], row["gradient_error"]) < 1e-5
        assert row["tokens_per_second"] == pytest.approx(tokens / row["seconds"])
    assert rows["TRL"]["over_trl"] == rows["TRL"]["of_trl_bytes"] == 1.0
    assert rows["packed"]["over_trl"] > 0


def test_who_is_wrong_has_no_number(tmp_path):
    wrong = Provider(name="wrong", computes="nothing sound", load=off_by_a_thousandth)
    row = rows_of(tmp_path, wrong)["wrong"]
    assert row["error"].startswith("wrong result, not timed: loss off by")
    assert row["seconds"] is row["over_trl"] is row["extra_bytes"] is None


def test_another_depth_than_asked_for_has_no_number(tmp_path, monkeypatch):
    from grpo_fast.integrations import trl

    monkeypatch.setattr(trl.GRPOTrainer, "_not_packed", lambda self: "of a test")
    asked = Provider(name="packed", computes="", load=partial(drop_in.trainer, "packed"))
    row = rows_of(tmp_path, asked)["packed"]
    assert row["error"] == "went to depth 'fused' with this model"


def test_command_prints_a_table_and_writes_json(tmp_path, capsys):
    path = tmp_path / "rows.json"
    words = ["--drop-in", "--model", "tiny", "--shape", "5", "4", "3", "--rounds", "2"]
    words += ["--only", "TRL", "--only", "packed", "--seconds", "0", "--json", str(path)]
    assert main.main(words) == 0
    assert "x TRL" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert written["kind"] == "drop_in"
    assert [row["provider"] for row in written["rows"]] == ["TRL", "packed"]
    assert torch.tensor([row["over_trl"] for row in written["rows"]]).isfinite().all()
