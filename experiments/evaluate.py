"""The exact bound of a trained model over every example of a split, with its standard errors."""

import time
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffusion.statistics.standard_errors import bits_per_dim
from experiments.harness import checks, devices
from experiments.harness.data import splits
from experiments.harness.errors import ConfigError
from experiments.harness.evaluation.allocate import Estimator
from experiments.harness.evaluation.estimates import ESTIMATES, allocate, allocated_summary
from experiments.harness.evaluation.full_bound import full_bound, summary
from experiments.harness.pictures import plots
from experiments.harness.sampling import quality, sampler
from experiments.harness.setup import trained
from experiments.harness.setup.definition import ModelDefinition, define_model
from experiments.harness.workdir import provenance
from experiments.harness.workdir.files import append_jsonl, write_json, write_npz

RESULT_FILE = provenance.EVALUATION


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Evaluates what the work directory holds and prints the result."""
    print(result_line(evaluate(config, workdir)))


def evaluate(config: ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
    """The bound of the EMA weights, written to the work directory.

    With the full sum over t, or to the Monte-Carlo error `evaluate.target`. Every example counts
    once, with a noise that is a function of (seed, example, t): beyond rounding the numbers depend
    neither on the batch size nor on the devices. Writes evaluation.json, a line of
    evaluations.jsonl, evaluation.npz with the arrays, and two plots.

    Args:
      config: its model, schedule and decoder are measured; `evaluate` says on what.
      workdir: holds the checkpoints.

    Returns:
      The content of evaluation.json; docs/results.md lists it.

    Raises:
      ConfigError: for a setting or a checkpoint that does not fit.
    """
    check(config)
    loaded = trained.load(config, workdir, config.evaluate.checkpoint)
    run = loaded.with_variance(config.evaluate.variance)
    definition, params = run.definition, run.params
    if "quality" in config.evaluate.also:
        sampled = loaded.with_variance(config.sample.variance)
        sampled.levels(config.sample.num_timesteps)  # if there are none, better said now
    dataset = splits.load_measured(config, config.evaluate.split)
    start = time.monotonic()
    bound = _allocated if config.evaluate.target else _full
    result, curves = bound(config, definition, params, dataset)
    result |= {
        "num_examples": len(dataset.images),
        "split": config.evaluate.split,
        "checkpoint": config.evaluate.checkpoint,
        "num_timesteps": definition.levels.num_timesteps,
        "seed": config.seed,
        **provenance.identity(RESULT_FILE, config, run.step, workdir),
    }
    for name in config.evaluate.also:
        if name != "quality":
            result[name] = ESTIMATES[name](config, definition, params, dataset)
    if "quality" in config.evaluate.also:
        result["quality"] = quality.of_samples(sampled)
    result["seconds"] = round(time.monotonic() - start, 1)
    _write(epath.Path(workdir), result, curves, definition)
    return result


class Curves(NamedTuple):
    """What is drawn and kept of a bound beside its summary, over a data set.

    Attributes:
      total: of each example, in nats.
      kl: at t = 2 … T in bits/dim, the mean over examples.
      kl_se: its standard error over examples, where it is known.
      eps_error: ‖ε − ε̂‖² at t = 1 … T, the mean over examples.
    """

    total: np.ndarray
    kl: np.ndarray
    kl_se: np.ndarray | None
    eps_error: np.ndarray


def _full(
    config: ConfigDict, definition: ModelDefinition, params: Any, dataset: splits.Dataset
) -> tuple[dict[str, Any], Curves]:
    """The full sum over t."""
    terms, noise_variances = full_bound(config, definition, params, dataset)
    kl = bits_per_dim(terms.kl, int(np.prod(definition.image_shape)))
    n, num_timesteps = terms.eps_error.shape
    replicates = min(config.evaluate.replicates, num_timesteps - 1)
    curves = Curves(
        total=terms.total,
        kl=kl.mean(axis=0),
        kl_se=kl.std(axis=0, ddof=1) / np.sqrt(n) if n > 1 else None,
        eps_error=terms.eps_error.mean(axis=0),
    )
    summed = summary(terms, noise_variances, definition)
    return summed | {"network_evaluations": n * (num_timesteps + replicates + 1)}, curves


def _allocated(
    config: ConfigDict, definition: ModelDefinition, params: Any, dataset: splits.Dataset
) -> tuple[dict[str, Any], Curves]:
    """A few timesteps per example, to the target; the curves are constant on bins of t."""
    found = allocate(config, Estimator(config, definition, params, dataset))
    num_terms = definition.levels.num_timesteps - 1
    bins = len(found.rate)
    of_t = ((np.arange(num_terms) + 0.5) * bins / max(num_terms, 1)).astype(int)
    error, rate = found.eps_error[of_t], found.rate[of_t]
    # The bins' mean need not be the estimate's to the last digit; the curve is.
    kl = rate * found.diffusion.mean() / rate.sum() if rate.any() else rate
    curves = Curves(
        total=found.total,
        kl=bits_per_dim(kl, int(np.prod(definition.image_shape))),
        kl_se=None,
        eps_error=np.concatenate([error[:1] if num_terms else found.eps_error[:1], error]),
    )
    return allocated_summary(found, definition), curves


def check(config: ConfigDict) -> None:
    """Raises ConfigError for settings or data that `evaluate` can't use; compiles nothing."""
    also = ("sample",) if "quality" in config.evaluate.also else ()
    checks.check(config, "evaluate", *also)
    definition = define_model(config)
    devices.check_batch("config.evaluate.batch_size", config.evaluate.batch_size)
    splits.check_split(config, config.evaluate.split)
    if "quality" in config.evaluate.also:
        sampler.check(config, definition)
        quality.check(config)
    if "k_sample" in config.evaluate.also:
        num_timesteps = config.evaluate.k_sample.num_timesteps
        try:
            definition.schedule.levels(num_timesteps)
        except ValueError as error:
            raise ConfigError(
                f"config.evaluate.k_sample.num_timesteps = {num_timesteps}: {error}"
            ) from error


