"""The report as a person meets it: opened from disk, read, driven by mouse and by keys."""

import numpy as np
import pytest

pytestmark = pytest.mark.browser


def ready(page, step: int, group: int) -> None:
    page.locator(f"#xray[data-ready='{step}.{group}']").wait_for()


def overflow(page) -> int:
    return page.evaluate("document.documentElement.scrollWidth - innerWidth")


def test_charts_and_the_widest_group_of_the_last_step_are_there_at_once(report, visit):
    page = visit(report[0]).page
    assert page.locator("figure svg").count() == 2
    assert page.locator("figure svg").first.bounding_box()["height"] > 100
    assert page.get_by_test_id("xray-said").inner_text() == "3 of 3 steps embedded."
    assert "3 of 64 groups: best, worst, degenerate" in page.get_by_test_id("kept").inner_text()
    assert page.get_by_test_id("completion").count() == 5
    group = max(report[1][10].meta["groups"], key=lambda g: np.std(g["rewards"]))
    ready(page, 10, group["index"])
    tokens = sum(c["stop"] - c["start"] for c in group["completions"])
    assert page.locator("#xray-columns .t").count() == tokens


def test_a_group_opens_with_its_completions_by_reward(report, visit):
    path, steps = report
    page = visit(path, "#step=1&group=0").page
    page.get_by_test_id("step").select_option(label="step 5")
    ready(page, 5, 0)
    page.get_by_test_id("group").select_option(label="group 14: best, highest KL")
    ready(page, 5, 14)
    group = steps[5].meta["groups"][2]
    columns = page.get_by_test_id("completion")
    shown = [int(column.get_attribute("data-index")) for column in columns.all()]
    rewards = [group["rewards"][index] for index in shown]
    assert rewards == sorted(group["rewards"], reverse=True)
    first = group["completions"][shown[0]]
    text = columns.first.text_content()
    assert f"{first['stop'] - first['start']} tokens" in text
    assert f"exact {first['reward']:g}" in text
    assert "ended by stop" in text or "cut at the longest length" in text
    spans = columns.first.locator(".t")
    assert spans.count() == first["stop"] - first["start"]
    assert page.url.endswith("#step=5&group=14")


def test_a_link_opens_step_group_channel_and_token(report, visit):
    page = visit(report[0], "#step=10&group=7&channel=kl&token=2.3").page
    ready(page, 10, 7)
    assert page.get_by_test_id("channel-kl").get_attribute("aria-pressed") == "true"
    assert "token 3 of" in page.get_by_test_id("why").inner_text()
    page.evaluate("location.hash = '#step=1&group=14'")
    ready(page, 1, 14)


def test_switching_the_channel_recolours_and_the_legend_has_numbers(report, visit):
    page = visit(report[0], "#step=5&group=7").page
    span = page.locator("#xray-columns .t").first
    seen = set()
    for name in ("logprob", "kl", "entropy", "clip", "mass", "ratio"):
        page.get_by_test_id(f"channel-{name}").click()
        classes = page.locator("#xray-columns .t").evaluate_all("all => all.map(s => s.className)")
        seen.add(" ".join(classes))
        assert any(char.isdigit() for char in page.get_by_test_id("legend").inner_text()) != (
            name == "clip"
        )
    assert len(seen) == 6
    page.keyboard.press("3")
    assert page.get_by_test_id("channel-kl").get_attribute("aria-pressed") == "true"
    assert span.is_visible()


def test_clipped_and_masked_tokens_are_told_apart_without_colour(report, visit):
    page = visit(report[0], "#step=5&group=7&channel=entropy").page
    style = "s => getComputedStyle(s).textDecorationLine + getComputedStyle(s).textDecorationStyle"
    found = {
        kind: page.locator(f"#xray-columns .t.{kind}").first.evaluate(style)
        for kind in ("low", "high", "off")
    }
    assert found == {"low": "underlinedotted", "high": "underlinesolid", "off": "line-throughsolid"}
    page.get_by_test_id("group").select_option("0")
    ready(page, 5, 0)


def test_the_why_card_has_the_formula_filled_in(report, visit, make):
    path, steps = report
    step = steps[5]
    group = step.meta["groups"][1]
    page = visit(path, "#step=5&group=7").page
    token = page.locator("#xray-columns .t.high").first
    index = int(page.locator("article:has(.t.high)").first.get_attribute("data-index"))
    token.click()
    card = page.get_by_test_id("why")
    assert token.get_attribute("aria-current") == "true"
    place = int(page.url.rpartition(".")[2])
    at = group["completions"][index]["start"] + place
    ratio, advantage = step.arrays["ratio"][at], group["advantages"][index]
    branch = page.get_by_test_id("why-trained-branch").inner_text()
    said = f"ratio {ratio:.4g} > 1.28 and A = +{advantage:.4g}: clipped, policy gradient 0"
    assert branch == f"{said}, the KL stays"
    for name in ("log-prob", "old", "reference", "sampler", "KL", "entropy", "gradient mass"):
        assert page.get_by_test_id(f"why-{name}").inner_text()
    told = make.oracle(step, group, make.config)
    offset = at - group["completions"][0]["start"]
    slope = float(page.get_by_test_id("why-trained-slope").get_attribute("data-value"))
    assert slope == pytest.approx(float(told["slope"][offset]), rel=1e-9)
    assert page.get_by_test_id("why-whatif").count() == 0
    page.get_by_test_id("number-epsilon_high").fill("5")
    assert "gradient kept" in page.get_by_test_id("why-whatif-branch").inner_text()
    assert "of the stored tokens" in card.inner_text()


