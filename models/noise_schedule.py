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

MARGIN = 0.2  # the units' centres go so far beyond [0, 1], for the ends to have as many as the rest
WIDTH = 0.75  # of a unit's logistic density at first, in spacings of the centres


class Interior(NamedTuple):
    """What shapes a schedule between its ends: a straight line and logistic units.

    Attributes:
      weight: positive weights of the line, first, and of the units; their sum is one.
      steepness: of each unit, positive, over the unit of time.
      shift: of each unit against its centre, in its own widths.
      centre: constants that spread the units over the unit of time.
    """

    weight: Float[Array, "k+1"]
    steepness: Float[Array, "k"]
    shift: Float[Array, "k"]
    centre: Float[Array, "k"]

    def rise(self, start: Float[Array, "*b"], end: Float[Array, "*b"]) -> Float[Array, "*b"]:
        """How much the weighted sum rises from time `start` to a later `end`; zero if they meet.

        σ(y) − σ(x) = σ(y) σ(−x) (1 − e^{x − y}): every factor is positive and none cancels.
        """
        duration = jnp.asarray(end - start)[..., None]
        before = self.steepness * (jnp.asarray(start)[..., None] - self.centre) + self.shift
        after = self.steepness * (jnp.asarray(end)[..., None] - self.centre) + self.shift
        units = -jnp.expm1(-self.steepness * duration)
        units *= jax.nn.sigmoid(after) * jax.nn.sigmoid(-before)
        return jnp.sum(self.weight * jnp.concatenate([duration, units], axis=-1), axis=-1)


class NoiseSchedule(nn.Module):
    """λ(u) = max − (max − min) g(u) for u ∈ [0, 1], where g rises strictly from 0 to 1.

    g is a straight line plus logistic units with positive weights, less its value at 0 and over its
    rise to 1. At first g(u) = u to 1e-7 with 64 units, 3e-5 with 32 and 0.006 with any number.
    Kingma et al. (2021), appendix H.

    The two ends belong to the bound and the interior to its variance
    (`diffusion.learned_schedule`): `ends_only` and `interior_only` send gradients to one alone.

    Attributes:
      max: log-SNR at u = 0, or where it starts if the ends are trained.
      min: log-SNR at u = 1, likewise.
      features: number of logistic units.
      train_ends: whether the ends are parameters, as a middle and a log-width, so that max > min
        always. Otherwise they are constants.
    """

    max: float = 10.0
    min: float = -10.0
    features: int = 64
    train_ends: bool = False

    def validate(self) -> None:
        """Checks the settings.

        Raises:
          ValueError: with one line naming the setting, its value and what would be right.
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
        # Between them the units have as much weight as the line.
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
        """λ and dλ/du for the bound: their gradient reaches `max` and `min` and nothing else.

        g(u) is held constant. If the ends are not trained there is no gradient at all.
        """
        interior = jax.lax.stop_gradient(self._interior())
        return value_and_slope(lambda u: _log_snr(u, self.ends(), interior), time)

    def interior_only(self, time: Float[Array, "b"]) -> Float[Array, "b"]:
        """λ for `variance_surrogate`: its gradient reaches the interior and never the ends."""
        return _log_snr(time, jax.lax.stop_gradient(self.ends()), self._interior())

    def ends(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """λ(0) and λ(1), the least noisy level and the noisiest: what the bound's ends need."""
        if not self.train_ends:
            return jnp.asarray(self.max, float), jnp.asarray(self.min, float)
        half_width = 0.5 * jnp.exp(self.log_width)
        return self.middle + half_width, self.middle - half_width

    def _interior(self) -> Interior:
        # Only ratios of weights matter.
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
    """λ(u), counted from the nearer end: so it meets both exactly, however a program rounds."""
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
    """The schedule as a table, evaluated in float64: from here on it is like any other.

    Between knots the table is off by at most max|λ''|/(8 (num_knots − 1)²). `Schedule.levels` takes
    the nearest knots, so T levels are the network's own where num_knots = T; with many more knots
    than T, as by default at T = 1000, their times are off by half a knot at most.

    Args:
      apply: (params, times) -> log-SNRs, such as a `NoiseSchedule`'s `apply`.
      params: what `apply` takes; floats of any precision.
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
