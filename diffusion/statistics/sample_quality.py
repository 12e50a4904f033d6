"""Distances between two sets of samples, from their features: Fréchet, kernel, precision, recall.

Arrays [n, f] of features, pixels or a classifier's activations, stand for the samples. All work is
on the host in float64; memory beyond the features is f² numbers and a block of pairs.

Two errors are kept apart, as in `estimate.py`. `se` is over both sets, as draws from their
populations. `mc_se` is over the generated samples with the real set fixed: how far a second set of
the same sampler would land. Two samplers measured on one real set, with samples drawn
independently, differ by noise of √(mc_se_1² + mc_se_2²).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Num

_BLOCK_SIZE = 2**22
"""Numbers in a block of pairs: 32 MiB, of which a few are held at once."""


def _checked(
    name: str, features: Num[np.ndarray, "n *f"], least: int = 0, why: str = ""
) -> Float[np.ndarray, "n f"]:
    """The features in float64, when they are at least so many finite rows."""
    if np.ndim(features) != 2:
        raise ValueError(f"{name} has shape {np.shape(features)}; it must be [samples, features]")
    if len(features) < least:
        raise ValueError(f"{name} has {len(features)} samples; it needs at least {least}{why}")
    features = np.asarray(features, np.float64)
    finite = np.isfinite(features).all(axis=1)
    if not finite.all():
        sample = int(np.argmin(finite))
        raise ValueError(f"{name}: sample {sample} has features that are not finite")
    return features


def _check_lengths(real_length: int, fake_length: int) -> None:
    if real_length != fake_length:
        raise ValueError(
            f"fake has {fake_length} features a sample; it must have {real_length}, as real has"
        )


def _blocks(num_rows: int, num_columns: int) -> Iterator[slice]:
    """Slices of the rows, each with at most a block of pairs."""
    size = max(1, _BLOCK_SIZE // max(1, num_columns))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


class Moments(NamedTuple):
    """Count, mean and scatter of samples seen so far.

    Attributes:
      count: number of samples.
      mean: of each feature.
      scatter: Σ (x − mean)(x − mean)ᵀ.
    """

    count: int
    mean: Float[np.ndarray, "f"]
    scatter: Float[np.ndarray, "f f"]

    @classmethod
    def empty(cls, num_features: int) -> "Moments":
        """Of no samples."""
        return cls(0, np.zeros(num_features), np.zeros((num_features, num_features)))

    def update(self, features: Num[np.ndarray, "n *f"]) -> "Moments":
        """With the samples of a batch of any size added.

        Raises:
          ValueError: the batch is not [n, f] of the same f, or not finite.
        """
        features = _checked("features", features)
        if features.shape[1] != len(self.mean):
            raise ValueError(
                f"features are {features.shape[1]} a sample; "
                f"they must be {len(self.mean)}, as those before"
            )
        if not len(features):
            return self
        mean = features.mean(axis=0)
        centred = features - mean
        return self.merge(Moments(len(features), mean, centred.T @ centred))

    def merge(self, other: "Moments") -> "Moments":
        """Of both sets together. Chan, Golub & LeVeque (1983), the pairwise update."""
        count = self.count + other.count
        if count == 0:
            return self
        difference = other.mean - self.mean
        between = np.outer(difference, difference) * (self.count * other.count / count)
        mean = self.mean + difference * (other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    def without(self, other: "Moments") -> "Moments":
        """With a part of the set taken away again: `merge` of a negative count."""
        return self.merge(Moments(-other.count, other.mean, -other.scatter))

    @property
    def covariance(self) -> Float[np.ndarray, "f f"]:
        """Unbiased, over n − 1.

        Raises:
          ValueError: there are fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"count = {self.count}; a covariance needs at least 2 samples")
        return self.scatter / (self.count - 1)


def _factor(covariance: Float[np.ndarray, "f f"]) -> Float[np.ndarray, "f f"]:
    """F with F Fᵀ = covariance.

    Eigenvalues below rounding are set to zero: where n ≤ f they are noise of either sign, and the
    root of 1e-16 is not small.
    """
    eigenvalues, vectors = np.linalg.eigh(covariance)
    rounding = len(covariance) * np.finfo(np.float64).eps * np.abs(eigenvalues).max(initial=0.0)
    return vectors * np.sqrt(np.where(eigenvalues > rounding, eigenvalues, 0.0))