def test_forks_and_pushes_are_listed(report, visit):
    page = visit(report[0], "#step=5&group=7").page
    forks = page.get_by_test_id("fork")
    assert forks.count() >= 1
    assert "won" in forks.first.inner_text()
    assert "entropy" in forks.first.inner_text()
    assert page.locator("#xray-columns .t.fork").count() >= 2
    forks.first.click()
    assert "◆" in page.get_by_test_id("why").inner_text()
    up = page.get_by_test_id("push-up").locator("tr")
    assert up.count() == 2
    wide, narrow = (bar.bounding_box()["width"] for bar in up.locator("i").all())
    assert wide == pytest.approx(narrow * 3.25 / 0.5, rel=0.02)
    assert "EOS is pushed up: shorter completions" in page.get_by_test_id("push-eos").inner_text()


def test_hostile_text_is_shown_and_does_nothing(report, visit):
    page = visit(report[0], "#step=5&group=7").page
    text = page.locator("#xray-columns").text_content()
    assert "<script>window.stolen" in text.replace("\u200b", "").replace("·", " ")
    for hidden in ("\u202e", "\u2028", "\u0007"):
        assert hidden not in page.locator("#xray-body").text_content()
    assert "\\u202e" in text
    assert "\\x07" in page.get_by_test_id("prompt").inner_text()
    assert page.evaluate("window.stolen") is None
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2


def test_an_injected_script_would_not_run(report, visit, browser):
    context = browser.new_context()
    page = context.new_page()
    refused = []
    page.on("console", lambda message: refused.append(message.text))
    page.goto(report[0].as_uri())
    page.evaluate(
        "const s = document.createElement('script'); s.textContent = 'window.stolen = 1';"
        "document.body.append(s); fetch('https://example.org').catch(() => {})"
    )
    assert page.evaluate("window.stolen") is None
    page.wait_for_timeout(100)
    assert len([text for text in refused if "Content Security Policy" in text]) >= 2
    context.close()


def test_keys_alone_reach_groups_steps_and_tokens(report, visit):
    page = visit(report[0], "#step=1&group=0").page
    page.keyboard.press("j")
    ready(page, 1, 7)
    page.keyboard.press("ArrowRight")
    ready(page, 5, 7)
    page.keyboard.press("k")
    ready(page, 5, 0)
    page.keyboard.press("j")
    ready(page, 5, 7)
    for _ in range(60):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('t')"):
            break
    card = page.get_by_test_id("why")
    assert "token 0 of" in card.inner_text()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert "token 2 of" in card.inner_text()
    before = card.inner_text()
    page.keyboard.press("ArrowDown")
    assert "token 2 of" in card.inner_text() != before
    page.keyboard.press("Enter")
    assert page.locator(".t[aria-current]").count() == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_has_no_sideways_scrolling(report, visit, scheme):
    viewport = {"width": 320, "height": 700}
    page = visit(
        report[0], "#step=5&group=7&token=1.2", viewport=viewport, color_scheme=scheme
    ).page
    assert overflow(page) == 0
    tops = [box.bounding_box()["x"] for box in page.get_by_test_id("completion").all()]
    assert len(set(tops)) == 1


def test_dark_by_preference_and_by_button(report, visit):
    page = visit(report[0], color_scheme="dark").page
    ground = "getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(20, 23, 27)"
    page.get_by_test_id("theme").click()
    assert page.evaluate(ground) == "rgb(246, 247, 249)"
    assert page.get_by_test_id("theme").inner_text() == "dark"


def test_without_a_token_log_the_page_says_so_in_one_sentence(make, visit, tmp_path):
    folder = make.run(tmp_path / "run")
    page = visit(make.page(folder)).page
    assert page.get_by_test_id("xray-said").inner_text().startswith("No token log in this run")
    assert not page.get_by_test_id("xray").count()
    page.get_by_test_id("theme").click()
    page = visit(make.page(folder, make.log({}))).page
    assert page.get_by_test_id("xray-said").inner_text() == "The token log has no step yet."


def test_a_chart_tells_the_value_under_the_pointer(report, visit):
    page = visit(report[0]).page
    figure = page.locator("figure:has(svg)").first
    value = figure.locator(".value")
    assert value.inner_text() == "last 1"
    box = figure.get_by_test_id("chart").bounding_box()
    middle = box["y"] + box["height"] / 2
    seen = []
    for share in (0.2, 0.6, 0.97):
        page.mouse.move(box["x"] + share * box["width"], middle)
        step, _, number = value.inner_text().removeprefix("step ").partition(": ")
        assert float(number) == int(step) / 10  # the reward of that step
        seen.append(int(step))
    assert seen == sorted(set(seen))
    assert seen[-1] == 10
    page.mouse.move(0, 0)
    assert value.inner_text() == "last 1"


def test_a_finding_of_the_doctor_opens_the_token_that_shows_it(make, visit, tmp_path):
    rows = [{"step": s, "reward": 0.1, "kl": 9.0 * s} for s in range(1, 41)]
    path = make.page(
        make.run(tmp_path / "run", rows), make.log({40: make.step(make.config, step=40)})
    )
    page = visit(path).page
    link = page.locator("section.finding", has_text="KL explosion").get_by_test_id("shown-by")
    assert link.inner_text().startswith("step 40 group ")
    link.click()
    page.locator(".t[aria-current]").wait_for()
    assert page.get_by_test_id("channel-kl").get_attribute("aria-pressed") == "true"
    assert page.get_by_test_id("why-trained").is_visible()
    assert page.locator("#xray").bounding_box()["y"] < 100
