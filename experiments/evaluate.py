"""The exact bound of a trained model over every example of a split, with its standard errors."""

import time
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from diffusion.bound import Bound
from diffusion.estimate import bits_per_dim, estimate, noise_variance, replicate_timesteps
from experiments.harness import (
    analytic,
    data,
    devices,
    estimates,
    measure,
    pictures,
    quality,
    settings,
)
from experiments.harness import workdir as workdirs
from experiments.harness.allocate import Estimator
from experiments.harness.checkpoints import CHECKPOINTS
from experiments.harness.errors import ConfigError
from experiments.harness.estimates import ESTIMATES, allocate, allocated_summary
from experiments.harness.metrics import append_jsonl, write_json, write_npz
from experiments.harness.progress import progress
from experiments.harness.sampler_settings import decides
from experiments.harness.sampling import Trained
from experiments.harness.settings import Problem
from experiments.harness.state import abstract_params
from experiments.harness.weights import load_ema

RESULT_FILE = "evaluation.json"


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
      What evaluation.json holds; `design.md` lists it.

    Raises:
      ConfigError: for a setting or a checkpoint that does not fit.
    """
    check(config)
    workdirs.check_network(config, workdir)
    problem = settings.build(config)
    params, step = load_ema(workdir, config.evaluate.checkpoint, abstract_params(problem))
    problem = problem.learned(params)
    workdirs.check_writable(workdir)
    problem = analytic.choose(
        config, config.evaluate.variance, "config.evaluate.variance", problem, params, step, workdir
    )
    if "quality" in config.evaluate.also:
        sampled = _sampled(config, params, step, workdir)
        sampled.levels(config.sample.num_timesteps)  # if there are none, better said now
    dataset = settings.load_measured(config, config.evaluate.split)
    start = time.monotonic()
    bound = _allocated if config.evaluate.target else _full
    result, curves = bound(config, problem, params, dataset)
    result |= {"num_examples": len(dataset.images), **identity(config, problem, step, workdir)}
    for name in config.evaluate.also:
        if name != "quality":
            result[name] = ESTIMATES[name](config, problem, params, dataset)
    if "quality" in config.evaluate.also:
        result["quality"] = quality.of_samples(sampled)
    result["seconds"] = round(time.monotonic() - start, 1)
    _write(epath.Path(workdir), result, curves, problem)
    return result


def _sampled(config: ConfigDict, params: Any, step: int, workdir: epath.PathLike) -> Trained:
    """These weights as `sample` would draw from them."""
    problem, of = settings.build(config).learned(params), config.sample
    setting = "config.sample.variance"
    problem = analytic.choose(config, of.variance, setting, problem, params, step, workdir)
    return Trained(config, epath.Path(workdir), problem, params, step)


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
    config: ConfigDict, problem: Problem, params: Any, dataset: data.Dataset
) -> tuple[dict[str, Any], Curves]:
    """The full sum over t."""
    terms, noise_variances = full_bound(config, problem, params, dataset)
    kl = bits_per_dim(terms.kl, int(np.prod(problem.image_shape)))
    n, num_timesteps = terms.eps_error.shape
    replicates = min(config.evaluate.replicates, num_timesteps - 1)
    curves = Curves(
        total=terms.total,
        kl=kl.mean(axis=0),
        kl_se=kl.std(axis=0, ddof=1) / np.sqrt(n) if n > 1 else None,
        eps_error=terms.eps_error.mean(axis=0),
    )
    summed = summary(terms, noise_variances, problem)
    return summed | {"network_evaluations": n * (num_timesteps + replicates + 1)}, curves


def _allocated(
    config: ConfigDict, problem: Problem, params: Any, dataset: data.Dataset
) -> tuple[dict[str, Any], Curves]:
    """A few timesteps per example, to the target; the curves are constant on bins of t."""
    found = allocate(config, Estimator(config, problem, params, dataset))
    num_terms = problem.levels.num_timesteps - 1
    bins = len(found.rate)
    of_t = ((np.arange(num_terms) + 0.5) * bins / max(num_terms, 1)).astype(int)
    error, rate = found.eps_error[of_t], found.rate[of_t]
    # The bins' mean need not be the estimate's to the last digit; the curve is.
    kl = rate * found.diffusion.mean() / rate.sum() if rate.any() else rate
    curves = Curves(
        total=found.total,
        kl=bits_per_dim(kl, int(np.prod(problem.image_shape))),
        kl_se=None,
        eps_error=np.concatenate([error[:1] if num_terms else found.eps_error[:1], error]),
    )
    return allocated_summary(found, problem), curves


def identity(
    config: ConfigDict, problem: Problem, step: int, workdir: epath.PathLike | None = None
) -> dict[str, Any]:
    """What an evaluation is of: two with the same identity have the same numbers.

    Args:
      config: the config.
      problem: the mathematics it names.
      step: the step that the weights are of.
      workdir: holds the levels that samples step through, where their quality is asked for.
    """
    told = config.to_dict()
    others = ("train", "sample", "quality", "sigma", "variance", "spacing", "devices", "profile")
    for section in others:
        del told[section]
    for name in ("data_dir", "stream", "memory_limit_mb", "workers", "prefetch"):
        del told["data"][name]
    del told["model"]["dtype"], told["model"]["remat"]  # of training alone
    if config.evaluate.variance not in analytic.ANALYTIC:
        del told["analytic"]
    if not config.model.class_conditional:
        del told["evaluate"]["labels"]
    for name in ("ode", "k_sample"):
        if name not in config.evaluate.also:
            del told["evaluate"][name]
    if not config.evaluate.target and "continuous" not in config.evaluate.also:
        del told["evaluate"]["pilot"], told["evaluate"]["max_evaluations"]
    del told["evaluate"]["batch_size"], told["evaluate"]["chunk_size"]
    told = workdirs.flatten(told)
    if "quality" in config.evaluate.also:
        told |= workdirs.flatten({"quality": config.quality.to_dict()})
        told |= workdirs.flatten({"samples": decides(config, workdir)})
    return {
        "split": config.evaluate.split,
        "checkpoint": config.evaluate.checkpoint,
        "step": step,
        "num_timesteps": problem.levels.num_timesteps,
        "seed": config.seed,
        "settings": told,
    }


def check(config: ConfigDict) -> None:
    """Raises ConfigError for settings or data that `evaluate` can't use; compiles nothing."""
    problem = settings.build(config)
    devices.check_batch("config.evaluate.batch_size", config.evaluate.batch_size)
    settings.pick(data.SPLITS, config.evaluate.split, "config.evaluate.split")
    settings.check_split(config, config.evaluate.split)
    settings.pick(CHECKPOINTS, config.evaluate.checkpoint, "config.evaluate.checkpoint")
    settings.check_positive(config, "evaluate.chunk_size", "evaluate.replicates")
    settings.check_labels(config)
    analytic.check(config, config.evaluate.variance, "config.evaluate.variance")
    estimates.check(config)
    if "quality" in config.evaluate.also:
        quality.check(config, problem)
        analytic.check(config, config.sample.variance, "config.sample.variance")
    if "k_sample" in config.evaluate.also:
        num_timesteps = config.evaluate.k_sample.num_timesteps
        try:
            problem.schedule.levels(num_timesteps)
        except ValueError as error:
            raise ConfigError(
                f"config.evaluate.k_sample.num_timesteps = {num_timesteps}: {error}"
            ) from error


