"""Console script `grpo-fast`: train, demo, plan, report, doctor, diff, bench, parity, env; options
of train from `TrainConfig`."""

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import os
import platform
import re
import shlex
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .config_file import TRL_NAMES, build_config, read_config
from .errors import ConfigError, GrpoFastError, nearest
from .loss_config import LossConfig

INTERRUPTED = 130
# As a shell reports a program that SIGPIPE ended.
READER_LEFT = 141
_PROGRAM = "grpo-fast"
# What Python says of a value that is no number, and what a person expects to read.
_SAID = (
    (r"invalid literal for int\(\) with base 10: (.+)", "a whole number"),
    (r"could not convert string to float: (.+)", "a number"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 the user can mend it, 1 a defect, 130
    interrupted, 141 nobody reads on (`| head`). Errors are one line on standard error; `--debug`
    anywhere shows the traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [item for item in arguments if item != "--debug"]
    try:
        code = _dispatch(arguments)
        # At exit it would be too late to tell a reader that left from a defect.
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # What Python still has to write at exit must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_LEFT
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except GrpoFastError as error:
        if debug:
            traceback.print_exc()
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except Exception as error:
        if debug:
            traceback.print_exc()
            return 1
        print(
            f"internal error: {type(error).__name__}: {_one_line(error)} "
            "(run with --debug for the traceback)",
            file=sys.stderr,
        )
        return 1


def train_command(arguments: Sequence[str]) -> int:
    """train with GRPO: [--config FILE.yaml] [--key value ...]"""
    if {"-h", "--help"} & set(arguments):
        _print_train_help(arguments)
        return 0
    return _train(train_config(arguments), ["train", *arguments])


def _train(config: TrainConfig, words: Sequence[str], **options: Any) -> int:
    """Train as the command `words` says, and the exit code."""
    from .trainer import train

    again = [item for item in words if item not in ("--resume", "--no-resume")]
    resume = f"resume with: {shlex.join([_called_as(), *again, '--resume'])}"
    try:
        result = train(config, **options)
    except KeyboardInterrupt:
        saved = any(Path(config.output_dir, "checkpoints").glob("step-*"))
        print(f"interrupted{f': {resume}' if saved else ', nothing was saved yet'}")
        return INTERRUPTED
    if result.interrupted:
        print(f"interrupted after step {result.step}: {resume}")
        return INTERRUPTED
    print(
        f"{Path(result.output_dir).resolve().name}: reward {result.eval_before:.2f} -> "
        f"{result.eval_after:.2f} in {result.seconds:.0f} s | report: {result.report}"
    )
    return 0


def demo_command(arguments: Sequence[str]) -> int:
    """train the small arithmetic model of the examples: [--fault NAME|list] [--key value ...]"""
    from .faults import heard, listed, pick_fault, read_faults, split_fault

    spec = importlib.util.find_spec("grpo_examples")
    assert spec is not None, "setup.py installs examples/ as grpo_examples"
    folder = Path(next(iter(spec.submodule_search_locations or ())))
    name, flags = split_fault(arguments)
    flags = ["--config", str(folder / "demo.yaml"), *flags]
    if {"-h", "--help"} & set(arguments):
        _print_train_help(flags, "demo [--fault NAME]")
    if name == "list" or {"-h", "--help"} & set(arguments):
        print(listed(read_faults(folder)))
        return 0
    if name is None:
        config, fault, prepare = train_config(flags), None, {}
        words = ["train", *flags]
    else:
        fault = pick_fault(read_faults(folder), name)
        config, words = train_config(flags, fault.change), ["demo", *arguments]
        prepare = {"prepare": fault.prepare} if fault.prepare else {}
    code = _train(config, words, **prepare)
    if code == 0:
        print(heard(config.output_dir, fault))
    return code


def plan_command(arguments: Sequence[str]) -> int:
    """estimate memory and time of an update: [--model M --gpu GPU --group-size G ...]"""
    from .plan_command import main

    return main(arguments)


def report_command(arguments: Sequence[str]) -> int:
    """write the report of a run, finished or not, of any trainer: RUN [--out FILE]"""
    rest, out = list(arguments), None
    if "--out" in rest[:-1]:
        at = rest.index("--out")
        _, out = rest.pop(at), rest.pop(at)
    if len(rest) != 1 or rest[0].startswith("-"):
        raise ConfigError(f"report takes one run folder: {_PROGRAM} report runs/demo [--out FILE]")
    from .report import write_report

    print(write_report(rest[0], out))
    return 0


def doctor_command(arguments: Sequence[str]) -> int:
    """name what is wrong with a run and which option to change: RUN [--json ...]"""
    from .doctor_command import main

    return main(arguments)


def diff_command(arguments: Sequence[str]) -> int:
    """say where two runs part: RUN_A RUN_B [--rtol X] [--json]"""
    from .diff_command import main

    return main(arguments)


def bench_command(arguments: Sequence[str]) -> int:
    """measure the kernels; --static compiles them for every target without a GPU"""
    return importlib.import_module("grpo_bench.main").main(list(arguments))


def parity_command(arguments: Sequence[str]) -> int:
    """hold the loss against that of a trainer installed here: --host trl|liger|verl"""
    return importlib.import_module("grpo_bench.parity").main(list(arguments))


def env_command(arguments: Sequence[str]) -> int:
    """show versions, the device, and which implementation 'auto' is here"""
    if arguments:
        raise ConfigError(f"env takes no arguments, found '{arguments[0]}'")
    import torch

    from .implementation import resolve_impl

    device = "cuda" if torch.cuda.is_available() else "cpu"
    names = ("torch", "triton", "transformers", _PROGRAM)
    rows = [("python", platform.python_version()), *((name, _version(name)) for name in names)]
    about = f"{device}, {torch.get_num_threads()} threads"
    rows.append(("device", torch.cuda.get_device_name() if device == "cuda" else about))
    rows.append(("impl auto", resolve_impl("auto", torch.empty(0, device=device))))
    for name, value in rows:
        print(f"{name:<13} {value}")
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": train_command,
    "demo": demo_command,
    "plan": plan_command,
    "report": report_command,
    "doctor": doctor_command,
    "diff": diff_command,
    "bench": bench_command,
    "parity": parity_command,
    "env": env_command,
}


def train_config(arguments: Sequence[str], change: Mapping[str, Any] | None = None) -> TrainConfig:
    """`TrainConfig` from the YAML file after --config, overridden by `change`, then by the other
    options.

    Raises ConfigError naming the file, key or option, what was found and what was expected.
    """
    values, flags = _split_config(arguments)
    for name, value in (change or {}).items():
        nested = isinstance(value, Mapping)
        values[name] = values.get(name, {}) | value if nested else value
    if not flags:
        return build_config(values)
    _check_options(flags)
    tyro = _import_tyro()
    captured = io.StringIO()
    try:
        # A wrong choice in the file may be overridden by an option; TrainConfig checks the outcome.
        with contextlib.redirect_stderr(captured), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return tyro.cli(
                TrainConfig, args=flags, default=_partial(tyro, values), prog=f"{_PROGRAM} train"
            )
    except SystemExit as stop:
        cause: BaseException | None = stop
        while cause is not None and not isinstance(cause, GrpoFastError):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        raise ConfigError(_from_box(captured.getvalue())) from None


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name == "--version":
        print(f"{_PROGRAM} {_version(_PROGRAM)}")
        return 0
    if name not in COMMANDS:
        raise ConfigError(
            f"unknown command '{name}': {nearest(name, COMMANDS)}commands are {', '.join(COMMANDS)}"
        )
    if name in ("report", "env") and {"-h", "--help"} & set(rest):
        print(f"{_PROGRAM} {name}: {COMMANDS[name].__doc__}")
        return 0
    return COMMANDS[name](rest)


def _usage() -> str:
    lines = [f"  {name:<8} {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {_PROGRAM} [--version] [--debug] COMMAND ...",
            "",
            *lines,
            "",
            f"`{_PROGRAM} train --help` explains every option; --debug shows tracebacks.",
        ]
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _called_as() -> str:
    """`grpo-fast` where a shell finds this one under that name, else its path as it was called."""
    called, found = Path(sys.argv[0]), shutil.which(_PROGRAM)
    if called.name != _PROGRAM or (found and Path(found).resolve() == called.resolve()):
        return _PROGRAM
    return str(called)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or "no message"


def _split_config(arguments: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """(values of the YAML file, or none, the other arguments)."""
    files, flags = [], []
    items = iter(arguments)
    for item in items:
        name, equals, file = item.partition("=")
        if name != "--config":
            flags.append(item)
        else:
            files.append(file if equals else next(items, ""))
    if len(files) > 1:
        raise ConfigError(f"--config given twice ({files[0]}, {files[1]}): one file makes one run")
    if files and (not files[0] or files[0].startswith("--")):
        raise ConfigError("--config needs a file: --config examples/demo.yaml")
    return (read_config(files[0]) if files else {}), flags


def _check_options(flags: Sequence[str]) -> None:
    """Refuse an option that is no field, naming the nearest one, and a list given in two parts."""
    fields = [("--", field) for field in dataclasses.fields(TrainConfig) if field.name != "loss"]
    fields += [("--loss.", field) for field in dataclasses.fields(LossConfig)]
    options = {prefix + field.name.replace("_", "-") for prefix, field in fields}
    switches = {
        f"{prefix}no-{field.name.replace('_', '-')}"
        for prefix, field in fields
        if field.type is bool
    }
    given = [flag.partition("=")[0].replace("_", "-") for flag in flags]
    for option in ("--reward", "--reward-weights"):
        # A second value replaces the first one; of a list, that would lose entries in silence.
        if given.count(option) > 1:
            raise ConfigError(f"{option} given twice: put all values after one, {option} A B")
    for flag, option in zip(flags, given, strict=True):
        if option.startswith("--") and option not in options | switches:
            name = option[2:].replace("-", "_")
            meant = "--" + TRL_NAMES.get(name, name).replace("_", "-")
            raise ConfigError(
                f"unknown option {flag.partition('=')[0]}: {nearest(meant, options)}"
                f"`{_PROGRAM} train --help` lists all"
            )


def _import_tyro() -> Any:
    try:
        import tyro
    except ModuleNotFoundError:
        raise ConfigError(
            "options on the command line need the package tyro: pip install 'tyro>=1.0', or put "
            "every option in the file after --config"
        ) from None
    return tyro


def _partial(tyro: Any, values: dict[str, Any]) -> TrainConfig:
    """A `TrainConfig` that was never checked, its gaps marked: tyro fills them and builds the real
    one."""

    def fill(cls: type, given: dict[str, Any]) -> Any:
        made = object.__new__(cls)
        for field in dataclasses.fields(cls):
            value = tyro.MISSING_NONPROP
            if field.name in given:
                value = given[field.name]
            elif field.default is not dataclasses.MISSING:
                value = field.default
            object.__setattr__(made, field.name, value)
        return made

    return fill(TrainConfig, values | {"loss": fill(LossConfig, values.get("loss", {}))})


def _print_train_help(arguments: Sequence[str], command: str = "train") -> None:
    """Every field with its docstring and default; defaults are the file's where one is given."""
    values, _ = _split_config([item for item in arguments if item not in ("-h", "--help")])
    tyro = _import_tyro()
    about = (
        "--config FILE.yaml is read first, options override it; --debug shows tracebacks. "
        + " ".join((TrainConfig.__doc__ or "").split())
    )
    with contextlib.suppress(SystemExit), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tyro.cli(
            TrainConfig,
            args=["--help"],
            default=_partial(tyro, values),
            prog=f"{_PROGRAM} {command}",
            description=about,
        )


def _from_box(box: str) -> str:
    """The message in tyro's framed error: sentences, and options without their explanations."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()
    parts: list[str] = []
    # The first line is the title; the frame is two columns wide, drawn or blank.
    for line in lines[1:]:
        text = line[2:].removesuffix("│").rstrip()
        if not text.strip("─-╰╯ "):
            continue
        if text.startswith(("For full helptext", "Argument helptext")):
            break
        # Explanations stand deeper than the options they explain.
        if len(text) - len(text.lstrip()) <= 4:
            parts.append(text.strip())
    message = " ".join(parts)
    for said, meant in _SAID:
        message = re.sub(f"Error parsing (--\\S+): {said}", rf"\1 = \2, expected {meant}", message)
    return f"{message} (see {_PROGRAM} train --help)"


if __name__ == "__main__":
    sys.exit(main())
