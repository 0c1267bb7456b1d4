"""`file.py:function` and `package.module:function`; what cannot be loaded is named, with the
line."""

import math
import sys

import pytest

from grpo_fast import ConfigError
from grpo_fast.plugins import load_function


@pytest.fixture(autouse=True)
def import_state():
    """Loading a file adds a module and a folder: both go again."""
    modules, path = set(sys.modules), list(sys.path)
    yield
    for name in set(sys.modules) - modules:
        del sys.modules[name]
    sys.path[:] = path


def write(folder, text, name="mine.py"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_from_a_file_and_from_a_module(tmp_path):
    path = write(tmp_path, "def double(x):\n    return 2 * x\n")
    assert load_function(f"{path}:double")(3) == 6
    assert load_function("math:sqrt") is math.sqrt


def test_two_files_of_one_name_stay_apart(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        write(tmp_path / name, f"def who():\n    return '{name}'\n")
    found = [load_function(f"{tmp_path}/{name}/mine.py:who")() for name in "ab"]
    assert found == ["a", "b"]


def test_a_file_runs_once_for_all_its_functions(tmp_path):
    path = write(tmp_path, "calls = []\ndef f():\n    return calls\ndef g():\n    return calls\n")
    assert load_function(f"{path}:f")() is load_function(f"{path}:g")()


def test_a_file_may_import_its_neighbour_and_hides_no_standard_module(tmp_path):
    write(tmp_path, "VALUE = 7\n", "rollout_neighbour.py")
    write(tmp_path, "raise RuntimeError('not the standard colorsys')\n", "colorsys.py")
    path = write(
        tmp_path,
        "import colorsys\nimport rollout_neighbour\n"
        "def f():\n    return rollout_neighbour.VALUE, colorsys.rgb_to_hsv(0, 0, 0)\n",
    )
    assert load_function(f"{path}:f")() == (7, (0.0, 0.0, 0))


def test_a_file_may_define_dataclasses(tmp_path):
    path = write(
        tmp_path,
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: int = 1\ndef f():\n    return A().x\n",
    )
    assert load_function(f"{path}:f")() == 1


BAD = {
    "no-colon": ("mine.py", "", "'mine.py' names no function: expected `file.py:function`"),
    "no-file": ("min.py:f", "", "min.py does not exist: did you mean 'mine.py'"),
    "no-module": ("no_such_module_at_all:f", "", "no module 'no_such_module_at_all'"),
    "file-as-module": ("mine:f", "def f(): pass\n", "did you mean 'mine.py:f'"),
    "no-function": ("mine.py:duble", "def double(): pass\n", "'duble': did you mean 'double'"),
    "nothing-there": ("mine.py:f", "x = 1\n", "functions there: none"),
    "not-callable": ("mine.py:x", "x = 1\n", "'x' in mine.py is of type int"),
    "class": ("mine.py:X", "class X: pass\n", "'X' in mine.py is a class"),
    "syntax": ("mine.py:f", "\n\ndef f(:\n", r"SyntaxError: .* \(mine.py:3\)"),
    "raises": ("mine.py:f", "x = 1\ny = 1 / 0\n", r"ZeroDivisionError: .* \(mine.py:2\)"),
    "exits": ("mine.py:f", "import sys\nsys.exit(3)\n", r"SystemExit: 3 \(mine.py:2\)"),
    "import": ("mine.py:f", "\nimport no_such_thing\n", r"ModuleNotFoundError: .* \(mine.py:2\)"),
}


@pytest.mark.parametrize("spec, text, message", BAD.values(), ids=BAD.keys())
def test_what_cannot_be_loaded_is_named(tmp_path, monkeypatch, spec, text, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    write(tmp_path, text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_function(spec)
    assert "\n" not in str(caught.value)


def test_the_original_error_is_kept_for_debugging(tmp_path):
    path = write(tmp_path, "y = 1 / 0\n")
    with pytest.raises(ConfigError) as caught:
        load_function(f"{path}:f")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_a_mended_file_loads(tmp_path):
    path = write(tmp_path, "1 / 0\n")
    with pytest.raises(ConfigError):
        load_function(f"{path}:f")
    # Longer than before: Python's bytecode cache goes by size and second.
    write(tmp_path, "def f():\n    return 1\n")
    assert load_function(f"{path}:f")() == 1
