"""The main job: train, evaluate, sample and report, as far as the work directory lacks it."""

from typing import Any

from etils import epath
from ml_collections import ConfigDict

from experiments import evaluate, report, sample, train
from experiments.harness import checks
from experiments.harness.data import splits
from experiments.harness.processes import distributed
from experiments.harness.setup.definition import define_model
from experiments.harness.workdir import dependences, provenance
from experiments.harness.workdir.checkpoints import Checkpoints
from experiments.harness.workdir.files import read


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Trains, evaluates and samples what is missing, and prints the result."""
    check(config)
    state = train.train(config, workdir, checked=True)
    result = _evaluation(config, workdir)
    finished = result is not None and _is_sampled(config, workdir)
    if result is None:
        result = evaluate.evaluate(config, workdir, checked=True)
    if not _is_sampled(config, workdir):
        sample.sample(config, workdir, checked=True)
    if not finished or not (epath.Path(workdir) / report.REPORT_FILE).exists():
        report.report(config, workdir)
    if finished:
        print(f"{workdir} is finished: {int(state.step)} steps, evaluated and sampled")
    print(evaluate.result_line(result))


def check(config: ConfigDict) -> None:
    """Raises ConfigError for settings or data that a part cannot use; compiles nothing."""
    checks.check(config, "train", "evaluate", "sample")
    definition = define_model(config)
    for part in (train, evaluate, sample):
        part.check_fit(config, definition)


def _evaluation(config: ConfigDict, workdir: epath.PathLike) -> dict[str, Any] | None:
    """The recorded evaluation; None unless it depends on the same settings as one of today."""
    path = epath.Path(workdir) / evaluate.RESULT_FILE
    wanted = _wanted(dependences.EVALUATION, config, workdir, config.evaluate.checkpoint)

    def parse(recorded):
        evaluate.result_line(recorded)  # it has all that the main job prints
        return recorded if provenance.is_current(path, recorded, wanted) else None

    return read(path, parse)


def _is_sampled(config: ConfigDict, workdir: epath.PathLike) -> bool:
    """Whether the samples in samples/ depend on the same settings as new ones would."""
    path = epath.Path(workdir) / dependences.SAMPLES
    wanted = _wanted(dependences.SAMPLES, config, workdir, config.sample.checkpoint)
    return bool(read(path, lambda saved: provenance.is_current(path, saved, wanted)))


def _wanted(
    result: str, config: ConfigDict, workdir: epath.PathLike, checkpoint: str
) -> dict[str, Any]:
    """The identity of a result of the best or the latest checkpoint."""
    with Checkpoints(workdir, read_only=True) as checkpoints:
        step = distributed.broadcast_first(checkpoints.choose(checkpoint))
    return provenance.identity(result, config, step, workdir, data=splits.fingerprints(config))
