"""README's pictures of a finished run, report.png, xray.png and console.png of this folder:
`python docs/draw_report.py runs/demo`, with Playwright and Chromium."""

import io
import shutil
import sys
from pathlib import Path
from urllib.parse import urlencode

import numpy as np
from playwright.sync_api import sync_playwright
from rich.console import Console
from rich.terminal_theme import MONOKAI

from grpo_fast.console import Progress
from grpo_fast.records import Records, TokenSource, open_records
from grpo_fast.report import write_report

DOCS = Path(__file__).parent
NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTH = 1280
COLUMNS = 88


def panel(records: Records) -> str:
    """The console as it stood after two thirds of the run, as HTML."""
    rows = [row for row in records.rows if row["step"]]
    last = rows[len(rows) * 2 // 3]["step"]
    answers = {row["step"]: row for row in reversed(records.completions)}
    # The time that the run took, and not the drawing.
    seconds = iter(np.cumsum([0.0, *(row["step_time"] for row in rows)]).tolist())
    now = next(seconds)
    console = Console(file=io.StringIO(), record=True, force_terminal=True, width=COLUMNS)
    progress = Progress(len(rows), console=console, clock=lambda: now)
    progress.start()
    for row in rows[:last]:
        now = next(seconds)
        answer = answers[row["step"]]
        progress.step(row["step"], row, f"{answer['prompt']}{answer['completion']}")
    # What is recorded from here on is the last frame.
    console.export_text()
    progress.stop()
    return console.export_html(theme=MONOKAI, inline_styles=True)


def telling(tokens: TokenSource) -> dict[str, str | int]:
    """The group with the most different completions, at the token of most gradient."""
    best = (0, {})
    for step in tokens.steps():
        meta, arrays = tokens.read(step)
        for group in meta["groups"]:
            spans = [slice(c["start"], c["stop"]) for c in group["completions"]]
            count = len({arrays["token_ids"][span].tobytes() for span in spans})
            if count > best[0]:
                mass = [np.nan_to_num(arrays["gradient_mass"][span]) for span in spans]
                place = int(np.argmax([m.max(initial=0) for m in mass]))
                index = group["completions"][place]["index"]
                token = f"{index}.{mass[place].argmax()}"
                where = {"step": step, "group": group["index"], "channel": "mass", "token": token}
                best = (count, where)
    return best[1]


def draw(run: str) -> None:
    """The top of the page, and its X-ray at the most telling group."""
    report = write_report(run, Path(run) / "report.html").resolve().as_uri()
    records = open_records(run)
    where = telling(records.tokens)
    chromium = next(filter(None, map(shutil.which, NAMES)))
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": 1180})
        page.goto(report)
        page.screenshot(path=DOCS / "report.png")
        page.goto(f"{report}#{urlencode(where)}")
        page.locator(f"#xray[data-ready='{where['step']}.{where['group']}']").wait_for()
        page.evaluate("document.getElementById('xray').scrollIntoView()")
        page.screenshot(path=DOCS / "xray.png")
        page.set_content(panel(records))
        page.locator("pre").screenshot(path=DOCS / "console.png")
        browser.close()


if __name__ == "__main__":
    draw(sys.argv[1])
