"""A study: trains and measures every combination of some settings, and compares them.

Run it again, and it goes on with what is missing. Run it several times at once on the same
directory, and the processes share its trainings.
"""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from configs.base import SETTINGS
from configs.settings.declaration import problems
from experiments import train
from experiments.harness.data import splits
from experiments.harness.errors import ConfigError, RunError
from experiments.harness.processes.progress import progress
from experiments.harness.study import axes, directory, measures, results, sharing
from experiments.harness.study.axes import Study
from experiments.harness.study.measures import Measurement
from experiments.harness.study.sharing import Training
from experiments.harness.study.summary import Key, Measured, Summary
from experiments.harness.workdir import record


class Plan(NamedTuple):
    """What a study trains and measures.

    Attributes:
      config: its config.
      study: its cells.
      skipped: why a cell can't be trained or measured, for each such cell.
      trainings: the trainings of the other cells.
    """

    config: ConfigDict
    study: Study
    skipped: dict[Key, str]
    trainings: list[Training]


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Works on the study until nothing is missing, and prints its tables."""
    ablate(config, workdir)
    print((epath.Path(workdir) / "ablation.md").read_text())


def ablate(config: ConfigDict, workdir: epath.PathLike) -> Summary:
    """Trains and measures what is missing; after each cell it writes the tables anew.

    Each network is a run in its own work directory, cells/NAME, and each measurement a file there.

    Args:
      config: a run's config, whose `ablate` has the axes.
      workdir: the study's directory.

    Returns:
      The result.

    Raises:
      ConfigError: for a study that is not possible; nothing was written.
      RunError: if a training or its measurement failed; all others are finished.
    """
    plan = make_plan(config)
    directory.check(plan.study, config, workdir)
    plan = plan._replace(trainings=directory.located(plan.trainings, plan.study, workdir))
    worker = Worker(plan, workdir)
    chosen = config.ablate.cell
    if chosen > len(plan.trainings):
        raise ConfigError(
            f"config.ablate.cell = {chosen}; the study has {len(plan.trainings)} trainings"
        )
    record.make(workdir)
    if not chosen:
        sharing.check_locks(workdir, len(plan.trainings))
    with sharing.writing(workdir):
        directory.check(plan.study, config, workdir)  # another process may have added to it
        directory.record(plan.study, config, workdir)
    worker.run(chosen)
    summary = worker.report()
    reasons = {t.name: directory.failure(t, workdir) for t in plan.trainings}
    failures = [f"{name} ({reason})" for name, reason in reasons.items() if reason]
    if failures:
        raise RunError(
            f"workdir={workdir}: {len(failures)} of {len(plan.trainings)} trainings failed: "
            f"{'; '.join(failures)}"
        )
    return summary


def check(config: ConfigDict) -> None:
    """Raises ConfigError for a study that is not possible; compiles nothing."""
    make_plan(config)


def make_plan(config: ConfigDict) -> Plan:
    """The cells and trainings of a study, with the reasons why some cells are not possible.

    Raises:
      ConfigError: if the axes are wrong, two cells are the same, or the baseline or every cell is
        not possible.
    """
    for problem in problems(config, SETTINGS):
        raise ConfigError(problem)
    study = axes.expand(config)
    skipped = {}
    for key, cell in study.cells.items():
        try:
            train.check(cell)
            measures.check(cell)
        except ConfigError as error:
            skipped[key] = str(error)
    valid = [key for key in study.cells if key not in skipped]
    if not valid:
        key, reason = next(iter(skipped.items()))
        raise ConfigError(
            f"config.ablate.axes: none of the {len(skipped)} cells is possible; "
            f"({axes.named(key)}): {reason}"
        )
    if study.baseline in skipped:
        raise ConfigError(
            f"config.ablate.baseline = {study.baseline} is not possible: {skipped[study.baseline]}"
        )
    axes.require_different({key: study.cells[key] for key in valid})
    trainings = sharing.trainings(study, valid, config.ablate.seeds)
    return Plan(config, study, skipped, trainings)


class Worker:
    """One of the processes that work on a study."""

    def __init__(self, plan: Plan, workdir: epath.PathLike):
        self.plan, self.workdir = plan, epath.Path(workdir)
        # A training that failed before is tried once more.
        self.failed_before = {
            training.name for training in plan.trainings if directory.failure(training, workdir)
        }

    def run(self, chosen: int) -> None:
        """Works on the training with this number, from 1; 0: on all that are free."""
        todo = sum(len(training.cells) for training in self.plan.trainings)
        done = sum(len(self.measurements(training)) for training in self.plan.trainings)
        tqdm.write(
            f"{len(self.plan.study.cells)} cells, {len(self.plan.trainings)} trainings, "
            f"{done} of {todo} measurements done"
        )
        with progress(todo, "study", "cell", initial=done) as self.bar:
            if chosen:
                sharing.work_on(self.plan.trainings[chosen - 1], self.workdir, self.work)
            else:
                sharing.work_off(self.plan.trainings, self.workdir, self.work)

    def work(self, training: Training) -> None:
        """Trains a network and measures its cells, as far as that has not been done."""
        place, measured = training.directory(self.workdir), self.measurements(training)
        is_failed = directory.failure(training, self.workdir) is not None
        if is_failed and training.name not in self.failed_before:  # in another process
            return
        directory.forget_failure(training, self.workdir)
        if len(measured) < len(training.cells):
            tqdm.write(f"cell {training.name}")
            try:
                train.train(training.config, place, checked=True)
                for key in [key for key in training.cells if key not in measured]:
                    measures.measure(key, self.plan.study.cells[key], place, self.workdir)
                    self.report()
            except RunError as error:
                directory.record_failure(training, self.workdir, str(error))
                tqdm.write(f"warning: cell {training.name} failed: {error}")
        jax.clear_caches()  # what was traced; programs of equal operations are kept

    def measurements(self, training: Training) -> dict[Key, Measurement]:
        """The measurements of a training's cells, as far as there are any."""
        place, cells = training.directory(self.workdir), self.plan.study.cells
        if not measures.is_trained(training.config, place):
            return {}
        loaded = {key: measures.load(key, cells[key], place) for key in training.cells}
        return {key: measurement for key, measurement in loaded.items() if measurement is not None}

    def report(self) -> Summary:
        """Writes the tables of all that has been measured, by any process."""
        plan, ablate = self.plan, self.plan.config.ablate
        with sharing.writing(self.workdir):
            measured = {t.name: self.measurements(t) for t in plan.trainings}
            cells = {key: self.of_cell(key, measured) for key in plan.study.cells}
            summary = results.summarize(
                {key: cell for key, cell in cells.items() if cell is not None},
                plan.study.baseline,
                {axis: tuple(values) for axis, values in plan.study.axes.items()},
                math.prod(splits.describe_data(plan.config, "train").image_shape),
                plan.skipped,
                ablate.seeds,
                self.failures(),
            )
            results.write(self.workdir, summary, facts(plan.study))
        self.bar.update(sum(len(m) for m in measured.values()) - self.bar.n)
        return summary

    def of_cell(self, key: Key, measured: dict[str, dict[Key, Measurement]]) -> Measured | None:
        """The measurements of a cell over its training seeds; None without any."""
        of_seed = {
            training.config.seed: measured[training.name][key]
            for training in self.plan.trainings
            if key in measured[training.name]
        }
        if not of_seed:
            return None
        parts = list(of_seed.values())
        return Measured(
            seeds=tuple(of_seed),
            totals=np.stack([part.totals for part in parts]),
            figures={name: [part.figures[name] for part in parts] for name in parts[0].figures},
            curves={name: [part.curves[name] for part in parts] for name in parts[0].curves},
        )

    def failures(self) -> dict[Key, dict[int, str]]:
        """Of each cell, why trainings failed, by their seed."""
        failures: dict[Key, dict[int, str]] = {}
        for training in self.plan.trainings:
            reason = directory.failure(training, self.workdir)
            for key in training.cells if reason is not None else ():
                failures.setdefault(key, {})[training.config.seed] = reason
        return failures


def facts(study: Study) -> dict[str, Any]:
    """What all cells have in common, for the readers of the tables."""
    facts_of_cells = [
        {
            "data": cell.data.name,
            "split": cell.ablate.split,
            "checkpoint": cell.ablate.checkpoint,
            "num_steps": cell.train.num_steps,
            "num_timesteps": cell.ablate.num_timesteps or cell.schedule.num_timesteps,
            "draws": cell.ablate.draws,
            "seed": cell.seed,
        }
        for cell in study.cells.values()
    ]
    first, *others = facts_of_cells
    return {
        name: value
        for name, value in first.items()
        if all(other[name] == value for other in others)
    }
