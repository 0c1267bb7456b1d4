"""`grpo-fast diff`: what differs between two runs, from which step on, and how it is told."""

import json
import math

import pytest

from grpo_fast.cli import main

CONFIG = {"output_dir": "runs/a", "seed": 0, "loss": {"beta": 0.0}, "reward": ["r.py:f"]}


def rows(steps=range(0, 13), **changes):
    """A run; `changes` at steps: {"kl": {7: 0.5}}."""
    found = []
    for step in steps:
        row = {"step": step, "reward": 0.1 * step, "kl": 0.01 * step, "step_time": step**0.5}
        row |= {"eval_reward": math.nan} if step == 3 else {}
        found.append(row | {n: at[step] for n, at in changes.items() if step in at})
    return found


@pytest.fixture
def two(tmp_path, capsys):
    """two(rows_a, rows_b, config_b, *options) -> (exit code, output)."""

    def call(a, b, config=None, *options):
        for name, lines, values in (("a", a, CONFIG), ("b", b, CONFIG | (config or {}))):
            folder = tmp_path / name
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text(json.dumps(values))
            text = "".join(json.dumps(x) + "\n" for x in lines)
            (folder / "metrics.jsonl").write_text(text.replace("NaN", "null"))
        code = main(["diff", str(tmp_path / "a"), str(tmp_path / "b"), *options])
        return code, capsys.readouterr().out

    return call


def test_the_same_run_in_another_folder_at_another_speed_is_the_same(two):
    code, text = two(rows(), rows(step_time={5: 99.0}), {"output_dir": "elsewhere"})
    assert code == 0
    assert "config: the same" in text
    assert "metrics: identical for 13 steps (3 metrics)" in text


def test_the_first_step_that_differs_and_by_how_much(two):
    other = rows(kl={7: 0.07 * (1 + 1e-9), 9: 0.18}, reward={9: 0.9 * 2})
    code, text = two(rows(), other, {"seed": 1, "loss": {"beta": 0.04}})
    assert code == 1
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "metrics: identical for 7 steps, first difference at step 7, in 1 of 3" in lines
    (line,) = [line for line in lines if line.startswith("kl 0.07 0.07")]
    assert line.endswith("1.0e-09 5.0e-01 at 9")
    assert "config: 2 keys differ" in lines
    assert "seed 0 1" in lines
    assert "loss.beta 0.0 0.04" in lines
    assert max(map(len, text.splitlines())) <= 80


def test_a_tolerance_passes_over_small_differences(two):
    other = rows(kl={7: 0.07 * (1 + 1e-9), 9: 0.18})
    code, text = two(rows(), other, None, "--rtol", "1e-6")
    assert code == 1
    assert "identical for 9 steps, first difference at step 9" in text
    code, text = two(rows(), rows(kl={7: 0.07 * (1 + 1e-9)}), None, "--rtol", "1e-6")
    assert (code, "identical for 13 steps" in text) == (0, True)


def test_steps_and_metrics_of_one_run_only_are_named(two):
    other = [row | {"entropy": 1.0} for row in rows(range(0, 20))]
    code, text = two(rows(), other, {"top_p": 1.0})
    assert code == 1
    assert "identical for 13 steps" in text
    assert "steps only in B (1): 13-19" in text
    assert "metrics only in B (1): entropy" in text
    assert "only in B (1): top_p" in text


def test_a_number_that_is_none_in_one_run_is_a_difference(two):
    code, text = two(rows(), rows(kl={4: math.nan}))
    assert code == 1
    assert "first difference at step 4" in text


def test_json_says_the_same(two):
    code, text = two(rows(), rows(reward={12: 1.3}), {"seed": 1}, "--json")
    said = json.loads(text)
    assert code == 1
    assert (said["schema"], said["same"]) == (1, False)
    assert said["config"]["changed"] == {"seed": [0, 1]}
    assert said["metrics"]["first_step"] == 12
    assert said["metrics"]["at_first_step"]["reward"][:2] == [0.1 * 12, 1.3]
    assert said["metrics"]["different_steps"] == [[12, 12]]
    assert said["main"]["reward"] == [0.1 * 12, 1.3]


def test_long_names_and_values_stay_within_80_columns(two):
    long = "rewards/" + "a_very_long_name_of_a_reward_function" * 3 + "/mean"
    a, b = ([row | {long: value} for row in rows()] for value in (1 / 3, -1e-30))
    _, text = two(a, b, {"model": "organisation/" + "m" * 90, "\x1b[2J": 1})
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text


def test_logs_of_other_trainers_compare(tmp_path, capsys):
    ours = tmp_path / "a.jsonl"
    ours.write_text('{"step": 1, "reward": 0.5}\n{"step": 2, "reward": 0.5}\n')
    theirs = tmp_path / "b.jsonl"
    theirs.write_text('{"step": 1, "data": {"critic/score/mean": 0.5}}\n')
    assert main(["diff", str(ours), str(theirs)]) == 1
    text = capsys.readouterr().out
    assert "config: not compared, A and B have none" in text
    assert "b.jsonl (verl, 1 rows to step 1)" in text
    assert "metrics: identical for 1 steps (1 metrics)" in text


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "the following arguments are required: RUN_A, RUN_B"),
        (["gone", "gone"], "no run at gone"),
        (["a", "b", "--rtol", "-1"], "--rtol -1.0: expected a number from 0 to 1"),
        (["a", "b", "--rtol", "x"], "--rtol: invalid float value: 'x'"),
    ],
)
def test_a_wrong_call_is_one_line_and_2(capsys, words, message):
    assert main(["diff", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
