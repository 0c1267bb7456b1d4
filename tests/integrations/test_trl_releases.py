"""What the losses of TRL's releases differ in, held against the oldest one: tests of the drop-in,
in a process that finds that release first."""

import os
import subprocess
import sys
from pathlib import Path

from grpo_bench.hosts import PEERS
from grpo_fast.integrations.trl_versions import OLDEST

ROOT = Path(__file__).resolve().parents[2]
FOLDER = Path(sys.prefix) / "trl19"
FILES = [f"tests/integrations/test_trl{of}.py" for of in ("", "_depths", "_steps")]
CASES = "dapo and gradient_accumulation or entropy or luspo or adapters or sampler"


def python(*arguments: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(FOLDER), str(PEERS)])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_the_folder_has_the_oldest_release_that_is_taken():
    found = python("-c", "import trl; print(trl.__version__)")
    assert found.stdout.startswith("{}.{}.".format(*OLDEST)), found.stderr


def test_the_oldest_release_trains_as_itself():
    run = python("-m", "pytest", "-q", *FILES, "-k", CASES)
    assert run.returncode == 0, run.stdout[-3000:]
