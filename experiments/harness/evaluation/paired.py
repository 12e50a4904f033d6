"""Bounds of one model for several levels and Σ_θ, on the same examples with the same noise.

The differences between them then have much smaller errors than the bounds themselves.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from diffusion.bound import kl_from_error, prior_kl, reconstruction
from diffusion.forward import diffuse
from diffusion.schedules import Levels, Step
from diffusion.statistics.standard_errors import Estimate, estimate
from diffusion.variances import Variance
from experiments.harness import devices, memory
from experiments.harness.data import order, splits
from experiments.harness.evaluation.programs import compile_program
from experiments.harness.evaluation.subject import Subject
from experiments.harness.pictures import plots
from experiments.harness.processes.progress import progress
from experiments.harness.setup.definition import check_levels, define_model


class Choice(NamedTuple):
    """The levels and the Σ_θ of a bound."""

    levels: Levels
    variance: Variance


Key = tuple[int, str]
"""The identifier of a choice: its number of levels, T, and its name among those with this T."""

Totals = dict[Key, Float[np.ndarray, "n draws"]]
"""The bound of every example and draw of the noise, in nats and float64."""


class Entry(NamedTuple):
    """The bound of one choice, in bits/dim.

    Attributes:
      num_timesteps: T.
      name: of the choice, among those with this T.
      bits_per_dim: the mean over examples and draws.
      bits_per_dim_se: its standard error over examples.
      bits_per_dim_mc_se: its standard error over noise, with the examples fixed.
      difference: from the reference at this T, with the same examples and noise.
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
    definition = define_model(config)
    memory.check_memory(config, definition.image_shape, section)
    devices.check_batch("config.evaluate.batch_size", config.evaluate.batch_size)
    splits.check_split(config, config[section].split)
    check_levels(config, definition, f"{section}.num_timesteps")


def measure_totals(subject: Subject, choices: Mapping[Key, Choice], draws: int) -> Totals:
    """The bound of every example for each choice, with the full sum over t.

    The noise is a function of (seed, example, t, draw), whatever the levels; draw 0 is that of an
    evaluation. The network runs once for each (levels, example, t, draw), however many Σ_θ are
    measured at the same levels.
    """
    run_ends = _make_ends(subject, draws)
    groups: dict[bytes, list[Key]] = {}
    for key, choice in choices.items():
        groups.setdefault(choice.levels.log_snr.tobytes(), []).append(key)
    evaluations = draws * sum(choices[keys[0]].levels.num_timesteps for keys in groups.values())
    terms, totals = {}, dict.fromkeys(choices)
    num_evaluations = subject.num_examples * evaluations
    with progress(num_evaluations, "compare", "eval", unit_scale=True) as bar:
        for keys in groups.values():
            levels = choices[keys[0]].levels
            variances = tuple(choices[key].variance for key in keys)
            if variances not in terms:
                terms[variances] = _make_terms(subject, draws, variances)
            run_terms, ends = terms[variances], subject._replace(levels=_first_levels(levels))

            def run(index, levels=levels, run_terms=run_terms, ends=ends):
                last = np.asarray(levels.log_snr[-1], np.float32)
                total = np.asarray(run_ends(ends, index, last), np.float64)
                total = total[:, None]  # the same for every Σ_θ
                for steps, is_step in _chunks(levels, subject.chunk_size):
                    kl = np.asarray(run_terms(ends, index, *steps), np.float64)
                    total = total + kl[..., is_step].sum(axis=-1)
                return total

            total = subject.over_examples(run, bar, draws * levels.num_timesteps)
            totals |= zip(keys, total.swapaxes(0, 1), strict=True)
    return totals


def _chunks(levels: Levels, chunk_size: int) -> Iterator[tuple[tuple[np.ndarray, ...], np.ndarray]]:
    """The steps to t = 2 … T in chunks: (t, λ, gap), and which of them are no padding."""
    for positions, mask in order.padded_batches(levels.num_timesteps - 1, chunk_size):
        t = positions + 2
        yield (t, np.float32(levels.log_snr[t]), np.float32(levels.gap[t])), mask


