"""Bounds of one network by levels and Σ_θ, all measured on the same examples with the same noise.

Their differences are then known far better than they are themselves.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from diffusion.bound import kl_from_error, prior_kl, reconstruction
from diffusion.forward import diffuse
from diffusion.schedules import Levels, Step
from diffusion.statistics.standard_errors import Estimate, estimate
from diffusion.variances import Variance
from experiments.harness import devices
from experiments.harness.data import order, splits
from experiments.harness.data.batches import over_examples
from experiments.harness.errors import ConfigError
from experiments.harness.evaluation.programs import evaluation_noise, jit_evaluation
from experiments.harness.pictures import plots
from experiments.harness.processes.progress import progress
from experiments.harness.setup.definition import ModelDefinition, define_model


class Choice(NamedTuple):
    """What a bound is measured with: the levels it steps through, and Σ_θ."""

    levels: Levels
    variance: Variance


Key = tuple[int, str]
"""What a choice is called: the number of its levels, T, and the name that sets it apart."""

Totals = dict[Key, Float[np.ndarray, "n draws"]]
"""The bound of every example and draw of the noise, in nats and float64."""


class Entry(NamedTuple):
    """The bound of one choice, in bits/dim.

    Attributes:
      num_timesteps: T.
      name: what it is called beside its T.
      bits_per_dim: the mean over examples and draws.
      bits_per_dim_se: its standard error over examples.
      bits_per_dim_mc_se: its standard error over noise, with the examples fixed.
      difference: to the reference at this T, with the same examples and noise.
      difference_se: its standard error over examples.
      difference_mc_se: its standard error over noise.
    """

    num_timesteps: int
    name: str
    bits_per_dim: float
    bits_per_dim_se: float
    bits_per_dim_mc_se: float
    difference: float
    difference_se: float
    difference_mc_se: float


def check(config: ConfigDict, section: str) -> None:
    """Raises ConfigError unless a section fits the data, the devices and the schedule."""
    definition, settings = define_model(config), config[section]
    devices.check_batch("config.evaluate.batch_size", config.evaluate.batch_size)
    splits.check_split(config, settings.split)
    for num_timesteps in settings.num_timesteps:
        try:
            definition.schedule.levels(num_timesteps)
        except ValueError as error:
            raise ConfigError(
                f"config.{section}.num_timesteps = {settings.num_timesteps}; "
                f"config.schedule.{config.schedule.name} has no {num_timesteps} levels: {error}"
            ) from error


def measure_totals(
    config: ConfigDict,
    definition: ModelDefinition,
    params: Any,
    dataset: splits.Dataset,
    choices: Mapping[Key, Choice],
    draws: int,
) -> Totals:
    """The bound of every example by choice, with the full sum over t.

    The noise is a function of (seed, example, t, draw), whatever the levels; draw 0 is that of an
    evaluation. The network runs once for each (levels, example, t, draw), however many Σ_θ there
    are of the same levels.
    """
    mesh, n = devices.mesh(), len(dataset.images)
    run_ends = _make_ends(config, definition, mesh, draws)
    params = devices.place(params, devices.replicated(mesh))
    groups: dict[bytes, list[Key]] = {}
    for key, choice in choices.items():
        groups.setdefault(choice.levels.log_snr.tobytes(), []).append(key)
    evaluations = draws * sum(choices[keys[0]].levels.num_timesteps for keys in groups.values())
    programs, totals = {}, dict.fromkeys(choices)
    with progress(n * evaluations, "compare", "eval", unit_scale=True) as bar:
        for keys in groups.values():
            levels = choices[keys[0]].levels
            variances = tuple(choices[key].variance for key in keys)
            if variances not in programs:
                programs[variances] = _make_terms(config, definition, mesh, draws, variances)
            run_terms = programs[variances]

            def run(index, levels=levels, run_terms=run_terms):
                examples = dataset.examples(index)
                total = np.asarray(run_ends(params, *_ends(levels), examples, index), np.float64)
                total = total[:, None]  # the same for every Σ_θ
                for steps, is_step in _chunks(levels, config.evaluate.chunk_size):
                    kl = run_terms(params, *steps, examples, index)
                    total = total + np.asarray(kl, np.float64)[..., is_step].sum(axis=-1)
                return total

            cost = draws * levels.num_timesteps
            total = over_examples(run, n, config.evaluate.batch_size, bar, cost)
            totals |= zip(keys, total.swapaxes(0, 1), strict=True)
    return totals


def _chunks(levels: Levels, chunk_size: int) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
    """The steps to t = 2 … T, some at a time: (t, λ, gap), and where they are no repeats."""
    for positions, mask in order.padded_batches(levels.num_timesteps - 1, chunk_size):
        t = positions + 2
        yield (t, np.float32(levels.log_snr[t]), np.float32(levels.gap[t])), mask


def _ends(levels: Levels) -> tuple[Levels, Float[np.ndarray, ""]]:
    """What the bound's ends need: the two levels that a decoder may use, and λ_T."""
    first = Levels(np.float32(levels.log_snr[:3]), np.float32(levels.gap[:3]))
    return first, np.asarray(levels.log_snr[-1], np.float32)