def full_bound(
    config: ConfigDict, problem: Problem, params: Any, dataset: data.Dataset
) -> tuple[Bound, np.ndarray]:
    """The bound's terms of every example, and the variance of each total's Monte-Carlo noise.

    Returns:
      A Bound of float64 arrays in nats, [n, …], and the variances, [n] in nats².
    """
    mesh = devices.mesh()
    first = measure.make_bound(config, problem, mesh)
    second = measure.make_terms_at(config, problem, mesh, draw=1)
    num_timesteps, batch_size = problem.levels.num_timesteps, config.evaluate.batch_size
    params = devices.place(params, devices.replicated(mesh))
    n = len(dataset.images)
    terms, variances, seen = [], [], 0
    evaluations = num_timesteps + min(config.evaluate.replicates, num_timesteps - 1) + 1
    with progress(n * evaluations, "evaluate", "eval", unit_scale=True) as bar:
        for index, mask in data.padded_batches(n, batch_size):
            examples = dataset.examples(index)
            t = replicate_timesteps(index, num_timesteps, config.evaluate.replicates)
            once = jax.device_get(first(params, problem.levels, examples, index))
            again = jax.device_get(second(params, problem.levels, examples, index, t))
            variance = _noise_variance(once, again, t, num_timesteps)
            terms.append(jax.tree.map(lambda a, mask=mask: np.asarray(a, np.float64)[mask], once))
            variances.append(variance[mask])
            seen += int(mask.sum())
            bar.update(int(mask.sum()) * evaluations)
    if seen != n:
        raise AssertionError(f"{seen} examples evaluated of {n}")
    return jax.tree.map(lambda *parts: np.concatenate(parts), *terms), np.concatenate(variances)


def _noise_variance(once: Bound, again: Bound, t: np.ndarray, num_timesteps: int) -> np.ndarray:
    """Variance of each example's total, from two draws of some of its terms."""
    first = np.take_along_axis(once.kl, t - 2, axis=1)
    of_sum = noise_variance(first, again.kl, num_timesteps - 1)
    return of_sum + noise_variance(once.reconstruction[:, None], again.reconstruction[:, None], 1)


def summary(terms: Bound, noise_variances: np.ndarray, problem: Problem) -> dict[str, float]:
    """The bound in bits/dim with both standard errors, and its three parts."""
    num_dims = int(np.prod(problem.image_shape))
    total = estimate(terms.total, noise_variances, num_dims)
    parts = Bound(*(bits_per_dim(a, num_dims).mean(axis=0) for a in terms))
    return {
        "bits_per_dim": total.mean,
        "bits_per_dim_se": total.se,
        "bits_per_dim_mc_se": total.mc_se,
        "prior": float(parts.prior),
        "diffusion": float(parts.kl.sum()),
        "reconstruction": float(parts.reconstruction),
    }


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


def _write(workdir: epath.Path, result: dict, curves: Curves, problem: Problem) -> None:
    """evaluation.json, its line in the history, the arrays and the plots."""
    num_dims = int(np.prod(problem.image_shape))
    log_snr = problem.levels.log_snr[1:]
    # ‖x_0 − x̂_0‖² = ‖ε − ε̂‖²/SNR, then from data units to grey levels.
    squared = curves.eps_error * np.exp(-log_snr) / num_dims
    rmse = np.sqrt(squared) / problem.quantization.spacing
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
    pictures.plot_kl_per_timestep(
        workdir / "kl_per_timestep.png",
        **parts,
        log_snr=log_snr,
        reconstruction=result["reconstruction"],
        kl_se=curves.kl_se,
    )
    pictures.plot_rate_distortion(
        workdir / "rate_distortion.png",
        **parts,
        rmse=rmse,
        max_value=problem.quantization.num_levels - 1,
    )
    append_jsonl(workdir / "evaluations.jsonl", result)
    write_json(workdir / RESULT_FILE, result)
