"""`python main.py …` in a process that is forked from one that has imported all of it.

Many commands then run in the time of few. What a user types and reads is the same: the flags, both
outputs and the exit status.
"""

import multiprocessing
import os
import pathlib
import runpy
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping
from typing import NamedTuple

# JAX warns at every fork; but no device is in use yet.
warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)

ROOT = pathlib.Path(__file__).parents[2]
_IMPORTED = ("experiments.all", "experiments.harness.command_line", "grain", "tensorflow_datasets")


class Ended(NamedTuple):
    """How a command ended.

    Attributes:
      status: the exit status; None if it was killed.
      stdout, stderr: what it printed.
      seconds: processor time, without that of the imports.
    """

    status: int | None
    stdout: str
    stderr: str
    seconds: float


def run(
    flags: list[str],
    directory: pathlib.Path = ROOT,
    environment: Mapping[str, str] | None = None,
    limit: float = 120.0,
) -> Ended:
    """Runs `main.py` with some flags.

    Args:
      flags: what follows `python main.py`.
      directory: the working directory.
      environment: further variables; PYTHONIOENCODING is obeyed.
      limit: seconds after which it is killed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_IMPORTED, __name__])
    with tempfile.TemporaryDirectory() as printed:
        arguments = (flags, str(directory), dict(environment or {}), printed)
        process = context.Process(target=_main, args=arguments)
        process.start()
        process.join(limit)
        status = process.exitcode
        if status is None:
            process.kill()
            process.join()
        outputs = [_read(printed, name) for name in ("stdout", "stderr")]
        seconds = float(_read(printed, "seconds") or limit)
        return Ended(status, *outputs, seconds)


def _read(directory: str, name: str) -> str:
    path = pathlib.Path(directory) / name
    return path.read_bytes().decode(errors="replace") if path.exists() else ""


def _main(flags: list[str], directory: str, environment: dict[str, str], printed: str) -> None:
    """In the new process: what Python does with a program, then its end."""
    os.chdir(directory)
    os.environ.update(environment)
    encoding = environment.get("PYTHONIOENCODING", "utf-8")
    for number, name, errors in ((1, "stdout", "strict"), (2, "stderr", "backslashreplace")):
        file = open(f"{printed}/{name}", "w", encoding=encoding, errors=errors)  # noqa: SIM115
        os.dup2(file.fileno(), number)
        setattr(sys, name, file)
    status = 0
    sys.argv = ["main.py", *flags]
    sys.path.insert(0, str(ROOT))
    try:
        runpy.run_path(str(ROOT / "main.py"), run_name="__main__")
    except SystemExit as end:
        status = _status(end.code)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    pathlib.Path(printed, "seconds").write_text(str(time.process_time()))
    os._exit(status)


def _status(code: object) -> int:
    """The exit status that Python makes of the argument of `sys.exit`."""
    if code is None or isinstance(code, int):
        return code or 0
    print(code, file=sys.stderr)
    return 1
