"""The whole program on a tiny model: it learns, it repeats itself, it resumes bit for bit, it stops
when asked."""

import io
import json
import math
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from grpo_fast import CheckpointError, ConfigError, GrpoFastError, LossConfig, RewardError, train
from grpo_fast.config import TrainConfig
from grpo_fast.console import Progress
from grpo_fast.trainer import StopRequest

GOLDEN = Path(__file__).parent / "golden" / "losses_cpu.txt"


def config_of(world: Path, output: Path, **changes) -> TrainConfig:
    options = {
        "model": str(world / "model"),
        "dataset": str(world / "data.jsonl"),
        "reward": (f"{world}/rewards.py:many_a",),
        "output_dir": str(output),
        "prompts_per_step": 4,
        "group_size": 8,
        "max_completion_length": 8,
        "token_budget": 256,
        "learning_rate": 1e-2,
        "max_steps": 4,
        "num_iterations": 2,
        "eval_prompts": 8,
        "eval_every": 2,
        "save_every": 2,
        "device": "cpu",
        "loss": LossConfig(beta=0.01),
    }
    return TrainConfig(**options | changes)


def rows(output: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (output / name).read_text().splitlines()]


TIMES = {"step_time", "tokens_per_second"}
TIMES |= {f"time/{phase}" for phase in ("rollout", "reward", "update", "token_log")}


def without_times(metrics: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for row in metrics]


def weights(output: Path, step: int) -> bytes:
    return (output / f"checkpoints/step-{step:06d}/model.safetensors").read_bytes()


def test_a_tiny_run_learns(world, tmp_path):
    config = config_of(world, tmp_path / "run", max_steps=25, eval_every=0, save_every=0)
    result = train(config)
    assert result.eval_after > result.eval_before + 0.3
    assert result.step == 25
    assert not result.interrupted
    assert Path(result.report).is_file()
    metrics = rows(tmp_path / "run")
    first, last = metrics[1]["reward"], metrics[-1]["reward"]
    assert last > first + 0.3


def test_the_metrics_people_look_for_are_there(world, tmp_path):
    rewards = tuple(f"{world}/rewards.py:{name}" for name in ("many_a", "short"))
    train(config_of(world, tmp_path / "run", reward=rewards, reward_weights=(1.0, 0.5)))
    metrics = rows(tmp_path / "run")
    assert [row["step"] for row in metrics] == [0, 1, 2, 3, 4]
    assert [row["step"] for row in metrics if "eval_reward" in row] == [0, 2, 4]
    names = [
        "reward",
        "reward_std",
        "rewards/many_a/mean",
        "rewards/many_a/std",
        "rewards/short/mean",
        "kl",
        "entropy",
        "loss",
        "clip_ratio/low_mean",
        "clip_ratio/low_min",
        "clip_ratio/high_mean",
        "clip_ratio/high_max",
        "clip_ratio/region_mean",
        "learning_rate",
        "grad_norm",
        "frac_reward_zero_std",
        "advantage/winners",
        "completions/mean_length",
        "completions/clipped_ratio",
        "num_tokens",
        "step_time",
        "tokens_per_second",
    ]
    for row in metrics[1:]:
        assert set(names) <= set(row)
        assert all(math.isfinite(row[name]) for name in names if row[name] is not None)
        assert row["sampling/sampling_logp_difference/max"] < 1e-3, "sampler and trainer disagree"
    samples = rows(tmp_path / "run", "completions.jsonl")
    assert {row["step"] for row in samples} == {1, 2, 3, 4}
    ranked = [row["reward"] for row in samples if row["step"] == 1]
    assert ranked == sorted(ranked, reverse=True)


def test_kl_is_absent_when_not_measured(world, tmp_path):
    train(config_of(world, tmp_path / "run", loss=LossConfig(), max_steps=1))
    assert "kl" not in rows(tmp_path / "run")[1]


def test_first_losses_are_pinned(world, tmp_path):
    """A change of any rounding-sized thing must be meant: rerun with GRPO_FAST_WRITE_GOLDEN=1 and
    say why."""
    train(config_of(world, tmp_path / "run"))
    found = [
        f"{row['step']} {row['loss']:.6f} {row['grad_norm']:.5f}"
        for row in rows(tmp_path / "run")[1:]
    ]
    if os.environ.get("GRPO_FAST_WRITE_GOLDEN"):
        GOLDEN.write_text("\n".join(found) + "\n")
    golden = GOLDEN.read_text().splitlines()
    for line, expected in zip(found, golden, strict=True):
        numbers = [float(x) for x in line.split()]
        assert numbers == pytest.approx([float(x) for x in expected.split()], rel=1e-3, abs=2e-5)


