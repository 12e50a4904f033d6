"""The directory of a study: which study it holds, where its trainings are, and which failed.

A study may grow, and may lose values of its axes. `study.json` keeps all axes and values that it
ever had, so that a name never gets another meaning.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from configs.settings.declaration import shown
from experiments.harness.errors import ConfigError
from experiments.harness.study.axes import Axes, Study, identity
from experiments.harness.study.sharing import CELLS, Training
from experiments.harness.workdir.checkpoints import check_path, is_new
from experiments.harness.workdir.dependences import RUN, WEIGHTS, depends, group
from experiments.harness.workdir.files import plain, read, write_json
from experiments.harness.workdir.provenance import differences, fingerprint, flatten
from experiments.harness.workdir.record import CONFIG_FILE, recorded_config

_STUDY = "study.json"
_FAILURE = "failure.json"  # in the work directory of a training


class _Record(NamedTuple):
    """The content of study.json.

    Attributes:
      axes: of each value, all settings that its axis sets, also those that this value leaves.
      settings: those that all cells have in common, of those that determine what is trained.
    """

    axes: Axes
    settings: dict[str, Any]


def check(study: Study, config: ConfigDict, workdir: epath.PathLike) -> None:
    """Raises ConfigError if the directory holds something else than this study.

    Values of axes, seeds and measures may have been added or taken out. An axis may have been
    added if one of its values leaves the settings as they were.
    """
    check_path(workdir)
    if (epath.Path(workdir) / CONFIG_FILE).exists() or not is_new(workdir):
        raise ConfigError(f"workdir={workdir} holds a run; a study needs a directory of its own")
    before = _recorded(workdir)
    changes = _changes(before, _described(study, config, before))
    if changes:
        raise ConfigError(
            f"workdir={workdir} holds another study: {'; '.join(changes[:4])}; use another workdir"
        )


def _changes(before: _Record, now: _Record) -> list[str]:
    if not before.axes.keys() <= now.axes.keys():
        return [f"its axes were {', '.join(before.axes)}, now {', '.join(now.axes)}"]
    changes = []
    for axis, values in now.axes.items():
        if axis in before.axes:
            for name in [name for name in values if name in before.axes[axis]]:
                then = {**before.settings, **before.axes[axis][name]}
                changes += _differing(f"{axis} = {name}: ", then, values[name])
        elif all(_differing("", before.settings, settings) for settings in values.values()):
            changes += _differing(f"{axis} is new; ", before.settings, next(iter(values.values())))
    return changes + _differing("", before.settings, now.settings)


def _differing(where: str, then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The settings that both have, with different values."""
    return [
        f"{where}{name} was {shown(then[name])}, now {shown(value)}"
        for name, value in now.items()
        if name in then and then[name] != value
    ]


def record(study: Study, config: ConfigDict, workdir: epath.PathLike) -> None:
    """Adds the study to study.json."""
    before = _recorded(workdir)
    now = _described(study, config, before)
    axes = {axis: before.axes.get(axis, {}) | values for axis, values in now.axes.items()}
    both = _Record(axes, before.settings | now.settings)
    write_json(epath.Path(workdir) / _STUDY, both._asdict())


def _recorded(workdir: epath.PathLike) -> _Record:
    def parse(content):
        axes = {axis: dict(values) for axis, values in content["axes"].items()}
        return _Record(axes, dict(content["settings"]))

    remedy = "restore it, or use another workdir"
    return read(epath.Path(workdir) / _STUDY, parse, remedy) or _Record({}, {})


def _described(study: Study, config: ConfigDict, before: _Record) -> _Record:
    """The record of a study, whose axes may have set further settings before."""
    settings = flatten(config.to_dict())
    names = {
        axis: {n for s in [*values.values(), *before.axes.get(axis, {}).values()] for n in s}
        for axis, values in study.axes.items()
    }
    axes = {
        axis: {
            value: {n: own.get(n, settings.get(n)) for n in sorted(names[axis])}
            for value, own in values.items()
        }
        for axis, values in study.axes.items()
    }
    shared = (depends(WEIGHTS, settings) | {"ablate.split"}).difference(*names.values())
    return _Record(
        plain(axes), plain({n: settings[n] for n in sorted(shared) if group(n) != "seed"})
    )


def located(trainings: Sequence[Training], study: Study, workdir: epath.PathLike) -> list[Training]:
    """The trainings with the work directories that hold them.

    A study that has grown may name its trainings otherwise than before. Those that have begun are
    recognised by their configs; the others get directories that no other training has.
    """
    directory = epath.Path(workdir) / CELLS
    paths = sorted(directory.iterdir()) if directory.exists() else []
    configs = {path.name: recorded_config(path) for path in paths if path.is_dir()}
    present = {name: config for name, config in configs.items() if config is not None}
    return [_located(training, study, present) for training in trainings]


def _located(training: Training, study: Study, present: Mapping[str, dict]) -> Training:
    varied = {name for values in study.axes.values() for own in values.values() for name in own}
    wanted = {
        name: value
        for name, value in plain(identity(WEIGHTS, training.config)).items()
        if group(name) != "speed" or name in varied
    }
    names = sorted(present, key=lambda name: name != training.name)  # its own name first
    for name in names:
        recorded = flatten(present[name])
        # A config of an earlier version, without the settings of an axis, fits no cell.
        is_known = varied & wanted.keys() <= recorded.keys()
        if is_known and not _differing("", recorded, wanted):
            # The run may have begun for a cell that is measured otherwise.
            config = training.config.copy_and_resolve_references()
            begun = {n: recorded[n] for n in differences(RUN, present[name], config)}
            kept = [f"{n} = {shown(value)}" for n, value in begun.items() if n not in varied]
            if kept:
                tqdm.write(f"cell {name} goes on with {', '.join(kept)}, as it began")
            config.update_from_flattened_dict(begun)
            return training._replace(name=name, config=config.lock())
    if training.name in present:
        return training._replace(name=f"{training.name},{fingerprint(wanted)}")
    return training


def record_failure(training: Training, workdir: epath.PathLike, reason: str) -> None:
    write_json(training.directory(workdir) / _FAILURE, {"reason": reason})


def forget_failure(training: Training, workdir: epath.PathLike) -> None:
    (training.directory(workdir) / _FAILURE).unlink(missing_ok=True)


def failure(training: Training, workdir: epath.PathLike) -> str | None:
    """Why a training stopped for good; None if it did not."""
    path = training.directory(workdir) / _FAILURE
    return read(path, lambda content: str(content["reason"]))
