"""From noise to data. A sampler is (init, step), scanned over steps computed beforehand."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree

from diffusion.forward import Noise
from diffusion.reverse import Reverse, convert
from diffusion.schedules import Array, Levels, Step

Treatment = Callable[[Float[Array, "b *d"]], Float[Array, "b *d"]]

X_0_TREATMENTS: dict[str, Treatment] = {
    "none": lambda x_0_hat: x_0_hat,
    "clip": lambda x_0_hat: jnp.clip(x_0_hat, -1.0, 1.0),
}
"""What is done to x̂_0 before it is used; in samplers only, never in a bound."""


class Sampler(NamedTuple):
    """A sampler's two functions. Its carry holds x, at level t before a step and s after it.

    Attributes:
      init: x_T -> carry.
      step: (carry, Step, noise) -> (carry, x_s, x̂_0).
    """

    init: Callable[[Float[Array, "b *d"]], Any]
    step: Callable[[Any, Step, Float[Array, "b *d"]], tuple[Any, Array, Array]]


class Samples(NamedTuple):
    """What a sampler made.

    Attributes:
      x_0: samples, in data units.
      x_t: states at the recorded levels.
      x_0_hat: the prediction that was made at each recorded level.
    """

    x_0: Float[Array, "b *d"]
    x_t: Float[Array, "k b *d"]
    x_0_hat: Float[Array, "k b *d"]


def ancestral(
    reverse: Reverse, x_0_treatment: str = "none", condition: PyTree | None = None
) -> Sampler:
    """The model's own sampler, (13.5): x_{t−1} ~ p_θ(x_{t−1} | x_t), and x̂_0 at the end.

    Ho et al. (2020), algorithm 2.
    """
    treat = X_0_TREATMENTS[x_0_treatment]

    def step(x_t, step, noise):
        prediction, extra = reverse.outputs(x_t, step.log_snr, condition)
        x_0_hat = convert(prediction, x_t, step.log_snr, reverse.parameterization, "x_0")
        x_0_hat = treat(x_0_hat)
        x_s = reverse.step(x_t, x_0_hat, step, extra).sample(noise)
        x_s = jnp.where(jnp.isinf(step.gap[0]), x_0_hat, x_s)
        return x_s, x_s, x_0_hat

    return Sampler(init=lambda x_t: x_t, step=step)


def sample(
    sampler: Sampler,
    levels: Levels,
    noise: Noise,
    batch_size: int,
    record: Int[np.ndarray, "k"] | tuple[int, ...] = (),
) -> Samples:
    """Runs a sampler from x_T ~ N(0, I) down to x_0, as one scan.

    Args:
      sampler: what to run.
      levels: T noise levels, each stepped through once.
      noise: standard normal noise as a function of the level it makes; at T it is x_T itself.
      batch_size: samples drawn together; sample i depends on the noise of row i alone.
      record: levels t ≥ 1 whose x_t and x̂_0 are kept. Memory grows with their number only.

    Raises:
      ValueError: if a level to record is not one of 1 … T.
    """
    last = levels.num_timesteps
    if any(not 1 <= t <= last for t in record):
        raise ValueError(f"record = {tuple(record)}; recorded levels lie in 1 … {last}")

    def at(t):
        return jnp.full(batch_size, t, jnp.int32)

    x_T = noise(at(last))
    slots = np.full(last + 1, len(record))  # a spare place for the levels that nobody asked for
    slots[np.asarray(record, int)] = np.arange(len(record))
    empty = jnp.zeros((len(record) + 1, *x_T.shape), x_T.dtype)

    def advance(state, scanned):
        carry, x_t, kept = state
        t, slot = scanned
        carry, x_s, x_0_hat = sampler.step(carry, levels.step(at(t)), noise(at(t - 1)))
        kept = (kept[0].at[slot].set(x_t), kept[1].at[slot].set(x_0_hat))
        return (carry, x_s, kept), None

    t = jnp.arange(last, 0, -1)
    state = (sampler.init(x_T), x_T, (empty, empty))
    (_, x_0, (x_t, x_0_hat)), _ = jax.lax.scan(advance, state, (t, jnp.asarray(slots)[t]))
    return Samples(x_0, x_t[:-1], x_0_hat[:-1])
