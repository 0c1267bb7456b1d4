"""docs/conformance.md from tests/parity: `.venv/bin/python docs/conformance.py`, after `make test`
has brought the trainers."""

import dataclasses
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_fast.errors import ConfigError
from grpo_fast.loss_config import LossConfig

ROOT = Path(__file__).resolve().parent.parent
PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Conformance

`LossConfig.from_trl(args)` and `LossConfig.from_verl(actor)` read the config of another trainer,
without importing it. Each row below is a test in `tests/parity`: the trainer's own function, as
installed, and `linear_grpo_loss` on the same six ragged sequences (one empty, one of advantage 0),
off policy. The last columns are the difference of the losses, which are of order 0.1, and the
largest one of the gradients in hidden states and head, over the largest entry. What has no row and
no equivalent is refused with a ConfigError that names the option.

This page is written by `docs/conformance.py`; a test holds it to the tests' rows.
"""
NOTES = {
    "trl": """Computed in float64 on both sides. Every row also has `log_ratio_clamp = 80`: TRL
bounds no log-ratio, and 80 is the widest bound there is; `dataclasses.replace(config,
log_ratio_clamp=20.0)` is safer. TRL's divisor is the caller's `denominator`; without gradient
accumulation, and with one step a generation, it is the default here.

| loss_type | `denominator` |
|---|---|
{normalisers}

`entropy_denominator` is tokens x accumulation for all of them. No part of the loss, and so no part
of the translation: the mask (`mask_truncated_completions`, tools), the advantages
(`group_advantages` for `scale_rewards`), the load-balancing loss of an MoE model, and when to pass
`old_logprobs`. With `use_adaptive_entropy` the bonus of a step is `dataclasses.replace(config,
entropy_coef=...)`, 0 until the entropy was seen to be at `entropy_target` or below.

Older versions: up to 0.25 the weight for vLLM is `token_truncate` with
`vllm_importance_sampling_cap`, and what a version does not have is off. `from_trl` does not know
the version, so it cannot know that up to 1.9 `luspo` at token level counted padding, and `dapo`,
`cispo` and `vespo` divided by `num_items_in_batch / processes`.
""",
    "verl": """Computed in float64 on both sides; verl adds 1e-8 to lengths. Every row is called
with `**verl_denominators(actor, mask)` (in `grpo_fast.presets`): verl divides by sizes of the whole
step, from `global_batch_info`, and where they are missing by what the micro-batch has, empty
sequences left out. `algorithm.rollout_correction` and `rollout.temperature` are keywords of
`from_verl`. Kept differences, far from the old policy and the reference: k3 is not held at 10 (see
the traps), `gspo` bounds a mean log-ratio at 20 instead of 10, and beyond a bound a token is still
pulled back, where verl gives it no gradient.
""",
    "liger": """Liger computes in float32 whatever it is given, grpo-fast here in float64. Names are
TRL's but for `epsilon_low`, so there is no preset.
""",
}
TITLES = {
    "trl": "TRL 1.16.0: `LossConfig.from_trl(GRPOConfig(...))`",
    "verl": "verl 0.9.1: `LossConfig.from_verl(ActorConfig(...))`",
    "liger": "Liger-Kernel 0.8.5: `LigerFusedLinearGRPOLoss(...)`",
}


def load(name: str) -> ModuleType:
    """tests/parity/test_<name>.py as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"tests/parity/test_{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def theirs(options: dict[str, Any]) -> str:
    """The trainer's options as they would be written."""
    flat = {}
    for name, value in options.items():
        nested = name in ("policy_loss", "rollout_correction")
        flat |= value if nested else {name: value}
    return f"`{listed(flat)}`" if flat else "defaults"


def listed(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in options.items())


def effect(config: LossConfig) -> tuple:
    """What is left of options that say the same as no option."""
    derived = {"epsilon_high": config.clip_high, "importance_sampling_level": config.level}
    derived |= {"aggregation": config.adds_up, "delta": config.cap, "log_ratio_clamp": None}
    fields = [field.name for field in dataclasses.fields(config)]
    return tuple(derived.get(name, getattr(config, name)) for name in fields)


def ours(config: LossConfig) -> str:
    """`loss_type` and every option that changes something."""
    shown = {"loss_type": config.loss_type}
    for field in dataclasses.fields(config):
        try:
            without = effect(dataclasses.replace(config, **{field.name: field.default}))
        except ConfigError:
            without = None
        if without != effect(config):
            shown[field.name] = getattr(config, field.name)
    return f"`{listed(shown)}`"


def number(value: float) -> str:
    return f"{value:.0e}" if value else "exact"


def normalisers(module: ModuleType) -> str:
    """One row a divisor, with the loss types that have it."""
    table = getattr(module, "NORMALISERS", {})
    kinds = {text: [kind for kind in table if table[kind] == text] for text in table.values()}
    return "\n".join(f"| `{'`, `'.join(names)}` | {text} |" for text, names in kinds.items())


def section(name: str, module: ModuleType, *, measured: bool) -> str:
    lines = [f"## {TITLES[name]}", "", NOTES[name].replace("{normalisers}", normalisers(module))]
    lines += ["| there | here | loss | gradient |", "|---|---|---|---|"]
    for options in module.CASES:
        gap = module.difference(options) if measured else (0.0, 0.0)
        numbers = " | ".join(number(value) for value in gap)
        lines.append(f"| {theirs(options)} | {ours(module.translate(options))} | {numbers} |")
    lines += ["", "One name, two meanings:", "", "| trap | there | here |", "|---|---|---|"]
    lines += [f"| {trap.what} | {trap.there:.4g} | {trap.here:.4g} |" for trap in module.TRAPS]
    return "\n".join(lines) + "\n"


def page(*, measured: bool = True) -> str:
    """The page; with `exact` for every difference where nothing is `measured`."""
    sections = [section(name, load(name), measured=measured) for name in TITLES]
    return "\n".join([HEAD, *sections])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
