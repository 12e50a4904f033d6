"""What a study finds: each cell's bound and its difference to the baseline, paired."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float

from diffusion.statistics.crossed import CrossedMean, crossed_mean
from diffusion.statistics.standard_errors import bits_per_dim
from experiments.harness.workdir.files import write_json

Key = tuple[str, ...]
"""A cell of the grid: the name of its value on each axis, in the order of the axes."""

Curve = tuple[Float[np.ndarray, "m"], Float[np.ndarray, "m"]]
"""Training steps and the values at these steps."""


class Measured(NamedTuple):
    """What has been measured of a cell, for the training seeds that have been trained so far.

    Attributes:
      seeds: the training seeds, in the order of the rows of `totals`.
      totals: the bound of each training seed, example and noise draw, in nats and float64. Examples
        and noise are the same for all cells and seeds. A model that diverged has NaN or infinity.
      figures: further measures by name, such as "loss_variance" or "images_per_s", with one value
        for each training seed.
      curves: learning curves by name, such as "validation bits/dim" or "loss", with one curve for
        each training seed.
    """

    seeds: tuple[int, ...]
    totals: Float[np.ndarray, "seeds n draws"]
    figures: Mapping[str, Sequence[float]]
    curves: Mapping[str, Sequence[Curve]]


class Cell(NamedTuple):
    """The result of a cell, in bits/dim.

    Attributes:
      key: the cell.
      bound: the bound.
      difference: the bound minus the baseline's, on the same examples, noise and training seeds.
    """

    key: Key
    bound: CrossedMean
    difference: CrossedMean


class Summary(NamedTuple):
    """The result of a study, finished or not.

    Attributes:
      axes: the names of the values of each axis.
      baseline: the cell with which the others are compared.
      cells: the measured cells.
      skipped: cells that can't be trained, with the reason.
      missing: cells that have not been measured yet.
    """

    axes: Mapping[str, tuple[str, ...]]
    baseline: Key
    cells: list[Cell]
    skipped: Mapping[Key, str]
    missing: list[Key]


def summarize(
    cells: Mapping[Key, Measured],
    baseline: Key,
    axes: Mapping[str, tuple[str, ...]],
    num_dims: int,
    skipped: Mapping[Key, str],
    seeds: Sequence[int],
) -> Summary:
    """The summary of what has been measured so far.

    Args:
      cells: the measured cells; a cell of which nothing has been measured is left out.
      baseline: the cell with which the others are compared.
      axes: the names of the values of each axis. The grid is their product.
      num_dims: dimensions of an example.
      skipped: the cells of the grid that can't be trained, with the reason.
      seeds: all training seeds of the study.
    """
    del seeds
    results = []
    for key, measured in cells.items():
        difference = measured.totals - cells[baseline].totals
        means = (crossed_mean(bits_per_dim(x, num_dims)) for x in (measured.totals, difference))
        results.append(Cell(key, *means))
    return Summary(axes, baseline, results, skipped, [])


def write(workdir: epath.PathLike, summary: Summary, facts: Mapping[str, Any]) -> None:
    """Writes ablation.json, and further files with the same content for people.

    Args:
      workdir: the study's directory.
      summary: the result.
      facts: what all cells have in common, such as the split and the number of training steps.
    """
    rows = [
        {"cell": cell.key, **cell.bound._asdict(), "difference": cell.difference._asdict()}
        for cell in summary.cells
    ]
    write_json(epath.Path(workdir) / "ablation.json", {**facts, "cells": rows})
