"""The bound of one network by T and Σ_θ: fixed, learned, and worked out from measured errors.

All Σ_θ are measured on the same examples with the same noise, so their differences are known far
better than they are themselves.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from diffusion.bound import kl_of_error, prior_kl, reconstruction
from diffusion.estimate import Estimate, estimate
from diffusion.forward import diffuse
from diffusion.schedules import Levels, Step
from diffusion.variances import VARIANCES, Variance
from experiments.harness import analytic, data, devices, measure, pictures, settings
from experiments.harness import workdir as workdirs
from experiments.harness.checkpoints import CHECKPOINTS, load_ema
from experiments.harness.errors import ConfigError
from experiments.harness.metrics import write_json
from experiments.harness.progress import progress
from experiments.harness.settings import Problem
from experiments.harness.state import abstract_params

REFERENCE = "beta_tilde"  # what the others are compared with


class Entry(NamedTuple):
    """The bound at one T with one Σ_θ, in bits/dim.

    Attributes:
      num_timesteps: T.
      variance: the name of Σ_θ.
      bits_per_dim: the mean over examples and draws.
      bits_per_dim_se: its standard error over examples.
      bits_per_dim_mc_se: its standard error over noise, with the examples fixed.
      difference: to Σ_θ = β̃ at this T, with the same examples and noise.
      difference_se: its standard error over examples.
      difference_mc_se: its standard error over noise.
    """

    num_timesteps: int
    variance: str
    bits_per_dim: float
    bits_per_dim_se: float
    bits_per_dim_mc_se: float
    difference: float
    difference_se: float
    difference_mc_se: float


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Measures every entry of the table; writes it, draws it and prints it."""
    print(to_markdown(sigma(config, workdir)))


def sigma(config: ConfigDict, workdir: epath.PathLike) -> list[Entry]:
    """The table of what the work directory holds, as sigma.json, sigma.md and sigma.png.

    Every example counts once, with the full sum over t and noise that is a function of
    (seed, example, t, draw): beyond rounding nothing depends on the batch size or the devices.

    Args:
      config: `sigma` says which T, on what.
      workdir: holds the checkpoints.

    Returns:
      The entries, T by T.

    Raises:
      ConfigError: for a setting or a checkpoint that does not fit.
    """
    check(config)
    workdirs.check_network(config, workdir)
    problem = settings.build(config)
    params, step = load_ema(workdir, config.sigma.checkpoint, abstract_params(problem))
    problem = problem.learned(params)
    workdirs.check_writable(workdir)
    variances = {}
    for name in _names(config):
        chosen = analytic.choose(config, name, "config.sigma", problem, params, step, workdir)
        variances[name] = chosen.variance
    dataset = settings.load_data(config, config.sigma.split)
    totals = measure_totals(config, problem, params, dataset, variances)
    num_dims = int(np.prod(problem.image_shape))
    entries = [
        entry
        for num_timesteps, of_sigma in totals.items()
        for entry in summarize(num_timesteps, of_sigma, num_dims)
    ]
    identity = {
        "split": config.sigma.split,
        "checkpoint": config.sigma.checkpoint,
        "step": step,
        "seed": config.seed,
        "draws": config.sigma.draws,
        "num_examples": len(dataset.images),
    }
    _write(epath.Path(workdir), entries, identity)
    return entries


def check(config: ConfigDict) -> None:
    """Raises ConfigError for settings or data that `sigma` can't use; compiles nothing."""
    problem = settings.build(config)
    devices.check_batch("config.evaluate.batch_size", config.evaluate.batch_size)
    settings.check_positive(config, "evaluate.chunk_size")
    settings.pick(data.SPLITS, config.sigma.split, "config.sigma.split")
    settings.describe_data(config, config.sigma.split)
    settings.pick(CHECKPOINTS, config.sigma.checkpoint, "config.sigma.checkpoint")
    remedy = "it must be at least 2: their spread is the error"
    settings.check_setting(config, "sigma.draws", lambda n: n >= 2, remedy)
    remedy = "it must hold different numbers of levels, such as (10, 100), each at least 2"
    settings.check_setting(config, "sigma.num_timesteps", _are_timesteps, remedy)
    for name in _names(config):
        analytic.check(config, name, "config.sigma")
    for num_timesteps in config.sigma.num_timesteps:
        try:
            problem.schedule.levels(num_timesteps)
        except ValueError as error:
            raise ConfigError(
                f"config.sigma.num_timesteps = {config.sigma.num_timesteps}; "
                f"config.schedule.{config.schedule.name} has no {num_timesteps} levels: {error}"
            ) from error


