"""The report of a run: what stands on the page, for whole, cut, sparse and hostile runs."""

import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest

from grpo_fast.charts import charts, draw
from grpo_fast.errors import InputError
from grpo_fast.report import samples, tiles, write_report

TITLES = [
    "Reward",
    "Reward parts",
    "Winners' advantage",
    "Spread of the rewards",
    "Groups that teach nothing",
    "Winners alike",
    "Completion length",
    "Truncated completions",
    "KL to the reference",
    "KL of old policy and sampler",
    "Clip ratio",
    "Entropy",
    "Loss",
    "Gradient norm",
    "Learning rate",
    "Tokens a second",
    "Padding",
    "Seconds a step",
]


def step_row(step: int) -> dict:
    return {
        "step": step,
        "reward": 0.4 + step / 100,
        "rewards/exact_answer/mean": 0.4,
        "rewards/short/mean": 0.2,
        "advantage/winners": 1.5,
        "advantage/abs_mean": 0.7,
        "frac_reward_zero_std": 0.25,
        "groups/all_best_frac": 0.25,
        "groups/all_worst_frac": 0.0,
        "reward_std": 0.45,
        "groups/std_mean": 0.4,
        "groups/winners_alike": 0.3,
        "completions/mean_length": 5.0,
        "completions/min_length": 2,
        "completions/max_length": 9,
        "completions/clipped_ratio": 0.1,
        "kl": 0.001 * step,
        "kl/old_k3": 1e-4,
        "batch/pad_frac": 0.2,
        "clip_ratio/region_mean": 0.0,
        "clip_ratio/high_mean": 0.0,
        "clip_ratio/low_mean": 0.0,
        "entropy": 0.6,
        "loss": -0.001,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "num_tokens": 1000 * step,
        "step_time": 0.5,
        "tokens_per_second": 2000.0,
        "time/rollout": 0.3,
        "time/update": 0.15,
        "time/reward": 0.01,
    }


def answer(step: int, **changes) -> dict:
    return {
        "step": step,
        "group": 3,
        "prompt": f"What is 1 + {step}?",
        "completion": f" {1 + step}",
        "reward": 1.0,
        "rewards": {"exact_answer": 1.0, "short": 0.5},
        "advantage": 1.25,
        "finish_reason": "stop",
        "columns": {"answer": str(1 + step)},
    } | changes


def write_run(folder, rows, answers=(), config=None):
    folder.mkdir(exist_ok=True)
    for name, lines in (("metrics.jsonl", rows), ("completions.jsonl", answers)):
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