def _frechet(
    mean_a: Float[np.ndarray, "f"],
    factor_a: Float[np.ndarray, "f f"],
    mean_b: Float[np.ndarray, "f"],
    factor_b: Float[np.ndarray, "f f"],
) -> float:
    """The Fréchet distance of N(m_a, F_a F_aᵀ) and N(m_b, F_b F_bᵀ).

    The trace of (C_a^{1/2} C_b C_a^{1/2})^{1/2} is the sum of the singular values of F_aᵀ F_b. No
    root is taken of a product's eigenvalues, so that singular covariances keep their digits.
    """
    overlap = np.linalg.svd(factor_a.T @ factor_b, compute_uv=False).sum()
    traces = np.square(factor_a).sum() + np.square(factor_b).sum()
    # Zero at the least, but for rounding.
    return max(0.0, float(np.square(mean_a - mean_b).sum() + traces - 2 * overlap))


def frechet_distance(real: Moments, fake: Moments) -> float:
    """‖m_a − m_b‖² + tr(C_a + C_b − 2 (C_a^{1/2} C_b C_a^{1/2})^{1/2}), a real and b fake.

    In squared units of the features: the squared 2-Wasserstein distance of two Gaussians with
    these moments, and FID where the features are Inception's. Symmetric; sound for singular
    covariances. Costs a few f³ operations.

    It is biased upwards by about a constant over n, another for each sampler (Chong & Forsyth
    2020): compare only distances at the same numbers of samples.

    Raises:
      ValueError: fewer than two samples in a set, or features of different lengths.

    Heusel et al. (2017), section 'Fréchet Inception Distance'.
    """
    _check_lengths(len(real.mean), len(fake.mean))
    return _frechet(real.mean, _factor(real.covariance), fake.mean, _factor(fake.covariance))


def frechet_mc_se(real: Moments, fake: Num[np.ndarray, "n *f"], num_groups: int = 50) -> float:
    """Standard error of `frechet_distance` over the fake samples, the real moments fixed.

    The jackknife that deletes a group at a time. On the average its square is the variance where
    the distance is far above its noise, and more where it is not: about twice where the fakes
    follow the real moments exactly. It knows nothing of the bias. Its own relative error is
    1/√(2 (num_groups − 1)): a tenth at 50 groups.

    With the sets exchanged this is the error over the real samples; the root of the sum of both
    squares is the error over both.

    Args:
      real: moments of the real samples.
      fake: features of the generated samples, at least two a group, in any order.
      num_groups: costs as many Fréchet distances: below a second in all at f = 64, minutes at
        f = 2048.

    Raises:
      ValueError: too few samples or groups, features of different lengths or not finite.
    """
    if num_groups < 2:
        raise ValueError(f"num_groups = {num_groups}; it must be at least 2")
    fake = _checked("fake", fake, 2 * num_groups, f", two for each of {num_groups} groups")
    _check_lengths(len(real.mean), fake.shape[1])

    def moments(features):
        return Moments.empty(len(real.mean)).update(features)

    whole, factor = moments(fake), _factor(real.covariance)
    distances = np.empty(num_groups)
    # Neighbours together: where classes take turns, every group has some of each.
    for group, part in enumerate(np.array_split(fake, num_groups)):
        rest = whole.without(moments(part))
        distances[group] = _frechet(real.mean, factor, rest.mean, _factor(rest.covariance))
    return float(np.sqrt((num_groups - 1) * distances.var()))


class KernelDistance(NamedTuple):
    """An unbiased squared MMD with its standard errors.

    Attributes:
      mean: the estimate; below zero at times where the distributions are close.
      se: over both sets.
      mc_se: over the fake samples, with the real set fixed.
    """

    mean: float
    se: float
    mc_se: float


class _Effects(NamedTuple):
    """Kernel values k_ij as mean + row_i + column_j + residual, by least squares.

    Attributes:
      mean: over the pairs.
      row, column: effects of each sample; they sum to zero.
      residual: the residuals' variance, unbiased.
    """

    mean: float
    row: Float[np.ndarray, "n"]
    column: Float[np.ndarray, "m"]
    residual: float