def _first_levels(levels: Levels) -> Levels:
    """λ_1 and λ_2, the only levels that a decoder uses, so that one program serves all T."""
    return Levels(np.float32(levels.log_snr[:3]), np.float32(levels.gap[:3]))


def _make_terms(
    subject: Subject, draws: int, variances: tuple[Variance, ...]
) -> Callable[..., Float[Array, "b sigma draws m"]]:
    """The KLs of some steps: (subject, index, t [m], λ [m], gap [m]) -> [b sigma draws m].

    T and the schedule are arguments, so that one program serves all.
    """

    def terms(model, batch, t, log_snr, gap):
        x_0, reverse, ones = batch.x_0, model.reverse, jnp.ones_like(batch.index)

        def at(eps, log_snr, gap):
            step = Step(log_snr * ones, gap * ones)
            outputs = reverse.outputs(diffuse(x_0, step.log_snr, eps), step.log_snr)
            error = reverse.eps_error(outputs.prediction, x_0, eps, step.log_snr) ** 2

            def kl(variance):
                chosen = reverse._replace(variance=variance)
                ratio = chosen.log_variance_ratio(step, error, outputs.extra)
                return kl_from_error(error, step, ratio)

            return jnp.stack([kl(variance) for variance in variances])

        noises = [batch.noise(draw) for draw in range(draws)]
        eps = jnp.stack([jax.vmap(noise)(t[:, None] * ones) for noise in noises])
        kls = jax.lax.map(lambda eps: jax.vmap(at)(eps, log_snr, gap), eps)
        return jnp.transpose(kls, (3, 2, 0, 1))

    return compile_program(subject, terms, num_shared=3)


def _make_ends(subject: Subject, draws: int) -> Callable[..., Float[Array, "b draws"]]:
    """Prior plus reconstruction: (subject with the first levels, index, λ_T) -> [b draws]."""

    def ends(model, batch, last_log_snr):
        x_0, ones = batch.x_0, jnp.ones_like(batch.index)
        noises = [batch.noise(draw) for draw in range(draws)]
        parts = [reconstruction(model, x_0, noise(ones)) for noise in noises]
        return prior_kl(x_0, last_log_snr * ones)[:, None] + jnp.stack(parts, axis=1)

    return compile_program(subject, ends, num_shared=1)


def summarize(totals: Totals, reference: str, num_dims: int) -> list[Entry]:
    """The entries, each compared with the choice named `reference` at the same T."""
    entries = []
    for (num_timesteps, name), total in totals.items():
        value = _estimate(total, num_dims)
        difference = _estimate(total - totals[num_timesteps, reference], num_dims)
        entries.append(Entry(num_timesteps, name, *value, *difference))
    return entries


def _estimate(totals: Float[np.ndarray, "n draws"], num_dims: int) -> Estimate:
    """Draws are independent given the example, so their variance gives the noise of their mean."""
    draws = totals.shape[1]
    return estimate(totals.mean(axis=1), totals.var(axis=1, ddof=1) / draws, num_dims)


def to_markdown(entries: list[Entry], kind: str, reference: str) -> str:
    """The bound by name and T, the lowest of each T in bold, and the differences to a reference.

    Args:
      entries: the entries.
      kind: what the names are, for the heads of the tables.
      reference: the name with which the others are compared.
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
    """Writes the tables and a plot to STEM.md and STEM.png; other arguments as `to_markdown`."""
    workdir = epath.Path(workdir)
    (workdir / f"{stem}.md").write_text(to_markdown(entries, kind, reference) + "\n")
    by_name = {}
    for entry in entries:
        by_name.setdefault(entry.name, {})[entry.num_timesteps] = entry.bits_per_dim
    plots.plot_bits_over_timesteps(workdir / f"{stem}.png", by_name, reference)


def rows(entries: list[Entry], kind: str) -> list[dict[str, Any]]:
    """The entries for a JSON file, in which `kind` is the key of their names."""
    return [
        {kind if field == "name" else field: value for field, value in entry._asdict().items()}
        for entry in entries
    ]
