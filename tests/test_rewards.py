"""Reward functions: called as TRL calls them, combined, and never believed blindly."""

import asyncio
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from grpo_fast import ConfigError, RewardError
from grpo_fast.prompts import Prompt
from grpo_fast.rewards import RewardFunction, load_rewards, score

PROMPTS = [
    Prompt(1, "p", (1,), {"answer": ["x"]}),
    Prompt(2, "q", (2,), {"answer": ["y"], "extra": 7}),
]
TEXTS = ["x", "no"]
IDS = [[5, 6], [7]]


def scores(*functions, weights=(), prompts=PROMPTS):
    weights = weights or [1.0] * len(functions)
    rewards = [
        RewardFunction(getattr(f, "__name__", "reward"), f, w)
        for f, w in zip(functions, weights, strict=True)
    ]
    return score(rewards, prompts, TEXTS, IDS)


def test_columns_arrive_as_keywords_and_missing_ones_as_none():
    seen = {}

    def everything(**columns):
        seen.update(columns)
        return [0, 0]

    scores(everything)
    assert seen == {
        "prompts": ["p", "q"],
        "completions": ["x", "no"],
        "completion_ids": [[5, 6], [7]],
        "answer": [["x"], ["y"]],
        "extra": [None, 7],
    }


def test_only_what_a_function_names_is_passed():
    def exact(completions, *, answer, unknown="default"):
        assert unknown == "default"
        return [float([a] == b) for a, b in zip(completions, answer, strict=True)]

    assert scores(exact).total == [1.0, 0.0]


def test_chat_prompts_give_messages_as_in_trl():
    message = {"role": "user", "content": "hi"}
    chat = [Prompt(1, "user=hi", (1,), {}, (message,))] * 2
    seen = {}

    def look(prompts, completions):
        seen.update(prompts=prompts, completions=completions)
        prompts[0][0]["content"] = "changed"
        return [0, 0]

    scores(look, prompts=chat)
    assert seen["prompts"][1] == [{"role": "user", "content": "hi"}]
    assert seen["completions"] == [[{"role": "assistant", "content": text}] for text in TEXTS]
    assert message["content"] == "hi"

    def written_for_text(completions):
        return [float(text.strip() == "x") for text in completions]

    with pytest.raises(RewardError, match="for chat prompts a completion is"):
        scores(written_for_text, prompts=chat)


def test_weighted_sum_of_what_applies():
    def one(completions):
        return [1.0, None]

    def two(completions):
        return [2, None]

    def three(completions):
        return [None, None]

    found = scores(one, two, three, weights=(1.0, 0.5, 9.0))
    assert found.total[0] == 2.0
    assert math.isnan(found.total[1])
    assert found.parts["two"][0] == 2.0
    assert math.isnan(found.parts["three"][0])


STARTED: list[str] = []


async def first(completions):
    STARTED.append("first")
    for _ in range(2000):
        if "second" in STARTED:
            return [1, 1]
        await asyncio.sleep(0.001)
    raise TimeoutError("second never started")


async def second(completions):
    STARTED.append("second")
    return (value for value in (2, 2))


def test_async_functions_wait_side_by_side():
    STARTED.clear()
    assert scores(first, second).total == [3.0, 3.0]


def test_a_plain_function_may_run_a_loop_of_its_own():
    def own_loop(completions):
        return asyncio.run(second(completions))

    assert scores(second, own_loop).total == [4.0, 4.0]


def test_async_functions_work_inside_a_running_loop():
    async def notebook():
        STARTED.clear()
        return scores(first, second).total

    assert asyncio.run(notebook()) == [3.0, 3.0]


@pytest.mark.filterwarnings("error")
def test_a_failure_leaves_no_coroutine_behind():
    with pytest.raises(RewardError, match="reward 'raising'"):
        scores(second, raising)


@pytest.mark.parametrize(
    "values",
    [
        [True, False],
        [np.float32(1), np.int64(0)],
        [np.bool_(True), np.array(0)],
        [torch.tensor(1.0), torch.tensor(0)],
        [Fraction(1), -0.0],
    ],
)
def test_numbers_of_every_kind(values):
    found = scores(lambda completions: values).total
    assert found == [1.0, 0.0]
    assert {type(value) for value in found} == {float}


@pytest.mark.parametrize(
    "collection",
    [torch.tensor([1.0, 0.5]), np.array([1.0, 0.5]), (1, 0.5), {"a": 1, "b": 0.5}.values()],
)
def test_any_ordered_collection_is_a_list(collection):
    assert scores(lambda completions: collection).total == [1.0, 0.5]


