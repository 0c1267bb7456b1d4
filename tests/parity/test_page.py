"""docs/conformance.md has the rows and traps of these tests."""

import importlib.util
import re
from pathlib import Path

import pytest

# TRL's own default.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing:FutureWarning")
SCRIPT = Path(__file__).resolve().parents[2] / "docs/conformance.py"


def test_the_page_is_that_of_these_tests_up_to_digits():
    spec = importlib.util.spec_from_file_location("conformance", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    written = script.PAGE.read_text(encoding="utf-8")

    def rows(text: str) -> list[str]:
        return re.sub(r"\| (exact|\de-\d\d) (?=\|)", "| number ", text).splitlines()

    hint = "write it again: .venv/bin/python docs/conformance.py"
    assert rows(written) == rows(script.page(measured=False)), hint
