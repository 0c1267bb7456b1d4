"""The house rules that a reader relies on: who imports whom, how long a file may get, and that no
op stands alone."""

import ast
import functools
import inspect
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPS = ("token_logprob", "policy_loss", "group_advantage", "segment_reduce")
LEAVES = {"loss_config", "errors"}
# What each module of grpo_fast may import from grpo_fast; those not named here may import what
# stands above the loop.
ALLOWED = {
    "errors": set(),
    "numbered": {"errors"},
    "loss_config": {"errors", "numbered", "presets"},  # presets inside from_trl and from_verl
    "presets": LEAVES,
    "advantage_config": set(),
    "config": {"advantage_config", "errors", "loss_config"},
    "optimizer": {"config", "errors"},
    "plugins": {"errors"},
    "reference": {"loss_config", "reference_advantage", "reference_loss"},
    "reference_advantage": set(),
    "reference_attention": set(),
    "reference_loss": {"loss_config"},
    "rows": set(),
    "aggregation": {"loss_config", "rows"},
    "tokens": {"errors", "rows"},
    "objective": {"loss_config", "plugins", "tokens"},
    "correction": {"loss_config", "rows", "tokens"},
    "policy_terms": {"correction", "loss_config", "objective", "rows", "tokens"},
    "loss_metrics": {"loss_config", "objective"},
    "live": {"loss_config", "rows"},
    "torch_kernels": {"objective", "policy_terms", "rows", "torch_segments"},
    "torch_segments": set(),
    "inputs": LEAVES | {"aggregation", "rows"},
    "implementation": {"errors", "torch_kernels"},
    "products": set(),
    "chunked": {"products", "torch_kernels"},
    "vocab_parallel": {"errors"},
    "linear_loss": {
        "aggregation",
        "chunked",
        "correction",
        "loss_config",
        "objective",
        "policy_terms",
        "products",
        "rows",
        "vocab_parallel",
    },
    "autograd": {"chunked", "errors", "linear_loss"},
    "outputs": {"errors"},
    "compiled": LEAVES
    | {
        "autograd",
        "chunked",
        "implementation",
        "inputs",
        "loss_metrics",
        "numbered",
        "outputs",
        "products",
        "vocab_parallel",
    },
    "advantages": {"advantage_config", "errors", "implementation", "reference"},
    "entropy_control": {"aggregation", "loss_config"},
    "kl_reward": LEAVES | {"implementation", "inputs", "objective", "reference"},
    "testing": set(),
    "groups": {"advantages", "errors"},
    # A log is diagnosed without torch: the doctor knows rows of numbers and no part of a run.
    "history": set(),
    "reward_checks": {"history"},
    "policy_checks": {"history"},
    "doctor_rules": {"history", "policy_checks", "reward_checks"},
    "doctor": {"doctor_rules", "history"},
    "xray": {"doctor", "errors", "loss_config", "records", "token_log"},
    "token_log": {"errors"},
    "doctor_command": {"doctor", "doctor_rules", "errors", "history", "records"},
    # A log of whoever is read without torch, too; of the trainer's metrics only the arithmetic.
    "track": {"errors"},
    "track_trackio": set(),
    "track_tensorboard": set(),
    "track_wandb": set(),
    "metrics": {"rollout", "token_choice"},
    "import_lines": {"errors", "import_tokens", "metrics"},
    "import_tokens": {"errors", "token_log"},
    "import_trl": {"errors", "import_lines"},
    "import_verl": {"errors", "import_lines", "import_tokens", "token_log"},
    "diff_command": {"doctor", "errors", "history", "records"},
    "records": {"errors", "import_lines", "import_trl", "import_verl", "runlog", "token_log"},
    "token_choice": set(),
    "token_columns": {
        "aggregation",
        "collate",
        "groups",
        "loss_config",
        "outputs",
        "rows",
    },
    "token_step": {
        "groups",
        "loss_config",
        "outputs",
        "rollout",
        "token_choice",
        "token_columns",
        "token_log",
    },
    "faults": {"config_file", "doctor", "doctor_rules", "errors", "plugins", "runlog"},
    "packing": {"config", "errors", "groups", "live", "loss_config"},
    "layout": set(),
    "collate": {"errors", "groups", "layout", "packing"},
    "attention_backends": {"layout"},
    "attention_packages": {"attention_backends", "layout"},
    "attention_flex": {"attention_backends", "layout"},
    "attention_choice": {"attention_backends", "attention_flex", "attention_packages", "errors"},
    "attention": {"attention_backends", "attention_choice", "errors", "layout"},
    "forward": {"attention", "collate", "groups", "layout", "model", "packing"},
    "activation_checkpointing": {"config", "errors", "loss_config"},
    "memory": {"activation_checkpointing", "config"},
    "planner": {
        "attention",
        "config",
        "errors",
        "groups",
        "loss_config",
        "memory",
        "packing",
        "step",
    },
    "model_shapes": {"errors"},
    "cost": {"model_shapes"},
    "gpus": {"errors", "memory"},
    "estimate": {
        "chunked",
        "config",
        "cost",
        "errors",
        "gpus",
        "loss_config",
        "memory",
        "model_shapes",
        "optimizer",
        "packing",
        "planner",
    },
    "plan_command": {"config", "errors", "estimate", "gpus", "model_shapes"},
    "self_check": {"attention", "errors", "forward", "groups", "model", "packing"},
}
# What an adapter may import: the public ops and, where a host has log-probs already, what follows
# them. hosts: the head of a model, and how it may be sharded.
ADAPTERS = {
    "hosts": {"chunked", "errors", "model", "vocab_parallel"},
    "logprobs": LEAVES | {"inputs", "policy_terms", "products", "torch_segments"},
    "liger": LEAVES | {"objective", "ops", "outputs", "presets"},
    "verl": LEAVES | {"objective", "ops", "presets"},
    "openrlhf": LEAVES | {"model", "objective", "ops"},
    "open_instruct": LEAVES | {"model", "objective", "ops"},
    # A host's trainer is the caller of a step, like `trainer`.
    "trl": LEAVES | {"model", "ops", "outputs", "step"},
    "trl_depths": LEAVES | {"groups", "model", "step"},
    "trl_head": {"autograd", "chunked", "errors", "implementation", "products"},
    "trl_loss": {"loss_config"},
    "trl_versions": {"errors"},
    "padded": {"groups", "live", "loss_config"},
    "gradients": {"errors"},
    # Writes a run log, and says what our own trainer says of one.
    "trl_tokens": LEAVES
    | {"import_lines", "rollout", "token_choice", "token_columns", "token_log", "token_step"},
    "trl_columns": {
        "aggregation",
        "correction",
        "inputs",
        "loss_config",
        "policy_terms",
        "token_columns",
        "tokens",
        "torch_segments",
    },
    "trl_callback": LEAVES | {"doctor", "import_lines", "report", "runlog"},
}
# What adapters share, and what TRL's is made of.
SHARED = {"gradients", "hosts", "logprobs", "padded"}
SHARED |= {"trl_columns", "trl_depths", "trl_head", "trl_loss", "trl_tokens", "trl_versions"}
TRANSFORMERS = {"model", "generate", "attention", "prompts", "tiny", "import_tokens"}
# The last link to what a user types: nothing imports it.
ENDS = {"cli", "trainer"}


