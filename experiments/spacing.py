"""The bound of one network by number of levels and their spacing, the best levels among them.

The best levels are those of the lowest expected bound, found from the network's errors on the
training data; all are measured on the same examples with the same noise.
"""

from etils import epath
from ml_collections import ConfigDict

from diffusion.schedules import Levels
from diffusion.spacing import SPACINGS
from experiments.harness import checks
from experiments.harness.data import splits
from experiments.harness.evaluation import paired
from experiments.harness.evaluation.paired import Choice, Entry
from experiments.harness.evaluation.subject import subject_of
from experiments.harness.setup import optimal_steps, trained
from experiments.harness.setup.trained import Run
from experiments.harness.workdir import dependences, metrics, provenance
from experiments.harness.workdir.files import write_json

REFERENCE = "uniform"  # what the others are compared with
OPTIMAL = "bound_optimal"


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Finds the best levels and measures every spacing; writes the table and prints it."""
    print(paired.to_markdown(spacing(config, workdir), "spacing", REFERENCE))


def spacing(config: ConfigDict, workdir: epath.PathLike) -> list[Entry]:
    """The table of what the work directory holds, as spacing.json, spacing.md and spacing.png.

    spacing.json holds the best levels too, for a sampler; they are there before anything is
    measured. The noise is a function of (seed, example, t, draw), whatever the levels.

    Args:
      config: `spacing` says how many levels, of which candidates and with which Σ_θ, on what.
      workdir: holds the checkpoints.

    Returns:
      The entries, T by T, named by their spacing.

    Raises:
      ConfigError: for a setting or a checkpoint that does not fit.
    """
    check(config)
    run = trained.load(config, workdir, config.spacing.checkpoint)
    run = run.with_variance(config.spacing.variance)
    dataset = splits.load_measured(config, config.spacing.split)
    subject = subject_of(config, run.definition, run.params, dataset)
    optimal = _optimal(run)
    result = {
        "split": config.spacing.split,
        "checkpoint": config.spacing.checkpoint,
        **provenance.identity(
            dependences.OPTIMAL_LEVELS, config, run.step, data=splits.fingerprints(config)
        ),
        "seed": config.seed,
        "variance": config.spacing.variance or config.model.variance,
        "candidates": config.spacing.candidates,
        "draws": config.spacing.draws,
        "num_examples": subject.num_examples,
        "log_snr": optimal_steps.to_json(optimal),
    }
    path = epath.Path(workdir) / optimal_steps.FILE
    write_json(path, result)
    choices = {
        (num_timesteps, name): Choice(levels, run.definition.variance)
        for num_timesteps in config.spacing.num_timesteps
        for name, levels in {
            **{name: rule(subject.schedule, num_timesteps) for name, rule in SPACINGS.items()},
            OPTIMAL: optimal[num_timesteps],
        }.items()
    }
    draws = config.spacing.draws
    totals = paired.measure_totals(subject, choices, draws)
    entries = paired.summarize(totals, REFERENCE, subject.num_dims)
    paired.write(workdir, "spacing", entries, "spacing", REFERENCE)
    metrics.show(workdir, run.step, pictures={"spacing": epath.Path(workdir) / "spacing.png"})
    write_json(path, result | {"entries": paired.rows(entries, "spacing")})
    return entries


def check(config: ConfigDict) -> None:
    """Raises ConfigError for settings or data that `spacing` can't use; compiles nothing."""
    checks.check(config, "spacing")
    paired.check(config, "spacing")


def _optimal(run: Run) -> dict[int, Levels]:
    """The best levels of the schedule for the run's Σ_θ, by their number."""
    if run.definition.variance.is_learned:
        # Mean errors do not determine its KL; the analytic Σ_θ is what it is trained to equal.
        run = run.with_variance("analytic_diagonal")
    return optimal_steps.find(
        run.definition.schedule.levels(run.config.spacing.candidates),
        *run.measured_errors(),
        run.definition.variance,
        tuple(run.config.spacing.num_timesteps),
    )
