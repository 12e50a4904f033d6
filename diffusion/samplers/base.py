"""The type of a sampler, (init, step), and `sample`, which runs one over given noise levels."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from diffusion.forward import Noise
from diffusion.gaussian import expand
from diffusion.schedules import Array, Levels, Step, alpha, sigma

Draw = Callable[[int | Int[Array, ""]], Float[Array, "b *d"]]
"""k -> the k-th standard normal noise of a step; a pure function."""


class Sampler(NamedTuple):
    """A rule that goes from level t to level s < t, for any two levels.

    x is not part of the history, so that one sampler can wrap another and change x between steps.

    Attributes:
      init: x_T -> history, a pytree; empty for a sampler without memory.
      step: (history, x_t, Step, draw) -> (history, x_s, x̂_0). All rows take the same step.
      num_draws: the number of noises that a step draws, numbered from 0.
      evaluations: (history, num_steps) -> network evaluations, including those of the step to the
        data: one number for all samples, or one for each.
      forget: history -> the history after x was replaced by a sample of another path.
    """

    init: Callable[[Float[Array, "b *d"]], Any]
    step: Callable[[Any, Float[Array, "b *d"], Step, Draw], tuple[Any, Array, Array]]
    num_draws: int = 1
    evaluations: Callable[[Any, Any], Any] = lambda history, num_steps: num_steps
    forget: Callable[[Any], Any] = lambda history: history


class State(NamedTuple):
    """A batch of samples at one level.

    Attributes:
      history: the sampler's memory.
      x: the samples at level t.
      x_0_hat: the latest prediction, at level t + 1; zero at level T.
    """

    history: Any
    x: Float[Array, "b *d"]
    x_0_hat: Float[Array, "b *d"]


class Samples(NamedTuple):
    """The output of a sampler.

    Attributes:
      x_0: samples, in data units.
      x_t: states at the recorded levels.
      x_0_hat: predictions at the recorded levels.
      evaluations: network evaluations of each sample.
    """

    x_0: Float[Array, "b *d"]
    x_t: Float[Array, "k b *d"]
    x_0_hat: Float[Array, "k b *d"]
    evaluations: Int[Array, "b"]


def start(sampler: Sampler, x_T: Float[Array, "b *d"]) -> State:
    """The state at level T."""
    return State(sampler.init(x_T), x_T, jnp.zeros_like(x_T))


def advance(
    sampler: Sampler,
    state: State,
    t: Int[Array, "b"],
    step: Step,
    noise: Noise,
    num_timesteps: int | Int[Array, ""],
) -> State:
    """One step, from level t to t − 1.

    Args:
      sampler: the sampler.
      state: the state at level t.
      t: the level, the same for all rows.
      step: its log-SNR and gap.
      noise: standard normal noise as a function of an integer. Draw k of this step has the number
        t − 1 + k (T + 1): the first draw of a step has the number of the level that it goes to.
      num_timesteps: T.
    """

    def draw(k):
        return noise(t - 1 + k * (num_timesteps + 1))

    return State(*sampler.step(state.history, state.x, step, draw))


def sample(
    sampler: Sampler,
    levels: Levels,
    noise: Noise,
    batch_size: int,
    record: Int[np.ndarray, "k"] | tuple[int, ...] = (),
    x_T: Float[Array, "b *d"] | None = None,
) -> Samples:
    """Runs a sampler from level T down to the data, as one scan.

    Args:
      sampler: the sampler.
      levels: T noise levels, which need not be those of the model.
      noise: as in `advance`; number T is x_T itself.
      batch_size: number of samples; sample i depends on the noise of row i only.
      record: levels t ≥ 1 whose x_t and x̂_0 are returned. Memory grows with their number only.
      x_T: the start; by default noise.

    Raises:
      ValueError: if a recorded level is not in 1 … T, or occurs twice.
    """
    last = levels.num_timesteps
    check_record(record, last)

    def at(t):
        return jnp.full(batch_size, t, jnp.int32)

    state = start(sampler, noise(at(last)) if x_T is None else jnp.asarray(x_T))
    slots = np.full(last + 1, len(record))  # levels that are not recorded share a spare slot
    slots[np.asarray(record, int)] = np.arange(len(record))
    empty = jnp.zeros((len(record) + 1, *state.x.shape), state.x.dtype)

    def scanned(carry, t_and_slot):
        state, x_t, x_0_hat = carry
        t, slot = t_and_slot
        after = advance(sampler, state, at(t), levels.step(at(t)), noise, last)
        recorded = x_t.at[slot].set(state.x), x_0_hat.at[slot].set(after.x_0_hat)
        return (after, *recorded), None

    t = jnp.arange(last, 0, -1)
    carry, _ = jax.lax.scan(scanned, (state, empty, empty), (t, jnp.asarray(slots)[t]))
    state, x_t, x_0_hat = carry
    evaluations = sampler.evaluations(state.history, last)
    evaluations = jnp.broadcast_to(jnp.asarray(evaluations, jnp.int32), (batch_size,))
    return Samples(state.x, x_t[:-1], x_0_hat[:-1], evaluations)


def check_record(record: Int[np.ndarray, "k"] | Sequence[int], last: int) -> None:
    """Raises ValueError unless these are distinct levels in 1 … T."""
    levels = [int(t) for t in record]
    if any(not 1 <= t <= last for t in levels) or len(set(levels)) < len(levels):
        raise ValueError(f"record = {tuple(levels)}; recorded levels lie in 1 … {last}, each once")


def no_history(x_T: Float[Array, "b *d"]) -> tuple[()]:
    """The init of a sampler without memory."""
    del x_T
    return ()


def scales(
    log_snr: Float[Array, "b"], like: Float[Array, "b *d"]
) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """α and σ at a log-SNR, shaped to broadcast against `like`."""
    return expand(alpha(log_snr), like), expand(sigma(log_snr), like)


def is_last(step: Step) -> Array:
    """Whether the step goes to the data; the same for all rows."""
    return jnp.isinf(step.gap[0])
