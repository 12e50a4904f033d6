"""The trainings of a study, and which process works on which of them.

Cells that differ only in how a network is measured share its training. Processes share the
trainings by locks: each takes one that no other process holds. The system unlocks a file when its
process ends, so that another process takes over what a dead one has left.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments.harness.errors import ConfigError
from experiments.harness.study.axes import Study, file_name, identity
from experiments.harness.study.summary import Key
from experiments.harness.workdir import lock, record
from experiments.harness.workdir.dependences import WEIGHTS

CELLS = "cells"  # the directory of all trainings
_LOCK = "cell.lock"
_TABLE_LOCK = "table.lock"
_SECONDS = 2.0  # between two attempts to take a training that another process holds


class Training(NamedTuple):
    """A network of a study: one run in a work directory of its own.

    Attributes:
      name: the name of its work directory.
      config: its config.
      cells: the cells that are measured with this network.
    """

    name: str
    config: ConfigDict
    cells: tuple[Key, ...]

    def directory(self, workdir: epath.PathLike) -> epath.Path:
        return epath.Path(workdir) / CELLS / self.name


def trainings(study: Study, valid: Sequence[Key], seeds: Sequence[int]) -> list[Training]:
    """The trainings of a study, those of the baseline first.

    Args:
      study: the study.
      valid: the cells that can be trained, in the order of the grid.
      seeds: the training seeds.
    """
    groups: dict[str, list[Key]] = {}
    identities = {key: json.dumps(identity(WEIGHTS, config)) for key, config in study.cells.items()}
    for key in valid:
        groups.setdefault(identities[key], []).append(key)
    places = [
        place
        for place in range(len(study.axes))
        if len({(_without(key, place), identity) for key, identity in identities.items()})
        > len({_without(key, place) for key in identities})
    ]
    result = []
    for keys in groups.values():
        for seed in seeds:
            config = study.cells[keys[0]].copy_and_resolve_references()
            config.seed = seed
            name = file_name([*(keys[0][place] for place in places), f"seed={seed}"])
            result.append(Training(name, config.lock(), tuple(keys)))
    return sorted(result, key=lambda training: study.baseline not in training.cells)


def _without(key: Key, place: int) -> Key:
    return key[:place] + key[place + 1 :]


def check_locks(workdir: epath.PathLike, number: int) -> None:
    """Raises ConfigError if processes can't share a study here.

    Args:
      workdir: the study's directory.
      number: of its trainings.
    """
    try:
        with lock.attempted(epath.Path(workdir) / f".{_TABLE_LOCK}"):
            pass
    except lock.NoLocksError as error:
        raise ConfigError(
            f"workdir={workdir} is on {error}, so processes can't share the study; run each "
            f"training by a command of its own, --config.ablate.cell=1 … {number}"
        ) from error


def work_off(
    trainings: Sequence[Training], workdir: epath.PathLike, work: Callable[[Training], None]
) -> None:
    """Calls a function for each training, while this process holds the training's lock.

    It waits for trainings that other processes hold, and calls the function for these too. So the
    training of a process that died is finished.
    """
    remaining, is_waiting = list(trainings), False
    while remaining:
        refused = []
        for training in remaining:
            with _attempted(training, workdir) as is_mine:
                if is_mine:
                    work(training)
                else:
                    refused.append(training)
        if len(refused) == len(remaining):
            if not is_waiting:
                names = ", ".join(training.name for training in refused)
                tqdm.write(f"waiting for other processes, which work on {names}")
            is_waiting = True
            time.sleep(_SECONDS)
        else:
            is_waiting = False
        remaining = refused


def work_on(training: Training, workdir: epath.PathLike, work: Callable[[Training], None]) -> None:
    """Calls a function for one training, also where there are no locks.

    Raises:
      ConfigError: if another process works on it.
    """
    with ExitStack() as stack:
        try:
            is_mine = stack.enter_context(_attempted(training, workdir))
        except lock.NoLocksError:
            is_mine = True
        if not is_mine:
            directory = training.directory(workdir)
            raise ConfigError(
                f"workdir={directory} is being worked on by {lock.holder(directory / _LOCK)}"
            )
        work(training)


@contextmanager
def _attempted(training: Training, workdir: epath.PathLike) -> Iterator[bool]:
    directory = training.directory(workdir)
    record.make(directory)
    with lock.attempted(directory / _LOCK) as is_mine:
        yield is_mine


@contextmanager
def writing(workdir: epath.PathLike) -> Iterator[None]:
    """In the body no other process writes the tables of the study, where there are locks."""
    path = epath.Path(workdir) / _TABLE_LOCK
    while True:
        with ExitStack() as stack:
            try:
                is_mine = stack.enter_context(lock.attempted(path))
            except lock.NoLocksError:
                is_mine = True
            if is_mine:
                yield
                return
        time.sleep(0.05)
