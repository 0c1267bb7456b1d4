"""A pytest plugin for the hosts' own tests: the drop-in in place of what it replaces, in every
module that has it. docs/host_tests.py runs them; HOST_TESTS says which host, and whether."""

import importlib
import os
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

PACKAGES = {"liger": "liger-kernel"}
HOST, _, DROP_IN = os.environ["HOST_TESTS"].partition(":")


def pytest_configure(config) -> None:
    if HOST == "verl":
        from grpo_bench.hosts import verl_core

        verl_core()  # without Ray, which verl's root package imports
    if HOST == "trl":
        import stand_ins
        from transformers import training_args

        stand_ins.write(Path.cwd())
        # Its configs ask for bf16 and not for a CPU, which has it.
        training_args.is_torch_bf16_gpu_available = lambda: True
        # Liger's layers need a GPU, and stay in transformers' models for all tests after.
        imports = importlib.import_module("trl.import_utils")
        imports.is_liger_kernel_available = lambda *_, **__: False
    if HOST == "openrlhf":
        # Imported beside the loss, and of no use to it.
        sys.modules.setdefault("deepspeed", ModuleType("deepspeed"))


# Its token ids are no words of a stand-in: TRL's embedding fails, or all is taken as truncated.
OF_QWEN = ("test_train_with_mask_truncated_completions",)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test of something that only the hub has is not run."""
    if item.name in OF_QWEN:
        pytest.skip("it writes token ids of Qwen's own vocabulary")
    try:
        return (yield)
    except OSError as error:
        if "huggingface.co" not in str(error):
            raise
        pytest.skip("its model, processor or data is on the hub alone")
    except IndexError as error:
        if "index out of range in self" not in str(error):
            raise
        pytest.skip("it writes token ids of Qwen's own vocabulary")


def pytest_report_collectionfinish(config, items) -> str:
    """Put the drop-in in, and say where: a test that has none of the names shows nothing."""
    names = replaced()
    found = {name for item in items for name in names.keys() & vars(item.module).keys()}
    if DROP_IN:
        for module in {item.module for item in items}:
            # `from host import name` copied it.
            vars(module).update({name: names[name] for name in found & vars(module).keys()})
    return f"{version(config)} with, in place: {', '.join(sorted(found))}"


def version(config) -> str:
    """Of the installed host, or of the checkout."""
    package = PACKAGES.get(HOST, HOST)
    try:
        return f"{package} {metadata.version(package)}"
    except metadata.PackageNotFoundError:
        return f"{package} {(config.rootpath / 'version.txt').read_text().strip()}"


def replaced() -> dict[str, object]:
    """Names of the host, and what they are with the drop-in in place."""
    adapter = importlib.import_module(f"grpo_fast.integrations.{HOST}")
    if HOST == "trl":
        return {"GRPOTrainer": adapter.GRPOTrainer}
    if HOST == "openrlhf":
        return {"PolicyLoss": adapter.PolicyLoss}
    if DROP_IN:
        adapter.register()
    if HOST == "liger":
        return {"LigerFusedLinearGRPOLoss": adapter.LigerFusedLinearGRPOLoss}
    ours = {there: adapter.policy_loss(there) for there in adapter.MODES}
    if DROP_IN:
        core = importlib.import_module("verl.trainer.ppo.core_algos")
        core.POLICY_LOSS_REGISTRY.update(ours)
    return {f"compute_policy_loss_{there}": loss for there, loss in ours.items()}