# Entropy starts at 3.90 nats and falls: the bonus sets in after the second step.
ADAPTIVE = {
    "entropy_target": 3.895,
    "entropy_coef": 0.02,
    "use_adaptive_entropy": True,
    "entropy_coef_delta": 0.01,
    "entropy_coef_max": 0.03,
}


RESUMED = {
    "plain": {},
    "several": {
        "reward_weights": (1.0, 0.5),
        "multi_objective_aggregation": "normalize_then_sum",
        "loss": LossConfig(**ADAPTIVE),
    },
    "master": {"dtype": "bfloat16", "learning_rate": 1e-4},
    "stochastic": {
        "dtype": "bfloat16",
        "learning_rate": 1e-4,
        "update_precision": "stochastic",
    },
}


@pytest.mark.parametrize(
    "stop_at, kind", [(2, "plain"), (3, "several"), (3, "master"), (2, "stochastic")]
)
def test_resume_is_the_uninterrupted_run_bit_for_bit(world, tmp_path, stop_at, kind, monkeypatch):
    """A checkpoint step and one between; a plain run, one whose entropy bonus has a state, and
    bfloat16 ones whose weights follow from more than themselves."""
    changes = {"max_steps": 6, **RESUMED[kind]}
    if kind == "several":
        changes["reward"] = tuple(f"{world}/rewards.py:{name}" for name in ("many_a", "short"))
    whole = tmp_path / "whole"
    train(config_of(world, whole, **changes))
    parts = tmp_path / "parts"
    from grpo_fast import trainer

    real = trainer.rollout

    def interrupted(config, parts_, step, watch):
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return real(config, parts_, step, watch)

    monkeypatch.setattr(trainer, "rollout", interrupted)
    first = train(config_of(world, parts, **changes))
    monkeypatch.undo()
    assert first.interrupted
    assert first.step == stop_at
    second = train(config_of(world, parts, resume=True, **changes))
    assert not second.interrupted
    assert weights(parts, 6) == weights(whole, 6)
    assert without_times(rows(parts)) == without_times(rows(whole))
    assert rows(parts, "completions.jsonl") == rows(whole, "completions.jsonl")
    optimizer = "checkpoints/step-000006/optimizer.safetensors"
    assert (parts / optimizer).read_bytes() == (whole / optimizer).read_bytes()


@pytest.mark.parametrize("during", ["evaluate", "log"])
def test_a_stop_asked_for_late_in_a_step_is_saved_with_that_step(
    world, tmp_path, during, monkeypatch
):
    from grpo_fast import trainer

    owner = trainer if during == "evaluate" else trainer.RunLog
    real, calls = getattr(owner, during), iter(range(100))

    def interrupted(*arguments):
        # The first call comes before step 1, the second in it.
        if next(calls) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments)

    monkeypatch.setattr(owner, during, interrupted)
    result = train(config_of(world, tmp_path / "run", eval_every=1, save_every=0))
    assert result.interrupted
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == [f"step-{result.step:06d}"]
    assert result.step == (1 if during == "evaluate" else 2)


def test_a_stop_asked_for_in_the_middle_of_a_print_prints_each_line_once():
    class Signalled(io.StringIO):
        def write(self, text):
            count = super().write(text)
            if "the line" in text and "stopping" not in self.getvalue():
                os.kill(os.getpid(), signal.SIGINT)
            return count

    file = Signalled()
    progress = Progress(1, console=Console(file=file, width=80))
    with StopRequest(progress) as stop:
        progress.note("the line")
    assert stop.requested
    assert file.getvalue() == "the line\nstopping after this step, once more to stop at once\n"


def test_adaptive_entropy_acts_at_or_below_its_target(world, tmp_path):
    """The coefficients logged are those that follow from the entropies logged."""
    loss = LossConfig(**ADAPTIVE)
    options = {"num_iterations": 1, "eval_every": 0, "save_every": 0, "max_steps": 6}
    train(config_of(world, tmp_path / "run", loss=loss, **options))
    coef, before, expected = loss.entropy_coef, math.inf, []
    metrics = rows(tmp_path / "run")[1:]
    for row in metrics:
        expected.append(coef if before <= loss.entropy_target else 0.0)
        before = row["entropy"]
        coef = min(max(coef + (0.01 if before <= loss.entropy_target else -0.01), 0.0), 0.03)
    assert [row["entropy_coef"] for row in metrics] == pytest.approx(expected)
    assert len({round(x, 6) for x in expected}) >= 3, "the test must see it off, on and moving"
    # Groups that teach nothing are measured too, also while there is no bonus.
    assert any(row["frac_reward_zero_std"] and not row["entropy_coef"] for row in metrics)
    assert not any(row["n_tokens_skipped"] for row in metrics)
    state = json.loads((tmp_path / "run/checkpoints/step-000006/state.json").read_text())["state"]
    assert state["entropy_control"] == {
        "coef": pytest.approx(coef),
        "entropy": pytest.approx(before, rel=1e-6),
    }


