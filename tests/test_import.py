"""What report and doctor open: logs of other trainers, told apart by what lies there; and each bad
file in one sentence that names it."""

import json
import math
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_fast.cli import main
from grpo_fast.errors import InputError
from grpo_fast.import_verl import METRICS
from grpo_fast.records import open_records


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answer(k: int, **changes):
    """Completion `k` of a step: two prompts, four completions each."""
    return {"prompt": f"p{k // 4}", "completion": f"c{k}", "reward": float(k % 4)} | changes


def rollout(k: int, step: int, **changes):
    """The same as verl writes it; its answers come sorted by length, not by prompt."""
    k = (3 * k) % 8
    row = {"input": f"p{k // 4}", "output": f"c{k}", "gts": 42, "score": float(k % 4), "step": step}
    return row | {"acc": k % 4 == 3, "pred": "x", "uid": f"u{k}"} | changes


LOGGED = {
    "critic/score/mean": 1.4,
    "critic/rewards/mean": 1.3,
    "actor/kl_loss": 0.02,
    "actor/pg_clipfrac": 0.01,
    "response_length/mean": 50.0,
    "val-core/gsm8k/acc/mean@1": 0.4,
    "perf/mfu/actor": 0.3,
}
CONSOLE = (
    "hello: [1]\n(TaskRunner pid=7) step:{} - critic/score/mean:np.float64(1.4) - "
    "actor/kl_loss:0.02 - val-core/gsm8k/acc/mean@1:0.4 - note:none\n"
)


@pytest.fixture
def verl(tmp_path):
    for step in (1, 2, 10):
        write(tmp_path / "rollouts" / f"{step}.jsonl", [rollout(k, step) for k in range(8)])
    return tmp_path


def test_completions_as_lines_say_what_their_steps_were(tmp_path):
    path = write(tmp_path / "a.jsonl", [answer(k, token_ids=[1] * (k + 1)) for k in range(8)])
    records = open_records(path)
    assert (records.source, records.name) == ("JSON lines", "a.jsonl")
    (row,) = records.rows
    assert row["step"] == 1
    assert row["reward"] == 1.5
    assert row["reward_std"] == statistics.stdev([0, 1, 2, 3] * 2)
    assert row["frac_reward_zero_std"] == 0
    assert row["completions/mean_length"] == 4.5
    assert "completions/clipped_ratio" not in row
    best = records.completions[3]
    assert best["advantage"] == 1.5 / (statistics.stdev(range(4)) + 1e-4)
    assert row["advantage/winners"] == best["advantage"]
    assert [r["group"] for r in records.completions] == [0] * 4 + [1] * 4
    assert any("all completions are taken as one step" in note for note in records.notes)
    assert any("advantages are not in the log" in note for note in records.notes)


def test_names_of_others_and_messages_are_understood(tmp_path):
    question = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "2+2?"}]
    lines = [
        {
            "global_step": 3,
            "question": question,
            "response": [{"role": "assistant", "content": str(k)}],
            "score": None if k == 2 else k,
            "advantage": k - 1,
            "finish_reason": "length" if k else "stop",
            "length": 7,
            "level": "easy",
        }
        for k in range(3)
    ]
    records = open_records(write(tmp_path / "a.jsonl", lines))
    (row,) = records.rows
    assert (row["step"], row["reward"]) == (3, 0.5)
    assert row["unscored_frac"] == pytest.approx(1 / 3)
    assert row["completions/clipped_ratio"] == pytest.approx(2 / 3)
    first = records.completions[0]
    assert first["prompt"] == "system: Be short.\nuser: 2+2?"
    assert (first["completion"], first["columns"]) == ("0", {"level": "easy"})
    assert records.completions[2]["reward"] is None
    assert records.notes == ()


def test_dead_groups_and_parts_are_seen(tmp_path):
    lines = [answer(k, reward=1.0, rewards={"format": 1.0, "answer": k % 2}) for k in range(8)]
    lines += [answer(k, step=2) for k in range(8)]
    for row in lines[:8]:
        row["step"] = 1
    records = open_records(write(tmp_path / "a.jsonl", lines))
    assert [row["frac_reward_zero_std"] for row in records.rows] == [1.0, 0.0]
    assert records.rows[0]["rewards/answer/mean"] == 0.5
    assert records.rows[0]["groups/all_best_frac"] == 1.0
    assert "rewards/answer/mean" not in records.rows[1]