def _make_terms(
    config: ConfigDict,
    definition: ModelDefinition,
    mesh: Mesh,
    draws: int,
    variances: tuple[Variance, ...],
) -> Callable[..., Float[Array, "b sigma draws m"]]:
    """The KLs of some steps: (params, t [m], λ [m], gap [m], examples, index) -> [b sigma draws m].

    T and the schedule are arguments, so that one program serves all.
    """

    def terms(params, t, log_snr, gap, examples, index):
        x_0, ones = definition.quantization.to_data(examples.images), jnp.ones_like(index)
        reverse = definition.model(params, examples.labels).reverse

        def at(eps, log_snr, gap):
            step = Step(log_snr * ones, gap * ones)
            outputs = reverse.outputs(diffuse(x_0, step.log_snr, eps), step.log_snr)
            error = reverse.eps_error(outputs.prediction, x_0, eps, step.log_snr) ** 2

            def kl(variance):
                of_this = reverse._replace(variance=variance)
                return kl_from_error(
                    error, step, of_this.log_variance_ratio(step, error, outputs.extra)
                )

            return jnp.stack([kl(variance) for variance in variances])

        noises = [evaluation_noise(config, definition, index, draw) for draw in range(draws)]
        eps = jnp.stack([jax.vmap(noise)(t[:, None] * ones) for noise in noises])
        kls = jax.lax.map(lambda of_draw: jax.vmap(at)(of_draw, log_snr, gap), eps)
        return jnp.transpose(kls, (3, 2, 0, 1))

    return jit_evaluation(terms, mesh, num_batched=2, num_shared=4)


def _make_ends(
    config: ConfigDict, definition: ModelDefinition, mesh: Mesh, draws: int
) -> Callable[..., Float[Array, "b draws"]]:
    """Prior and reconstruction: (params, first levels, λ_T, examples, index) -> sum, [b draws]."""

    def ends(params, first, last_log_snr, examples, index):
        x_0, ones = definition.quantization.to_data(examples.images), jnp.ones_like(index)
        model = definition.model(params, examples.labels)._replace(levels=first)
        noises = [evaluation_noise(config, definition, index, draw) for draw in range(draws)]
        parts = [reconstruction(model, x_0, noise(ones)) for noise in noises]
        return prior_kl(x_0, last_log_snr * ones)[:, None] + jnp.stack(parts, axis=1)

    return jit_evaluation(ends, mesh, num_batched=2, num_shared=3)


def summarize(totals: Totals, reference: str, num_dims: int) -> list[Entry]:
    """The entries, each compared with the choice at its T that has the reference's name."""
    entries = []
    for (num_timesteps, name), total in totals.items():
        value = _estimate(total, num_dims)
        difference = _estimate(total - totals[num_timesteps, reference], num_dims)
        entries.append(Entry(num_timesteps, name, *value, *difference))
    return entries


def _estimate(totals: Float[np.ndarray, "n draws"], num_dims: int) -> Estimate:
    """Draws are independent given the example, so their spread tells the noise of their mean."""
    draws = totals.shape[1]
    return estimate(totals.mean(axis=1), totals.var(axis=1, ddof=1) / draws, num_dims)


def to_markdown(entries: list[Entry], kind: str, reference: str) -> str:
    """The bound by name and T, the lowest of each T in bold, and the differences to a reference.

    Args:
      entries: what was measured.
      kind: what the names are of, for the tables' heads.
      reference: the name that the others are compared with.
    """
    names = list(dict.fromkeys(entry.name for entry in entries))
    columns = list(dict.fromkeys(entry.num_timesteps for entry in entries))
    by_place = {(entry.name, entry.num_timesteps): entry for entry in entries}
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
        head = [f"| {kind} | {' | '.join(f'T = {T}' for T in columns)} |"]
        head.append("| --- " * len(columns) + "| --- |")
        body = [f"| {n} | {' | '.join(show(by_place[n, T]) for T in columns)} |" for n in rows]
        return "\n".join(head + body)

    return (
        "Bits/dim ± its standard error over noise, with the examples fixed:\n\n"
        + table(value, names)
        + f"\n\nDifference to {reference} on the same examples and noise, ± its standard error "
        "over examples:\n\n" + table(difference, [n for n in names if n != reference])
    )


def write(
    workdir: epath.PathLike, stem: str, entries: list[Entry], kind: str, reference: str
) -> None:
    """The tables and a picture, as STEM.md and STEM.png; arguments as for `to_markdown`."""
    workdir = epath.Path(workdir)
    (workdir / f"{stem}.md").write_text(to_markdown(entries, kind, reference) + "\n")
    by_name = {}
    for entry in entries:
        by_name.setdefault(entry.name, {})[entry.num_timesteps] = entry.bits_per_dim
    plots.plot_bits_over_timesteps(workdir / f"{stem}.png", by_name, reference)


def rows(entries: list[Entry], kind: str) -> list[dict[str, Any]]:
    """The entries for a JSON file, where their names are listed as `kind`."""
    return [
        {kind if field == "name" else field: value for field, value in entry._asdict().items()}
        for entry in entries
    ]