def test_a_fixed_entropy_bonus_is_logged_and_no_bonus_is_not(world, tmp_path):
    for name, loss in {"fixed": LossConfig(entropy_coef=0.1), "none": LossConfig()}.items():
        train(config_of(world, tmp_path / name, loss=loss, max_steps=1))
    assert rows(tmp_path / "fixed")[1]["entropy_coef"] == 0.1
    assert "entropy_coef" not in rows(tmp_path / "none")[1]


def test_resume_after_a_kill_drops_what_was_not_saved(world, tmp_path, monkeypatch):
    """kill -9 in step 4: steps 3 and the half of 4 are redone, and no row is there twice."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(config_of(world, whole))
    from grpo_fast import trainer

    def die(*_):
        raise SystemExit(9)

    monkeypatch.setattr(trainer, "evaluate", trainer.evaluate)
    calls = iter(range(100))
    real = trainer.update
    monkeypatch.setattr(trainer, "update", lambda *a: die() if next(calls) == 3 else real(*a))
    with pytest.raises(SystemExit):
        train(config_of(world, killed))
    monkeypatch.undo()
    assert [row["step"] for row in rows(killed)] == [0, 1, 2, 3]
    train(config_of(world, killed, resume=True))
    assert without_times(rows(killed)) == without_times(rows(whole))
    assert weights(killed, 4) == weights(whole, 4)


def test_resuming_a_finished_run_says_so(world, tmp_path, capsys):
    config = config_of(world, tmp_path / "run", max_steps=2)
    train(config)
    before = rows(tmp_path / "run")
    result = train(config_of(world, tmp_path / "run", max_steps=2, resume=True))
    assert result.step == 2
    assert not result.interrupted
    assert rows(tmp_path / "run") == before


def test_resume_refuses_another_run(world, tmp_path):
    train(config_of(world, tmp_path / "run", max_steps=2))
    with pytest.raises(
        CheckpointError, match=r"group_size = 8, this run has 4.*another output_dir"
    ):
        train(config_of(world, tmp_path / "run", group_size=4, resume=True))


def forget(output: Path, *names: str) -> None:
    """Make the checkpoint one of before these options."""
    path = output / "checkpoints/step-000002/state.json"
    record = json.loads(path.read_text())
    for name in names:
        del record["state"]["config"][name]
    path.write_text(json.dumps(record))


@pytest.mark.parametrize("dtype, precision", [("auto", "master"), ("bfloat16", "none")])
def test_a_run_of_before_there_were_precisions_goes_on(world, tmp_path, dtype, precision):
    """Float32 parameters as they were; bfloat16 ones had torch's AdamW, which is now `none`."""
    options = {"dtype": dtype, "update_precision": precision, "max_steps": 2, "eval_every": 0}
    train(config_of(world, tmp_path / "run", **options))
    forget(tmp_path / "run", "optimizer", "update_precision")
    result = train(config_of(world, tmp_path / "run", resume=True, **options | {"max_steps": 3}))
    assert result.step == 3


@pytest.mark.parametrize("forgotten", [(), ("optimizer", "update_precision")])
def test_resume_refuses_another_precision(world, tmp_path, forgotten):
    options = {"dtype": "bfloat16", "max_steps": 2, "eval_every": 0}
    train(config_of(world, tmp_path / "run", update_precision="none", **options))
    forget(tmp_path / "run", *forgotten)
    with pytest.raises(
        CheckpointError, match="with update_precision = 'none', this run has 'master' .*put it back"
    ):
        train(config_of(world, tmp_path / "run", resume=True, **options))