def _kernel_effects(
    x: Float[np.ndarray, "n f"], y: Float[np.ndarray, "m f"], within: bool
) -> _Effects:
    """The effects of k(x_i, y_j) = (x_iᵀ y_j/f + 1)³ over all pairs; i ≠ j `within` a set."""
    n, m = len(x), len(y)
    rows, columns, squares = np.empty(n), np.zeros(m), 0.0
    for block in _blocks(n, m):
        base = x[block] @ y.T / x.shape[1] + 1
        kernel = base * base * base
        if within:
            own = np.arange(block.start, block.stop)
            kernel[own - block.start, own] = 0.0
        rows[block] = kernel.sum(axis=1)
        columns += kernel.sum(axis=0)
        squares += np.vdot(kernel, kernel)
    if within:
        # The diagonal is missing: x_i takes part in n − 1 pairs, and both effects are one.
        mean = rows.sum() / (n * (n - 1))
        effect = (rows - rows.mean()) / (n - 2)
        explained = n * (n - 1) * mean**2 + 2 * (n - 2) * np.square(effect).sum()
        return _Effects(mean, effect, effect, (squares - explained) / (n * (n - 3)))
    mean = rows.sum() / (n * m)
    row, column = rows / m - mean, columns / n - mean
    explained = n * m * mean**2 + m * np.square(row).sum() + n * np.square(column).sum()
    return _Effects(mean, row, column, (squares - explained) / ((n - 1) * (m - 1)))


def kernel_distance(real: Num[np.ndarray, "n *f"], fake: Num[np.ndarray, "m *g"]) -> KernelDistance:
    """Squared MMD under k(x, y) = (xᵀy/f + 1)³: KID where the features are Inception's.

    Unbiased at every n and m, over all pairs. Costs (n² + n m + m²) f multiplications.

    The errors are those of U-statistics: a first-order variance from each sample's mean kernel and
    a second-order one from the residuals of single pairs, which is all there is where the
    distributions are equal. The spread of the means counts the second twice. It is taken off once,
    and the result is never put below it: on the average the squared error is the variance where
    the distance is far above its noise, and up to about twice it where it is not.

    Args:
      real: features of at least four real samples.
      fake: features of at least four generated samples.

    Raises:
      ValueError: too few samples, features of different lengths or not finite.

    Bińkowski et al. (2018), section 4; Gretton et al. (2012), lemma 6; Hoeffding (1948).
    """
    x, y = _checked("real", real, 4), _checked("fake", fake, 4)
    _check_lengths(x.shape[1], y.shape[1])
    n, m = len(x), len(y)
    of_x, of_y = _kernel_effects(x, x, within=True), _kernel_effects(y, y, within=True)
    across = _kernel_effects(x, y, within=False)

    # From the spread of the means, which counts each second-order term below twice.
    spread_x = 4 * np.square(of_x.row - across.row).sum() / (n * (n - 1))
    spread_y = 4 * np.square(of_y.row - across.column).sum() / (m * (m - 1))
    pairs_x = 2 * of_x.residual / ((n - 1) * (n - 2))
    pairs_y = 2 * of_y.residual / ((m - 1) * (m - 2))
    pairs = pairs_x + pairs_y + 4 * across.residual / (n * m)
    variance = max(spread_x + spread_y - pairs, pairs)
    # With the real samples fixed, k(x_i, y_j) has no residual: a mean over i belongs to y_j.
    mc_variance = max(spread_y - pairs_y, pairs_y)
    return KernelDistance(
        mean=float(of_x.mean + of_y.mean - 2 * across.mean),
        se=float(np.sqrt(variance)),
        mc_se=float(np.sqrt(mc_variance)),
    )


class PrecisionRecall(NamedTuple):
    """Shares of samples in 0 … 1.

    Attributes:
      precision: of the fakes, within the reach of the real samples.
      recall: of the real samples, within the reach of the fakes.
    """

    precision: float
    recall: float


