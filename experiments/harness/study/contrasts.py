"""Paired differences between cells: same examples, same noise, same training seeds."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from jaxtyping import Float

from diffusion.statistics.crossed import crossed_mean
from diffusion.statistics.standard_errors import bits_per_dim
from experiments.harness.study.summary import Difference, Effect, Key, Measured

Bounds = Mapping[Key, Mapping[int, Float[np.ndarray, "n draws"]]]
"""The bounds of cells by training seed, example and draw, in bits/dim; all finite."""


def finite_bounds(cells: Mapping[Key, Measured], num_dims: int) -> Bounds:
    """The bounds of those cells whose totals are all finite."""
    return {
        key: dict(zip(measured.seeds, bits_per_dim(measured.totals, num_dims), strict=True))
        for key, measured in cells.items()
        if np.isfinite(measured.totals).all()
    }


def mean_difference(bounds: Bounds, pairs: Sequence[tuple[Key, Key]]) -> Difference | None:
    """The mean over pairs of cells of the first minus the second.

    Returns:
      The difference over the training seeds that all cells have; None if there is no such seed, no
      pair, or a cell has no bounds.
    """

    def combine(values):
        return np.mean([values[first] - values[second] for first, second in pairs], axis=0)

    return _combination(bounds, itertools.chain.from_iterable(pairs), combine)


def interaction(
    bounds: Bounds, both: Key, first: Key, second: Key, neither: Key
) -> Difference | None:
    """(both − first) − (second − neither); None as for `mean_difference`."""

    def combine(values):
        return (values[both] - values[first]) - (values[second] - values[neither])

    return _combination(bounds, (both, first, second, neither), combine)


def _combination(bounds: Bounds, keys: Iterable[Key], combine: Callable) -> Difference | None:
    """The mean of a function of {cell: [seeds n draws]}.

    The function takes differences before means, so that identical cells leave exactly zero.
    """
    keys = list(dict.fromkeys(keys))
    if not keys or not bounds.keys() >= set(keys):
        return None
    seeds = [seed for seed in bounds[keys[0]] if all(seed in bounds[key] for key in keys)]
    if not seeds:
        return None
    mean = crossed_mean(combine({k: np.stack([bounds[k][seed] for seed in seeds]) for k in keys}))
    return Difference(mean, mean.interval(), mean.p_value, np.nan, tuple(seeds))


def effects(bounds: Bounds, axes: Mapping[str, tuple[str, ...]], baseline: Key) -> list[Effect]:
    """The main effects of each axis; for two axes their interactions too.

    An effect without a term that could be measured is left out. With one axis there are none, as
    the differences to the baseline are the effects.
    """
    if len(axes) < 2:
        return []
    measured_effects = [
        effect
        for place, axis in enumerate(axes)
        for value in axes[axis]
        if value != baseline[place]
        and (effect := _main_effect(bounds, axes, baseline, place, value)) is not None
    ]
    return measured_effects + (_interactions(bounds, axes, baseline) if len(axes) == 2 else [])


def _main_effect(
    bounds: Bounds, axes: Mapping[str, tuple[str, ...]], baseline: Key, place: int, value: str
) -> Effect | None:
    """The effect of a value of the axis at a place in the order of the axes."""
    names = list(axes)
    others = [axes[name] for name in names if name != names[place]]

    def cell(rest, value):
        return (*rest[:place], value, *rest[place:])

    pairs = [
        (cell(rest, value), cell(rest, baseline[place])) for rest in itertools.product(*others)
    ]
    measured = [pair for pair in pairs if bounds.keys() >= set(pair)]
    difference = mean_difference(bounds, measured)
    if difference is None:
        return None
    return Effect({names[place]: value}, difference, len(measured), len(pairs))


def _interactions(
    bounds: Bounds, axes: Mapping[str, tuple[str, ...]], baseline: Key
) -> list[Effect]:
    interactions = []
    for key in itertools.product(*axes.values()):
        if key[0] == baseline[0] or key[1] == baseline[1]:
            continue
        corners = key, (key[0], baseline[1]), (baseline[0], key[1]), baseline
        if (difference := interaction(bounds, *corners)) is not None:
            interactions.append(Effect(dict(zip(axes, key, strict=True)), difference, 1, 1))
    return interactions
