"""The X-ray of a log that says little of its tokens: what is not there is not measured, never 0."""

import json

import pytest

from grpo_fast.report import write_report

pytestmark = pytest.mark.browser
FULL = {
    "logprobs": [-0.5, -1.5, -0.25],
    "old_logprobs": [-0.75, -1.0, -0.25],
    "entropy": [0.5, 1.0, 0.1],
}


def lines(folder, **known):
    path = folder / "rollouts.jsonl"
    rows = [
        {
            "prompt": "2+2=",
            "completion": f"{k}",
            "reward": float(k == 1),
            "token_ids": [4, 5 + k, 1],
        }
        for k in range(4)
    ]
    path.write_text("".join(json.dumps(row | known) + "\n" for row in rows))
    return write_report(path)


def channels(page):
    buttons = page.locator("[data-testid^=channel-]")
    found = [buttons.nth(k) for k in range(buttons.count())]
    return {b.get_attribute("data-testid").removeprefix("channel-"): b.is_enabled() for b in found}


def why(page, place=0, token=1):
    page.locator("[data-testid=tokens]").nth(place).locator(".t").nth(token).click()
    return page.locator("#xray-why").inner_text()


def test_ids_alone_are_shown_and_nothing_is_made_up(visit, tmp_path):
    page = visit(lines(tmp_path)).page
    assert not any(channels(page).values())
    assert page.locator("[data-testid=completion]").count() == 4
    assert page.locator(".completion .t.blank").count() == 0
    said = why(page)
    assert "Not forwarded" not in said
    for name in ("log-prob", "old", "ratio", "KL", "entropy", "gradient mass"):
        assert page.locator(f"[data-testid='why-{name}']").inner_text() == "not measured"
    assert "this step has no policy log-probs" in said
    assert "this step has no policy log-probs" in page.locator("#xray-notes").inner_text()
    assert page.locator("[data-testid=trained-loss], [data-testid=whatif-loss]").count() == 0


def test_log_probs_alone_do_not_make_a_ratio(visit, tmp_path):
    page = visit(lines(tmp_path, logprobs=FULL["logprobs"])).page
    enabled = channels(page)
    assert enabled.pop("logprob")
    assert not any(enabled.values())
    why(page)
    assert page.locator("[data-testid=why-old]").inner_text() == "not measured"
    assert page.locator("[data-testid=why-log-prob]").inner_text() == "\u22121.5 (p = 0.2231)"
    assert "this step has no old log-probs" in page.locator("#xray-notes").inner_text()


def test_with_old_log_probs_what_if_is_computed(visit, tmp_path):
    page = visit(lines(tmp_path, **FULL)).page
    enabled = {name for name, on in channels(page).items() if on}
    assert enabled - {"clip"} == {"logprob", "entropy"}
    notes = page.locator("#xray-notes").inner_text()
    assert "As trained is not recomputed: the log does not say which loss was trained" in notes
    low = page.locator("[data-testid=whatif-low]")
    clipped = []
    for epsilon in ("0.1", "0.9"):
        page.locator("[data-testid=number-epsilon]").fill(epsilon)
        clipped.append(float(low.get_attribute("data-value")))
    # The losers' second token went from exp(-1) to exp(-1.5).
    assert clipped == [pytest.approx(3 / 12), 0]
    assert page.locator("[data-testid=trained-low]").count() == 0
    assert page.locator("[data-testid=whatif-loss_type] option:checked").inner_text() == "dapo"
