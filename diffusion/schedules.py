"""Noise schedules: the log-SNR as a function of time, and the tables of β, ᾱ, σ², β̃ from it.

A noise level is a log-SNR λ = log(ᾱ / (1 − ᾱ)). A step between two levels s < t is the pair
(λ_t, λ_s − λ_t). The pair determines α, σ, β, β̃ and all KL weights, by formulas that are accurate
in float32 at any number of timesteps. Schedules are float64 on the host; `Levels.step` rounds them.
"""

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float, Real

Array = jax.Array | np.ndarray
Numbers = Real[ArrayLike, "..."] | Sequence
"""Log-SNRs, times or timesteps: one for all examples, or an array or list with one for each."""


def floats(x: Numbers) -> Float[Array, "..."]:
    """Numbers as an array of floats on the device; an array of floats keeps its precision."""
    x = jnp.asarray(x)
    return x if jnp.issubdtype(x.dtype, jnp.floating) else x.astype(float)


def known_values(x: Numbers) -> np.ndarray | None:
    """The values of an array, to be checked on the host; None while JAX traces it."""
    try:
        return np.asarray(x)
    except jax.errors.TracerArrayConversionError:
        return None


def alpha(log_snr: Numbers) -> Float[Array, "..."]:
    """√ᾱ at a log-SNR: the factor of x_0 in x_t. One at λ = +∞."""
    return jnp.exp(0.5 * jax.nn.log_sigmoid(floats(log_snr)))


def sigma(log_snr: Numbers) -> Float[Array, "..."]:
    """√(1 − ᾱ) at a log-SNR: the factor of ε in x_t. Value and gradient are zero at λ = +∞."""
    return jnp.exp(0.5 * jax.nn.log_sigmoid(-floats(log_snr)))


class Step(NamedTuple):
    """A pair of noise levels s < t for each example, as arrays of floats.

    Attributes:
      log_snr: λ_t, the noisier level.
      gap: λ_s − λ_t > 0; +∞ where s = 0 is the data itself.
    """

    log_snr: Float[Array, "*b"]
    gap: Float[Array, "*b"]

    @property
    def log_snr_s(self) -> Float[Array, "*b"]:
        """λ_s, the cleaner level."""
        return self.log_snr + self.gap

    @property
    def c(self) -> Float[Array, "*b"]:
        """1 − SNR_t/SNR_s = β_t/(1 − ᾱ_t): the posterior mean's weight of x_0, divided by α_s."""
        return -jnp.expm1(-self.gap)

    @property
    def beta(self) -> Float[Array, "*b"]:
        """β_t, the variance of q(x_t | x_s)."""
        return jax.nn.sigmoid(-self.log_snr) * self.c

    @property
    def posterior_variance(self) -> Float[Array, "*b"]:
        """β̃_t, the variance of q(x_s | x_t, x_0). Zero at s = 0. Lecture 13, (13.20)."""
        return jax.nn.sigmoid(-self.log_snr_s) * self.c

    @property
    def log_beta_ratio(self) -> Float[Array, "*b"]:
        """log(β_t/β̃_t) ≥ 0; +∞ at s = 0."""
        product = jax.nn.sigmoid(self.log_snr_s) * self.c
        # If ᾱ_s c is near one, 1 − ᾱ_s c is computed as a sum of two small terms.
        small = product < 0.5
        rest = jax.nn.sigmoid(-self.log_snr_s) + jax.nn.sigmoid(self.log_snr_s) * jnp.exp(-self.gap)
        return -jnp.where(small, jnp.log1p(-jnp.where(small, product, 0.0)), jnp.log(rest))


