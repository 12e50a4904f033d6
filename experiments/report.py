"""A page of what work directories hold: results, curves, plots, samples, settings and versions.

It only reads, computes nothing on a device, and can be made while a run trains.
"""

from collections.abc import Iterator, Sequence

from etils import epath
from ml_collections import ConfigDict

from experiments.harness import paths
from experiments.harness.errors import ConfigError
from experiments.harness.processes import distributed
from experiments.harness.reports.comparison import distinct_names
from experiments.harness.reports.contents import CELLS, Contents, read_contents
from experiments.harness.reports.page import render
from experiments.harness.workdir.files import replace

REPORT_FILE = "report.html"


def run(config: ConfigDict, workdir: epath.PathLike, *others: epath.PathLike) -> None:
    """Writes the page and prints its path."""
    print(f"the report is in {report(config, workdir, *others)}")


def report(config: ConfigDict, workdir: epath.PathLike, *others: epath.PathLike) -> epath.Path:
    """Writes the page of one directory, or of several side by side.

    Args:
      config: `report.file` says where the page is written.
      workdir: a work directory, or that of a study. It may be in training, and its files damaged.
      *others: further ones. Those that hold nothing are named in the page.

    Returns:
      The page's path: report.html in the first directory, unless `report.file` says otherwise.

    Raises:
      ConfigError: if there is nothing to show, or the page cannot be written.
    """
    check(config)
    directories = list(_directories(workdir, others))
    target = config.report.file and paths.expanded(config.report.file, "config.report.file")
    target = epath.Path(target or directories[0] / REPORT_FILE)
    if not distributed.is_first():
        return target
    studies, runs, skipped = _read(directories)
    if not runs and not studies:
        raise ConfigError(
            f"workdir={workdir} holds nothing to report ({'; '.join(skipped)}); train first"
        )
    try:
        replace(target, render(runs, studies, skipped).encode(errors="replace"))
    except OSError as error:
        raise ConfigError(
            f"{target} cannot be written ({error.strerror}); give another file: "
            "--config.report.file=PATH"
        ) from error
    return target


def check(config: ConfigDict) -> None:
    """Raises ConfigError for settings that `report` can't use; compiles nothing."""
    file = config.report.file
    if file and epath.Path(file).is_dir():
        raise ConfigError(f"config.report.file = {file!r} is a directory; give a file")


def _directories(workdir: epath.PathLike, others: Sequence[epath.PathLike]) -> Iterator[epath.Path]:
    """The directories, each once."""
    seen = set()
    for setting, given in (("--workdir", workdir), *((f"{other}", other) for other in others)):
        path = epath.Path(paths.expanded(str(given), setting))
        if (resolved := path.resolve()) not in seen:
            seen.add(resolved)
            yield path


def _read(
    directories: Sequence[epath.Path],
) -> tuple[list[Contents], list[Contents], list[str]]:
    """The studies, the runs with those of the studies, and a line for each other directory."""
    studies, runs, skipped = [], [], []
    for path, name in zip(directories, distinct_names(directories), strict=True):
        if not path.is_dir():
            skipped.append(f"{path} is {'a file' if path.exists() else 'no directory'}")
            continue
        contents = read_contents(path, name)
        if contents.is_study:
            studies.append(contents)
            prefix = f"{name}/" if len(directories) > 1 else ""
            cells = sorted(cell for cell in (path / CELLS).glob("*") if cell.is_dir())
            contents_of_cells = (read_contents(cell, f"{prefix}{cell.name}") for cell in cells)
            runs += [cell for cell in contents_of_cells if not cell.is_empty]
        elif contents.is_empty:
            skipped.append(f"{path} holds nothing")
        else:
            runs.append(contents)
    return studies, runs, skipped
