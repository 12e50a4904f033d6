"""What `main.py` does around an experiment: its errors become one line each."""

import errno
import importlib
import importlib.util
import keyword
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout

from ml_collections import ConfigDict

from experiments.harness.errors import ConfigError, RunError, one_line
from experiments.harness.processes import distributed, signals
from experiments.harness.processes.signals import Interrupted
from experiments.harness.workdir import record

TOGETHER = ("all", "train", "evaluate", "sample")  # that several processes can run together
REPORT = "report"  # takes several work directories, in any state
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


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
      leftover: arguments that are no flags: further work directories of a report, else a mistake.
      join: joins the other processes, where several run together.
    """
    try:
        return _run(experiment, config, workdir, leftover, join)
    except Interrupted as interrupted:
        status = _fail(interrupted, interrupted.status)
        if interrupted.by_all and distributed.is_one_of_several():
            return status  # all leave together, in order
        return distributed.exit_without_waiting(status)
    except KeyboardInterrupt:
        message = "interrupted; the same command goes on from the last checkpoint"
        return distributed.exit_without_waiting(_fail(message, status=130))
    except ConfigError as error:
        return distributed.exit_without_waiting(_fail(error, status=2))
    except RunError as error:
        return distributed.exit_without_waiting(_fail(error, status=1))
    except OSError as error:
        if error.errno not in _NO_SPACE:
            _end_others()
            raise
        return distributed.exit_without_waiting(
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
    # A module cannot have the name of a keyword, `import`.
    name = experiment + "_" * keyword.iskeyword(experiment)
    module = importlib.import_module(f"experiments.{name}")
    if leftover and experiment != REPORT:
        raise ConfigError(
            f"{leftover[0]!r} is no flag; flags begin with --, as in --workdir=…; only "
            f"--experiment={REPORT} takes further directories"
        )
    join()
    if experiment not in TOGETHER:
        distributed.require_one_process(f"--experiment={experiment}")
    if not workdir:
        raise ConfigError("--workdir is missing; name a directory, as in --workdir=runs/digits")
    with signals.listening(), _first_prints():
        if experiment != REPORT:
            record.open_run(workdir)
        module.run(config.lock(), workdir, *leftover)
    return 0


def _end_others() -> None:
    """Ends all processes, if there are several, after an unexpected error with its traceback."""
    if distributed.is_one_of_several():
        traceback.print_exc()
        distributed.exit_without_waiting(1)


@contextmanager
def _first_prints() -> Iterator[None]:
    """In the body only the first of several processes prints results; all print errors."""
    if distributed.is_first():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        yield


def _fail(message: object, status: int) -> int:
    """One line to standard error."""
    print(f"error: {one_line(message)}", file=sys.stderr)
    return status