class Levels(NamedTuple):
    """T noisy levels above level 0, the data; float64 on the host, indexed by t = 0 … T.

    As an argument of a function that JAX traces it is on the device, in the default float type.

    Attributes:
      log_snr: λ_t, decreasing from λ_0 = +∞.
      gap: λ_{t−1} − λ_t, computed in float64; +∞ at t = 1, and a meaningless +∞ at t = 0.
    """

    log_snr: Float[Array, "levels"]
    gap: Float[Array, "levels"]

    @classmethod
    def from_log_snr(cls, log_snr: Float[Array, "T"]) -> "Levels":
        """Levels from λ_1 … λ_T.

        Raises:
          ValueError: if the log-SNRs are not finite and strictly decreasing.
        """
        log_snr = np.asarray(log_snr, np.float64)
        if log_snr.ndim != 1 or not log_snr.size or not np.all(np.isfinite(log_snr)):
            raise ValueError(f"a schedule needs a list of finite log-SNRs; got {log_snr}")
        if np.any(np.diff(log_snr) >= 0):
            t = int(np.argmax(np.diff(log_snr) >= 0)) + 2
            raise ValueError(
                f"log-SNRs must fall strictly with t; at t = {t} they go from "
                f"{log_snr[t - 2]:.17g} to {log_snr[t - 1]:.17g}"
            )
        gap = np.concatenate([[np.inf, np.inf], log_snr[:-1] - log_snr[1:]])
        return cls(np.concatenate([[np.inf], log_snr]), gap)

    @property
    def num_timesteps(self) -> int:
        """T: the number of noisy levels."""
        return len(self.log_snr) - 1

    def step(self, t: Numbers) -> Step:
        """The step from t to t − 1, for t = 1 … T, in the default float type on the device.

        Raises:
          ValueError: if a t is out of range, unless JAX traces it.
        """
        self.check(t)
        t = jnp.asarray(t)
        return Step(jnp.asarray(self.log_snr, float)[t], jnp.asarray(self.gap, float)[t])

    def check(self, t: Numbers, first: int = 1) -> None:
        """Raises TypeError or ValueError for a t that is no whole number in first … T.

        A traced t passes unchecked.
        """
        values = known_values(t)
        if values is None:
            return
        if not np.issubdtype(values.dtype, np.integer):
            raise TypeError(f"t is of type {values.dtype}; it must be of whole numbers")
        is_wrong = (values < first) | (values > self.num_timesteps)
        if is_wrong.any():
            raise ValueError(
                f"t = {values[is_wrong][0]}; it must lie in {first} … {self.num_timesteps}"
            )

    @property
    def alpha_bar(self) -> Float[Array, "levels"]:
        """ᾱ_t for t = 0 … T; ᾱ_0 = 1."""
        return self._numpy.exp(-self._numpy.logaddexp(0.0, -self.log_snr))

    @property
    def sigma2(self) -> Float[Array, "levels"]:
        """σ_t² = 1 − ᾱ_t for t = 0 … T, without cancellation."""
        return self._numpy.exp(-self._numpy.logaddexp(0.0, self.log_snr))

    @property
    def beta(self) -> Float[Array, "levels"]:
        """β_t = 1 − ᾱ_t/ᾱ_{t−1} = σ_t² c for t = 1 … T; zero at t = 0, which has no step."""
        return self.sigma2 * self._after_zero(-self._numpy.expm1(-self.gap[1:]))

    @property
    def posterior_variance(self) -> Float[Array, "levels"]:
        """β̃_t = β_t (1 − ᾱ_{t−1})/(1 − ᾱ_t) for t = 1 … T (13.20); β̃_1 = 0, and zero at t = 0."""
        return self._after_zero(self.beta[1:] * self.sigma2[:-1] / self.sigma2[1:])

    @property
    def _numpy(self) -> ModuleType:
        """NumPy on the host, `jax.numpy` on the device."""
        return np if isinstance(self.log_snr, np.ndarray) else jnp

    def _after_zero(self, values: Float[Array, "T"]) -> Float[Array, "levels"]:
        return self._numpy.concatenate([self._numpy.zeros(1, values.dtype), values])