def result_line(result: dict[str, Any]) -> str:
    """The result for people: a line, and one more for each further estimate."""

    what = "bits/dim given labels" if result["settings"].get("evaluate.labels") else "bits/dim"

    def show(of, name):
        return _show(of[name])

    def line(name, of, detail):
        return (
            f"{name} {what} {show(of, 'bits_per_dim')} ± {show(of, 'bits_per_dim_se')} "
            f"({detail}, Monte-Carlo error ± {show(of, 'bits_per_dim_mc_se')}, "
            f"{of['network_evaluations']:,} network evaluations"
        )

    parts = ", ".join(f"{p} {show(result, p)}" for p in ("prior", "diffusion", "reconstruction"))
    detail = f"{parts}), {result['num_examples']} examples, T = {result['num_timesteps']}"
    lines = [line(result["split"], result, detail)]
    for name in ESTIMATES:
        if name in result:
            lines.append(line(f"  {name}", result[name], _detail(name, result[name])))
    if "quality" in result:
        lines.append(f"  quality {quality.line(result['quality'])}")
    return "\n".join(lines)


def _show(value: float | None) -> str:
    """NaN where there is nothing to tell it by, as with one example; null once in a file."""
    return "unknown" if value is None or np.isnan(value) else f"{value:.4f}"


def _detail(name: str, of: dict[str, Any]) -> str:
    """What sets a further estimate apart."""
    details = {
        "continuous": lambda: "the bound as T → ∞",
        "k_sample": lambda: (
            f"{of['num_samples']} trajectories at T = {of['num_timesteps']}; "
            f"one alone {_show(of['one_sample_bits_per_dim'])}"
        ),
        "ode": lambda: (
            f"{of['dequantization']} dequantisation; trace ± {_show(of['trace_se'])}, "
            f"solver ± {_show(of['mean_solver_error'])}, {of['failed_solves']} solves failed"
        ),
    }
    return details[name]() + ")"


def _write(workdir: epath.Path, result: dict, curves: Curves, definition: ModelDefinition) -> None:
    """evaluation.json, its line in the history, the arrays and the plots."""
    num_dims = int(np.prod(definition.image_shape))
    log_snr = definition.levels.log_snr[1:]
    # ‖x_0 − x̂_0‖² = ‖ε − ε̂‖²/SNR, then from data units to grey levels.
    squared = curves.eps_error * np.exp(-log_snr) / num_dims
    rmse = np.sqrt(squared) / definition.quantization.spacing
    arrays = {
        "t": np.arange(1, len(log_snr) + 1),
        "log_snr": log_snr,
        "kl": curves.kl,
        "x_0_rmse": rmse,
        "bits_per_dim_per_example": bits_per_dim(curves.total, num_dims),
    }
    if curves.kl_se is not None:
        arrays["kl_se"] = curves.kl_se
    write_npz(workdir / "evaluation.npz", **arrays)
    parts = {"kl": curves.kl, "prior": result["prior"]}
    plots.plot_kl_per_timestep(
        workdir / "kl_per_timestep.png",
        **parts,
        log_snr=log_snr,
        reconstruction=result["reconstruction"],
        kl_se=curves.kl_se,
    )
    plots.plot_rate_distortion(
        workdir / "rate_distortion.png",
        **parts,
        rmse=rmse,
        max_value=definition.quantization.num_levels - 1,
    )
    append_jsonl(workdir / "evaluations.jsonl", result)
    write_json(workdir / RESULT_FILE, result)
