"""What is installed: exactly our packages, in a wheel and in an editable install, and never the
name `kernels`."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"grpo_fast", "grpo_kernels", "grpo_bench", "grpo_examples"}


def python(code: str, cwd: Path, **env: str) -> str:
    """Run code in a fresh interpreter; its standard output."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--disable-pip-version-check", "-w", str(folder), str(ROOT)]
    subprocess.run(command, check=True, cwd=folder, timeout=300)
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_our_packages_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == PACKAGES
    for expected in (
        "grpo_kernels/policy_loss.py",
        "grpo_bench/static.py",
        "grpo_examples/demo.yaml",
        "grpo_examples/arithmetic.jsonl",
        "grpo_fast/report.html.jinja",
        "grpo_fast/page/loss.js",
        "grpo_fast/page/xray.css",
        "grpo_fast/page/xray.html.jinja",
        "grpo_fast/py.typed",
        "grpo_kernels/py.typed",
    ):
        assert expected in names
    assert not [name for name in names if Path(name).name.startswith("test_")]


@pytest.fixture(scope="session")
def unpacked(wheel, tmp_path_factory) -> Path:
    """The wheel as `pip install` lays it down, on a path of its own."""
    folder = tmp_path_factory.mktemp("site")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_wheel_imports_from_elsewhere(unpacked, tmp_path):
    code = (
        "import grpo_fast, grpo_kernels.policy_loss, grpo_bench.static; "
        "print(grpo_fast.__file__); print(grpo_bench.static.__file__)"
    )
    files = python(code, tmp_path, PYTHONPATH=str(unpacked)).splitlines()
    assert all(file.startswith(str(unpacked)) for file in files)


def test_this_install_imports_from_elsewhere(tmp_path):
    code = "import grpo_fast, grpo_kernels.policy_loss, grpo_bench.static, grpo_examples"
    python(code, tmp_path)


def test_kernels_is_never_ours(tmp_path):
    """At the root, `kernels` must not look like a package of ours, and transformers must import."""
    code = (
        "import importlib.util as u; spec = u.find_spec('kernels'); "
        "print(spec is None or spec.origin is None); import transformers"
    )
    assert python(code, ROOT) == "True"


def test_import_is_light(tmp_path):
    code = """
import time, sys
start = time.perf_counter()
import grpo_fast
print(time.perf_counter() - start)
heavy = {'transformers', 'triton', 'matplotlib', 'tyro', 'rich', 'jinja2'} & set(sys.modules)
assert not heavy, heavy
"""
    assert min(float(python(code, tmp_path)) for _ in range(3)) < 2.0


def test_version_is_one():
    import grpo_fast

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == grpo_fast.__version__


def test_every_dependency_earns_its_line():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    peers = (ROOT / "tests/parity/peers.txt").read_text(encoding="utf-8").splitlines()
    declared = project["dependencies"] + extras["dev"] + extras["flash-attn"] + extras["8bit"]
    declared += [line for line in peers if not line.startswith("#")]
    contributing = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for requirement in declared:
        name = re.match(r"[A-Za-z0-9-]+", requirement).group()
        assert f"| {name} |" in contributing, f"{name} has no line in CONTRIBUTING.md"
