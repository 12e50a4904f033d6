"""What a study finds, as types: cells, their paired differences to the baseline, and effects."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from diffusion.statistics.crossed import CrossedMean
from experiments.harness.pictures.comparisons import Curve

ALPHA = 0.05  # the family-wise error rate of Holm's tests

Key = tuple[str, ...]
"""A cell of the grid: the name of its value on each axis, in the order of the axes."""


class Measured(NamedTuple):
    """What has been measured of a cell, for the training seeds that have been trained so far.

    Attributes:
      seeds: the training seeds, in the order of the rows of `totals`.
      totals: the bound of each training seed, example and noise draw, in nats and float64. Examples
        and noise are the same for all cells and seeds. A model that diverged has NaN or infinity.
      figures: further measures by name, such as "loss_variance" or "images_per_second", with one
        value for each training seed. "loss_variance_se" is the standard error of "loss_variance"
        with the network fixed.
      curves: learning curves by name, such as "validation bits/dim" or "loss", with one curve for
        each training seed.
    """

    seeds: tuple[int, ...]
    totals: Float[np.ndarray, "seeds n draws"]
    figures: Mapping[str, Sequence[float]]
    curves: Mapping[str, Sequence[Curve]]


class Difference(NamedTuple):
    """A paired difference of bounds in bits/dim: same examples, noise and training seeds.

    Attributes:
      mean: with its errors.
      interval: half the width of the 95 % confidence interval.
      p: of a two-sided test that it is zero.
      p_holm: p corrected for all differences to the baseline; NaN for an effect, whose p is not.
      seeds: the training seeds that all cells of the difference have.
    """

    mean: CrossedMean
    interval: float
    p: float
    p_holm: float
    seeds: tuple[int, ...]

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.mean.mean - self.interval

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.mean.mean + self.interval

    @property
    def is_significant(self) -> bool:
        """Whether it differs from zero by Holm's tests at 5 %."""
        return self.p_holm <= ALPHA

    @property
    def verdict(self) -> str:
        """One of: lower, higher, within its error, identical, no error known."""
        if self.mean.mean == self.mean.se == 0:
            return "identical"
        if np.isnan(self.p):
            return "no error known"
        if not self.is_significant:
            return "within its error"
        return "lower" if self.mean.mean < 0 else "higher"


class Figure(NamedTuple):
    """A further measure of a cell.

    Attributes:
      values: of each training seed.
      se: standard error of their mean with the networks fixed, at most: the draws are the same
        for all seeds, so that errors do not average out. NaN if it is not known.
      ratio: to the baseline, the geometric mean over the seeds that both have; NaN where a value
        of either is not positive.
    """

    values: tuple[float, ...]
    se: float
    ratio: float

    @property
    def mean(self) -> float:
        """Over training seeds."""
        return float(np.mean(self.values))

    @property
    def low(self) -> float:
        """The least value of a training seed."""
        return float(np.min(self.values))

    @property
    def high(self) -> float:
        """The largest value of a training seed."""
        return float(np.max(self.values))


class Cell(NamedTuple):
    """The result of a cell.

    Attributes:
      key: the cell.
      seeds: the training seeds that have been measured.
      not_finite: of each training seed with NaN or infinite totals, the number of such examples.
      bound: in bits/dim; None if a total is not finite.
      difference: to the baseline; None for the baseline, and where the totals of either are not
        finite, or no training seed is common.
      figures: further measures by name.
      curves: as measured.
    """

    key: Key
    seeds: tuple[int, ...]
    not_finite: Mapping[int, int]
    bound: CrossedMean | None
    difference: Difference | None
    figures: Mapping[str, Figure]
    curves: Mapping[str, Sequence[Curve]]


class Effect(NamedTuple):
    """The effect of a value, or of a pair of values of two axes.

    A main effect is the difference between a value and the baseline's value on the same axis, as
    the mean over the values of the other axes. An interaction is a difference of differences:
    how far the effect of a value depends on the value of the other axis.

    Attributes:
      values: the values by axis: of one axis, or of two for an interaction.
      difference: the effect.
      num_pairs: the number of pairs of cells that a main effect is the mean of.
      num_possible: the number of such pairs in the grid.
    """

    values: Mapping[str, str]
    difference: Difference
    num_pairs: int
    num_possible: int


class Summary(NamedTuple):
    """The result of a study, finished or not.

    Attributes:
      axes: the names of the values of each axis.
      baseline: the cell with which the others are compared.
      seeds: all training seeds of the study.
      num_examples: the number of examples on which each cell is measured; 0 without any cell.
      cells: the measured cells: the baseline, then by rising difference, then those without one.
      effects: main effects, and for two axes the interactions.
      skipped: cells that can't be trained, with the reason.
      failed: of each cell, why trainings failed, by their seed.
      missing: of each cell, the training seeds that have not been measured yet, and did not fail.
    """

    axes: Mapping[str, tuple[str, ...]]
    baseline: Key
    seeds: tuple[int, ...]
    num_examples: int
    cells: list[Cell]
    effects: list[Effect]
    skipped: Mapping[Key, str]
    failed: Mapping[Key, Mapping[int, str]]
    missing: Mapping[Key, tuple[int, ...]]

    @property
    def is_complete(self) -> bool:
        """Whether every cell that can be trained has been measured for every training seed."""
        return not self.missing and not self.failed
