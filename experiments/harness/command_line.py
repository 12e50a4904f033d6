"""What `main.py` does around an experiment: its flags parsed, its errors as one line each."""

import difflib
import errno
import importlib
import importlib.util
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from experiments.harness.errors import ConfigError, RunError
from experiments.harness.processes import distributed, signals
from experiments.harness.processes.signals import Interrupted
from experiments.harness.workdir import provenance, record

EXPERIMENTS = ("all", "train", "evaluate", "sample", "variance", "sigma", "spacing")
TOGETHER = ("all", "train", "evaluate", "sample")  # that several processes can run together
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_ROOT = Path(__file__).parents[2]


def parse_flags(argv: list[str]) -> list[str]:
    """Parses the flags, after choosing a config where none is named; a mistake ends the program."""
    defaults = {"config": _default_config(argv), "verbosity": "-1"}  # warnings and worse
    missing = [f"--{k}={v}" for k, v in defaults.items() if _flag_value(argv, k) is None]
    argv = [argv[0], *missing, *argv[1:]]
    config = _flag_value(argv, "config") or ""
    try:
        _check_is_file(config)
        return flags.FLAGS(argv)
    except ConfigError as error:
        raise SystemExit(_fail(error, status=2)) from error
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        message = _misspelt_override(argv, config) or " ".join(str(error).split())
        raise SystemExit(_fail(message, status=2)) from error


def run(
    experiment: str,
    config: ConfigDict,
    workdir: str | None,
    leftover: Sequence[str] = (),
    join: Callable[[], None] = lambda: None,
) -> int:
    """Runs an experiment; returns the program's exit status.

    Args:
      experiment: its name.
      config: the config.
      workdir: the work directory, None where none is named.
      leftover: arguments that are no flags, which is a mistake.
      join: joins the other processes, where several run together.
    """
    try:
        return _run(experiment, config, workdir, leftover, join)
    except Interrupted as interrupted:
        status = _fail(interrupted, interrupted.status)
        # Where all processes leave together they do so in order.
        return status if interrupted.by_all else distributed.leave_alone(status)
    except KeyboardInterrupt:
        message = "interrupted; the same command goes on from the last checkpoint"
        return distributed.leave_alone(_fail(message, status=130))
    except ConfigError as error:
        return distributed.leave_alone(_fail(error, status=2))
    except RunError as error:
        return distributed.leave_alone(_fail(error, status=1))
    except OSError as error:
        if error.errno not in _NO_SPACE:
            _end_others()
            raise
        return distributed.leave_alone(
            _fail(
                f"workdir={workdir} cannot be written ({error.strerror}); every complete "
                "checkpoint is intact; make room, and the same command goes on",
                status=1,
            )
        )
    except Exception:
        _end_others()
        raise


def _run(
    experiment: str,
    config: ConfigDict,
    workdir: str | None,
    leftover: Sequence[str],
    join: Callable[[], None],
) -> int:
    module = importlib.import_module(f"experiments.{experiment}")
    if leftover:
        raise ConfigError(f"{leftover[0]!r} is no flag; flags begin with --, as in --workdir=…")
    join()
    if experiment not in TOGETHER:
        distributed.require_one_process(f"--experiment={experiment}")
    module.check(config.lock())
    if not workdir:
        raise ConfigError("--workdir is missing; name a directory, as in --workdir=runs/digits")
    with signals.listening(), _told_once():
        module.run(config, workdir)
    return 0


def _end_others() -> None:
    """As `devices.leave_alone`, of an error that is nobody's but ours: with its traceback."""
    if distributed.is_one_of_several():
        traceback.print_exc()
        distributed.leave_alone(1)


@contextmanager
def _told_once() -> Iterator[None]:
    """In the body only the first of several processes prints; errors are everyone's."""
    if distributed.is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def _fail(message: object, status: int) -> int:
    """One line to standard error."""
    print(f"error: {message}", file=sys.stderr)
    return status


def _default_config(argv: list[str]) -> str:
    """The work directory's own config where it holds a run, else the digits."""
    workdir = _flag_value(argv, "workdir")
    try:
        has_run = bool(workdir) and record.recorded_config(workdir) is not None
    except (OSError, ValueError):
        has_run = False
    return f"{_ROOT}/configs/recorded.py:{workdir}" if has_run else f"{_ROOT}/configs/digits.py"


def _flag_value(argv: list[str], name: str) -> str | None:
    """A flag's value, given as --name=value or as --name value."""
    for position, argument in enumerate(argv):
        match = re.fullmatch(rf"--?{name}(?:=(.*))?", argument, re.DOTALL)
        if match and match[1] is not None:
            return match[1]
        if match and position + 1 < len(argv):
            return argv[position + 1]
    return None


def _check_is_file(config: str) -> None:
    """Raises ConfigError unless the part of --config before a colon is a file."""
    if not Path(config.partition(":")[0]).is_file():
        known = sorted(f"configs/{p.name}" for p in (_ROOT / "configs").glob("[!_]*.py"))
        raise ConfigError(f"--config={config} is no file; known: {', '.join(known)}")


def _misspelt_override(argv: list[str], config: str) -> str | None:
    """The first override that names no setting, with the settings that it may have meant."""
    path, _, argument = config.partition(":")
    try:
        spec = importlib.util.spec_from_file_location("config_file", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tree = module.get_config(*([argument] if argument else [])).to_dict()
    except Exception:  # the config file itself is wrong: the first error says how
        return None
    names = set(provenance.flatten(tree))
    sections = {name.rsplit(".", 1)[0] for name in names if "." in name}
    for argument in argv:
        match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if match and match[1] not in names | sections:
            close = difflib.get_close_matches(match[1], sorted(names), n=1, cutoff=0.5)
            hint = f"; did you mean --config.{close[0]}?" if close else ""
            return f"--config.{match[1]} is no setting of {path}{hint}"
    return None
