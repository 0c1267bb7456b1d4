"""Token ids in JSON lines and in verl's rollouts: an X-ray for who never ran our trainer, in which
what is not there is not measured; each bad line in one sentence."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest

from grpo_fast.cli import main
from grpo_fast.import_tokens import NUMBERS
from grpo_fast.records import open_records
from grpo_fast.tiny import tiny_tokenizer
from grpo_fast.token_log import COLUMNS

DOCS = Path(__file__).resolve().parents[1] / "docs/watch.md"


def write(path: Path, rows) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def line(k: int, **changes):
    """Completion `k` of two groups of two, two or three tokens long."""
    ids = [5 + k, 7, 1][: 2 + k % 2]
    row = {"prompt": f"p{k // 2}", "completion": f"c{k}", "reward": float(k % 2)}
    return row | {"token_ids": ids, "logprobs": [-0.5 * (t + 1) for t in range(len(ids))]} | changes


def rollout(k: int):
    """The same as verl writes it."""
    row = line(k)
    names = {"prompt": "input", "completion": "output", "reward": "score"}
    return {names.get(name, name): value for name, value in row.items()} | {"gts": 1, "step": 1}


def test_lines_with_token_ids_are_a_token_log(tmp_path):
    records = open_records(write(tmp_path / "a.jsonl", [line(k) for k in range(4)]))
    assert records.tokens.steps() == [1]
    meta, arrays = records.tokens.read(1)
    assert arrays["token_ids"].tolist() == [5, 7, 6, 7, 1, 7, 7, 8, 7, 1]
    assert arrays["logprobs"].tolist()[:5] == [-0.5, -1.0, -0.5, -1.0, -1.5]
    assert arrays["mask"].tolist() == [1] * 10
    for name in (*COLUMNS.keys() - {"token_ids", "logprobs", "mask"}, "old_logprobs"):
        assert np.isnan(arrays[name]).all(), name
    assert "ref_logprobs" not in arrays
    first, second = meta["groups"]
    assert (first["prompt"], first["rewards"], first["size"]) == ("p0", [0.0, 1.0], 2)
    spans = [(c["start"], c["stop"]) for g in (first, second) for c in g["completions"]]
    assert spans == [(0, 2), (2, 5), (5, 7), (7, 10)]
    assert (meta["loss"], meta["denominator"], "push" in meta) == (None, None, False)
    assert meta["totals"]["tokens"] == 10
    assert meta["advantage"]["scale_rewards"] == "group"
    assert records.completions[0].keys() == {
        "step", "group", "prompt", "completion", "reward", "rewards", "advantage",
        "finish_reason", "length", "columns",
    }  # fmt: skip
    assert records.completions[0]["columns"] == {}


def test_every_number_a_line_has_is_kept(tmp_path):
    given = {name: [0.25, None] for name in NUMBERS} | {"mask": [1, 0], "prompt_ids": [9, 8]}
    rows = [line(0, **given, advantage=0.5), line(1, token_ids=None, advantage=-0.5)]
    records = open_records(write(tmp_path / "a.jsonl", rows))
    meta, arrays = records.tokens.read(1)
    for name in NUMBERS:
        assert arrays[name][0] == 0.25
        assert math.isnan(arrays[name][1])
    assert arrays["mask"].tolist() == [1, 0]
    (group,) = meta["groups"]
    assert (group["prompt_ids"], group["size"], len(group["completions"])) == ([9, 8], 2, 1)
    assert meta["kept"].startswith("the 1 of 2 completions")
    # Of a part of the step nobody knows the tokens, and of given advantages nobody the rule.
    assert meta["totals"]["tokens"] is None
    assert meta["advantage"] == {}


def test_steps_are_apart_and_those_without_tokens_are_none(tmp_path):
    rows = [line(k, step=step) for step in (4, 2) for k in range(4)]
    for row in rows[:4]:
        del row["token_ids"], row["logprobs"]
    rows += [line(k, step=9) for k in range(2)]
    records = open_records(write(tmp_path / "a.jsonl", rows))
    assert records.tokens.steps() == [2, 9]
    assert len(records.tokens.read(9).meta["groups"]) == 1


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_rollouts_of_verl_have_them_too(tmp_path, kind):
    path = write(tmp_path / "rollouts" / "1.jsonl", [rollout(k) for k in range(4)])
    write(path.parent / "vocabulary.jsonl", [{"id": 7, "text": "seven"}])
    records = open_records(path.parent if kind == "folder" else path)
    assert records.source == "verl"
    assert records.tokens.read(1).arrays["token_ids"].tolist()[:2] == [5, 7]
    assert records.tokens.vocabulary() == {7: "seven"}


def test_texts_come_from_the_lines_a_vocabulary_or_a_tokenizer(tmp_path):
    rows = [line(0, tokens=["five", "seven"]), line(1, prompt_ids=[10])]
    path = write(tmp_path / "a.jsonl", rows)
    assert open_records(path).tokens.vocabulary() == {5: "five", 7: "seven"}
    write(tmp_path / "vocabulary.jsonl", [{"id": 5, "text": "?"}, {"id": 6, "text": "six"}])
    assert open_records(tmp_path).tokens.vocabulary() == {5: "five", 6: "six", 7: "seven"}
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    known = {5: "five", 6: "six", 7: "seven", 1: "<eos>", 10: tokenizer.decode([10])}
    assert open_records(path).tokens.vocabulary() == known
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    assert main(["report", str(path)]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "The token log is not shown" in page
    assert "tokenizer.json is no tokenizer" in page


WRONG = {
    "fewer numbers": ({"logprobs": [-1.0]}, "logprobs has 1 entries for 2 token ids, expected one"),
    "one number": ({"entropy": 0.5}, "entropy has 0.5 for 2 token ids, expected one each"),
    "words": ({"ratio": [1.0, "b"]}, "ratio[1] is 'b', expected a number or null"),
    "a flag": ({"kl": [True, 0.0]}, "kl[0] is True, expected a number or null"),
    "no ids": ({"token_ids": [5, "7"]}, "token_ids[1] is '7', expected a whole number from 0 up"),
    "broken ids": ({"token_ids": [5, 7.5]}, "token_ids[1] is 7.5, expected a whole number"),
    "negative ids": ({"token_ids": [5, -1]}, "token_ids[1] is -1, expected a whole number"),
    "ids of a prompt": ({"prompt_ids": ["p"]}, "prompt_ids[0] is 'p', expected a whole number"),
    "a prompt": ({"prompt_ids": "p"}, "prompt_ids is 'p', expected a list of token ids"),
    "a mask": ({"mask": [1, 2]}, "mask[1] is 2, expected 0 or 1"),
    "texts": ({"tokens": ["a", 3]}, "tokens[1] is 3, expected its text"),
    "fewer texts": ({"tokens": ["a"]}, "tokens has 1 entries for 2 token ids"),
    "a name": ({"ref_logps": [-1.0, -2.0]}, "'ref_logps' has one number a token and is no name"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_bad_line_is_one_sentence(tmp_path, capsys, name):
    changes, message = WRONG[name]
    path = write(tmp_path / "a.jsonl", [line(0), line(2, **changes)])
    assert main(["report", str(path)]) == 2
    error = capsys.readouterr().err
    assert f"{path}:2: {message}" in error
    assert error.count("\n") == 1


def test_a_broken_vocabulary_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [line(k) for k in range(4)])
    (tmp_path / "vocabulary.jsonl").write_text('{"id": 5}\n')
    assert main(["report", str(path)]) == 0
    assert "vocabulary.jsonl:1: expected" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_the_example_of_the_docs_opens_with_an_x_ray(tmp_path):
    (block,) = re.findall(r"```json\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    path = tmp_path / "rollouts.jsonl"
    path.write_text(block, encoding="utf-8")
    records = open_records(path)
    assert records.notes == ()
    step = records.tokens.read(records.tokens.steps()[0])
    assert np.isfinite(step.arrays["old_logprobs"]).any()
    assert set(records.tokens.vocabulary()) == set(step.arrays["token_ids"].tolist())
    assert main(["report", str(path)]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '"unmeasured":["entropy","ratio","gradient_mass"]' in page


def test_the_docs_name_every_number():
    text = DOCS.read_text(encoding="utf-8")
    assert [name for name in NUMBERS if f"`{name}`" not in text] == []