def test_micro_batching_changes_nothing_but_rounding(world, tmp_path):
    for budget in (16, 4096):
        train(config_of(world, tmp_path / str(budget), token_budget=budget, max_steps=2))
    small, large = rows(tmp_path / "16"), rows(tmp_path / "4096")
    for a, b in zip(small[1:], large[1:], strict=True):
        assert a["reward"] == b["reward"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-6)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def test_memory_is_planned_and_rehearsed_before_the_first_step(world, tmp_path, capsys):
    for name, changes in {"kept": {}, "again": {"checkpointing": "on"}}.items():
        train(config_of(world, tmp_path / name, token_budget=None, max_steps=2, **changes))
    said = capsys.readouterr().out
    assert re.search(r"memory: rows of at most 320 tokens, checkpointing off: .* rehearsed", said)
    assert re.search(r"memory: rows of at most 320 tokens, checkpointing on: .* rehearsed", said)
    assert without_times(rows(tmp_path / "kept")) == without_times(rows(tmp_path / "again"))


def test_a_run_that_cannot_fit_dies_before_it_touches_anything(world, tmp_path, monkeypatch):
    train(config_of(world, tmp_path / "run", max_steps=1))
    monkeypatch.setattr("grpo_fast.planner.free_bytes", lambda _: 10**6)
    with pytest.raises(ConfigError, match="a row of 256 tokens does not fit into"):
        train(config_of(world, tmp_path / "run", existing="move"))
    assert [row["step"] for row in rows(tmp_path / "run")] == [0, 1]


def test_gradients_that_are_not_finite_are_skipped_then_stop_the_run(world, tmp_path, monkeypatch):
    from grpo_fast import trainer

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a, **k: torch.tensor(math.nan))
    with pytest.raises(GrpoFastError, match="not finite in 3 steps in a row"):
        train(config_of(world, tmp_path / "run", max_steps=9))
    metrics = rows(tmp_path / "run")
    assert [row["skipped_updates"] for row in metrics[1:]] == [1.0] * 3
    assert trainer.MAX_SKIPPED_STEPS == 3


BAD = {
    "model": ({"model": "/nowhere"}, ConfigError, "/nowhere"),
    "data": ({"dataset": "/nowhere.jsonl"}, GrpoFastError, "/nowhere.jsonl"),
    "no-torchao": (
        {"optimizer": "adamw_8bit", "model": "/nowhere"},
        ConfigError,
        "'adamw_8bit' needs torchao",
    ),
    "reward-file": ({"reward": ("/nowhere.py:f",)}, GrpoFastError, "/nowhere.py"),
    "reward-name": ({"reward": ("REWARDS:many_b",)}, GrpoFastError, "many_b.*many_a"),
    "reward-raises": ({"reward": ("REWARDS:broken",)}, RewardError, "broken.*KeyError"),
    "reward-count": ({"reward": ("REWARDS:too_few",)}, RewardError, "too_few.*1.*8"),
    "budget": ({"token_budget": 9}, ConfigError, "token_budget = 9 is below"),
    "prompts": ({"prompts_per_step": 60}, ConfigError, "prompts_per_step = 60 is more than"),
    "held-out": ({"eval_prompts": 64}, GrpoFastError, "eval_prompts"),
}


@pytest.mark.parametrize("changes, error, message", BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(world, tmp_path, changes, error, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    if "reward" in changes:
        name = changes["reward"][0].replace("REWARDS", f"{world}/rewards.py")
        changes = {"reward": (name,)}
    with pytest.raises(error, match=message) as caught:
        train(config_of(world, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)


def test_a_run_is_not_written_over(world, tmp_path):
    config = config_of(world, tmp_path / "run", max_steps=1)
    train(config)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(ConfigError, match="already holds a run"):
        train(config)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    train(config_of(world, tmp_path / "run", max_steps=1, existing="move"))
    assert (tmp_path / "run.1/metrics.jsonl").read_bytes() == before


def test_a_config_that_cannot_run_moves_no_run_aside(world, tmp_path):
    train(config_of(world, tmp_path / "run", max_steps=1))
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    with pytest.raises(GrpoFastError):
        train(config_of(world, tmp_path / "run", dataset="/nowhere.jsonl", existing="move"))
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize(
    "scheduler, expected",
    [("constant", [0.5, 1, 1, 1, 1]), ("linear", [0.5, 1, 1, 2 / 3, 1 / 3]), ("cosine", None)],
)
def test_learning_rate(scheduler, expected):
    from grpo_fast.trainer import learning_rate

    config = TrainConfig(
        model="m",
        dataset="d",
        reward=("r:f",),
        learning_rate=1.0,
        warmup_steps=2,
        max_steps=5,
        lr_scheduler_type=scheduler,
    )
    found = [learning_rate(config, step) for step in range(1, 6)]
    expected = expected or [0.5, 1, 1, 0.75, 0.25]
    assert found == pytest.approx(expected)
