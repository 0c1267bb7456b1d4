"""Every command and snippet of the README is run, and its file map is the tree."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_fast.tiny import save_tiny

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
# A README shows real runs; a test has seconds.
SHORTER = {
    "train": "--max-steps 1 --prompts-per-step 2 --group-size 2 --max-completion-length 4 "
    "--eval-prompts 2 --device cpu",
    "demo": "--max-steps 2 --eval-prompts 2 --prompts-per-step 2",
    "bench": "--kernel segment_reduce --target sm_90",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    lines = [
        line.partition("  #")[0].strip() for block in blocks("bash") for line in block.splitlines()
    ]
    return [line for line in lines if line]


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A working directory with what the README's commands name."""
    folder = tmp_path_factory.mktemp("desk")
    save_tiny(folder / "my-model")
    rows = [{"prompt": "abcdefgh"[k] + "b", "answer": "c"} for k in range(8)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (reward,) = [block for block in blocks("python") if block.startswith("# rewards.py")]
    (folder / "rewards.py").write_text(reward)
    return folder


def run(command: list[str], cwd: Path) -> str:
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_commands_run_in_the_order_of_the_readme(desk):
    seen = set()
    for line in commands():
        words = shlex.split(line)
        if words[0] == "make":
            run(["make", "--dry-run", *words[1:]], ROOT)
        else:
            assert words[0] == "grpo-fast", line
            if words[1] == "diff":
                shutil.copytree(desk / words[2], desk / words[3])
            if words[1] == "bench" and "--static" not in words:
                run([*words, "--help"], desk)
            else:
                run([*words, *shlex.split(SHORTER.get(words[1], ""))], desk)
        seen.add(words[1])
    assert {"demo", "test", "train", "report", "bench"} <= seen
    assert (desk / "runs/mine/report.html").is_file()


def test_the_step_of_an_own_loop_runs(desk):
    (code,) = [block for block in blocks("python") if "grpo_backward" in block]
    assert "tensor(" in run([sys.executable, "-c", code], desk)


@pytest.mark.parametrize("code", [b for b in blocks("python") if "import torch" in b])
def test_snippets_run(code):
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)
    assert scope["loss"].isfinite()
    assert scope["hidden"].grad.any()
    assert scope["weight"].grad.any()


def test_file_map_is_the_tree():
    named = set(re.findall(r"^\| `([a-z_/.]+)` \|", README, flags=re.MULTILINE))
    paths = [p for p in (ROOT / "grpo_fast").rglob("*.py") if p.name != "__init__.py"]
    files = {str(path.relative_to(ROOT)) for path in paths}
    assert {name for name in named if name.startswith("grpo_fast/")} == files
    assert all((ROOT / name).exists() for name in named)


def test_pictures_exist():
    for target in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / target).is_file(), target