def _are_timesteps(numbers: Any) -> bool:
    """Whether they are different whole numbers from 2 on."""
    return (
        isinstance(numbers, tuple)
        and len(numbers) > 0
        and all(isinstance(n, int) and n >= 2 for n in numbers)
        and len(set(numbers)) == len(numbers)
    )


def _names(config: ConfigDict) -> list[str]:
    """The Σ_θ that the network can have, β̃ first."""
    own = config.model.variance
    known = [name for name in VARIANCES if not VARIANCES[name]().is_learned or name == own]
    return [*known, *analytic.ANALYTIC]


def measure_totals(
    config: ConfigDict,
    problem: Problem,
    params: Any,
    dataset: data.Dataset,
    variances: dict[str, Variance],
) -> dict[int, dict[str, Float[np.ndarray, "n draws"]]]:
    """The bound of every example by T, Σ_θ and draw of the noise, in nats and float64.

    Draw 0 is the noise of an evaluation. The network runs once for each (example, t, draw), however
    many Σ_θ there are.
    """
    mesh, n, draws = devices.mesh(), len(dataset.images), config.sigma.draws
    run_terms = _make_terms(config, problem, mesh, tuple(variances.values()))
    run_ends = _make_ends(config, problem, mesh)
    params = devices.place(params, devices.replicated(mesh))
    evaluations = draws * sum(config.sigma.num_timesteps)
    found = {}
    with progress(n * evaluations, "sigma", "eval", unit_scale=True) as bar:
        for num_timesteps in config.sigma.num_timesteps:
            levels = problem.schedule.levels(num_timesteps)
            totals = np.empty((n, len(variances), draws))
            for index, mask in data.padded_batches(n, config.evaluate.batch_size):
                images = dataset.images[index]
                total = np.asarray(run_ends(params, *_ends(levels), images, index), np.float64)
                total = total[:, None]  # the same for every Σ_θ
                for steps, is_step in _chunks(levels, config.evaluate.chunk_size):
                    kl = run_terms(params, *steps, images, index)
                    total = total + np.asarray(kl, np.float64)[..., is_step].sum(axis=-1)
                    bar.update(int(mask.sum()) * draws * int(is_step.sum()))
                totals[index[mask]] = total[mask]
                bar.update(int(mask.sum()) * draws)
            found[num_timesteps] = dict(zip(variances, totals.swapaxes(0, 1), strict=True))
    return found


def _chunks(levels: Levels, chunk_size: int) -> Any:
    """The steps to t = 2 … T, some at a time: (t, λ, gap), and where they are no repeats."""
    for positions, mask in data.padded_batches(levels.num_timesteps - 1, chunk_size):
        t = positions + 2
        yield (t, np.float32(levels.log_snr[t]), np.float32(levels.gap[t])), mask


def _ends(levels: Levels) -> tuple[Levels, Float[np.ndarray, ""]]:
    """What the bound's ends need: the two levels that a decoder may use, and λ_T."""
    first = Levels(np.float32(levels.log_snr[:3]), np.float32(levels.gap[:3]))
    return first, np.asarray(levels.log_snr[-1], np.float32)


def _make_terms(
    config: ConfigDict, problem: Problem, mesh: Mesh, variances: tuple[Variance, ...]
) -> Callable[..., Float[Array, "b sigma draws m"]]:
    """The KLs of some steps: (params, t [m], λ [m], gap [m], images, index) -> [b sigma draws m].

    T and the schedule are arguments, so that one program serves all.
    """

    def terms(params, t, log_snr, gap, images, index):
        x_0, ones = problem.quantization.to_data(images), jnp.ones_like(index)
        reverse = problem.reverse(params)

        def at(eps, log_snr, gap):
            step = Step(log_snr * ones, gap * ones)
            outputs = reverse.outputs(diffuse(x_0, step.log_snr, eps), step.log_snr)
            error = reverse.eps_error_of(outputs.prediction, x_0, eps, step.log_snr) ** 2

            def kl(variance):
                of_this = reverse._replace(variance=variance)
                return kl_of_error(
                    error, step, of_this.log_variance_ratio(step, error, outputs.extra)
                )

            return jnp.stack([kl(variance) for variance in variances])

        noises = [
            measure.evaluation_noise(config, problem, index, draw)
            for draw in range(config.sigma.draws)
        ]
        eps = jnp.stack([jax.vmap(noise)(t[:, None] * ones) for noise in noises])
        kls = jax.lax.map(lambda of_draw: jax.vmap(at)(of_draw, log_snr, gap), eps)
        return jnp.transpose(kls, (3, 2, 0, 1))

    return measure.jit_evaluation(terms, mesh, num_batched=2, num_shared=4)


