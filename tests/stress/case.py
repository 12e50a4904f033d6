"""What a bad input is: flags, files, and what the error line contains."""

import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tests.stress import command


class Case(NamedTuple):
    """A bad input.

    Attributes:
      name: its name in the table.
      flags: those of `main.py`. {here} stands for a new directory; the first flag is
        --workdir={here}/run, unless they have one.
      contained: a text that the error line contains.
      make: writes files into the new directory, or beneath it.
      environment: further variables; {here} as in flags.
      directory: the working directory; {here} as in flags.
    """

    name: str
    flags: tuple[str, ...]
    contained: str
    make: Callable[[pathlib.Path], Any] = lambda here: None
    environment: Mapping[str, str] = {}
    directory: str = str(command.ROOT)


def write(name: str, content: bytes, here: pathlib.Path) -> None:
    (here / name).parent.mkdir(parents=True, exist_ok=True)
    (here / name).write_bytes(content)
