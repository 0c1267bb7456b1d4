"""A report of 65,000 tokens in one group: it opens at once, and what is not drawn yet is there when
wanted."""

import time

import pytest

from grpo_fast import xray

pytestmark = pytest.mark.browser
WORDS = [f" w{number}" for number in range(5000)]
# Of these 16 completions the page draws so many tokens each before anybody scrolls.
CHUNK = 256


@pytest.fixture(scope="module")
def large(make, tmp_path_factory):
    step = make.step(make.config, groups=2, size=16, length=5600, words=len(WORDS))
    step = xray._only(step, step.meta["groups"][1:])
    folder = make.run(tmp_path_factory.mktemp("runs") / "run")
    return make.page(folder, make.log({1: step}, WORDS)), step


@pytest.fixture
def opened(large, visit):
    page = visit(large[0], "#step=1&group=7").page
    return page, large[1].meta["groups"][0]


def column(page, completion: dict):
    return page.locator(f"article[data-index='{completion['index']}']")


def words_of(step, completion: dict) -> list[str]:
    """As the page writes them."""
    ids = step.arrays["token_ids"][completion["start"] : completion["stop"]]
    return [("■" if i == 1 else "") + WORDS[i].replace(" ", "\u200b·") for i in ids]


def test_65_000_tokens_open_in_two_seconds(large, visit):
    path, step = large
    assert len(step.arrays["token_ids"]) > 65_000
    assert path.stat().st_size < 8e6
    walls, spent = [], []
    # Others may hold this machine's processors: of three times the best is the page's own.
    for _ in range(3):
        start = time.perf_counter()
        page = visit(path, "#step=1&group=7").page
        # Two frames on, what was drawn is on the screen.
        page.evaluate("new Promise(r => requestAnimationFrame(() => requestAnimationFrame(r)))")
        walls.append(time.perf_counter() - start)
        spent.append(processor_seconds(page))
        # Not every token is drawn at once, which takes three times as long.
        assert 16 * CHUNK <= page.locator("#xray-columns .t").count() < 32 * CHUNK
    # On two shared cores 0.67 to 0.97 and 0.62 to 0.84 of 15 times.
    assert min(walls) < 2
    assert min(spent) < 1.3


def processor_seconds(page) -> float:
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable")
    metrics = session.send("Performance.getMetrics")["metrics"]
    return next(one["value"] for one in metrics if one["name"] == "ProcessTime")


def test_tokens_are_drawn_where_one_scrolls_and_nothing_is_lost(opened, large):
    page, group = opened
    last = group["completions"][-1]
    box = column(page, last)
    tokens = box.get_by_test_id("tokens")
    words = words_of(large[1], last)
    assert tokens.text_content() == "".join(words)
    assert box.locator(".t").count() == CHUNK
    tokens.scroll_into_view_if_needed()
    while box.locator(".later").count():
        shown = box.locator(".t").count()
        box.locator(".later").first.evaluate("chunk => chunk.scrollIntoView()")
        box.locator(".t").nth(shown).wait_for(state="attached")
    assert box.locator(".t").all_text_contents() == words
    assert box.locator(".t").evaluate_all("all => all.every(s => s.classList.length > 1)")


def test_a_link_and_the_key_end_lead_to_tokens_that_were_not_drawn(large, visit):
    path, step = large
    completion = step.meta["groups"][0]["completions"][3]
    last = completion["stop"] - completion["start"] - 1
    page = visit(path, "#step=1&group=7&token=3.1000").page
    why = page.get_by_test_id("why")
    assert "token 1000 of" in why.inner_text()
    current = page.locator(".t[aria-current]")
    assert current.text_content() == words_of(step, completion)[1000]
    current.focus()
    page.keyboard.press("End")
    assert f"token {last} of" in why.inner_text()
    assert page.evaluate("document.activeElement.textContent") == words_of(step, completion)[last]
    page.keyboard.press("ArrowLeft")
    assert f"token {last - 1} of" in why.inner_text()


def test_what_the_browsers_search_finds_stays_found_when_it_is_drawn(opened, large):
    page, group = opened
    words = words_of(large[1], group["completions"][5])
    box = column(page, group["completions"][5])
    # All of it is elements as soon as the browser has time.
    box.locator(".later").last.locator("span").first.wait_for(state="attached")
    wanted = "".join(words[2000:2004]).strip("\u200b")
    assert page.evaluate("text => window.find(text)", wanted)
    page.evaluate("getSelection().anchorNode.parentElement.scrollIntoView()")
    box.locator(".t").nth(CHUNK).wait_for(state="attached")
    found = "[getSelection().toString(), getSelection().anchorNode.parentElement.className]"
    text, drawn = page.evaluate(found)
    assert text == wanted
    assert drawn.startswith("t ")


def test_numbers_count_every_token_and_colours_reach_the_later_ones(opened, large, make):
    page, group = opened
    told = make.oracle(large[1], group, make.config)
    for which in ("trained", "whatif"):
        for name in ("loss", "mass", "gaining"):
            shown = page.get_by_test_id(f"{which}-{name}").get_attribute("data-value")
            assert float(shown) == pytest.approx(told[name], rel=1e-9)
    page.get_by_test_id("channel-entropy").click()
    page.get_by_test_id("fork").last.click()
    page.get_by_test_id("number-epsilon_high").fill("0.1")
    low, high = (
        float(page.get_by_test_id(f"{which}-high").get_attribute("data-value"))
        for which in ("trained", "whatif")
    )
    assert low < high
    drawn = page.locator("#xray-columns .t").evaluate_all("all => all.map(s => s.className)")
    assert any(name.startswith("t s") for name in drawn)
    assert not any(name.startswith("t d") for name in drawn)
