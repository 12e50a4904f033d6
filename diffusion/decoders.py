"""p(x_0 | x_1): the probability of the discrete pixels given the first noisy level.

A `Quantization` maps grey levels to data values. Decoders, data loading and pictures all use it.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt8

from diffusion.gaussian import Gaussian, expand, sum_per_example
from diffusion.schedules import Array, Levels, Numbers, alpha, known_values, sigma


class Quantization(NamedTuple):
    """Grey levels k = 0 … K − 1 as data on [−1, 1].

    Attributes:
      num_levels: K; 17 for scikit-learn's digits, 256 for bytes.
      scaling: "endpoints" has the first and last levels at −1 and 1 with a spacing of 2/(K − 1),
        as DDPM's x/127.5 − 1; "midpoints" has K bins on [−1, 1] with a spacing of 2/K, as VDM.
    """

    num_levels: int
    scaling: str = "endpoints"

    @property
    def spacing(self) -> float:
        """Distance between neighbouring levels, in data units."""
        return 2 / {"endpoints": self.num_levels - 1, "midpoints": self.num_levels}[self.scaling]

    @property
    def values(self) -> Float[np.ndarray, "K"]:
        """The K data values, increasing, in float64."""
        return (np.arange(self.num_levels) - (self.num_levels - 1) / 2) * self.spacing

    def to_data(self, level: Int[Array, "*b"] | UInt8[Array, "*b"]) -> Float[Array, "*b"]:
        """Grey levels as data values."""
        return jnp.asarray(self.values)[level]

    def to_level(self, x: Float[Array, "*b"]) -> Int[Array, "*b"]:
        """The nearest grey level of data values."""
        level = jnp.round(x / self.spacing + (self.num_levels - 1) / 2)
        return jnp.clip(level, 0, self.num_levels - 1).astype(jnp.int32)

    def check(self, x: Float[Array, "*b"]) -> None:
        """Refuses data that are not on the grey levels; a traced array passes unchecked.

        Raises:
          ValueError: if a value is a hundredth of the spacing, or more, from its nearest level; in
            half precision, more than rounding.
        """
        values = known_values(x)
        if values is None:
            return
        level = np.nan_to_num(np.round(values / self.spacing + (self.num_levels - 1) / 2))
        nearest = self.values[np.clip(level, 0, self.num_levels - 1).astype(int)]
        tolerance = max(0.01 * self.spacing, 2 * float(jnp.finfo(values.dtype).eps))
        is_off = ~(np.abs(values - nearest) < tolerance)
        if is_off.any():
            raise ValueError(
                f"x_0 has the value {values[is_off][0]:g}, which is no grey level: the decoder's "
                f"{self.num_levels} levels are {self.values[0]:g}, {self.values[1]:g} … "
                f"{self.values[-1]:g}; convert images with Quantization.to_data"
            )


SCALINGS = ("endpoints", "midpoints")

Decoder = Callable[..., Float[Array, "b"]]
"""(x_0, x_1, x_0_hat, levels) -> log p(x_0 | x_1) in nats, per example."""


def discretized_gaussian_log_prob(
    x_0: Float[Array, "b *d"],
    mean: Float[Array, "b *d"],
    std: Float[Array, "#b ..."],
    quantization: Quantization,
) -> Float[Array, "b *d"]:
    """log ∫ N(x; mean, std²) dx over the bin of x_0; the first and last bins are unbounded.

    Value and gradient are accurate in the tails and at any ratio of bin width to std, without
    clamping. Ho et al. (2020), equation 13.
    """
    level = quantization.to_level(x_0)
    half_bin = 0.5 * quantization.spacing / std
    centre = (x_0 - mean) / std
    inside = _log_interval(centre, jnp.broadcast_to(half_bin, jnp.shape(centre)))
    first = _log_ndtr(centre + half_bin)
    last = _log_ndtr(half_bin - centre)
    is_last = level == quantization.num_levels - 1
    return jnp.where(level == 0, first, jnp.where(is_last, last, inside))


_TAIL = -10.0  # below it log Φ and its gradient come from a series


def _log_ndtr(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """log Φ(x): JAX's function, except in the lower tail, where its gradient is 0/0."""
    x_tail = jnp.minimum(x, _TAIL)
    in_tail = -0.5 * x_tail**2 + _log_mills_ratio(x_tail)
    return jnp.where(x < _TAIL, in_tail, jax.scipy.special.log_ndtr(jnp.where(x < _TAIL, 0.0, x)))