def test_our_own_completions_are_lines_like_any_other(tmp_path):
    rows = [answer(k, step=4, group=9, columns={"answer": "5"}) for k in range(4)]
    records = open_records(write(tmp_path / "completions.jsonl", rows))
    assert records.completions[0]["columns"] == {"answer": "5"}
    assert records.completions[0]["group"] == 9


def test_rollouts_of_verl_in_the_order_of_their_steps(verl):
    for path in (verl, verl / "rollouts"):
        records = open_records(path)
        assert records.source == "verl"
        assert [row["step"] for row in records.rows] == [1, 2, 10]
        assert records.config == {"group_size": 4}
        assert records.rows[0]["reward"] == 1.5
        assert records.rows[0]["rewards/acc/mean"] == 0.25
        assert "completions/mean_length" not in records.rows[0]
        first = records.completions[0]
        assert first["columns"] == {"gts": 42, "pred": "x"}
        assert first["rewards"] == {"acc": 0.0}
    one = open_records(verl / "rollouts" / "10.jsonl")
    assert (one.source, [row["step"] for row in one.rows]) == ("verl", [10])


@pytest.mark.parametrize("place", ["rollouts", "."])
@pytest.mark.parametrize("kind", ["exp.jsonl", "train.log"])
def test_metrics_of_verl_have_our_names_beside_its_rollouts(verl, place, kind):
    path = verl / place / kind
    if kind == "exp.jsonl":
        write(path, [{"step": step, "data": LOGGED} for step in (1, 2, 3)])
    else:
        path.write_text("".join(CONSOLE.format(step) for step in (1, 2, 3)))
    for records in (open_records(verl), open_records(path)):
        rows = {row["step"]: row for row in records.rows}
        assert rows[3]["reward"] == rows[1]["reward"] == 1.4
        assert (rows[1]["kl"], rows[1]["eval_reward"]) == (0.02, 0.4)
    # What verl did not log is measured in its rollouts.
    assert open_records(verl).rows[0]["frac_reward_zero_std"] == 0
    if kind == "exp.jsonl":
        assert rows[1]["perf/mfu/actor"] == 0.3
        assert rows[1]["critic/rewards/mean"] == 1.3
        assert rows[1]["completions/mean_length"] == 50.0


def test_no_two_names_of_verl_become_one():
    assert len(set(METRICS.values())) == len(METRICS)


def test_steps_as_lines_and_as_one_list(tmp_path):
    rows = [{"step": k, "train/reward": k / 10, "eval/reward": None} for k in (2, 1)]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    for path in (write(tmp_path / "a.jsonl", rows), tmp_path / "list.json"):
        records = open_records(path)
        assert [row["step"] for row in records.rows] == [1, 2]
        assert records.rows[1]["reward"] == 0.2
        assert math.isnan(records.rows[0]["eval_reward"])


def test_report_and_doctor_open_them(verl, tmp_path, capsys):
    assert main(["report", str(verl / "rollouts")]) == 0
    assert capsys.readouterr().out == f"{verl}/rollouts/report.html\n"
    page = (verl / "rollouts" / "report.html").read_text(encoding="utf-8")
    assert "c7" in page
    lines = write(tmp_path / "lines" / "a.jsonl", [answer(k) for k in range(8)])
    assert main(["report", str(lines)]) == 0
    assert (lines.parent / "report.html").is_file()
    assert main(["report", str(lines), "--out", str(tmp_path / "b.html")]) == 0
    assert (tmp_path / "b.html").read_text() == (lines.parent / "report.html").read_text()
    assert main(["report", str(lines), "--out", str(tmp_path / "no" / "b.html")]) == 2
    assert "b.html cannot be written" in capsys.readouterr().err
    assert main(["doctor", str(verl / "rollouts"), "--json"]) == 0
    rules = {r["id"]: r["status"] for r in json.loads(capsys.readouterr().out)["rules"]}
    assert (rules["R1"], rules["R2"], rules["R3"]) == ("ok", "ok", "skipped")


