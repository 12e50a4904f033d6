"""The directory of a study: which study it holds, and which of its trainings failed."""

from typing import Any

from etils import epath
from ml_collections import ConfigDict

from configs.settings.declaration import shown
from experiments.harness.errors import ConfigError
from experiments.harness.study.axes import Study
from experiments.harness.study.sharing import Training
from experiments.harness.workdir.checkpoints import check_path, is_new
from experiments.harness.workdir.dependences import WEIGHTS, depends, group
from experiments.harness.workdir.files import plain, read, write_json
from experiments.harness.workdir.provenance import flatten
from experiments.harness.workdir.record import CONFIG_FILE

_STUDY = "study.json"
_FAILURE = "failure.json"  # in the work directory of a training


def check(study: Study, config: ConfigDict, workdir: epath.PathLike) -> None:
    """Raises ConfigError if the directory holds something else than this study.

    The study may have been smaller: more values, more seeds and other measures are permitted.
    """
    check_path(workdir)
    if (epath.Path(workdir) / CONFIG_FILE).exists() or not is_new(workdir):
        raise ConfigError(f"workdir={workdir} holds a run; a study needs a directory of its own")
    recorded = _recorded(workdir)
    if recorded is None:
        return
    then, now = recorded["axes"], plain(study.axes)
    changes = []
    if list(then) != list(now):
        changes.append(f"its axes were {', '.join(then)}, now {', '.join(now)}")
    else:
        changes += [
            f"{axis} = {name} was {shown(then[axis][name])}, now {shown(settings)}"
            for axis, values in now.items()
            for name, settings in values.items()
            if name in then[axis] and then[axis][name] != settings
        ]
    before, present = recorded["settings"], _settings(study, config)
    changes += [
        f"{name} was {shown(before[name])}, now {shown(value)}"
        for name, value in present.items()
        if name in before and before[name] != value
    ]
    if changes:
        raise ConfigError(
            f"workdir={workdir} holds another study: {'; '.join(changes[:4])}; use another workdir"
        )


def record(study: Study, config: ConfigDict, workdir: epath.PathLike) -> None:
    """Writes study.json."""
    content = {"axes": study.axes, "settings": _settings(study, config)}
    write_json(epath.Path(workdir) / _STUDY, content)


def _recorded(workdir: epath.PathLike) -> dict[str, Any] | None:
    def parse(content):
        axes = {axis: dict(values) for axis, values in content["axes"].items()}
        return {"axes": axes, "settings": dict(content["settings"])}

    remedy = "restore it, or use another workdir"
    return read(epath.Path(workdir) / _STUDY, parse, remedy)


def _settings(study: Study, config: ConfigDict) -> dict[str, Any]:
    """The settings that all cells have in common, of those that determine what is trained."""
    settings = flatten(config.to_dict())
    varied = {name for values in study.axes.values() for s in values.values() for name in s}
    names = (depends(WEIGHTS, settings) | {"ablate.split"}) - varied
    return plain({n: settings[n] for n in sorted(names) if group(n) != "seed"})


def record_failure(training: Training, workdir: epath.PathLike, reason: str) -> None:
    write_json(training.directory(workdir) / _FAILURE, {"reason": reason})


def forget_failure(training: Training, workdir: epath.PathLike) -> None:
    (training.directory(workdir) / _FAILURE).unlink(missing_ok=True)


def failure(training: Training, workdir: epath.PathLike) -> str | None:
    """Why a training stopped for good; None if it did not."""
    path = training.directory(workdir) / _FAILURE
    return read(path, lambda content: str(content["reason"]))
