"""A learned noise schedule: a monotone network from time to log-SNR, with exact ends."""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.initializers import constant, zeros_init
from jaxtyping import Float, PyTree

from diffusion.learned_schedule import value_and_slope
from diffusion.schedules import Array, Levels, Schedule

# The units' centres extend beyond [0, 1] by this margin, so that the ends have as many units nearby
# as the interior.
MARGIN = 0.2
WIDTH = 0.75  # initial width of a unit's logistic density, in spacings of the centres


class Interior(NamedTuple):
    """The shape of a schedule between its ends: a straight line plus k logistic units.

    Attributes:
      weight: positive weights, of the line first and then of the units; their sum is one.
      steepness: slope of each unit's argument in time, positive.
      shift: offset of each unit's argument from its value at the centre.
      centre: fixed times, spread evenly.
    """

    weight: Float[Array, "k+1"]
    steepness: Float[Array, "k"]
    shift: Float[Array, "k"]
    centre: Float[Array, "k"]

    def rise(self, start: Float[Array, "*b"], end: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """The increase of the weighted sum from time `start` to `end` ≥ `start`; zero if they meet.

        σ(y) − σ(x) = σ(y) σ(−x) (1 − e^{x − y}): every factor is positive, and nothing cancels.
        """
        duration = jnp.asarray(end - start)[..., None]
        before = self.steepness * (jnp.asarray(start)[..., None] - self.centre) + self.shift
        after = self.steepness * (jnp.asarray(end)[..., None] - self.centre) + self.shift
        units = -jnp.expm1(-self.steepness * duration)
        units *= jax.nn.sigmoid(after) * jax.nn.sigmoid(-before)
        return jnp.sum(self.weight * jnp.concatenate([duration, units], axis=-1), axis=-1)


class NoiseSchedule(nn.Module):
    """λ(u) = max − (max − min) g(u) for u ∈ [0, 1], where g rises strictly from 0 to 1.

    g is a straight line plus logistic units with positive weights, shifted and scaled so that
    g(0) = 0 and g(1) = 1. At initialisation g(u) = u to 1e-7 with 64 units, to 3e-5 with 32, and to
    0.006 with any number. Kingma et al. (2021), appendix H.

    The ends are trained on the bound and the interior on its variance
    (`diffusion.learned_schedule`): the gradients of `ends_only` reach the ends only, and those of
    `interior_only` the interior only.

    Attributes:
      max: log-SNR at u = 0; its initial value if the ends are trained.
      min: log-SNR at u = 1, likewise.
      features: number of logistic units.
      train_ends: whether the ends are parameters instead of constants. Their parameters are a
        middle and a log-width, so that max > min always.
    """

    max: float = 10.0
    min: float = -10.0
    features: int = 64
    train_ends: bool = False

    def validate(self) -> None:
        """Checks the settings.

        Raises:
          ValueError: with one line that names the setting, its value and the permitted values.
        """

        def check(right: bool, name: str, remedy: str) -> None:
            if not right:
                raise ValueError(f"schedule.learned.{name} = {getattr(self, name)}; {remedy}")

        check(bool(np.isfinite(self.max)), "max", "it must be finite")
        check(bool(np.isfinite(self.min)), "min", "it must be finite")
        check(self.max > self.min, "max", f"it must exceed schedule.learned.min = {self.min}")
        check(self.features >= 1, "features", "it must be at least 1")

    def setup(self) -> None:
        self.validate()
        # All units together have as much weight as the line.
        self.line_log_weight = self.param("line_log_weight", constant(np.log(self.features)), (1,))
        self.log_weight = self.param("log_weight", zeros_init(), (self.features,))
        steepness = constant(-np.log(WIDTH * self._spacing()))
        self.log_steepness = self.param("log_steepness", steepness, (self.features,))
        self.shift = self.param("shift", zeros_init(), (self.features,))
        if self.train_ends:
            self.middle = self.param("middle", constant((self.max + self.min) / 2), ())
            self.log_width = self.param("log_width", constant(np.log(self.max - self.min)), ())

    def __call__(self, time: Float[Array, "b"]) -> Float[Array, "b"]:
        """λ at times in [0, 1]; at 0 and 1 it is `ends` exactly."""
        return _log_snr(time, self.ends(), self._interior())

    def ends_only(self, time: Float[Array, "b"]) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
        """λ and dλ/du for the bound, with gradients with respect to the ends only.

        g(u) is held constant. If the ends are not trained, there are no gradients.
        """
        interior = jax.lax.stop_gradient(self._interior())
        return value_and_slope(lambda u: _log_snr(u, self.ends(), interior), time)

    def interior_only(self, time: Float[Array, "b"]) -> Float[Array, "b"]:
        """λ for `variance_surrogate`, with gradients with respect to the interior only."""
        return _log_snr(time, jax.lax.stop_gradient(self.ends()), self._interior())

    def ends(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """λ(0) and λ(1), of the least and the most noisy level, for reconstruction and prior."""
        if not self.train_ends:
            return jnp.asarray(self.max, float), jnp.asarray(self.min, float)
        half_width = 0.5 * jnp.exp(self.log_width)
        return self.middle + half_width, self.middle - half_width

    def _interior(self) -> Interior:
        # Only the ratios of the weights matter.
        weight = jax.nn.softmax(jnp.concatenate([self.line_log_weight, self.log_weight]))
        centre = (jnp.arange(self.features) + 0.5) * self._spacing() - MARGIN
        return Interior(weight, jnp.exp(self.log_steepness), self.shift, centre)

    def _spacing(self) -> float:
        return (1 + 2 * MARGIN) / self.features


def _log_snr(
    time: Float[Array, "b"],
    ends: tuple[Float[Array, ""], Float[Array, ""]],
    interior: Interior,
) -> Float[Array, "b"]:
    """λ(u), computed from the nearer end, so that both ends are exact in any rounding."""
    time = jnp.asarray(time)
    max, min = ends
    start, end = jnp.zeros_like(time), jnp.ones_like(time)
    scale = (max - min) / interior.rise(start[:1], end[:1])
    below, above = interior.rise(start, time), interior.rise(time, end)
    return jnp.where(time < 0.5, max - scale * below, min + scale * above)


def tabulate(
    apply: Callable[[PyTree, Float[Array, "n"]], Float[Array, "n"]],
    params: PyTree,
    num_knots: int = 2**16 + 1,
) -> Schedule:
    """The learned schedule as a table that is evaluated in float64, like every other schedule.

    Between knots the error is at most max|λ''|/(8 (num_knots − 1)²). `Schedule.levels` takes the
    nearest knots: for num_knots = T the T levels are the network's own, and with many more knots,
    as by default at T = 1000, the error of their times is at most half a knot.

    Args:
      apply: (params, times) -> log-SNRs, such as a `NoiseSchedule`'s `apply`.
      params: parameters for `apply`, of any float precision.
      num_knots: number of equally spaced knots, both ends included.

    Raises:
      ValueError: if num_knots < 2, or if the log-SNRs are not finite and strictly falling.
    """
    if num_knots < 2:
        raise ValueError(f"num_knots = {num_knots}; a learned schedule needs at least its two ends")
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
        knots = np.asarray(jax.jit(apply)(params, np.linspace(0.0, 1.0, num_knots)))
    Levels.from_log_snr(knots)
    return Schedule(knots)