def _log_mills_ratio(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """log Φ(x) + x²/2 for x ≤ −10, by a series that is accurate to rounding in float64."""
    series, inverse = 1.0, 1 / x**2  # Φ(x) = φ(x)/|x| (1 − 1/x² + 3/x⁴ − …)
    for odd in range(31, 0, -2):
        series = 1 - odd * inverse * series
    return jnp.log(series) - jnp.log(-x) - 0.5 * np.log(2 * np.pi)


def _log_interval(centre: Float[Array, "*b"], half: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """log(Φ(centre + half) − Φ(centre − half)) for half > 0.

    In a narrow bin whose density hardly changes the difference cancels, and Gauss-Legendre nodes
    are exact to rounding. Elsewhere Φ at the two edges differs by a factor of e² or more, or the
    bin is wide.
    """
    centre = jnp.abs(centre)  # by symmetry; Φ of negative numbers is accurate
    is_flat = (half < 0.25) & (centre * half < 1)
    return jnp.where(
        is_flat,
        _log_flat_interval(jnp.where(is_flat, centre, 0.0), jnp.where(is_flat, half, 0.1)),
        _log_steep_interval(centre, jnp.where(is_flat, 1.0, half)),
    )


def _log_flat_interval(centre: Float[Array, "*b"], half: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """`_log_interval` for half < 1/4 and |centre| · half < 1, where eight nodes err by 1e-17."""
    nodes, weights = (
        jnp.asarray(constants, centre.dtype) for constants in np.polynomial.legendre.leggauss(8)
    )
    points = centre[..., None] + half[..., None] * nodes
    log_density = -0.5 * points**2 - 0.5 * np.log(2 * np.pi)
    return jax.nn.logsumexp(log_density, axis=-1, b=weights) + jnp.log(half)


def _log_steep_interval(centre: Float[Array, "*b"], half: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """`_log_interval` where Φ of the two edges does not cancel; centre ≥ 0."""
    upper, lower = half - centre, -half - centre
    log_upper = _log_ndtr(upper)
    # In the tail the squares of the edges, which float32 rounds, are subtracted on paper.
    in_tail = upper < _TAIL
    tail_ratio = (
        2 * centre * half
        + _log_mills_ratio(jnp.minimum(upper, _TAIL))
        - _log_mills_ratio(jnp.where(in_tail, lower, _TAIL))
    )
    log_ratio = jnp.where(in_tail, tail_ratio, log_upper - _log_ndtr(lower))
    return log_upper + jax.nn.log1mexp(log_ratio)


def categorical_log_prob(
    x_0: Float[Array, "b *d"],
    x_1: Float[Array, "b *d"],
    log_snr: Numbers,
    quantization: Quantization,
) -> Float[Array, "b *d"]:
    """log p(x_0 | x_1) with p ∝ q(x_1 | x_0) over the K values. Kingma et al. (2021), 3.3."""
    signal, noise = expand(alpha(log_snr), x_1), expand(sigma(log_snr), x_1)
    values = jnp.asarray(quantization.values, x_1.dtype)
    distance = (x_1[..., None] - signal[..., None] * values) / noise[..., None]
    log_probs = jax.nn.log_softmax(-0.5 * distance**2)
    level = quantization.to_level(x_0)
    return jnp.take_along_axis(log_probs, level[..., None], axis=-1)[..., 0]


def discretized_gaussian(quantization: Quantization, variance: str = "beta_tilde") -> Decoder:
    """DDPM's decoder: N(x̂_0, σ_1²) integrated over the bin of each pixel.

    σ_1² is fixed, also where Σ_θ is learned. Nichol and Dhariwal (2021) use the learned Σ_θ at
    t = 1 too; here the network's `extra` has no gradient from that term.

    Args:
      quantization: the grey levels; data that are not traced must lie on them.
      variance: σ_1²: "beta" is β_1; "beta_tilde" is β̃_2, because β̃_1 is zero, or β_1 at T = 1.
    """

    def log_prob(x_0, x_1, x_0_hat, levels):
        del x_1
        quantization.check(x_0)
        std = jnp.sqrt(first_variance(levels, variance))
        return sum_per_example(discretized_gaussian_log_prob(x_0, x_0_hat, std, quantization))

    return log_prob


FIRST_VARIANCES = ("beta_tilde", "beta")


def first_variance(levels: Levels, variance: str) -> Float[Array, "1"]:
    """σ_1² of the discretised Gaussian decoder, β̃_2 or β_1, as an array of length one."""
    t = {"beta": 1, "beta_tilde": min(2, levels.num_timesteps)}[variance]
    step = levels.step(jnp.array([t]))
    return step.beta if t == 1 else step.posterior_variance


def gaussian(variance: float | None = None) -> Decoder:
    """For continuous data: p(x_0 | x_1) = N(x̂_0, variance) as a density.

    Args:
      variance: the best one is the mean squared error of x̂_0 per coordinate, e^{−λ_1} E[(ε − ε̂)²].
        By default it is e^{−λ_1}: that of a density of x_0 which is flat over σ_1/α_1, where x̂_0
        is x_1/α_1. Another choice by a factor f costs ½ (log f + 1/f − 1) nats per coordinate.

    Raises:
      ValueError: if the variance is not positive, unless JAX traces it.
    """
    known = None if variance is None else known_values(variance)
    if known is not None and not (known > 0).all():
        raise ValueError(f"variance = {variance}; it must be positive")

    def log_prob(x_0, x_1, x_0_hat, levels):
        del x_1
        value = jnp.exp(-levels.log_snr[1]) if variance is None else variance
        return Gaussian(x_0_hat, jnp.full((1,) * jnp.ndim(x_0), value)).log_prob(x_0)

    return log_prob


def categorical(quantization: Quantization) -> Decoder:
    """VDM's decoder: a softmax over the K values that depends on x_1 only.

    Args:
      quantization: the grey levels; data that are not traced must lie on them.
    """

    def log_prob(x_0, x_1, x_0_hat, levels):
        del x_0_hat
        quantization.check(x_0)
        log_snr = jnp.full(jnp.shape(x_1)[0], levels.log_snr[1])
        return sum_per_example(categorical_log_prob(x_0, x_1, log_snr, quantization))

    return log_prob


DECODERS: dict[str, Callable[..., Decoder]] = {
    "discretized_gaussian": discretized_gaussian,
    "categorical": categorical,
}