def _make_ends(config: ConfigDict, problem: Problem, mesh: Mesh) -> Callable[..., Array]:
    """Prior and reconstruction: (params, first levels, λ_T, images, index) -> sum, [b draws]."""

    def ends(params, first, last_log_snr, images, index):
        x_0, ones = problem.quantization.to_data(images), jnp.ones_like(index)
        reverse = problem.reverse(params)
        parts = [
            reconstruction(
                reverse,
                problem.decoder,
                x_0,
                measure.evaluation_noise(config, problem, index, draw)(ones),
                first,
            )
            for draw in range(config.sigma.draws)
        ]
        return prior_kl(x_0, last_log_snr * ones)[:, None] + jnp.stack(parts, axis=1)

    return measure.jit_evaluation(ends, mesh, num_batched=2, num_shared=3)


def summarize(
    num_timesteps: int, totals: dict[str, Float[np.ndarray, "n draws"]], num_dims: int
) -> list[Entry]:
    """The entries of one T, from the bound of every example and draw by Σ_θ, in nats."""
    entries = []
    for name, of_sigma in totals.items():
        value = _estimate(of_sigma, num_dims)
        difference = _estimate(of_sigma - totals[REFERENCE], num_dims)
        entries.append(Entry(num_timesteps, name, *value, *difference))
    return entries


def _estimate(totals: Float[np.ndarray, "n draws"], num_dims: int) -> Estimate:
    """Draws are independent given the example, so their spread tells the noise of their mean."""
    draws = totals.shape[1]
    return estimate(totals.mean(axis=1), totals.var(axis=1, ddof=1) / draws, num_dims)


def to_markdown(entries: list[Entry]) -> str:
    """The bound by Σ_θ and T, the lowest of each T in bold, and the differences to β̃."""
    names = list(dict.fromkeys(entry.variance for entry in entries))
    columns = list(dict.fromkeys(entry.num_timesteps for entry in entries))
    by_place = {(entry.variance, entry.num_timesteps): entry for entry in entries}
    best = {
        T: min((e for e in entries if e.num_timesteps == T), key=lambda e: e.bits_per_dim)
        for T in columns
    }

    def value(entry):
        text = f"{entry.bits_per_dim:.4f} ± {entry.bits_per_dim_mc_se:.4f}"
        return f"**{text}**" if entry is best[entry.num_timesteps] else text

    def difference(entry):
        return f"{entry.difference:+.4f} ± {entry.difference_se:.4f}"

    def table(show, rows):
        head = [f"| Σ_θ | {' | '.join(f'T = {T}' for T in columns)} |", "| --- " * len(columns)]
        head[1] += "| --- |"
        body = [f"| {n} | {' | '.join(show(by_place[n, T]) for T in columns)} |" for n in rows]
        return "\n".join(head + body)

    return (
        "Bits/dim ± its standard error over noise, with the examples fixed:\n\n"
        + table(value, names)
        + f"\n\nDifference to {REFERENCE} on the same examples and noise, ± its standard error "
        "over examples:\n\n" + table(difference, [n for n in names if n != REFERENCE])
    )


def _write(workdir: epath.Path, entries: list[Entry], identity: dict[str, Any]) -> None:
    """sigma.md, sigma.png and sigma.json."""
    (workdir / "sigma.md").write_text(to_markdown(entries) + "\n")
    by_sigma = {}
    for entry in entries:
        by_sigma.setdefault(entry.variance, {})[entry.num_timesteps] = entry.bits_per_dim
    pictures.plot_bits_over_timesteps(workdir / "sigma.png", by_sigma, REFERENCE)
    rows = [entry._asdict() for entry in entries]
    write_json(workdir / "sigma.json", identity | {"entries": rows})