class Schedule(NamedTuple):
    """A log-SNR that decreases with time, piecewise linear between equally spaced knots.

    Time is in [0, 1], from the least noisy level to the noisiest one; the data are not part of it.
    A table of β has one knot for each level, a linear log-SNR two knots.

    Attributes:
      knots: log-SNRs at equally spaced times, strictly decreasing, float64.
    """

    knots: Float[np.ndarray, "n"]

    def log_snr(self, time: Numbers) -> Float[Array, "..."]:
        """λ at times in [0, 1]."""
        times = np.linspace(0.0, 1.0, len(self.knots))
        return jnp.interp(floats(time), jnp.asarray(times, float), jnp.asarray(self.knots, float))

    def slope(self, time: Numbers) -> Float[Array, "..."]:
        """dλ/dtime < 0 at times in [0, 1]; at a knot, the slope after it.

        Raises:
          ValueError: for a schedule with one knot, which has no continuous time.
        """
        pieces = len(self.knots) - 1
        if pieces < 1:
            raise ValueError("a schedule of a single level has no continuous time")
        slopes = np.diff(np.asarray(self.knots, np.float64)) * pieces
        piece = jnp.clip(jnp.floor(floats(time) * pieces).astype(int), 0, pieces - 1)
        return jnp.asarray(slopes, float)[piece]

    def levels(self, num_timesteps: int) -> Levels:
        """T levels at equally spaced times, including both ends; at T = 1 the noisiest one.

        If T is at most the number of knots, levels are rounded to knots, so that a network trained
        on a β table sees only levels of that table. If T equals that number, they are the table.

        Raises:
          ValueError: if T < 1.
        """
        if num_timesteps < 1:
            raise ValueError(f"num_timesteps = {num_timesteps}; a schedule needs at least 1")
        last = len(self.knots) - 1
        position = np.linspace(0.0, last, num_timesteps) if num_timesteps > 1 else np.array([last])
        if num_timesteps <= len(self.knots):
            position = np.floor(position + 0.5)
        return Levels.from_log_snr(np.interp(position, np.arange(last + 1), self.knots))


def from_betas(betas: Float[Array, "n"] | Sequence[float]) -> Schedule:
    """The schedule of a table β_1 … β_N with values strictly between 0 and 1.

    Raises:
      ValueError: if the table is empty or a value is out of range.
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not betas.size:
        raise ValueError(f"betas must be a list of at least one number; got {betas.tolist()}")
    bad = np.flatnonzero(~((betas > 0) & (betas < 1)))
    if bad.size:
        raise ValueError(f"beta_{bad[0] + 1} = {betas[bad[0]]:g}; every beta must lie in (0, 1)")
    log_alpha_bar = np.cumsum(np.log1p(-betas))
    return Schedule(log_alpha_bar - np.log(-np.expm1(log_alpha_bar)))


def linear_beta(
    native_timesteps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Schedule:
    """β increases linearly over N steps. Ho et al. (2020), section 4."""
    return from_betas(np.linspace(beta_start, beta_end, native_timesteps, dtype=np.float64))


def cosine(native_timesteps: int = 1000, offset: float = 0.008) -> Schedule:
    """ᾱ(u) ∝ cos²((u + s)/(1 + s) π/2). Nichol and Dhariwal (2021), equation 17; s is `offset`."""

    def alpha_bar(u):
        return np.cos((u + offset) / (1 + offset) * np.pi / 2) ** 2

    return _from_alpha_bar(alpha_bar, native_timesteps)


def sigmoid(
    native_timesteps: int = 1000, start: float = -3.0, end: float = 3.0, temperature: float = 1.0
) -> Schedule:
    """ᾱ(u) is a sigmoid, scaled to decrease from 1 to 0. Jabri et al. (2022), algorithm 4."""

    def alpha_bar(u):
        falling = 1 / (1 + np.exp((u * (end - start) + start) / temperature))
        last = 1 / (1 + np.exp(end / temperature))
        return np.maximum(falling - last, 0.0)

    return _from_alpha_bar(alpha_bar, native_timesteps)


def linear_log_snr(max: float = 10.0, min: float = -10.0) -> Schedule:
    """λ decreases linearly from `max` at the first noisy level to `min` at the last.

    Raises:
      ValueError: unless max > min.
    """
    if not max > min:
        raise ValueError(f"max = {max:g} and min = {min:g}; max must exceed min")
    return Schedule(np.array([max, min], np.float64))


def _from_alpha_bar(
    alpha_bar: Callable[[np.ndarray], np.ndarray], native_timesteps: int, max_beta: float = 0.999
) -> Schedule:
    """β_t = 1 − ᾱ(t/N)/ᾱ((t − 1)/N), at most `max_beta`, as Nichol and Dhariwal (2021) clip it."""
    values = alpha_bar(np.arange(native_timesteps + 1) / native_timesteps)
    return from_betas(np.minimum(1 - values[1:] / values[:-1], max_beta))


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "linear_beta": linear_beta,
    "cosine": cosine,
    "sigmoid": sigmoid,
    "linear_log_snr": linear_log_snr,
    "betas": from_betas,
}
