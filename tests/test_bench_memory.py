"""Memory against the size of the group: every step is the oracle's, what does not fit is not run,
and a wrong step has no number."""

import json

import pytest
import torch

from grpo_bench import main, memory
from grpo_bench.memory import BASE_SIZE, MemorySeat, climb, providers, repeated
from grpo_bench.provider import Gap
from grpo_bench.steps import StepMatch, exact_step

TINY = StepMatch(shape=(9, 5, BASE_SIZE), model="tiny")


@pytest.fixture(scope="module")
def truth(tmp_path_factory):
    path = tmp_path_factory.mktemp("truth") / "truth.pt"
    torch.save(exact_step(TINY)._asdict(), path)
    return path


class Here:
    """A worker without a process."""

    def __init__(self, provider):
        self.provider, self.seat = provider, MemorySeat(provider)

    def ask(self, method, *arguments):
        return getattr(self.seat, method)(*arguments)


@pytest.mark.parametrize("provider", providers(20), ids=lambda provider: provider.name)
def test_every_layout_takes_the_oracle_s_step_at_every_size(provider, truth):
    rows = climb(Here(provider), TINY, 32, truth)
    assert [row["G"] for row in rows] == [8, 16, 32]
    for row in rows:
        assert row["error"] is None
        assert row["gradient_error"] < 1e-5
        assert row["seconds"] > 0


def test_a_group_repeats_its_completions():
    small, large = repeated(TINY), repeated(StepMatch(shape=(9, 5, 32), model="tiny"))
    assert len(large.completion_ids) == 32
    assert large.prompt_ids == small.prompt_ids
    assert list(large.completion_ids[8:16]) == list(small.completion_ids)
    assert large.advantages[24:] == small.advantages


def test_a_wrong_step_has_no_number(truth):
    (right, *_) = providers(20)

    def wrong():
        prepare = right.load()

        def spoiled(model, group):
            step = prepare(model, group)

            def run():
                loss = step()
                model.get_input_embeddings().weight.grad *= 1.001
                return loss

            return run

        return spoiled

    (row,) = climb(Here(type(right)(**{**vars(right), "load": wrong})), TINY, 32, truth)
    assert "wrong result: loss off by" in row["error"]
    assert row["extra"] is None


@pytest.mark.parametrize(
    ("taken", "sizes", "error"),
    [
        ([10, 20, 40, 80], [8, 16, 32, 64], "G=64: about 0 MB needed, not run"),
        ([20, 26, 27, 28], [8, 16, 32, 64], None),  # it has a ceiling
    ],
)
def test_what_would_not_fit_is_not_run(monkeypatch, truth, taken, sizes, error):
    monkeypatch.setattr(memory, "free_bytes", lambda _: 100)
    worker = Here(providers(20)[0])
    left = iter(taken)
    worker.ask = lambda *_: memory.Taken(next(left), 1.0, 0.0, 0.0)
    rows = climb(worker, TINY, 64, truth)
    assert [row["G"] for row in rows] == sizes
    assert rows[-1]["error"] == error


def test_a_failing_provider_is_a_line_of_the_table(truth):
    worker = Here(providers(20)[0])

    def fails(*_):
        raise Gap("its process ended with exit code -9")

    worker.ask = fails
    (row,) = climb(worker, TINY, 32, truth)
    lines = memory.memory_table([row])
    assert lines[-1] == "padded: G=8: its process ended with exit code -9"


def test_the_command_prints_a_table_and_draws_it(tmp_path, capsys, monkeypatch):
    for name in memory.ALLOCATOR:  # put back afterwards
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(memory, "Worker", lambda provider, *_: Closing(provider))
    words = ["--memory", "--shape", "9", "5", "--largest", "16", "--budget", "20"]
    out = [f"--json={tmp_path / 'm.json'}", f"--plot={tmp_path / 'm.png'}"]
    assert main.main([*words, "--model", "tiny", *out]) == 0
    table = capsys.readouterr().out
    assert "recomputed" in table
    assert "16 " in table
    result = json.loads((tmp_path / "m.json").read_text())
    assert (result["kind"], len(result["rows"])) == ("memory", 8)
    assert (tmp_path / "m.png").read_bytes().startswith(b"\x89PNG")


class Closing(Here):
    def close(self):
        pass


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--largest 4", "--largest 4: from 8"),
        ("--budget 100", "--budget of at least one sequence"),
    ],
)
def test_a_wrong_option_is_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main.main(["--memory", *words.split()])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
