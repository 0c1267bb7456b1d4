"""Progress on a terminal and on a pipe, seen through a captured console."""

import io
import logging
import math
import re

import pytest
from rich.console import Console

from grpo_fast.console import Progress, sparkline

METRICS = {
    "reward": 0.531,
    "kl": 0.0012,
    "clip_ratio/region_mean": 0.031,
    "entropy": 0.614,
    "tokens_per_second": 5300.4,
}


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def progress(clock, *, terminal=False, total=200, width=80):
    file = io.StringIO()
    console = Console(file=file, force_terminal=terminal, width=width, color_system=None)
    return Progress(total, console=console, clock=clock), file


def test_a_pipe_gets_one_plain_line_a_step(clock):
    bar, file = progress(clock)
    with bar:
        bar.start(0)
        clock.now += 6
        bar.step(12, METRICS)
    assert file.getvalue() == (
        "step 12/200 | reward 0.53 | kl 0.0012 | clip 0.031 | entropy 0.61 | 5,300 tok/s | "
        "1:34 left\n"
    )


def test_what_the_package_logs_is_a_line_while_the_run_goes_on(clock):
    log = logging.getLogger("grpo_fast")
    before = log.level, list(log.handlers)
    bar, file = progress(clock)
    with bar:
        log.info("attention='auto' is '%s'", "tiles")
    log.warning("unseen")
    assert file.getvalue() == "attention='auto' is 'tiles'\n"
    assert (log.level, log.handlers) == before


def test_what_was_not_measured_is_a_dash_and_a_nan_is_a_nan(clock):
    bar, file = progress(clock)
    bar.start(0)
    bar.step(1, {"reward": math.nan, "tokens_per_second": math.nan})
    line = file.getvalue()
    assert "| reward nan | kl - | clip - | entropy - | - tok/s |" in line
    bar.step(2, {"kl": 0.0})
    assert "| reward - | kl 0.0000 |" in file.getvalue()


def test_an_evaluation_joins_the_line(clock):
    bar, file = progress(clock)
    bar.start(0)
    bar.step(20, METRICS | {"eval_reward": 0.75})
    assert " | held-out 0.75 | " in file.getvalue()


@pytest.mark.parametrize(
    ("done", "step", "seconds", "left"),
    [(0, 10, 10, "3:10"), (100, 110, 10, "1:30"), (0, 1, 60, "3:19:00"), (0, 200, 9, "0:00")],
)
def test_time_left_counts_the_steps_of_this_part_only(clock, done, step, seconds, left):
    bar, file = progress(clock)
    bar.start(done)
    clock.now += seconds
    bar.step(step, METRICS)
    assert file.getvalue().endswith(f"| {left} left\n")


def test_a_long_note_stays_one_line_and_brackets_stay_text(clock):
    bar, file = progress(clock)
    note = "plan: [bold]8[/bold] prompts " + "x" * 200
    bar.note(note)
    with bar.status("loading [the] model"):
        pass
    assert file.getvalue() == f"{note}\nloading [the] model\n"


def test_a_terminal_gets_a_bar_with_the_same_numbers(clock):
    bar, file = progress(clock, terminal=True)
    with bar:
        bar.start(0)
        clock.now += 6
        bar.step(12, METRICS | {"eval_reward": 0.75})
        clock.now += 4
    screen = file.getvalue()
    assert "step 12/200" in screen
    assert "━" in screen
    assert (
        "\nreward 0.53  kl 0.0012  clip 0.031  entropy 0.61  5,300 tok/s  held-out 0.75\n" in screen
    )
    # 94 s at the last step, 4 s ago
    assert "0:10 elapsed, 1:30 left" in screen
    assert " | " not in screen


def test_a_note_on_a_terminal_does_not_break_the_bar(clock):
    bar, file = progress(clock, terminal=True)
    with bar:
        bar.start(0)
        bar.step(1, METRICS)
        file.seek(0)
        file.truncate()
        bar.note("evaluated")
        screen = file.getvalue()
    # the two lines of the bar are erased, the note takes their place, the bar comes again below
    assert screen.startswith("\r\x1b[2K\x1b[1A\x1b[2Kevaluated\n")
    assert screen.index("evaluated") < screen.index("step 1/200")


def test_a_status_on_a_terminal_replaces_the_numbers_for_a_while(clock):
    bar, file = progress(clock, terminal=True)
    with bar:
        bar.start(0)
        bar.step(1, METRICS)
        with bar.status("evaluating"):
            file.seek(0)
            file.truncate()
            bar.note("during")
            during = file.getvalue()
        file.seek(0)
        file.truncate()
        bar.note("after")
        after = file.getvalue()
    assert "evaluating" in during
    assert "reward 0.53" not in during
    assert "evaluating" not in after
    assert "reward 0.53" in after


def test_a_status_ends_with_an_error_inside(clock):
    bar, file = progress(clock, terminal=True)
    with bar:
        bar.start(0)
        with pytest.raises(RuntimeError), bar.status("evaluating"):
            raise RuntimeError
        file.seek(0)
        file.truncate()
        bar.note("after")
        assert "evaluating" not in file.getvalue()


def test_stopping_twice_leaves_the_cursor_visible(clock):
    bar, file = progress(clock, terminal=True)
    bar.start(0)
    bar.stop()
    bar.stop()
    bar.step(1, METRICS)
    assert "step 1/200 | reward 0.53" in file.getvalue()
    assert file.getvalue().count("\x1b[?25l") == file.getvalue().count("\x1b[?25h") == 1


def test_the_bar_fits_a_narrow_terminal(clock):
    bar, file = progress(clock, terminal=True, width=60)
    with bar:
        bar.start(0)
        bar.step(1, METRICS | {"eval_reward": 0.75})
    lines = re.split(r"\n|\x1b\[\??[0-9]*[A-Za-z]|\r", file.getvalue())
    assert max(len(line) for line in lines) == 60
    assert lines.count("reward 0.53  kl 0.0012  clip 0.031  entropy 0.61  5,300 tok…") > 0


def test_a_terminal_also_has_the_course_of_the_reward_and_a_completion(clock):
    bar, file = progress(clock, terminal=True)
    with bar:
        bar.start(0)
        for step, reward in enumerate((0.0, 0.5, 1.0), start=1):
            bar.step(step, METRICS | {"reward": reward}, "it is\n\x1b[2J " + "4" * 200)
    last = file.getvalue().rpartition("step 3/200")[2]
    assert "reward ▁▅█" in last
    assert "last   it is [2J 444" in last
    assert "\x1b[2J" not in last
    assert max(map(len, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last).splitlines())) <= 80


def test_a_pipe_shows_neither(clock):
    bar, file = progress(clock)
    with bar:
        bar.start(0)
        for step in (1, 2):
            bar.step(step, METRICS, "an answer")
    assert "an answer" not in file.getvalue()
    assert "▁" not in file.getvalue()


@pytest.mark.parametrize(
    "values, line",
    [
        ([], ""),
        ([1.0], ""),
        ([1.0, math.nan], ""),
        ([2.0, 2.0], "▅▅"),
        ([0.0, math.nan, 1.0], "▁█"),
        ([*range(80)], "".join("▁▂▃▄▅▆▇█"[k // 5] for k in range(40))),
    ],
)
def test_a_sparkline_is_as_high_as_its_values(values, line):
    assert sparkline(values) == line
