"""The demo's parts: data, reward, tokenizer, base model, config; and the two loops, run."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grpo_bench.hosts import PEERS
from grpo_examples import arithmetic
from grpo_examples.rewards import exact_answer
from grpo_fast.config_file import build_config, read_config
from grpo_fast.model import check_head, load_model, load_tokenizer
from grpo_fast.rewards import load_rewards

FOLDER = Path(arithmetic.__file__).parent


def test_the_data_file_is_what_the_function_makes():
    text = (FOLDER / "arithmetic.jsonl").read_text(encoding="utf-8")
    assert text == arithmetic.jsonl(arithmetic.addition_rows())


def test_the_sums_are_right_distinct_and_the_held_out_ones_unseen():
    rows = [json.loads(line) for line in (FOLDER / "arithmetic.jsonl").open(encoding="utf-8")]
    pairs = []
    for row in rows:
        a, b = (int(number) for number in row["prompt"].removesuffix("=").split("+"))
        assert int(row["answer"]) == a + b
        pairs.append((a, b))
    assert len(set(pairs)) == len(rows)
    count = arithmetic.HELD_OUT_ROWS
    held_out = {frozenset(pair) for pair in pairs[-count:]}
    assert not held_out & {frozenset(pair) for pair in pairs[:-count]}
    lessons = arithmetic.split_pairs()[1]
    assert not held_out & {frozenset(pair) for pair in lessons}
    carries = [arithmetic.has_carry(*pair) for pair in pairs[-count:]]
    assert sum(carries) == round(count * arithmetic.CARRY_SHARE)


def test_the_reward_is_the_exact_answer():
    assert exact_answer(["95", " 95\n", "59", ""], ["95"] * 4) == [1.0, 1.0, 0.0, 0.0]


def test_the_tokenizer_is_one_token_a_character():
    tokenizer = arithmetic.build_tokenizer()
    ids = tokenizer("37+58=")["input_ids"]
    assert len(ids) == 6
    assert tokenizer.decode(ids) == "37+58="
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_worksheets_forget_the_carry_and_nothing_else():
    tokenizer = arithmetic.build_tokenizer()
    rows = arithmetic.Worksheets(arithmetic.split_pairs()[1], tokenizer, 0).batch(1000)
    wrong = 0
    for row in rows:
        prompt, answer = tokenizer.decode(row, skip_special_tokens=True).split("=")
        a, b = map(int, prompt.split("+"))
        assert a + b - int(answer) in ((0, 10) if arithmetic.has_carry(a, b) else (0,))
        wrong += int(answer) != a + b
    share = arithmetic.CARRY_SHARE * arithmetic.FORGET_CARRY
    assert wrong / 1000 == pytest.approx(share, abs=0.06)


def test_the_base_model_is_a_model_directory_and_repeats_itself(tmp_path):
    for name in ("a", "b"):
        arithmetic.base_model(tmp_path / name, seed=3, steps=2)
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]
    model = load_model(tmp_path / "a", dtype=torch.float32, device="cpu")
    check_head(model)
    tokenizer = load_tokenizer(tmp_path / "a")
    assert tokenizer.decode(tokenizer("1+2=")["input_ids"]) == "1+2="


def test_the_config_names_parts_that_are_there():
    config = build_config(read_config(FOLDER / "demo.yaml"))
    assert config.eval_prompts == arithmetic.HELD_OUT_ROWS
    assert config.output_dir == "runs/demo"
    assert config.existing == "move"
    assert config.loss.beta > 0
    assert config.num_iterations > 1
    assert Path(config.dataset).is_file()
    (reward,) = load_rewards(config.reward, config.reward_weights)
    assert reward.name == "exact_answer"


@pytest.mark.parametrize("name", ["own_loop", "accelerate_loop"])
def test_the_loops_run_and_learn(name):
    # accelerate comes with the hosts of `make test`, or with the user's own packages.
    environment = os.environ | {"PYTHONPATH": str(PEERS)}
    command = [sys.executable, str(FOLDER / f"{name}.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    rewards = [float(number) for number in re.findall(r"reward (\S+)", done.stdout)]
    assert len(rewards) == 20
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.5
