"""The live page while a run goes on: a real run with `track: trackio`, and `trackio show` as a
person calls it."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from grpo_fast.tiny import save_tiny

pytestmark = [pytest.mark.browser, pytest.mark.track("trackio")]
# As in conftest.py.
PLACE = Path(sys.prefix) / "track"
STEPS, FIRST = 9, 4
EVIL = "<script>window.stolen = 1</script>"
# The rewards of step FIRST + 1 wait until somebody has looked at the page.
RUN = f"""
import sys
sys.path.append({str(PLACE)!r})
from grpo_fast.cli import main
sys.exit(main(sys.argv[1:]))
"""
REWARD = """
import time
from pathlib import Path
calls = 0
def count(completions, **columns):
    global calls
    calls += 1
    # The first call is of the held-out prompt.
    while calls > 1 + {first} and not Path({gate!r}).exists():
        time.sleep(0.05)
    return [text.count("a") + calls for text in completions]
"""


class Live(NamedTuple):
    url: str
    port: int
    gate: Path
    folder: Path


def environment(folder: Path, **more: str) -> dict[str, str]:
    return os.environ | {"TRACKIO_DIR": str(folder / "trackio"), "HF_HUB_OFFLINE": "1", **more}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def answers(host: str, port: int) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family) as one:
            one.settimeout(2)
            return one.connect_ex((host, port)) == 0
    except OSError:
        return False


def wait_for(what: Any, process: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert process.poll() in (None, 0), log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """A run that stands before step FIRST + 1, and the server of its page."""
    folder = tmp_path_factory.mktemp("live")
    save_tiny(folder / "model")
    rows = [{"prompt": f"{EVIL}{letter}"} for letter in "abcdefgh"]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    gate, port = folder / "go", free_port()
    (folder / "reward.py").write_text(REWARD.format(first=FIRST, gate=str(gate)))
    options = f"""
        model: {folder}/model
        dataset: {folder}/data.jsonl
        reward: {folder}/reward.py:count
        output_dir: {folder}/run
        prompts_per_step: 2
        group_size: 2
        max_completion_length: 4
        max_steps: {STEPS}
        eval_every: 0
        eval_prompts: 1
        device: cpu
        track: trackio
    """
    (folder / "run.yaml").write_text("\n".join(map(str.strip, options.splitlines())))
    log, page_log = folder / "run.log", folder / "page.log"
    train = ["-c", RUN, "train", "--config", str(folder / "run.yaml")]
    show = ["-m", "trackio.cli", "show", "--project", "grpo-fast"]
    # The command opens a browser, and this is the one that there is.
    there = {"PYTHONPATH": str(PLACE), "BROWSER": "true", "GRADIO_SERVER_PORT": str(port)}
    with log.open("w") as out, page_log.open("w") as page_out:
        run = subprocess.Popen(
            [sys.executable, *train], env=environment(folder), stdout=out, stderr=out
        )
        page = subprocess.Popen(
            [sys.executable, *show],
            env=environment(folder, **there),
            stdout=page_out,
            stderr=page_out,
        )
    try:
        metrics = folder / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.is_file() and steps_of(metrics) == FIRST, run, log)
        wait_for(lambda: answers("127.0.0.1", port), page, page_log)
        yield Live(f"http://127.0.0.1:{port}/?project=grpo-fast", port, gate, folder)
        gate.touch()
        assert run.wait(timeout=60) == 0, log.read_text()
        assert "is off" not in log.read_text()
    finally:
        for process in (run, page):
            process.kill()
            process.wait()


def steps_of(metrics: Path) -> int:
    return max((json.loads(line)["step"] for line in metrics.read_text().splitlines()), default=-1)


class Watched(NamedTuple):
    page: Any
    said: list[str]
    asked: list[str]


@pytest.fixture
def watch(browser, live):
    """`watch(**context)` -> Watched: nothing wrong on its console, nothing asked of others."""
    seen: list[Watched] = []

    def go(**options: Any) -> Watched:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options)
        page = context.new_page()
        watched = Watched(page, [], [])
        page.on("console", lambda message: watched.said.append(message.text))
        page.on("pageerror", lambda error: watched.said.append(str(error)))
        page.on("request", lambda request: watched.asked.append(request.url))
        page.goto(live.url)
        chart(page, "reward")
        seen.append(watched)
        return watched

    yield go
    for watched in seen:
        watched.page.context.close()
        assert not watched.said
        own = live.url.partition("?")[0]
        assert [u for u in watched.asked if not u.startswith((own, "data:", "blob:"))] == []


def last_step(page: Any) -> int:
    """Of the next answer that the page gets when it asks by itself, -1 where nothing is new."""
    with page.expect_response(lambda one: one.url.endswith("/api/get_logs_batch")) as answer:
        pass
    return max((row["step"] for row in rows_in(answer.value.json())), default=-1)


def rows_in(value: Any) -> list[dict]:
    """Every row of metrics in an answer, however it is wrapped."""
    if isinstance(value, dict):
        return [value] if "step" in value else [r for one in value.values() for r in rows_in(one)]
    return [r for one in value for r in rows_in(one)] if isinstance(value, list) else []


def chart(page: Any, metric: str) -> Any:
    """Its canvas, which is there once one has scrolled to it."""
    page.locator(f"[data-metric='{metric}']").first.scroll_into_view_if_needed()
    canvas = page.locator(f"[data-metric='{metric}'] canvas").first
    canvas.wait_for()
    return canvas


def drawn(page: Any, metric: str) -> str:
    return chart(page, metric).evaluate("canvas => canvas.toDataURL()")


def test_the_server_answers_on_this_machines_own_address_alone(live):
    assert answers("127.0.0.1", live.port)
    # A server for all addresses would answer on each of these, too.
    assert not answers("127.0.0.2", live.port)
    assert not answers("::1", live.port)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 320])
def test_charts_are_drawn(watch, width, scheme):
    page = watch(viewport={"width": width, "height": 900}, color_scheme=scheme).page
    for metric in ("reward", "loss", "grad_norm"):
        inked = "c => new Set(c.getContext('2d').getImageData(0, 0, c.width, c.height).data).size"
        assert chart(page, metric).evaluate(inked) > 8
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground.strip("rgba()").split(",")[:3])) < 200) == (scheme == "dark")
    assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_charts_move_while_the_run_goes_on(watch, live):
    page, turns = watch().page, []
    page.on("framenavigated", lambda frame: turns.append(frame.url))
    told = [last_step(page), last_step(page)]
    before = {metric: drawn(page, metric) for metric in ("reward", "grad_norm")}
    # Nothing is logged, so nothing moves.
    told += [last_step(page), last_step(page)]
    assert drawn(page, "reward") == before["reward"]
    assert max(told) <= FIRST
    live.gate.touch()
    end = time.monotonic() + 60
    while max(told) < STEPS or any(drawn(page, m) == old for m, old in before.items()):
        assert time.monotonic() < end, told
        told.append(last_step(page))
    # By its own asking, without a reload.
    assert not turns


def test_what_the_model_wrote_is_shown_as_text(watch):
    page = watch().page
    page.get_by_text("Media & Tables").first.click()
    page.get_by_text(EVIL).first.wait_for()
    assert page.evaluate("window.stolen") is None
