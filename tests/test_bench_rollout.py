"""Sampling beside transformers: the same greedy tokens, everybody makes all of them, and what is
wrong has no number."""

import json

import pytest
import torch

from grpo_bench import main, rollouts
from grpo_bench.isolated import Inline
from grpo_bench.provider import Provider
from grpo_bench.rollouts import Asked, RolloutSeat, decoding_bytes, measured
from grpo_bench.steps import StepMatch

TINY = StepMatch(shape=(5, 4, 3), model="tiny")


def never_ends():
    return lambda model, asked: [[2] * asked.length] * asked.count


def too_short():
    right = rollouts.ours()

    def sample(model, asked: Asked):
        found = right(model, asked)
        return found if asked.greedy else found[:-1]

    return sample


def rows_of(*providers: Provider) -> dict[str, dict]:
    workers = [Inline(provider, 1, RolloutSeat) for provider in providers]
    return {row["provider"]: row for row in measured(TINY, workers, 1e-3, least=2, seconds=0)}


def test_both_are_right_and_timed():
    rows = rows_of(*rollouts.PROVIDERS)
    assert set(rows) == {"HF generate", "grpo-fast"}
    for row in rows.values():
        assert row["error"] is None
        assert row["tokens_per_second"] == pytest.approx(12 / row["seconds"])
        assert row["of_roof"] == pytest.approx(1e-3 / row["seconds"])
    assert rows["HF generate"]["over_hf"] == 1.0
    assert rows["grpo-fast"]["over_hf"] > 0


@pytest.mark.parametrize(
    "load, says",
    [(never_ends, "wrong result, not timed: a greedy token is"), (too_short, "not C tokens each")],
)
def test_who_is_wrong_has_no_number(load, says):
    wrong = Provider(name="wrong", computes="nothing sound", load=load, package="torch")
    row = rows_of(*rollouts.PROVIDERS, wrong)["wrong"]
    assert says in row["error"]
    assert row["seconds"] is row["over_hf"] is None


def test_decoding_reads_weights_and_cache_once_a_step():
    layers = 2 * (2 * 32 * 8 * (4 + 2) + 3 * 32 * 64)
    cache = 2 * 2 * 2 * 8 * 3 * (4 * 5 + 1 + 2 + 3 + 4)
    assert decoding_bytes(TINY) == 4 * (4 * (layers + 32 * 64) + cache)
    half = StepMatch(shape=(5, 4, 3), model="tiny", dtype=torch.bfloat16)
    assert 2 * decoding_bytes(half) == decoding_bytes(TINY)


def test_command_prints_a_table_and_writes_json(tmp_path, capsys):
    path = tmp_path / "rows.json"
    words = ["--rollout", "--model", "tiny", "--shape", "5", "4", "3", "--rounds", "2"]
    assert main.main([*words, "--seconds", "0", "--json", str(path)]) == 0
    assert "x HF" in capsys.readouterr().out
    written = json.loads(path.read_text())
    assert (written["kind"], len(written["rows"])) == ("rollout", 2)
    assert written["about"]["bandwidth"] > 1e8