def test_a_function_cannot_change_what_others_see():
    def vandal(completions, completion_ids, prompts, answer):
        completions.clear()
        completion_ids[0].clear()
        answer[0].append("?")
        return [0, 0]

    def witness(completions, completion_ids, answer):
        return [len(completions), len(completion_ids[0]) + len(answer[0])]

    assert scores(vandal, witness).total == [2.0, 3.0]
    assert (TEXTS, IDS[0], PROMPTS[0].columns) == (["x", "no"], [5, 6], {"answer": ["x"]})


def returning(value):
    def reward(completions):
        return value

    return reward


def raising(completions):
    raise KeyError("answer")


async def raising_later(completions):
    await asyncio.sleep(0)
    raise ValueError("too\nlate")


def exiting(completions):
    raise SystemExit(3)


def lazy(completions):
    yield 1.0
    raise OSError("gone")


def needy(completions, anwser):
    return [0, 0]


def positional(completions, /):
    return [0, 0]


CALLED = r"called with 2 completions, the first 'x'"
BAD = {
    "one": (returning([1.0]), "reward 'reward' returned 1 values for 2 completions"),
    "three": (returning([1.0] * 3), "returned 3 values for 2"),
    "none-at-all": (returning([]), "returned 0 values for 2"),
    "nan": (
        returning([0, math.nan]),
        r"returned nan for completion 1, 'no' to row 2 of the data set: exp",
    ),
    "numpy-nan": (returning(np.array([0, math.nan])), "returned nan for completion 1"),
    "inf": (returning([-math.inf, 0]), r"returned -inf for completion 0, 'x'"),
    "huge": (returning([10**400, 0]), r"returned 1000.*for completion 0"),
    "text": (returning(["1", 0]), "returned '1' of type str for completion 0, 'x'"),
    "dict": (returning([{}, 0]), "returned {} of type dict for completion 0"),
    "column-vector": (returning(torch.zeros(2, 1)), r"returned \[0.0\] of type list for comple"),
    "number": (returning(1.0), "returned 1.0 of type float, expected a list of 2 numbers"),
    "nothing": (returning(None), "returned None of type NoneType, expected a list of 2"),
    "string": (returning("10"), "returned '10' of type str, expected a list"),
    "set": (returning({1, 0}), "of type set, expected a list"),
    "raises": (raising, rf"'raising' raised KeyError: 'answer' \(test_rewards.py:\d+\), {CALLED}"),
    "raises-later": (raising_later, rf"ValueError: too late \(test_rewards.py:\d+\), {CALLED}"),
    "raises-lazily": (lazy, r"reward 'lazy' raised OSError: gone \(test_rewards.py:\d+\)"),
    "exits": (exiting, "reward 'exiting' raised SystemExit: 3"),
    "column": (
        needy,
        "'needy' wants 'anwser', which is no column.*did you mean 'answer'.*there are answer, comp",
    ),
    "positional": (positional, "'positional' wants 'completions'.*by keyword: remove the /"),
}


@pytest.mark.parametrize("function, message", BAD.values(), ids=BAD.keys())
def test_a_bad_reward_is_named(function, message):
    with pytest.raises(RewardError, match=message) as caught:
        scores(function)
    assert "\n" not in str(caught.value)


def test_the_original_error_is_kept_for_debugging():
    for function, kind in ((raising, KeyError), (raising_later, ValueError)):
        with pytest.raises(RewardError) as caught:
            scores(function)
        assert isinstance(caught.value.__cause__, kind)


def test_a_long_completion_is_cut_in_the_message():
    with pytest.raises(RewardError) as caught:
        score([RewardFunction("r", returning([math.nan]))], PROMPTS[:1], ["a" * 1000], [[1]])
    assert len(str(caught.value)) < 250


def test_interrupting_a_reward_interrupts_the_run():
    def slow(completions):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        scores(slow)


def test_loading(tmp_path):
    (tmp_path / "r.py").write_text("def f(completions):\n    return [0]\ng = f\n")
    (tmp_path / "s.py").write_text("def f(completions):\n    return [1]\n")
    found = load_rewards([f"{tmp_path}/r.py:f", f"{tmp_path}/r.py:g"], [1.0, 2.0])
    assert [(reward.name, reward.weight) for reward in found] == [("f", 1.0), ("g", 2.0)]
    found = load_rewards([f"{tmp_path}/r.py:f", f"{tmp_path}/s.py:f"])
    assert [(reward.name, reward.weight) for reward in found] == [("r.f", 1.0), ("s.f", 1.0)]
    with pytest.raises(ConfigError, match="reward 'r.f' is given twice"):
        load_rewards([f"{tmp_path}/r.py:f"] * 2)
