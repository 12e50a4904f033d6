"""Distances between two sets of samples, from their features: Fréchet, kernel, precision, recall.

A sample is represented by its features, such as pixels or a classifier's activations, in an array
[n, f]. All computations run on the host in float64. Besides the features they need memory for f²
numbers and a block of pairs.

There are two standard errors, as in `standard_errors.py`. `se` is over both sets, as draws from
their populations. `mc_se` is over the generated samples with the real set fixed: the standard
deviation between sets of the same sampler. The difference of two samplers with independent samples
and the same real set has the standard error √(mc_se_1² + mc_se_2²).
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Num

_BLOCK_SIZE = 2**22
"""Number of pairs in a block: 32 MiB, a few of which are in memory at once."""


def _checked(
    name: str, features: Num[np.ndarray, "n *f"], least: int = 0, why: str = ""
) -> Float[np.ndarray, "n f"]:
    """The features in float64, or ValueError if they are not finite or are fewer than `least`."""
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
    """Slices of the rows, each with at most _BLOCK_SIZE pairs."""
    size = max(1, _BLOCK_SIZE // max(1, num_columns))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))


class Moments(NamedTuple):
    """Count, mean and scatter matrix of a set of samples, for updates batch by batch.

    Attributes:
      count: number of samples.
      mean: mean of each feature.
      scatter: Σ (x − mean)(x − mean)ᵀ.
    """

    count: int
    mean: Float[np.ndarray, "f"]
    scatter: Float[np.ndarray, "f f"]

    @classmethod
    def empty(cls, num_features: int) -> "Moments":
        """The moments of the empty set."""
        return cls(0, np.zeros(num_features), np.zeros((num_features, num_features)))

    def update(self, features: Num[np.ndarray, "n *f"]) -> "Moments":
        """The moments after adding a batch of any size.

        Raises:
          ValueError: if the batch is not finite or not [n, f] with the same f.
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
        """The moments of the union. Chan, Golub & LeVeque (1983), the pairwise update."""
        count = self.count + other.count
        if count == 0:
            return self
        difference = other.mean - self.mean
        between = np.outer(difference, difference) * (self.count * other.count / count)
        mean = self.mean + difference * (other.count / count)
        return Moments(count, mean, self.scatter + other.scatter + between)

    def without(self, other: "Moments") -> "Moments":
        """The moments after removing a part of the set: `merge` with a negative count."""
        return self.merge(Moments(-other.count, other.mean, -other.scatter))

    @property
    def covariance(self) -> Float[np.ndarray, "f f"]:
        """The unbiased covariance, scatter/(n − 1).

        Raises:
          ValueError: for fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"count = {self.count}; a covariance needs at least 2 samples")
        return self.scatter / (self.count - 1)


def _factor(covariance: Float[np.ndarray, "f f"]) -> Float[np.ndarray, "f f"]:
    """F with F Fᵀ = covariance.

    Eigenvalues at the size of rounding are set to zero. If n ≤ f they are noise of either sign, and
    the square root of 1e-16 is not small.
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

    The trace of (C_a^{1/2} C_b C_a^{1/2})^{1/2} is the sum of the singular values of F_aᵀ F_b. This
    avoids the square root of the eigenvalues of a product and is accurate for singular covariances.
    """
    overlap = np.linalg.svd(factor_a.T @ factor_b, compute_uv=False).sum()
    traces = np.square(factor_a).sum() + np.square(factor_b).sum()
    # The distance is not negative; rounding can make it so.
    return max(0.0, float(np.square(mean_a - mean_b).sum() + traces - 2 * overlap))


def frechet_distance(real: Moments, fake: Moments) -> float:
    """‖m_a − m_b‖² + tr(C_a + C_b − 2 (C_a^{1/2} C_b C_a^{1/2})^{1/2}), a real and b fake.

    It is the squared 2-Wasserstein distance of two Gaussians with these moments, in squared units
    of the features. With Inception's features it is FID. It is symmetric and accurate for singular
    covariances, and costs a few f³ operations.

    The bias is positive and about c/n, where c depends on the sampler (Chong & Forsyth 2020):
    compare distances at the same numbers of samples only.

    Raises:
      ValueError: for fewer than two samples in a set, or features of different lengths.

    Heusel et al. (2017), section 'Fréchet Inception Distance'.
    """
    _check_lengths(len(real.mean), len(fake.mean))
    return _frechet(real.mean, _factor(real.covariance), fake.mean, _factor(fake.covariance))


def frechet_mc_se(real: Moments, fake: Num[np.ndarray, "n *f"], num_groups: int = 50) -> float:
    """Standard error of `frechet_distance` over the fake samples, with the real moments fixed.

    A jackknife that deletes one group at a time. The mean of its square is the variance if the
    distance is far above its noise. It is larger otherwise: about twice the variance if both
    distributions have the same moments. It does not include the bias. The relative error of the
    standard error itself is 1/√(2 (num_groups − 1)), a tenth at 50 groups.

    With the two sets exchanged it is the error over the real samples. The root of the sum of both
    squares is the error over both sets.

    Args:
      real: moments of the real samples.
      fake: features of the generated samples, at least two in each group, in any order.
      num_groups: number of groups, and of Fréchet distances computed: less than a second in total
        at f = 64, minutes at f = 2048.

    Raises:
      ValueError: for too few samples or groups, and for features that are not finite or have
        different lengths.
    """
    if num_groups < 2:
        raise ValueError(f"num_groups = {num_groups}; it must be at least 2")
    fake = _checked("fake", fake, 2 * num_groups, f", two for each of {num_groups} groups")
    _check_lengths(len(real.mean), fake.shape[1])

    def moments(features):
        return Moments.empty(len(real.mean)).update(features)

    whole, factor = moments(fake), _factor(real.covariance)
    distances = np.empty(num_groups)
    # Groups are contiguous: if the classes alternate, each group has samples of all classes.
    for group, part in enumerate(np.array_split(fake, num_groups)):
        rest = whole.without(moments(part))
        distances[group] = _frechet(real.mean, factor, rest.mean, _factor(rest.covariance))
    return float(np.sqrt((num_groups - 1) * distances.var()))


class KernelDistance(NamedTuple):
    """An unbiased squared MMD with its standard errors.

    Attributes:
      mean: the estimate; it can be negative if the distributions are close.
      se: standard error over both sets.
      mc_se: standard error over the fake samples, with the real set fixed.
    """

    mean: float
    se: float
    mc_se: float


class _Effects(NamedTuple):
    """The least-squares decomposition k_ij = mean + row_i + column_j + residual_ij.

    Attributes:
      mean: mean of the kernel over pairs.
      row, column: effects of each sample, with sum zero.
      residual: unbiased variance of the residuals.
    """

    mean: float
    row: Float[np.ndarray, "n"]
    column: Float[np.ndarray, "m"]
    residual: float


def _kernel_effects(
    x: Float[np.ndarray, "n f"], y: Float[np.ndarray, "m f"], within: bool
) -> _Effects:
    """The effects of k(x_i, y_j) = (x_iᵀ y_j/f + 1)³ over all pairs; `within` one set, i ≠ j."""
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
        # Without the diagonal x_i has n − 1 pairs, and its row and column effects are equal.
        mean = rows.sum() / (n * (n - 1))
        effect = (rows - rows.mean()) / (n - 2)
        explained = n * (n - 1) * mean**2 + 2 * (n - 2) * np.square(effect).sum()
        return _Effects(mean, effect, effect, (squares - explained) / (n * (n - 3)))
    mean = rows.sum() / (n * m)
    row, column = rows / m - mean, columns / n - mean
    explained = n * m * mean**2 + m * np.square(row).sum() + n * np.square(column).sum()
    return _Effects(mean, row, column, (squares - explained) / ((n - 1) * (m - 1)))


def kernel_distance(real: Num[np.ndarray, "n *f"], fake: Num[np.ndarray, "m *g"]) -> KernelDistance:
    """Squared MMD under k(x, y) = (xᵀy/f + 1)³, over all pairs: KID, with Inception's features.

    It is unbiased at every n and m. It costs (n² + n m + m²) f multiplications.

    The errors are those of U-statistics. Their variance has a first-order part, from the mean
    kernel of each sample, and a second-order part, from the residuals of single pairs, which is all
    of it if the distributions are equal. The spread of the means contains the second-order part
    twice. It is subtracted once, and the result is at least that part. So the mean of the squared
    error is the variance if the distance is far above its noise, and up to about twice the variance
    otherwise.

    Args:
      real: features of at least four real samples.
      fake: features of at least four generated samples.

    Raises:
      ValueError: for too few samples, and for features that are not finite or have different
        lengths.

    Bińkowski et al. (2018), section 4; Gretton et al. (2012), lemma 6; Hoeffding (1948).
    """
    x, y = _checked("real", real, 4), _checked("fake", fake, 4)
    _check_lengths(x.shape[1], y.shape[1])
    n, m = len(x), len(y)
    within_x, within_y = _kernel_effects(x, x, within=True), _kernel_effects(y, y, within=True)
    between = _kernel_effects(x, y, within=False)

    # The spread of the means contains each second-order term below twice.
    spread_x = 4 * np.square(within_x.row - between.row).sum() / (n * (n - 1))
    spread_y = 4 * np.square(within_y.row - between.column).sum() / (m * (m - 1))
    pairs_x = 2 * within_x.residual / ((n - 1) * (n - 2))
    pairs_y = 2 * within_y.residual / ((m - 1) * (m - 2))
    pairs = pairs_x + pairs_y + 4 * between.residual / (n * m)
    variance = max(spread_x + spread_y - pairs, pairs)
    # With the real samples fixed, the mean of k(x_i, y_j) over i is a function of y_j alone.
    mc_variance = max(spread_y - pairs_y, pairs_y)
    return KernelDistance(
        mean=float(within_x.mean + within_y.mean - 2 * between.mean),
        se=float(np.sqrt(variance)),
        mc_se=float(np.sqrt(mc_variance)),
    )


class PrecisionRecall(NamedTuple):
    """Fractions of samples, from 0 to 1.

    Attributes:
      precision: fraction of the fake samples inside the balls around the real samples.
      recall: fraction of the real samples inside the balls around the fake samples.
    """

    precision: float
    recall: float


def _pairwise_squared(
    x: Float[np.ndarray, "n f"], y: Float[np.ndarray, "m f"]
) -> Float[np.ndarray, "n m"]:
    """‖x_i − y_j‖² as ‖x_i‖² + ‖y_j‖² − 2 x_iᵀ y_j."""
    return np.square(x).sum(axis=1)[:, None] + np.square(y).sum(axis=1) - 2 * (x @ y.T)


def _squared_radii(x: Float[np.ndarray, "n f"], k: int) -> Float[np.ndarray, "n"]:
    """Squared distance of each sample to its k-th nearest other sample."""
    radii = np.empty(len(x))
    for block in _blocks(len(x), len(x)):
        squared = _pairwise_squared(x[block], x)
        own = np.arange(block.start, block.stop)
        squared[own - block.start, own] = np.inf
        radii[block] = np.partition(squared, k - 1, axis=1)[:, k - 1]
    return radii


def _covered(
    centres: Float[np.ndarray, "n f"],
    squared_radii: Float[np.ndarray, "n"],
    x: Float[np.ndarray, "m f"],
) -> Bool[np.ndarray, "m"]:
    """Whether each x lies in at least one closed ball."""
    inside = np.zeros(len(x), bool)
    for block in _blocks(len(centres), len(x)):
        squared = _pairwise_squared(centres[block], x)
        inside |= (squared <= squared_radii[block, None]).any(axis=0)
    return inside


def precision_recall(
    real: Num[np.ndarray, "n *f"], fake: Num[np.ndarray, "m *g"], k: int = 3
) -> PrecisionRecall:
    """Precision: the fraction of fakes inside a ball around a real sample. Recall: the reverse.

    The radius of a ball is the distance to the k-th nearest other sample of the same set. Both
    fractions depend on n and m: compare them at the same numbers only. With the real set fixed,
    precision is a mean over independent fakes with the standard error √(p (1 − p)/m). Recall has no
    such formula. Rounding decides whether a sample exactly on a ball's surface is inside, so that
    duplicated samples can count either way.

    Costs (n + m)² f multiplications.

    Args:
      real: features of more than k real samples.
      fake: features of more than k generated samples.
      k: the neighbour whose distance is the radius.

    Raises:
      ValueError: for k below 1 or too few samples, and for features that are not finite or have
        different lengths.

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
