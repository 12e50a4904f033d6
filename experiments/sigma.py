"""The bound of one network by T and Σ_θ: fixed, learned, and worked out from measured errors.

All Σ_θ are measured on the same examples with the same noise, so their differences are known far
better than they are themselves.
"""

from etils import epath
from ml_collections import ConfigDict

from experiments.harness import checks
from experiments.harness.data import splits
from experiments.harness.evaluation import paired
from experiments.harness.evaluation.paired import Choice, Entry
from experiments.harness.evaluation.subject import subject_of
from experiments.harness.setup import analytic, trained
from experiments.harness.workdir import metrics
from experiments.harness.workdir.files import write_json

REFERENCE = "beta_tilde"  # what the others are compared with


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Measures every entry of the table; writes it, draws it and prints it."""
    print(paired.to_markdown(sigma(config, workdir), "Σ_θ", REFERENCE))


def sigma(config: ConfigDict, workdir: epath.PathLike) -> list[Entry]:
    """The table of what the work directory holds, as sigma.json, sigma.md and sigma.png.

    Every example counts once, with the full sum over t and noise that is a function of
    (seed, example, t, draw): beyond rounding nothing depends on the batch size or the devices.

    Args:
      config: `sigma` says which T, on what.
      workdir: holds the checkpoints.

    Returns:
      The entries, T by T, named by their Σ_θ.

    Raises:
      ConfigError: for a setting or a checkpoint that does not fit.
    """
    check(config)
    run = trained.load(config, workdir, config.sigma.checkpoint)
    variances = {
        name: run.with_variance(name).definition.variance
        for name in analytic.available_variances(config)
    }
    dataset = splits.load_measured(config, config.sigma.split)
    subject = subject_of(config, run.definition, run.params, dataset)
    choices = {
        (num_timesteps, name): Choice(subject.schedule.levels(num_timesteps), variance)
        for num_timesteps in config.sigma.num_timesteps
        for name, variance in variances.items()
    }
    draws = config.sigma.draws
    totals = paired.measure_totals(subject, choices, draws)
    entries = paired.summarize(totals, REFERENCE, subject.num_dims)
    result = {
        "split": config.sigma.split,
        "checkpoint": config.sigma.checkpoint,
        "step": run.step,
        "seed": config.seed,
        "draws": draws,
        "num_examples": subject.num_examples,
        "entries": paired.rows(entries, "variance"),
    }
    paired.write(workdir, "sigma", entries, "Σ_θ", REFERENCE)
    metrics.show(workdir, run.step, pictures={"sigma": epath.Path(workdir) / "sigma.png"})
    write_json(epath.Path(workdir) / "sigma.json", result)
    return entries


def check(config: ConfigDict) -> None:
    """Raises ConfigError for settings or data that `sigma` can't use; compiles nothing."""
    checks.check(config, "sigma")
    paired.check(config, "sigma")
