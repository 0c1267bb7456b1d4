"""Which attention backend is picked for what, what is logged, and what a refusal says."""

import logging

import pytest
import torch

from grpo_fast import ConfigError
from grpo_fast.attention_choice import Needs, pick_backend
from grpo_fast.attention_packages import FlashAttn2, FlashAttn3, FlashAttn4

BF16 = Needs("cuda", torch.bfloat16, 64, 64)
CAPPED = BF16._replace(softcap=True)


@pytest.fixture(autouse=True)
def _nothing_remembered():
    pick_backend.cache_clear()
    yield
    pick_backend.cache_clear()


def named(needs, name="auto") -> str:
    return type(pick_backend(name, needs)).__name__


def test_the_first_backend_that_can_is_picked():
    assert named(BF16) == "CUDAFlash"
    cpu = Needs("cpu", torch.float32, 64, 64)
    assert named(cpu) == "CPUFlash"
    assert named(cpu._replace(dtype=torch.float64)) == "CPUFlash"
    for needs in (cpu._replace(softcap=True), cpu._replace(window=7), cpu._replace(value_dim=128)):
        assert named(needs) == "Tiles"
    with pytest.raises(ConfigError, match="attention = 'flsh' is not available: did you mean"):
        pick_backend("flsh", BF16)


def installed(monkeypatch, **problems: str | None):
    """What `problem` says of each package, as in FlashAttn2='it is broken'."""
    for package in (FlashAttn2, FlashAttn3, FlashAttn4):
        problem = problems.get(package.__name__, f"it needs the package {package.package}")
        monkeypatch.setattr(package, "problem", lambda problem=problem: problem)
    pick_backend.cache_clear()


def test_auto_takes_pytorch_s_own_kernels_and_a_package_only_for_a_softcap(monkeypatch):
    installed(monkeypatch)
    assert named(BF16) == "CUDAFlash"
    assert named(BF16._replace(window=7)) == "CUDAFlash"
    assert named(CAPPED) == "Tiles"
    assert named(BF16._replace(head_dim=512, value_dim=512)) == "Efficient"
    assert named(BF16._replace(head_dim=192, value_dim=128)) == "Efficient"
    float32 = Needs("cuda", torch.float32, 64, 64)
    assert named(float32) == "Efficient"
    assert named(float32._replace(window=7)) == "Tiles"
    assert named(float32._replace(softcap=True)) == "Tiles"
    installed(monkeypatch, FlashAttn4=None)
    assert named(CAPPED) == "Tiles"
    assert named(CAPPED, "flash_attn_4") == "FlashAttn4"
    installed(monkeypatch, FlashAttn3=None)
    assert named(CAPPED) == "FlashAttn3"
    installed(monkeypatch, FlashAttn2=None, FlashAttn3=None)
    assert named(CAPPED) == "FlashAttn2"
    assert named(BF16) == "CUDAFlash"
    assert named(CAPPED, "flex") == "Flex"


def test_the_choice_is_logged_once_with_what_was_passed_over(monkeypatch, caplog):
    installed(monkeypatch, FlashAttn3="it is broken")
    caplog.set_level(logging.INFO, "grpo_fast")
    for _ in range(2):
        assert named(CAPPED) == "Tiles"
    assert caplog.messages == [
        "attention='auto' is 'tiles' for torch.bfloat16 on cuda (not 'flash': it has no softcap; "
        "not 'flash_attn_2': it needs the package flash-attn 2.7 or 2.8; not 'flash_attn_3': it is "
        "broken; not 'efficient': it has no softcap and no window)"
    ]
    caplog.clear()
    assert named(BF16, "flex") == "Flex"
    assert caplog.messages == ["attention='flex' for torch.bfloat16 on cuda"]


@pytest.mark.parametrize(
    "name, needs, problem",
    [
        ("flash", CAPPED, "it has no softcap"),
        ("flash", BF16._replace(head_dim=264), "at most 256, a multiple of 8, not 264"),
        ("flash_attn_4", BF16._replace(head_dim=256), "at most 128"),
        ("flash_attn_3", BF16._replace(dtype=torch.float32), "bfloat16 and float16, not"),
        ("flex", BF16._replace(device="cpu"), "it runs on cuda, not on cpu"),
        ("flex", BF16._replace(head_dim=8), "heads of at least 16"),
        ("flash_attn_2", BF16._replace(value_dim=128), "not 128 and 64"),
        ("flash_attn_2", BF16, "it needs the package flash-attn 2.7 or 2.8"),
        ("efficient", BF16._replace(dtype=torch.float64), "at most 32 bits"),
        ("efficient", BF16._replace(value_dim=68), "a multiple of 8, not 64 and 68"),
        ("efficient", BF16._replace(window=7), "no softcap and no window"),
        ("cpu_flash", BF16, "it runs on cpu, not on cuda"),
        ("cpu_flash", BF16._replace(device="cpu", softcap=True), "it has no softcap and no window"),
        ("cpu_flash", BF16._replace(device="cpu", value_dim=128), "as its keys, not 128 and 64"),
    ],
)
def test_a_backend_that_cannot_serve_says_why(name, needs, problem, monkeypatch):
    installed(monkeypatch)
    with pytest.raises(ConfigError, match=f"'{name}' cannot serve this model: .*{problem}"):
        pick_backend(name, needs)


@pytest.mark.parametrize(
    "capability, dtype, name",
    [
        ((7, 5), torch.float16, "Efficient"),
        ((7, 5), torch.bfloat16, "Tiles"),
        ((8, 0), torch.bfloat16, "CUDAFlash"),
        ((12, 0), torch.bfloat16, "CUDAFlash"),
    ],
)
def test_a_gpu_without_the_kernels_is_not_given_them(capability, dtype, name, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
    assert named(BF16._replace(dtype=dtype)) == name