def test_a_cut_last_line_is_left_out_and_said(tmp_path):
    path = write(tmp_path / "a.jsonl", [answer(k) for k in range(4)])
    with path.open("a") as file:
        file.write('{"prompt": "p')
    records = open_records(path)
    assert len(records.completions) == 4
    assert records.notes[0] == "the last line is not finished: a.jsonl is being written, or was cut"


GOOD = answer(0)
WRONG = {
    "empty": ([], "has no rows yet"),
    "not JSON": ([GOOD, "{"], ":2: not JSON"),
    "a number": ([GOOD, 3], ":2: expected a completion like the lines before it"),
    "mixed": ([GOOD, {"step": 1, "loss": 2.0}], ":2: expected a completion like the lines before"),
    "mixed the other way": ([{"step": 1, "loss": 2.0}, GOOD], ":2: a completion among the metrics"),
    "no reward": ([{"prompt": "a", "completion": "b"}], ":1: no 'reward' (or 'score'), expected"),
    "no prompt": ([{"completion": "b", "reward": 1}], ":1: no 'prompt' and no 'group'"),
    "a reward in words": (
        [GOOD, GOOD | {"reward": "good"}],
        ":2: reward is 'good', expected a fin",
    ),
    "an endless reward": ([GOOD, GOOD | {"reward": math.inf}], ":2: reward is inf, expected a fin"),
    "parts in words": ([GOOD | {"rewards": {"a": "b"}}], ":1: rewards.a is 'b', expected a finite"),
    "parts without names": ([GOOD | {"rewards": [1]}], ":1: rewards is [1], expected an object"),
    "a step that is none": ([GOOD | {"step": "one"}], ":1: has step 'one', expected a whole"),
    "some with a step": ([GOOD | {"step": 1}, GOOD], ":2: no step, and other lines have one"),
    "other numbers": ([{"step": 1, "a": 2}], "has neither reward, loss nor grad_norm in any row"),
    "cut metrics of verl": (
        [{"step": 1, "data": {"actor/loss": 1}}, {"step": 2}],
        ":2: expected verl's metrics",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("command", ["report", "doctor"])
def test_a_wrong_file_is_one_sentence_that_names_it(tmp_path, capsys, name, command):
    rows, message = WRONG[name]
    path = tmp_path / "a.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join([*lines, ""]))
    assert main([command, str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}{message}" in error or f"{path} {message}" in error
    assert error.count("\n") == 1


def test_a_wrong_folder_is_one_sentence(verl, capsys):
    assert main(["report", str(Path(__file__).parent)]) == 2
    assert "no run in" in capsys.readouterr().err
    write(verl / "validation" / "1.jsonl", [rollout(k, 1) for k in range(8)])
    with pytest.raises(InputError, match="has rollouts in rollouts, validation: give one of these"):
        open_records(verl)
    write(verl / "rollouts" / "2.jsonl", [{"loss": 1.0}])
    with pytest.raises(InputError, match=r"2\.jsonl:1: expected a completion \('input'"):
        open_records(verl / "rollouts")


@pytest.mark.parametrize("text", ["", '{"log_history": [', '{"log_history": 3}', "[]"])
def test_a_broken_state_of_trl_is_named(tmp_path, text):
    (tmp_path / "trainer_state.json").write_text(text)
    for path in (tmp_path, tmp_path / "trainer_state.json"):
        with pytest.raises(InputError, match=r"trainer_state\.json.* expected TRL's"):
            open_records(path)


def test_without_pyarrow_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "completions_00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="needs pyarrow to be read: pip install pyarrow"):
        open_records(tmp_path)


def test_nothing_is_imported_for_it_that_a_log_does_not_need(tmp_path):
    path = write(tmp_path / "a.jsonl", [answer(k) for k in range(8)])
    code = (
        "import sys; from grpo_fast.records import open_records; "
        f"open_records({str(path)!r}); print('torch' in sys.modules, 'pyarrow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
