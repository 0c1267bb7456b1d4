"""Command lines of this folder: a wrong one ends with exit code 2 and one line."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

from grpo_fast.model_shapes import MODELS

from .provider import DTYPES
from .timing import pick_device


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` without the usage block above its errors; descriptions keep their
    line breaks."""

    def __init__(self, prog: str, description: str, epilog: str | None = None):
        super().__init__(
            prog=prog,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}: see {self.prog} --help\n")

    def add_place(self) -> None:
        """`--device` and `--json`."""
        self.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
        self.add_argument("--json", type=Path, metavar="FILE", help="write header and rows to FILE")

    def add_step(self) -> None:
        """`--model`, `--dtype`, `--threads` and `--plot` of the tables of a whole step."""
        self.add_model()
        self.add_argument("--plot", type=Path, metavar="FILE", help="draw the table into a PNG")

    def add_model(self, default: str = "small") -> None:
        """`--model`, `--dtype` and `--threads`."""
        self.add_argument("--model", choices=MODELS, default=default, help=f"(default: {default})")
        self.add_argument("--dtype", choices=DTYPES, default="float32")
        self.add_argument("--threads", type=int, default=1, help="of each step (default: 1)")

    def device(self, name: str) -> torch.device:
        found = pick_device(name)
        if found.type == "cuda" and not torch.cuda.is_available():
            self.error("--device cuda, but PyTorch finds no CUDA device here")
        return found

    def add_shape(self, default: tuple[int, ...], letters: str = "NDV", *, sweep: bool = False):
        """`--shape`; in a sweep it may be given again, and `--model` with `--tokens` adds to it."""
        words = " ".join(map(str, default))
        names = ", ".join(
            {"N": "tokens", "D": "hidden size", "V": "vocabulary"}[x] for x in letters
        )
        self.add_argument(
            "--shape",
            type=int,
            nargs=len(letters),
            metavar=tuple(letters),
            default=None if sweep else default,
            action="append" if sweep else "store",
            help=f"{names} (default: {words})" + "; may be given again" * sweep,
        )
        if sweep:
            self.add_argument("--model", choices=MODELS, help="whose sizes to take, with --tokens")
            self.add_argument("--tokens", type=int, nargs="+", metavar="N", help="of --model")

    def shape(self, given: Sequence[int], sequences: int) -> tuple[int, ...]:
        if min(given) < 1 or given[0] % sequences:
            found = " ".join(map(str, given))
            self.error(f"--shape {found}: sizes from 1, tokens a multiple of {sequences}")
        return tuple(given)

    def shapes(self, options: argparse.Namespace, letters: str, sequences: int) -> list[tuple]:
        """Those of a sweep; empty where none was given."""
        if (options.model is None) != (options.tokens is None):
            self.error("--model and --tokens go together")
        asked = list(options.shape or ())
        if options.model is not None:
            model = MODELS[options.model]
            sizes = {"D": model.hidden, "V": model.vocabulary}
            asked += [[n] + [sizes[x] for x in letters[1:]] for n in options.tokens]
        return [self.shape(shape, sequences) for shape in asked]
