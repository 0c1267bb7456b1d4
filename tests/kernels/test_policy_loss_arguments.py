"""policy_loss names a wrong argument, and compiles nothing for other numbers and lengths."""

import inspect
import os
import subprocess
import sys

import pytest
import torch
from policy_loss_cases import CLIP, OBJECTIVES, call

from grpo_fast.testing import random_rows
from grpo_kernels import policy_loss as module

NUMBERS = (
    "v_units",
    "stride_logits",
    "stride_dlogits",
    "temperature",
    "low",
    "high",
    "cap",
    "dual_clip",
    "beta",
    "log_ratio_clamp",
)


def test_hyper_parameters_and_lengths_are_run_time_arguments():
    kernel = module._policy_loss_kernel
    parameters = inspect.signature(kernel.fn).parameters
    assert set(NUMBERS) <= parameters.keys()
    constants = {name for name, p in parameters.items() if p.annotation is not p.empty}
    flags = {"OBJECTIVE", "ESTIMATOR", "K2_SLOPE", "BIAS_CORRECTED"}
    assert constants == flags | {"UNIT", "BV"}


@pytest.mark.gpu
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_other_hyper_parameters_and_lengths_compile_nothing(objective, device):
    kernel = module._policy_loss_kernel

    def compiled() -> int:
        return sum(len(caches[0]) for caches in kernel.device_caches.values())

    rows = random_rows(4, 1024, device=device)
    call(module.policy_loss, rows, objective, beta=0.1)
    before = compiled()
    for k in range(1, 6):
        rows = random_rows(3 + k, 1024 + 16 * k, device=device)
        call(
            module.policy_loss,
            rows,
            objective,
            beta=k,
            low=1 / k,
            high=k,
            cap=2 + k,
            dual_clip=1 + k,
            temperature=k,
            log_ratio_clamp=k,
        )
    assert compiled() == before


def test_rows_are_counted_on_the_first_grid_dimension(monkeypatch):
    """CUDA's other dimensions end at 65,535."""
    grids = []

    class Recorder:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    monkeypatch.setattr(module, "_policy_loss_kernel", Recorder())
    rows = {
        name: value.expand(70_000, *value.shape[1:]).contiguous()
        for name, value in random_rows(1, 1).items()
    }
    module.policy_loss(**rows, **CLIP)
    assert grids == [(70_000,)]


def wrong(rows: dict, name: str, device) -> dict:
    """Rows with one argument spoiled."""
    n, v = rows["logits"].shape
    spoiled = {
        "shape": {"advantages": torch.zeros(n + 1, device=device)},
        "dtype": {"targets": rows["targets"].to(torch.int16)},
        "float64": {"logits": rows["logits"].double()},
        "half vector": {"weights": rows["weights"].half()},
        "stride": {"logits": torch.zeros(v, n, device=device).t()},
        "vector stride": {"old_logp": torch.zeros(2 * n, device=device)[::2]},
        "policy weights": {"policy_weights": torch.zeros(n, 1, device=device)},
        "entropy weights": {"entropy_weights": torch.zeros(n, device=device).half()},
        "device": {"ref_logp": torch.zeros(n, device="meta")},
        "no tensor": {"weights": 1.0},
        "one dimension": {"logits": rows["logits"][0]},
        "no entries": {"logits": rows["logits"][:, :0]},
        "overlap": {"dlogits": torch.zeros(v, device=device).expand(n, v)},
        "gradient shape": {"dlogits": torch.zeros(n, v + 1, device=device)},
        "temperature": {"temperature": 0.0},
        "temperature shape": {"temperature": torch.ones(n, 1, device=device)},
        "objective": {"objective": "ppo"},
        "estimator": {"kl_estimator": "k2+"},
    }
    return rows | spoiled[name]


@pytest.mark.parametrize(
    "name, message",
    [
        ("shape", r"advantages has shape \(4,\), expected \(3,\)"),
        (
            "dtype",
            "targets is torch.strided torch.int16, expected a dense tensor of int64 or int32",
        ),
        ("float64", "logits is torch.strided torch.float64, expected .* float32 or bfloat16"),
        ("half vector", "weights is torch.strided torch.float16, expected .* float32"),
        ("stride", r"logits has strides \(1, 3\), expected 1 in the last dimension"),
        ("vector stride", r"old_logp has strides \(2,\), expected 1"),
        ("device", "ref_logp is on meta, expected "),
        ("no tensor", "weights is float, expected a torch.Tensor"),
        ("one dimension", r"logits has shape \(5,\), expected \[N, V\]"),
        ("no entries", r"logits has shape \(3, 0\), expected \[N, V\] with V >= 1"),
        ("overlap", "dlogits has row stride 0, expected at least 5"),
        ("gradient shape", r"dlogits has shape \(3, 6\), expected \(3, 5\)"),
        ("temperature", "temperature is 0.0, expected a finite number > 0"),
        ("temperature shape", r"temperature has shape \(3, 1\), expected \(3,\)"),
        ("policy weights", r"policy_weights has shape \(3, 1\), expected \(3,\)"),
        ("entropy weights", "entropy_weights is torch.strided torch.float16"),
        ("objective", "objective is 'ppo', expected one of"),
        ("estimator", "kl_estimator is 'k2\\+', expected one of"),
    ],
)
def test_a_wrong_argument_is_named(name, message, device):
    rows = wrong(random_rows(3, 5, device=device), name, device)
    with pytest.raises(ValueError, match=message):
        module.policy_loss(**rows, **CLIP)


def test_beta_without_reference(device):
    rows = random_rows(3, 5, device=device)
    del rows["ref_logp"]
    with pytest.raises(ValueError, match="ref_logp is None, expected .* for beta = 0.1"):
        module.policy_loss(**rows, **CLIP, beta=0.1)


def test_a_cpu_tensor_without_the_interpreter_says_what_to_do():
    code = (
        "import torch; from grpo_kernels.policy_loss import policy_loss; x = torch.ones(1); "
        "policy_loss(torch.ones(1, 2), torch.zeros(1).long(), x, x)"
    )
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False
    )
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError: logits is on cpu, expected a CUDA tensor")
    assert "TRITON_INTERPRET=1" in last
    assert "impl='torch'" in last
