"""What of a token log reaches the page, and what shows a finding; then a real run, end to end."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace
from urllib.parse import parse_qs

import numpy as np
import pytest

from grpo_fast import xray
from grpo_fast.config import TrainConfig
from grpo_fast.doctor import diagnose
from grpo_fast.errors import InputError
from grpo_fast.loss_config import LossConfig
from grpo_fast.report import write_report
from grpo_fast.tiny import save_tiny
from grpo_fast.xray import build_xray, choose_steps, to_json

CONFIG = LossConfig(loss_type="dapo", epsilon_high=0.28, beta=0.04)


@pytest.fixture(scope="module")
def log(make):
    return make.log({step: make.step(CONFIG, step=step) for step in range(1, 8)})


def island(built) -> dict:
    return json.loads(built.island)


def test_first_last_and_wanted_steps_come_first_then_ever_finer_halves():
    stored = list(range(1, 101))
    order = choose_steps(stored, [37, 100])
    assert order[:7] == [1, 100, 37, 50, 25, 75, 13]
    assert sorted(order) == stored
    assert choose_steps([4], []) == [4]


def test_the_page_stays_small_and_says_how_much_is_left_out(log, monkeypatch):
    whole = build_xray(log, [])
    assert whole.said == "7 of 7 steps embedded."
    entries = island(whole)["steps"]
    sizes = [len(entry["data"]) + len(json.dumps(entry["meta"])) for entry in entries]
    monkeypatch.setattr(xray, "MOST_BYTES", int(3.5 * max(sizes)))
    some = build_xray(log, [])
    assert some.said == "3 of 7 steps embedded."
    assert [entry["meta"]["step"] for entry in island(some)["steps"]] == [1, 4, 7]
    # Large steps give up groups, and first those without an advantage.
    monkeypatch.setattr(xray, "MOST_BYTES", int(2.5 * min(sizes)))
    parts = build_xray(log, [])
    assert re.fullmatch(r"3 of 7 steps embedded, \d groups left out.*", parts.said)
    assert len(parts.island) - len(json.dumps(island(parts)["vocabulary"])) < 3 * min(sizes)
    for entry in island(parts)["steps"]:
        assert any(any(group["advantages"]) for group in entry["meta"]["groups"])
        assert 0 not in [group["index"] for group in entry["meta"]["groups"]]
    monkeypatch.setattr(xray, "MOST_BYTES", 10)
    least = build_xray(log, [])
    assert least.said == "1 of 7 steps embedded, 2 groups left out to keep the page small."
    (entry,) = island(least)["steps"]
    (group,) = entry["meta"]["groups"]
    tokens = sum(c["stop"] - c["start"] for c in group["completions"])
    assert {count for _, _, count in entry["layout"]} == {tokens}


def test_a_group_left_out_moves_the_tokens_behind_it(log):
    step = log.read(2)
    kept = xray._only(step, step.meta["groups"][1:])
    for before, after in zip(step.meta["groups"][1:], kept.meta["groups"], strict=True):
        for one, moved in zip(before["completions"], after["completions"], strict=True):
            for name, array in step.arrays.items():
                old = array[one["start"] : one["stop"]]
                new = kept.arrays[name][moved["start"] : moved["stop"]]
                np.testing.assert_array_equal(old, new)


def test_json_cannot_be_broken_out_of():
    hostile = "</script><!--\u2028\u2029 & \ud800"
    text = to_json({hostile: [hostile, float("nan"), float("inf"), 1.5]})
    assert not set(text) & set("<>&\u2028\u2029\ud800")
    assert json.loads(text) == {hostile: [hostile, None, None, 1.5]}


def test_prompts_are_cut_with_a_count_and_only_used_ids_have_texts(make):
    step = make.step(CONFIG)
    step.meta["groups"][0]["prompt"] = "x" * 30_000
    built = island(build_xray(make.log({1: step}), []))
    prompt = built["steps"][0]["meta"]["groups"][0]["prompt"]
    assert prompt.endswith("… (10,000 more characters)")
    used = {*np.unique(step.arrays["token_ids"]).tolist(), 7, 11, 4, 1}
    assert {int(i) for i in built["vocabulary"]} == used


def finding(rule: str, steps: list[int]):
    """The doctor's own finding of a rule, on a run that is sick enough."""
    rows = [
        {"step": s, "reward": 0.1, "kl": 9.0 * s, "frac_reward_zero_std": 0.9}
        | {"completions/clipped_ratio": 0.9}
        for s in range(1, 41)
    ]
    found = diagnose(rows, {}).findings[rule]
    found.steps[:] = steps
    return found