def _squared_distances(
    x: Float[np.ndarray, "n f"],
    y: Float[np.ndarray, "m f"],
    i: Int[np.ndarray, "p"],
    j: Int[np.ndarray, "p"],
) -> Float[np.ndarray, "p"]:
    """‖x_i − y_j‖² from the differences: zero for duplicates, and equal for equal pairs."""
    result = np.empty(len(i))
    for block in _blocks(len(i), x.shape[1]):
        result[block] = np.square(x[i[block]] - y[j[block]]).sum(axis=1)
    return result


def _bracket(
    x: Float[np.ndarray, "n f"], y: Float[np.ndarray, "m f"]
) -> tuple[Float[np.ndarray, "n m"], Float[np.ndarray, "n m"]]:
    """Bounds from below and above on every ‖x_i − y_j‖², as `_squared_distances` rounds it.

    ‖x‖² + ‖y‖² − 2xᵀy is a matrix product, but it cancels. It and the sum of squared differences
    are each within (f + 3) eps/2 (‖x‖ + ‖y‖)² of the truth, and (a + b)² ≤ 2 (a² + b²).
    """
    squares = np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1)
    product = 2 * (x @ y.T)
    margin = 2 * (x.shape[1] + 4) * np.finfo(np.float64).eps
    return squares * (1 - margin) - product, squares * (1 + margin) - product


def _squared_radii(x: Float[np.ndarray, "n f"], k: int) -> Float[np.ndarray, "n"]:
    """Squared distance of every sample to its k-th nearest other sample."""
    radii = np.empty(len(x))
    for block in _blocks(len(x), len(x)):
        lower, upper = _bracket(x[block], x)
        own = np.arange(block.start, block.stop)
        lower[own - block.start, own] = upper[own - block.start, own] = np.inf
        # Only a sample that may be nearer than the k-th least upper bound is worth exact work.
        furthest = np.partition(upper, k - 1, axis=1)[:, k - 1 : k]
        i, j = np.nonzero(lower <= furthest)
        exact = _squared_distances(x[block], x, i, j)
        order = np.lexsort((exact, i))
        radii[block] = exact[order][np.searchsorted(i, np.arange(len(own))) + k - 1]
    return radii


def _covered(
    centres: Float[np.ndarray, "n f"],
    squared_radii: Float[np.ndarray, "n"],
    x: Float[np.ndarray, "m f"],
) -> Bool[np.ndarray, "m"]:
    """Whether each x lies in some ball, its surface included."""
    inside = np.zeros(len(x), bool)
    for block in _blocks(len(centres), len(x)):
        lower, upper = _bracket(centres[block], x)
        radii = squared_radii[block]
        inside |= (upper <= radii[:, None]).any(axis=0)
        # Pairs that rounding leaves open decide only about samples that no other pair has.
        i, j = np.nonzero((lower <= radii[:, None]) & ~inside)
        inside[j[_squared_distances(centres[block], x, i, j) <= radii[i]]] = True
    return inside


def precision_recall(
    real: Num[np.ndarray, "n *f"], fake: Num[np.ndarray, "m *g"], k: int = 3
) -> PrecisionRecall:
    """Precision: the share of fakes within a real sample's reach. Recall: the reverse.

    A sample reaches as far as the k-th nearest other sample of its own set. Comparisons of
    distances are exact to the rounding of the squared differences, so that duplicates and ties
    count as they should. Both shares change with n and m: compare at the same numbers only. With
    the real set fixed, precision is a mean over independent fakes, so that its standard error is
    √(p (1 − p)/m); recall has none so simple.

    Costs (n + m)² f multiplications, and as many slower ones where all samples are duplicates.

    Args:
      real: features of more than k real samples.
      fake: features of more than k generated samples.
      k: the neighbour that sets a sample's reach.

    Raises:
      ValueError: k below 1, too few samples, features of different lengths or not finite.

    Kynkäänniemi et al. (2019), equations 1 and 2.
    """
    if k < 1:
        raise ValueError(f"k = {k}; it must be at least 1")
    why = f", one more than k = {k}"
    x, y = _checked("real", real, k + 1, why), _checked("fake", fake, k + 1, why)
    _check_lengths(x.shape[1], y.shape[1])
    return PrecisionRecall(
        precision=float(_covered(x, _squared_radii(x, k), y).mean()),
        recall=float(_covered(y, _squared_radii(y, k), x).mean()),
    )
