"""The demo made sick on purpose, `grpo-fast demo --fault NAME`, and what the doctor says of it.

The faults stand in `examples/faults.yaml`, what they need beside a config in `examples/faults.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config_file import checked_values, read_mapping
from .doctor import diagnose
from .doctor_rules import RULES
from .errors import ConfigError, nearest
from .plugins import load_function
from .runlog import read_metrics, read_saved_config

FILE = "faults.yaml"
# A fault is there from the first step, and a quarter of the prompts shows it as well.
SHORT = {"max_steps": 40, "prompts_per_step": 8, "eval_every": 5, "save_every": 0}


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    about: str
    rule: str
    """The doctor's rule that should speak."""
    change: dict[str, Any]
    """Of the demo's config."""
    prepare: Callable[[Any], None] | None
    """Called with the parts of the run before its first step."""


def read_faults(folder: Path) -> dict[str, Fault]:
    """The faults of `folder`/faults.yaml by name, files beside it found."""
    faults, path = {}, folder / FILE
    for name, block in read_mapping(path).items():
        change = checked_values(path, block["change"], where=f"{path}: {name}")
        change = SHORT | {"output_dir": f"runs/demo-fault-{name}"} | change
        spec = block.get("prepare")
        prepare = None if spec is None else load_function(str(folder / spec))
        faults[name] = Fault(name, block["about"], block["rule"], change, prepare)
    return faults


def pick_fault(faults: Mapping[str, Fault], name: str) -> Fault:
    """Raises ConfigError with the nearest name."""
    if name not in faults:
        raise ConfigError(
            f"unknown fault '{name}': {nearest(name, faults)}`grpo-fast demo --fault list` names "
            "them all"
        )
    return faults[name]


def split_fault(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """(name after --fault, or None, the other arguments)."""
    names, others = [], []
    items = iter(arguments)
    for item in items:
        option, equals, name = item.partition("=")
        if option == "--fault":
            names.append(name if equals else next(items, ""))
        else:
            others.append(item)
    if len(names) > 1:
        raise ConfigError(f"--fault given twice ({', '.join(names)}): one run has one fault")
    if names and (not names[0] or names[0].startswith("-")):
        raise ConfigError("--fault needs a name: `grpo-fast demo --fault list` names them all")
    return (names[0] if names else None), others


def listed(faults: Mapping[str, Fault]) -> str:
    """One line a fault."""
    width = max(map(len, faults))
    lines = [f"  {f.name:<{width}}  {f.rule:<3}  {f.about}" for f in faults.values()]
    return "\n".join(["faults, the doctor's rule that should speak, what is wrong:", *lines])


def heard(folder: str | Path, fault: Fault | None) -> str:
    """What the doctor says of the run in one line, and whether that was expected."""
    doctor = diagnose(read_metrics(folder), read_saved_config(folder))
    alarms = [found for found in doctor.ranked() if found.rule.id in doctor.alarms]
    said = ", ".join(f"{f.severity} {f.rule.id} {f.rule.name}" for f in alarms)
    said = f"doctor: {said or 'nothing above info'}"
    if fault is None:
        return said
    name = next(rule.name for rule in RULES if rule.id == fault.rule)
    step = doctor.alarms.get(fault.rule)
    found = "not found" if step is None else f"found at step {step}"
    return f"{said} | expected of {fault.name}: {fault.rule} {name}, {found}"