def python_files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).glob("*.py"))


@functools.cache
def imports(path: Path) -> frozenset[tuple[int, str]]:
    """(level, module) of every import in a file, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {(0, alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.module is None:
                found |= {(node.level, alias.name) for alias in node.names}
            else:
                found.add((node.level, node.module))
    return frozenset(found)


def top_levels(path: Path) -> set[str]:
    return {module.partition(".")[0] for level, module in imports(path) if level == 0}


def siblings(path: Path) -> set[str]:
    return {module.partition(".")[0] for level, module in imports(path) if level == 1}


@pytest.mark.parametrize("path", python_files("kernels"), ids=lambda path: path.stem)
def test_kernels_know_torch_and_triton_and_no_other_op(path):
    assert top_levels(path) <= {"torch", "triton"} | sys.stdlib_module_names
    assert siblings(path) <= {"launch", "online_softmax"}


@pytest.mark.parametrize("path", python_files("grpo_fast"), ids=lambda path: path.stem)
def test_import_arrows_of_grpo_fast(path):
    name = path.stem
    if name in ALLOWED:
        assert siblings(path) <= ALLOWED[name], f"{name} imports {siblings(path) - ALLOWED[name]}"
    if name not in {"__init__", "cli"}:
        assert not siblings(path) & (ENDS - {name})
    if name != "implementation":
        assert "grpo_kernels" not in top_levels(path)
    if top_levels(path) & {"transformers", "flash_attn", "tokenizers"}:
        assert name in TRANSFORMERS, f"{name} touches transformers"


@pytest.mark.parametrize("name", ADAPTERS)
def test_import_arrows_of_the_adapters(name):
    path = ROOT / f"grpo_fast/integrations/{name}.py"
    ours = {module.partition(".")[0] for level, module in imports(path) if level == 2}
    assert ours <= ADAPTERS[name], f"{name} imports {ours - ADAPTERS[name]}"
    assert siblings(path) <= SHARED - {name}
    # A host is imported by name, when it is asked for; TRL's is a base class.
    hosts = {"trl": {"trl"}, "trl_versions": {"trl"}, "trl_callback": {"transformers"}}
    host = hosts.get(name, set()) | ({"numpy"} if name in ("trl_columns", "trl_tokens") else set())
    assert top_levels(path) <= {"torch"} | host | sys.stdlib_module_names


def test_every_adapter_has_its_arrows():
    files = {path.stem for path in python_files("grpo_fast/integrations")}
    assert files == {"__init__", *ADAPTERS}
    # Hosts are heavy, and nobody who does not ask for one may wait for it.
    for path in python_files("grpo_fast"):
        assert "integrations" not in siblings(path), path
        assert not top_levels(path) & {"verl", "accelerate"}, path
        assert "trl" not in top_levels(path) or path.stem in ("trl", "trl_versions"), path


@pytest.mark.parametrize("folder", ["kernels", "grpo_fast", "bench", "examples", "tests"])
def test_nobody_imports_hugging_face_s_kernels_or_the_tests(folder):
    for path in (ROOT / folder).rglob("*.py"):
        assert not top_levels(path) & {"kernels", "bench", "tests", "conftest"}, path
        if folder in {"kernels", "grpo_fast"}:
            assert "grpo_bench" not in top_levels(path), path


def test_kernels_and_oracle_do_not_know_each_other():
    for name in ("reference", "reference_advantage", "reference_loss"):
        path = ROOT / f"grpo_fast/{name}.py"
        assert "grpo_kernels" not in top_levels(path)
        assert siblings(path) <= {"loss_config", "reference_advantage", "reference_loss"}


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_kernel_oracle_launcher_test_and_bench(op):
    from grpo_fast import reference

    kernels = {path.stem for path in python_files("kernels")}
    assert set(OPS) == kernels - {"launch", "online_softmax"}
    assert callable(getattr(reference, op))
    assert (ROOT / f"tests/kernels/test_{op}.py").is_file()
    assert (ROOT / f"bench/bench_{op}.py").is_file()
    assert f"{op}.py" in (ROOT / "kernels/README.md").read_text(encoding="utf-8")


def test_torch_kernels_have_the_kernels_signatures():
    """Same names, same arguments, same defaults: `impl` changes who computes and nothing else."""
    from grpo_fast import torch_kernels
    from grpo_fast.implementation import launchers

    for name, launcher in vars(launchers("triton")).items():
        theirs, ours = (
            [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
            for f in (launcher, getattr(torch_kernels, name))
        )
        assert ours == theirs, name


def functions(path: Path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


@pytest.mark.parametrize(
    "folder, budget",
    [("kernels", 500), ("grpo_fast", 400), ("grpo_fast/integrations", 400), ("bench", 400)],
)
def test_files_and_functions_stay_readable(folder, budget):
    for path in python_files(folder):
        length = len(path.read_text(encoding="utf-8").splitlines())
        assert length <= budget, f"{path.relative_to(ROOT)} has {length} lines, {budget} allowed"
        for function in functions(path):
            documented = ast.get_docstring(function, clean=False)
            lines = function.end_lineno - function.lineno + 1
            lines -= len(documented.splitlines()) if documented else 0
            lines -= function.body[0].lineno - function.lineno  # the signature
            assert lines <= 60, f"{path.name}: {function.name} has {lines} lines, 60 allowed"


def test_no_drawers_and_nothing_nested():
    names = {
        path.stem for folder in ("kernels", "grpo_fast", "bench") for path in python_files(folder)
    }
    assert not names & {"utils", "common", "helpers", "misc"}
    assert not (ROOT / "kernels/__init__.py").exists()
    assert not (ROOT / "bench/__init__.py").exists()
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_public_functions_say_what_they_replace():
    import grpo_fast

    for name in (
        "linear_grpo_loss",
        "grpo_loss",
        "linear_logprob",
        "token_logprob",
        "group_advantages",
        "kl_in_reward",
        "next_entropy_coef",
    ):
        assert getattr(grpo_fast, name).__doc__.startswith("`"), name
