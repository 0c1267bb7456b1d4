"""A group on the page: what a link names and is not here, equal completions, the same prompt at
other steps, the precision lens; and what is said of a log."""

import re

import numpy as np
import pytest
import torch

from grpo_fast import xray
from grpo_fast.records import open_records
from grpo_fast.reference_advantage import group_advantage
from grpo_fast.report import report_page

pytestmark = pytest.mark.browser
WIDTHS = [(1280, "light"), (320, "dark")]


def ready(page, step: int, group: int) -> None:
    page.locator(f"#xray[data-ready='{step}.{group}']").wait_for()


def fits(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


HERE = "here are groups 0, 7 and 14"


@pytest.mark.parametrize(
    ("fragment", "said"),
    [
        ("#step=5&group=8", f"Group 8 of step 5 was not kept in the log: {HERE}."),
        ("#step=6&group=0", "Step 6 was not kept in the log: here are steps 1, 5 and 10."),
        ("#step=6", "Step 6 was not kept in the log: here are steps 1, 5 and 10."),
        ("#step=5&group=%3Cb%3E\u202e", "Group <b>\\u202e of step 5 was not kept in the log: here"),
        ("#step=5&group=7&token=9.0", "Completion 9 of step 5, group 7 was not kept in the log"),
        ("#step=5&group=7&token=2.900", "Completion 2 of step 5, group 7 has no token 900: it has"),
        ("#step=5&group=7&token=2.x", "Completion 2 of step 5, group 7 has no token x: it has"),
    ],
)  # fmt: skip
def test_a_link_to_what_was_not_kept_says_so_and_what_is_there(report, visit, fragment, said):
    page = visit(report[0], fragment).page
    box = page.get_by_test_id("missing")
    assert box.inner_text().startswith(said)
    assert re.search(r" Shown: step \d+, group \d+\.$", box.inner_text())
    assert page.evaluate("window.stolen") is None
    assert not page.locator(".t[aria-current]").count()
    # Whoever goes on by hand is where he wants to be.
    page.get_by_test_id("step").select_option(label="step 1")
    box.wait_for(state="hidden")


def test_a_link_to_what_is_there_says_nothing(report, visit):
    page = visit(report[0], "#step=5&group=7&token=2.3").page
    assert not page.get_by_test_id("missing").is_visible()
    page.evaluate("location.hash = '#step=5&group=99'")
    page.get_by_test_id("missing").wait_for()
    page.evaluate("location.hash = '#step=5&group=14'")
    page.get_by_test_id("missing").wait_for(state="hidden")


def test_what_had_no_room_on_the_page_is_in_the_log(make, visit, tmp_path, monkeypatch):
    log = make.log({step: make.step(make.config, step=step) for step in range(1, 8)})
    sizes = [entry.size for entry in map(xray._encode, log.kept.values())]
    monkeypatch.setattr(xray, "MOST_BYTES", int(2.5 * min(sizes)))
    path = make.page(make.run(tmp_path / "run"), log)
    page = visit(path, "#step=2&group=7").page
    said = page.get_by_test_id("missing").inner_text()
    assert said.startswith("Step 2 is in the log, but left out of this page to keep it small: here")
    page.evaluate("location.hash = '#step=1&group=0'")
    page.get_by_text("Group 0 of step 1 is in the log, but left out of this page").wait_for()


def copied(step, sources: list[int], rewards: dict[int, float]):
    """The step with completion k a copy of completion sources[k], but for these `rewards`."""
    index, at = [], 0
    for group in step.meta["groups"]:
        old = group["completions"]
        group["rewards"] = [rewards.get(k, group["rewards"][s]) for k, s in enumerate(sources)]
        group["completions"] = []
        scores, ids = torch.tensor(group["rewards"]).double(), torch.zeros(6, dtype=torch.long)
        group["advantages"] = group_advantage(scores, ids).advantages.tolist()
        for k, source in enumerate(sources):
            index.append(np.arange(old[source]["start"], old[source]["stop"]))
            changed = {"index": k, "reward": group["rewards"][k], "start": at}
            changed["advantage"] = group["advantages"][k]
            at += len(index[-1])
            group["completions"].append(old[source] | changed | {"stop": at})
    order = np.concatenate(index)
    return step._replace(arrays={name: array[order] for name, array in step.arrays.items()})


@pytest.fixture
def twins(make, visit, tmp_path):
    """Of six completions 1, 2, 3 and 5 have the same tokens, and 5 another reward."""
    step = make.step(make.config, step=1, size=6, rewards=[1.0, 0.5, 0.0, 0.25, 0.75, 0.0])
    step = copied(step, [0, 1, 1, 1, 4, 1], {5: 0.9})
    path = make.page(make.run(tmp_path / "run"), make.log({1: step}))
    return lambda fragment="", **options: visit(path, f"#step=1&group=7{fragment}", **options).page


def shown(page) -> list[int]:
    cards = page.locator("article.completion:visible").all()
    return [int(card.get_attribute("data-index")) for card in cards]


@pytest.mark.parametrize(("width", "scheme"), WIDTHS)
def test_equal_completions_are_one_card_that_unfolds(twins, width, scheme):
    page = twins(viewport={"width": width, "height": 900}, color_scheme=scheme)
    assert shown(page) == [0, 5, 4, 1]
    fold = page.get_by_test_id("fold")
    assert fold.inner_text() == "\u00d7 3"
    assert fold.get_attribute("aria-expanded") == "false"
    chips = page.locator("[data-index='5'] .chips").inner_text()
    assert "same tokens as #1, #2, #3" in chips
    assert "and another reward" in chips
    assert "tie of 3" in page.locator("[data-index='1'] .chips").inner_text()
    fold.focus()
    page.keyboard.press("Enter")
    assert shown(page) == [0, 5, 4, 1, 2, 3]
    assert fold.get_attribute("aria-expanded") == "true"
    assert fits(page)
    page.keyboard.press("Space")
    assert shown(page) == [0, 5, 4, 1]


def test_a_link_into_a_folded_card_unfolds_it_and_keys_pass_it_over(twins):
    page = twins("&token=3.2")
    assert shown(page) == [0, 5, 4, 1, 2, 3]
    assert page.locator("[data-index='3'] .t[aria-current]").count() == 1
    page.get_by_test_id("fold").click()
    page.locator("[data-index='4'] .t").first.click()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    # 1 is the last card there is.
    assert page.locator("[data-index='1'] .t[aria-current]").count() == 1
    page.keyboard.press("ArrowUp")
    assert page.locator("[data-index='4'] .t[aria-current]").count() == 1


def test_folded_completions_count_in_the_loss(make, twins):
    page = twins()
    loss = page.get_by_test_id("trained-loss").get_attribute("data-value")
    page.get_by_test_id("fold").click()
    page.locator("[data-index='2']").get_by_test_id("drop").check()
    page.get_by_test_id("fold").click()
    assert page.get_by_test_id("trained-loss").get_attribute("data-value") == loss
    assert page.get_by_test_id("whatif-loss").get_attribute("data-value") != loss


@pytest.mark.parametrize(("width", "scheme"), WIDTHS)
def test_the_same_prompt_at_other_steps_is_a_line_with_links(report, visit, width, scheme):
    path, steps = report
    options = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    page = visit(path, "#step=5&group=7", **options).page
    means = [np.mean(steps[s].meta["groups"][1]["rewards"]) for s in steps]
    dots = page.get_by_test_id("trend-line").locator("circle")
    values = dots.evaluate_all("all => all.map(dot => Number(dot.dataset.value))")
    assert values == pytest.approx(means)
    heights = [float(dot.get_attribute("cy")) for dot in dots.all()]
    assert np.argsort(heights).tolist() == np.argsort(-np.array(means)).tolist()
    places = [float(dot.get_attribute("cx")) for dot in dots.all()]
    assert (places[1] - places[0]) / (places[2] - places[0]) == pytest.approx(4 / 9, abs=0.01)
    links = page.get_by_test_id("trend-link")
    won = sum(a > 0 for a in steps[10].meta["groups"][1]["advantages"])
    assert links.last.inner_text() == f"step 10: mean reward {means[2]:.4g}, {won} of 5 won"
    assert links.nth(1).get_attribute("aria-current") == "true"
    assert fits(page)
    links.last.focus()
    page.keyboard.press("Enter")
    ready(page, 10, 7)
    assert page.get_by_test_id("trend-link").last.get_attribute("aria-current") == "true"


def test_a_prompt_that_does_not_come_again_has_no_line(make, visit, tmp_path):
    path = make.page(make.run(tmp_path / "run"), make.log({1: make.step(make.config)}))
    page = visit(path, "#step=1&group=7").page
    said = page.get_by_test_id("trend").inner_text()
    assert said == "No other step of this page has this prompt."
    assert not page.get_by_test_id("trend-line").count()


def outside(step, group, config) -> tuple[int, int]:
    """Tokens whose ratio to the sampler's log-prob is beyond the bounds: all, and those of them
    whose ratio to the old policy's is not."""
    span = slice(group["completions"][0]["start"], group["completions"][-1]["stop"])
    new, old, sampler = (
        step.arrays[name][span].astype(np.float64)
        for name in ("logprobs", "old_logprobs", "sampler_logprobs")
    )
    moved, seen = (
        (ratio < 1 - config.epsilon) | (ratio > 1 + config.clip_high)
        for ratio in (np.exp(new - old), np.exp(new - sampler))
    )
    seen &= step.arrays["mask"][span] > 0
    return int(seen.sum()), int((seen & ~moved).sum())


@pytest.mark.parametrize(("width", "scheme"), WIDTHS)
def test_the_precision_lens_marks_what_rounding_alone_would_clip(
    make, visit, tmp_path, width, scheme
):
    step = make.step(make.config)
    noise = np.random.default_rng(0).normal(0, 0.3, len(step.arrays["logprobs"]))
    step.arrays["sampler_logprobs"] += noise.astype(np.float32)
    seen, expected = outside(step, step.meta["groups"][1], make.config)
    assert seen > expected > 0
    options = {"viewport": {"width": width, "height": 900}, "color_scheme": scheme}
    path = make.page(make.run(tmp_path / "run"), make.log({1: step}))
    page = visit(path, "#step=1&group=7", **options).page
    assert not page.locator("#xray-columns .phantom").count()
    page.keyboard.press("7")
    assert page.get_by_test_id("channel-gap").get_attribute("aria-pressed") == "true"
    marked = page.locator("#xray-columns .phantom")
    assert marked.count() == expected
    assert marked.first.evaluate("s => getComputedStyle(s).textDecorationStyle") == "wavy"
    assert f"old policy: {expected}" in page.get_by_test_id("legend").inner_text()
    marked.first.click()
    assert "rounding" in page.get_by_test_id("why").inner_text()
    assert page.locator("#xray-columns .t.d-1, #xray-columns .t.d1").count() > 0
    assert fits(page)


def test_without_the_samplers_log_probs_there_is_no_lens(make, visit, tmp_path):
    log = make.log({1: make.step(make.config, sampler=False)})
    page = visit(make.page(make.run(tmp_path / "run"), log), "#step=1&group=7").page
    button = page.get_by_test_id("channel-gap")
    assert button.is_disabled()
    assert button.get_attribute("title") == "not measured in this step"


def test_what_an_importer_left_out_is_said_on_the_page(make, visit, tmp_path):
    folder = make.run(tmp_path / "run")
    notes = (
        "rows 3 to 5 have no reward <script>window.stolen = 1</script>",
        "the last line is cut",
    )
    path = tmp_path / "page.html"
    path.write_text(report_page(open_records(folder)._replace(notes=notes)), encoding="utf-8")
    page = visit(path, viewport={"width": 320, "height": 700}).page
    items = page.get_by_test_id("log-notes").locator("li")
    assert tuple(items.all_inner_texts()) == notes
    assert page.evaluate("window.stolen") is None
    assert fits(page)
    assert not visit(make.page(folder)).page.get_by_test_id("log-notes").count()
