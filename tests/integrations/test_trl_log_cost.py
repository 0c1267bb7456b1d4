"""What the token log costs TRL's trainer: a bound that is measured here, and the table in the docs,
of a quiet machine."""

import importlib
import statistics
from pathlib import Path

import pytest
from trl_training import MARKS

pytestmark = [*MARKS, pytest.mark.filterwarnings("ignore:You are using 'rollout_func'")]
DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def script(monkeypatch):
    """docs/trl_log_cost.py."""
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("trl_log_cost")


@pytest.mark.parametrize("depth", ["TRL", "packed"])
def test_the_log_takes_a_small_part_of_a_step(script, depth):
    """1 to 2 % of a fifth of a second. The bound is for a machine that others use."""
    with script.Meter() as meter:
        steps = script.measure(meter, depth, {}, 64, 16, 64, 6)
    assert [step.kept for step in steps] == [False, True, False, True]
    assert all(step.here > 0 and (step.worker > 0) == step.kept for step in steps)
    assert statistics.median(step.here / step.update for step in steps) < 0.06


def number(cell):
    return float(cell.replace(",", "").removesuffix(" %"))


def test_the_docs_have_a_row_of_every_case_and_their_shares_add_up(script):
    page = (DOCS / "tokens.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if len(row) == 12 and row[2] in script.DEPTHS]
    named = {(name, f"{batch * length:,}") for name, _, batch, _, length, _ in script.CASES}
    assert {tuple(row[:3]) for row in rows} == {
        (*case, depth) for case in named for depth in script.DEPTHS
    }
    for row in rows:
        step, *times = (number(cell) for cell in row[3:8])
        shares = [number(cell) for cell in row[8:]]
        assert len(shares) == len(times)
        # Of rounded milliseconds.
        whole = [100 * time / step for time in times]
        assert shares == pytest.approx(whole, rel=0.06, abs=0.02), row
        if step > 1000:
            assert shares[0] < 1, row
