"""docs/host_tests.py on a host of three tests: what it runs, what it replaces, what it writes."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = """
import pytest

class PolicyLoss:
    pass

def test_any_loss():
    assert PolicyLoss

@pytest.mark.parametrize("case", [0, 1])
def test_the_host_s_own_loss(case):
    assert case or PolicyLoss.__module__ == __name__

def test_of_more():
    pytest.skip("no | GPU")
"""
PAGE = """text

| host and its tests | replaced in them | stock | drop-in |
|---|---|---|---|
| verl 0.9.1: `tests/a.py` | f | 1 passed | 1 passed |

more text
"""


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("host_tests", ROOT / "docs/host_tests.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_both_runs_of_a_host_go_into_both_pages(script, tmp_path, monkeypatch, capsys):
    checkout = tmp_path / "openrlhf"
    (checkout / "tests").mkdir(parents=True)
    (checkout / "version.txt").write_text("0.0.7\n")
    (checkout / "tests/test_loss_aggregation.py").write_text(TESTS)
    pages = {name: tmp_path / f"{name}.md" for name in ("PAGE", "SUMMARY")}
    for name, path in pages.items():
        monkeypatch.setattr(script, name, path)
    pages["PAGE"].write_text("# Title\n\n## verl 0.9.1: `tests/a.py`\n\nkept\n")
    pages["SUMMARY"].write_text(PAGE)
    assert script.main([f"openrlhf={checkout}"]) == 1
    assert "test_the_host_s_own_loss[0]: failed, AssertionError" in capsys.readouterr().out
    summary = pages["SUMMARY"].read_text()
    line = (
        "| openrlhf 0.0.7: `tests/test_loss_aggregation.py` | PolicyLoss "
        "| 3 passed, 1 not run | 2 passed, 1 failed, 1 not run |\n"
    )
    before, after = PAGE.split("| verl")
    assert summary == f"{before}{line}| verl{after}"
    page = pages["PAGE"].read_text()
    assert page.startswith(script.HEAD)
    assert "\n| `test_the_host_s_own_loss` | 2 passed | 1 passed, 1 failed | Asser" in page
    assert "\n| `test_of_more` | 1 not run | 1 not run | no \\| GPU |\n" in page
    assert page.endswith("## verl 0.9.1: `tests/a.py`\n\nkept\n")


def test_tests_that_do_not_start_are_an_error(script, tmp_path):
    with pytest.raises(SystemExit, match="pytest did not run"):
        script.run("openrlhf", tmp_path, "tests/test_loss_aggregation.py", drop_in=False)


def test_the_page_has_every_line_of_the_table(script):
    table = script.SUMMARY.read_text(encoding="utf-8").split(script.TABLE)[1]
    lines = table.partition("\n\n")[0].splitlines()
    titles = list(script.sections(script.PAGE.read_text(encoding="utf-8")))
    assert titles == [line.split(" | ")[0].removeprefix("| ") for line in lines]
    assert titles