@pytest.mark.parametrize(
    ("rule", "name"), [("R1", "equal rewards"), ("R9", "truncated"), ("R3", "highest KL")]
)
def test_a_finding_links_to_the_group_that_shows_it(log, rule, name):
    found = finding(rule, [3, 5, 900])
    built = build_xray(log, [found])
    (link,) = built.links[rule]
    assert link["text"].startswith("step 5 group ")
    assert link["text"].endswith(f": {name}")
    groups = {group["index"]: group for group in log.read(5).meta["groups"]}
    group = groups[int(re.search(r"group=(\d+)", link["href"])[1])]
    arrays = log.read(5).arrays
    if rule == "R1":
        assert len(set(group["rewards"])) == 1
    if rule == "R9":
        cut = [
            sum(c["finish_reason"] == "length" for c in g["completions"]) for g in groups.values()
        ]
        assert sum(c["finish_reason"] == "length" for c in group["completions"]) == max(cut)
    if rule == "R3":
        index, at = map(int, re.search(r"token=(\d+)\.(\d+)", link["href"]).groups())
        spans = [slice(c["start"], c["stop"]) for c in group["completions"]]
        most = max((arrays["kl"][s] * arrays["mask"][s]).max() for s in spans)
        assert arrays["kl"][spans[index]][at] == most


@pytest.mark.parametrize("rule", ["R5", "R15"])
def test_a_sampler_that_is_off_is_shown_through_the_precision_lens(log, rule):
    found = SimpleNamespace(rule=SimpleNamespace(id=rule), steps=[5])
    (link,) = xray.found_links(found, xray._embed(log, [5]))
    wanted = parse_qs(link["href"][1:])
    assert wanted["channel"] == ["gap"]
    meta, arrays = log.read(5)
    group = next(g for g in meta["groups"] if [str(g["index"])] == wanted["group"])
    gap = np.abs(arrays["old_logprobs"] - arrays["sampler_logprobs"])
    gap = np.nan_to_num(np.where(arrays["mask"] > 0, gap, 0))
    index, at = map(int, wanted["token"][0].split("."))
    spans = [slice(c["start"], c["stop"]) for c in group["completions"]]
    assert gap[spans[index]][at] == max(gap[s].max() for s in spans) > 0


def test_a_finding_of_steps_without_tokens_has_no_link(log):
    assert build_xray(log, [finding("R3", [30])]).links == {"R3": []}


def test_a_log_that_cannot_be_read_is_named_and_the_report_is_made_all_the_same(log):
    class Broken:
        def steps(self):
            return [1]

        def read(self, step):
            raise InputError("tokens/step-000001.npz is damaged (cut): remove it")

    built = build_xray(Broken(), [])
    assert built.island is None
    assert built.said.startswith("The token log is not shown: tokens/step-000001.npz is damaged")


def test_steps_without_a_group_are_passed_over(make, log):
    empty = make.step(CONFIG, step=9)
    empty.meta["groups"] = []
    none = build_xray(make.log({9: empty}), [])
    assert none.said == "No group was kept in any step of the token log."
    some = build_xray(make.log({2: log.read(2), 9: empty}), [])
    assert [entry["meta"]["step"] for entry in island(some)["steps"]] == [2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a tiny model, so small that every group is kept."""
    from grpo_fast.trainer import train

    folder = tmp_path_factory.mktemp("world")
    save_tiny(folder / "model")
    rows = [{"prompt": first + second} for first in "abcd" for second in "abcd"]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(
        "def many_a(prompts, completions, **_):\n"
        "    return [c.count('a') - 0.1 * len(c) for c in completions]\n"
    )
    config = TrainConfig(
        model=str(folder / "model"),
        dataset=str(folder / "data.jsonl"),
        reward=f"{folder}/rewards.py:many_a",
        output_dir=str(folder / "run"),
        prompts_per_step=3,
        group_size=6,
        max_completion_length=8,
        learning_rate=1e-2,
        max_steps=2,
        eval_prompts=2,
        device="cpu",
        loss=LossConfig(loss_type="dapo", epsilon=0.1, beta=0.05),
    )
    train(config)
    return folder / "run"


@pytest.mark.browser
def test_the_groups_of_a_real_run_add_up_to_the_loss_of_its_step(run, visit, tmp_path):
    from grpo_fast.records import open_records

    records = open_records(run)
    page = visit(write_report(run)).page
    assert page.get_by_test_id("xray-said").inner_text() == "2 of 2 steps embedded."
    for step in (1, 2):
        told = records.tokens.read(step)
        losses = []
        for group in told.meta["groups"]:
            page.evaluate(f"location.hash = '#step={step}&group={group['index']}'")
            page.locator(f"#xray[data-ready='{step}.{group['index']}']").wait_for()
            value = page.get_by_test_id("trained-loss").get_attribute("data-value")
            losses.append(float(value))
            again = page.get_by_test_id("whatif-loss").get_attribute("data-value")
            assert float(again) == float(value)
            with page.expect_download() as download:
                page.get_by_test_id("fixture-save").click()
            download.value.save_as(tmp_path / download.value.suggested_filename)
        row = next(row for row in records.rows if row["step"] == step)
        assert len(losses) == 3
        # The step adds up some hundred tokens of size 0.01 in float32.
        assert sum(losses) == pytest.approx(row["loss"], rel=1e-5, abs=1e-7)
    # And each is a test that passes: the eager loss has what the run stored.
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "30 passed" in done.stdout, done.stdout
