"""Command lines of this folder: a wrong one ends with exit code 2 and one line."""

import argparse
from typing import NoReturn


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
