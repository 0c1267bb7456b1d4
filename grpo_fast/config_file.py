"""A YAML file to a `TrainConfig`, checked key by key; every error names file and key."""

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any, Literal

import yaml

from .config import TrainConfig
from .errors import ConfigError, nearest
from .loss_config import LossConfig

# Inputs a config file may name relative to itself.
_PATH_FIELDS = ("model", "dataset", "eval_dataset", "reward")
# TRL's names of options that have another one here, whose likeness may be to something else.
TRL_NAMES = {
    "model_name_or_path": "model",
    "dataset_name": "dataset",
    "reward_funcs": "reward",
    "num_generations": "group_size",
    "per_device_train_batch_size": "token_budget",
    "gradient_accumulation_steps": "token_budget",
    "num_train_epochs": "max_steps",
    "eval_steps": "eval_every",
    "save_steps": "save_every",
    "logging_steps": "log_every",
}


def read_config(path: str | Path) -> dict[str, Any]:
    """`yaml.safe_load(open(path))` with every key and type checked against `TrainConfig`; no
    defaults filled in.

    A relative input path that exists beside the file is meant relative to the file, any other to
    the working directory. Raises ConfigError naming file, key, value and what was expected.
    """
    path = Path(path)
    return checked_values(path, read_mapping(path), where=str(path))


def read_mapping(path: Path) -> dict[str, Any]:
    """`yaml.safe_load(open(path))`, which must be `key: value` lines without a key given twice."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        raise ConfigError(
            f"config file {path} does not exist: check the path after --config"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(
            f"config file {path} is not YAML: {' '.join(str(error).split())}"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"config file {path} holds {type(values).__name__}, expected `key: value` lines"
        )
    return values


def checked_values(path: Path, values: dict[str, Any], *, where: str) -> dict[str, Any]:
    """`values`, which stand in the file `path`, checked as in `read_config`."""
    checked = parse_fields(TrainConfig, values, where=where)
    for name in _PATH_FIELDS:
        if isinstance(checked.get(name), str):
            checked[name] = _beside(path.parent, checked[name])
        elif isinstance(checked.get(name), tuple):
            checked[name] = tuple(_beside(path.parent, item) for item in checked[name])
    return checked


class _Loader(yaml.SafeLoader):
    """Refuses a key given twice, which YAML would settle in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """A mapping whose keys, `-` and `_` taken as one, are all different."""
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value).replace("-", "_")
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key '{key}' is given twice: keep one", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _beside(folder: Path, name: str) -> str:
    file = name.partition(":")[0]
    # An empty name is the folder itself, which exists.
    relative = file and not Path(file).is_absolute()
    return str(folder / name) if relative and (folder / file).exists() else name


def parse_fields(cls: type, values: dict[str, Any], *, where: str) -> dict[str, Any]:
    """Check keys and convert values of a plain mapping to the field types of dataclass `cls`."""
    hints = typing.get_type_hints(cls)
    parsed: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            raise ConfigError(
                f"{where}: unknown key '{key}': {_meant(name, hints)}known keys are "
                f"{', '.join(sorted(hints))}"
            )
        parsed[name] = _parse(hints[name], value, where=where, key=str(key))
    return parsed


def _meant(name: str, hints: dict[str, Any]) -> str:
    for block, kind in hints.items():
        if dataclasses.is_dataclass(kind) and name in typing.get_type_hints(kind):
            return f"it belongs in the block under '{block}:'; "
    return nearest(TRL_NAMES.get(name, name), hints)


def _parse(kind: Any, value: Any, *, where: str, key: str) -> Any:
    origin = typing.get_origin(kind)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(
                f"{where}: {key} = {value!r}, expected a block of `option: value` lines"
            )
        return parse_fields(kind, value, where=f"{where}: {key}")
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        inner = next(arm for arm in typing.get_args(kind) if arm is not type(None))
        return _parse(inner, value, where=where, key=key)
    if origin is tuple:
        items = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_parse(typing.get_args(kind)[0], item, where=where, key=key) for item in items)
    if origin is Literal or kind is str:
        if isinstance(value, str):
            return value
    elif kind is bool:
        if isinstance(value, bool):
            return value
    elif kind is int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    elif kind is float and not isinstance(value, bool):
        # YAML 1.1 reads `1e-6` as text; every trainer's users write it.
        try:
            return float(value)
        except (TypeError, ValueError):
            pass  # refused below, like any other wrong type
    name = "text" if kind is str or origin is Literal else kind.__name__
    raise ConfigError(f"{where}: {key} = {value!r} is {type(value).__name__}, expected {name}")


def build_config(values: dict[str, Any]) -> TrainConfig:
    """`TrainConfig(**values)` for the mapping of `read_config`, where `loss` is still a mapping."""
    values = dict(values)
    if isinstance(values.get("loss"), dict):
        values["loss"] = LossConfig(**values["loss"])
    required = [
        item.name for item in dataclasses.fields(TrainConfig) if item.default is dataclasses.MISSING
    ]
    missing = [name for name in required if name not in values and name != "loss"]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)} not given: set it in the config file or as --{missing[0]}"
        )
    return TrainConfig(**values)