class Page(HTMLParser):
    """What a browser would make of the page: text, tags, ids and what points outside."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.winners = 0
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href"):
                self.links.append(value)
            self.winners += name == "class" and value == "winner"

    def handle_data(self, data):
        if self.tags[-1:] not in (["style"], ["script"]):
            self.words.append(data)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    rows = [{"step": 0, "eval_reward": 0.41}, *map(step_row, range(1, 51))]
    rows[-1]["eval_reward"] = 0.953
    answers = [
        row
        for step in (1, 2, 20, 50)
        for row in (answer(step), answer(step, completion="wrong", reward=0.0, advantage=-1.25))
    ]
    config = {"max_steps": 50, "loss": {"beta": 0.1, "delta": None}, "reward": ["r.py:f"]}
    folder = write_run(tmp_path_factory.mktemp("runs") / "demo", rows, answers, config)
    path = write_report(folder)
    assert path == folder / "report.html"
    return path


def test_the_page_shows_the_result_every_chart_and_the_config(whole):
    page = Page(whole.read_text(encoding="utf-8"))
    assert "demo Reward on held-out prompts 0.41 → 0.95 50 steps" in page.text
    for part in (
        "held-out reward before 0.41",
        "held-out reward after 0.95",
        "training reward, first steps 0.43",
        "training reward, last steps 0.88",
        "time in steps 25 s",
        "tokens 50,000",
        "tokens a second 2,000",
        "loss.beta 0.1",
        "exact_answer",
    ):
        assert part in page.text
    for title in TITLES:
        assert title in page.text
    assert page.tags.count("svg") == len(TITLES)
    assert "not measured" not in page.text
    assert "Sits near 0 because" in page.text


def test_the_page_needs_nothing_from_outside_and_ids_are_unique(whole):
    html = whole.read_text(encoding="utf-8")
    page = Page(html)
    assert len(page.ids) == len(set(page.ids)) > 100
    targets = {f"#{name}" for name in page.ids}
    assert {link for link in page.links if not link.startswith("http")} <= targets
    assert set(re.findall(r"url\((#[^)]*)\)", html)) <= targets
    assert not {"link", "img", "iframe"} & set(page.tags)
    assert not [link for link in page.links if link.startswith("http")]
    assert "<text" in html


def test_first_middle_and_last_completions_are_there_and_winners_marked(whole):
    page = Page(whole.read_text(encoding="utf-8"))
    assert re.findall(r"Step (\d+)", page.text) == ["1", "20", "50"]
    assert page.winners == 3
    assert page.text.count("▲ +1.25") == 3
    assert "answer: 21" in page.text
    assert "exact_answer 1" in page.text
    assert "stop" in page.text


def test_the_same_run_gives_the_same_bytes(whole):
    before = whole.read_bytes()
    write_report(whole.parent)
    assert whole.read_bytes() == before
    assert not list(whole.parent.glob(".*"))


def test_text_from_prompts_completions_rewards_and_config_is_escaped(tmp_path):
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    row = step_row(1) | {f"rewards/{evil}/mean": 0.5, f"rewards/$\\frac{evil}$/mean": 0.5}
    bad = answer(
        1,
        prompt=evil,
        completion=f"lone \ud800 {evil}",
        rewards={evil: 1.0, "b": 0.0},
        finish_reason=evil,
        columns={evil: evil},
    )
    folder = write_run(tmp_path / "<b>run", [row], [bad], {"model": evil, evil: {"x": evil}})
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "img" not in page.tags
    # the page's own
    assert page.tags.count("script") == 1
    assert "onerror" in page.text
    assert page.text.count("alert(1)") >= 8
    # the page's own <b>, in "Step 1"
    assert page.tags.count("b") == 1


def test_a_young_run_without_kl_and_evaluation_says_not_measured(tmp_path):
    row = {key: value for key, value in step_row(1).items() if key != "kl"}
    folder = write_run(tmp_path / "run", [row], config={"max_steps": 10})
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "not measured: loss.beta is 0, so the run has no reference policy." in page.text
    assert "Reward on training prompts 0.41 → 0.41" in page.text
    assert "step 1 of 10: still running, or interrupted" in page.text
    assert "held-out reward before not measured" in page.text
    assert "No completions were kept" in page.text
    assert page.tags.count("svg") == len(TITLES) - 1


def test_a_cut_run_with_nan_null_and_an_unfinished_line(tmp_path):
    rows = [step_row(step) | {"grad_norm": None if step == 2 else 1.0} for step in (1, 2, 3)]
    rows[0]["entropy"] = rows[1]["entropy"] = rows[2]["entropy"] = None
    folder = write_run(tmp_path / "run", rows)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    with (folder / "completions.jsonl").open("a") as file:
        file.write(json.dumps(answer(3, reward=None, advantage=None, rewards={"f": None})))
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "3 steps" in page.text
    assert page.tags.count("svg") == len(TITLES) - 1
    assert "not scored" in page.text
    assert "nan" not in page.text


def test_an_evaluation_before_training_alone_is_enough(tmp_path):
    folder = write_run(tmp_path / "run", [{"step": 0, "eval_reward": 0.41}], config={})
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "held-out reward before 0.41 held-out reward after not measured" in page.text
    assert page.tags.count("svg") == 1


def test_an_empty_run_and_no_run_are_input_errors(tmp_path):
    with pytest.raises(InputError, match="no run in"):
        write_report(tmp_path)
    with pytest.raises(InputError, match="has no rows yet"):
        write_report(write_run(tmp_path / "run", []))
    assert not (tmp_path / "run" / "report.html").exists()


def test_without_matplotlib_the_page_says_what_is_missing(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run", [step_row(1)], [answer(1)])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "The charts are left out: matplotlib is not installed." in page.text
    assert "svg" not in page.tags
    assert "What is 1 + 1?" in page.text


def test_a_long_run_stays_a_light_page():
    rows = [step_row(step) | {"reward": math.sin(step)} for step in range(1, 20_001)]
    chart = next(chart for chart in charts(rows[:1]) if chart.title == "Reward")
    drawn = draw(chart, rows, 0)
    assert len(drawn["svg"]) < 60_000
    assert drawn["last"] == f"{math.sin(20_000):.3g}"


def test_axes_of_shares_start_at_zero_even_when_all_are_zero():
    rows = [step_row(step) for step in (1, 2, 3)]
    by_title = {chart.title: chart for chart in charts(rows)}
    ticks = re.findall(r">([-\d.]+)</text>", draw(by_title["Clip ratio"], rows, 0)["svg"])
    assert not [tick for tick in ticks if tick.startswith("-")]
    ticks = re.findall(r">([-\d.]+)</text>", draw(by_title["Loss"], rows, 0)["svg"])
    assert [tick for tick in ticks if tick.startswith("-")]


def test_a_long_completion_is_cut_with_a_count():
    block = samples([answer(1, completion="x" * 5000, prompt=[{"role": "user", "content": "ü"}])])
    assert "1,000 more characters" in block[0]["rows"][0]["completion"]
    assert block[0]["prompt"] == '[{"role": "user", "content": "ü"}]'


def test_groups_of_one_step_are_kept_apart():
    blocks = samples([answer(1), answer(1, group=4), answer(1, group=4)])
    assert [len(block["rows"]) for block in blocks] == [1, 2]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(59.4, "59 s"), (61, "1 min 1 s"), (7260, "2 h 1 min")]
)
def test_time_is_readable(seconds, shown):
    assert dict(tiles([{"step": 1, "step_time": seconds}]))["time in steps"] == shown


@pytest.mark.parametrize(("tokens", "shown"), [(1_500_000, "1.5 M"), (2.04e9, "2.0 B"), (9, "9")])
def test_token_counts_are_readable(tokens, shown):
    assert dict(tiles([{"step": 1, "num_tokens": tokens}]))["tokens"] == shown
