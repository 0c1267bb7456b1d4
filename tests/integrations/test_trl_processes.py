"""Two processes on CPUs: TRL and the drop-in under DDP and FSDP2 train the same weights."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trl_training import WEIGHTS, assert_same_logs

from grpo_bench.hosts import PEERS
from grpo_fast.tiny import save_tiny

pytestmark = pytest.mark.host
HERE = Path(__file__).resolve().parent
PACKED, FUSED, KERNEL = ("depth 'packed'",), ("depth 'fused'",), ("depth 'kernel'",)
# Name: (what is trained, what the log says). `processes.py` knows adapters, dead,
# images, depth and logged.
DDP = {
    "two iterations": (
        {"gradient_accumulation_steps": 2, "beta": 0.04, "num_iterations": 2, "max_steps": 4}
        | {"steps_per_generation": 2, "logged": True},
        PACKED,
    ),
    "adapters": ({"adapters": True, "loss_type": "grpo", "max_steps": 2}, PACKED),
    "a rank without a live group": ({"dead": True, "gradient_accumulation_steps": 2}, PACKED),
    "images on one rank": (
        {"images": True, "gradient_accumulation_steps": 2, "max_steps": 2},
        (*PACKED, "a micro-batch with images"),
    ),
    "fused": ({"depth": "fused", "loss_type": "bnpo", "max_steps": 2}, FUSED),
    "quantile": (
        {"top_entropy_quantile": 0.5, "max_steps": 1},
        (*KERNEL, "top_entropy_quantile is one quantile of all processes"),
    ),
}
FSDP = {
    "sharded": (
        {"gradient_accumulation_steps": 2, "beta": 0.04},
        (*KERNEL, "FSDP holds the parameters"),
    )
}
SHARDED = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen3DecoderLayer",
}


def launched(script, *arguments, **environment):
    """stdout of the script in two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(script), *map(str, arguments)]
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(PEERS))))
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        command,
        env=os.environ | environment | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def results(tmp_path_factory, cases, **environment):
    """Of each case, by rank, (TRL's, ours); under "means" what `processes.means` gave."""
    folder, out = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("out")
    torch.manual_seed(0)
    save_tiny(folder)
    runs = json.dumps([options for options, _ in cases.values()])
    launched(HERE / "processes.py", folder, out, runs, **environment)
    files = [torch.load(out / f"{rank}.pt", weights_only=False) for rank in range(2)]
    ranks, means = zip(*files, strict=True)
    return dict(zip(cases, zip(*ranks, strict=True), strict=True)) | {"means": means}


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return results(tmp_path_factory, DDP)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    return results(tmp_path_factory, FSDP, **SHARDED)


def assert_same(theirs, ours):
    """Whole logs, metric by metric, and the weights at the end."""
    assert_same_logs(theirs["log"], ours["log"])
    torch.testing.assert_close(ours["weights"], theirs["weights"], **WEIGHTS)


@pytest.mark.parametrize("name", DDP)
def test_processes_train_as_with_trl(ddp, name):
    for theirs, ours in ddp[name]:
        assert_same(theirs, ours)
        assert ours["wrapped"] == theirs["wrapped"] == "DistributedDataParallel"
    (_, first), (_, second) = ddp[name]
    assert first["weights"].keys() == second["weights"].keys()
    assert all(torch.equal(x, second["weights"][name]) for name, x in first["weights"].items())
    said = " ".join(first["lines"])
    assert all(words in said for words in DDP[name][1]), said


@pytest.mark.parametrize("side", [0, 1], ids=["TRL", "drop-in"])
def test_the_first_process_keeps_the_tokens_that_it_has(ddp, side):
    first, second = (rank[side] for rank in ddp["two iterations"])
    assert [meta["step"] for meta in first["kept"]] == [2, 4]
    assert second["kept"] == []
    for meta in first["kept"]:
        assert meta["iteration"] == 1
        assert meta["totals"]["completions"] == 8
        assert "process 0 of 2 only" in meta["kept"]
        assert {group["index"] for group in meta["groups"]} <= {0, 1}
        assert all(group["size"] == len(group["completions"]) for group in meta["groups"])


def test_gradients_are_averaged_whoever_has_one(ddp):
    for both, first, nobody, frozen, narrow, large in ddp["means"]:
        assert torch.equal(both, torch.full((2, 2), 2.0))
        assert torch.equal(first, torch.full((2, 2), 1.0))
        assert nobody is None
        assert frozen is None
        assert torch.equal(narrow, torch.full((3,), 6.0, dtype=torch.bfloat16))
        assert torch.equal(large, torch.full((9,), 7.0))


def test_shards_train_as_with_trl(fsdp):
    """The weights are those of all shards, on the first rank."""
    for theirs, ours in fsdp["sharded"]:
        assert_same(theirs, ours)
        assert ours["wrapped"] == theirs["wrapped"] == "FSDPQwen3ForCausalLM"
    said = " ".join(fsdp["sharded"][0][1]["lines"])
    assert all(words in said for words in FSDP["sharded"][1]), said


def test_the_accelerate_loop_learns_in_two_processes():
    said = launched(HERE.parents[1] / "examples" / "accelerate_loop.py")
    rewards = [float(number) for number in re.findall(r"reward (\S+)", said)]
    assert len(rewards) == 20
    assert sum(rewards[-5:]) > sum(rewards[:5]) + 0.5
