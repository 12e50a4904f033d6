"""What a sampler is, and how one is run: (init, step), over noise levels computed beforehand."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree

from diffusion.forward import Noise
from diffusion.gaussian import expand
from diffusion.reverse import Reverse
from diffusion.schedules import Array, Levels, Step, alpha, sigma

Draw = Callable[[int | Int[Array, ""]], Float[Array, "b *d"]]
"""Standard normal noise of one step, by number; a pure function of it."""


def dynamic_threshold(
    x_0_hat: Float[Array, "b *d"], quantile: float = 0.995
) -> Float[Array, "b *d"]:
    """Clips each example at a quantile of its |x̂_0|, at least 1, and scales it back to [−1, 1].

    Saharia et al. (2022), Imagen, section 2.3.
    """
    size = jnp.quantile(jnp.abs(x_0_hat).reshape(len(x_0_hat), -1), quantile, axis=1)
    size = expand(jnp.maximum(size, 1.0), x_0_hat)
    return jnp.clip(x_0_hat, -size, size) / size


X_0_TREATMENTS: dict[str, Callable[[Float[Array, "b *d"]], Float[Array, "b *d"]]] = {
    "none": lambda x_0_hat: x_0_hat,
    "clip": lambda x_0_hat: jnp.clip(x_0_hat, -1.0, 1.0),
    "dynamic": dynamic_threshold,
}
"""What is done to x̂_0 before it is used; in samplers only, never in a bound."""


class Sampler(NamedTuple):
    """A way from level t to level s < t, for any two levels.

    x is not part of the history, so that one sampler can wrap another and change x between steps.

    Attributes:
      init: x_T -> history: a pytree, empty for a sampler that has no memory.
      step: (history, x_t, Step, draw) -> (history, x_s, x̂_0). The step is the same for all rows.
      num_draws: how many noises a step may ask for, numbered from 0.
      evaluations: (history, num_steps) -> network evaluations that a sample took, the last step to
        the data included: a number, or one for each sample.
      forget: history -> the history for an x that did not come from where it was.
    """

    init: Callable[[Float[Array, "b *d"]], Any]
    step: Callable[[Any, Float[Array, "b *d"], Step, Draw], tuple[Any, Array, Array]]
    num_draws: int = 1
    evaluations: Callable[[Any, Any], Any] = lambda history, num_steps: num_steps
    forget: Callable[[Any], Any] = lambda history: history


class State(NamedTuple):
    """Where a batch of samples is.

    Attributes:
      history: the sampler's memory.
      x: the samples at level t.
      x_0_hat: the latest prediction, made at the level before; zero at the start.
    """

    history: Any
    x: Float[Array, "b *d"]
    x_0_hat: Float[Array, "b *d"]


class Samples(NamedTuple):
    """What a sampler made.

    Attributes:
      x_0: samples, in data units.
      x_t: states at the recorded levels.
      x_0_hat: the prediction that was made at each recorded level.
      evaluations: of the network, for each sample.
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
      sampler: what to run.
      state: at level t.
      t: the level, the same for all rows.
      step: its log-SNR and gap.
      noise: standard normal noise as a function of a number. Draw k of this step is number
        t − 1 + k (T + 1), so that the first one is numbered by the level that it makes.
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
      sampler: what to run.
      levels: T noise levels, each stepped through once.
      noise: as in `advance`; number T is x_T itself.
      batch_size: samples drawn together; sample i depends on the noise of row i alone.
      record: levels t ≥ 1 whose x_t and x̂_0 are kept. Memory grows with their number only.
      x_T: where to start, in place of noise.

    Raises:
      ValueError: if a level to record is not one of 1 … T, or named twice.
    """
    last = levels.num_timesteps
    check_record(record, last)

    def at(t):
        return jnp.full(batch_size, t, jnp.int32)

    state = start(sampler, noise(at(last)) if x_T is None else jnp.asarray(x_T))
    slots = np.full(last + 1, len(record))  # a spare place for the levels that nobody asked for
    slots[np.asarray(record, int)] = np.arange(len(record))
    empty = jnp.zeros((len(record) + 1, *state.x.shape), state.x.dtype)

    def scanned(carry, t_and_slot):
        state, x_t, x_0_hat = carry
        t, slot = t_and_slot
        after = advance(sampler, state, at(t), levels.step(at(t)), noise, last)
        kept = x_t.at[slot].set(state.x), x_0_hat.at[slot].set(after.x_0_hat)
        return (after, *kept), None

    t = jnp.arange(last, 0, -1)
    carry, _ = jax.lax.scan(scanned, (state, empty, empty), (t, jnp.asarray(slots)[t]))
    state, x_t, x_0_hat = carry
    evaluations = sampler.evaluations(state.history, last)
    evaluations = jnp.broadcast_to(jnp.asarray(evaluations, jnp.int32), (batch_size,))
    return Samples(state.x, x_t[:-1], x_0_hat[:-1], evaluations)


def check_record(record: Int[np.ndarray, "k"] | Sequence[int], last: int) -> None:
    """Raises ValueError unless these are different levels of 1 … T."""
    named = [int(t) for t in record]
    if any(not 1 <= t <= last for t in named) or len(set(named)) < len(named):
        raise ValueError(f"record = {tuple(named)}; recorded levels lie in 1 … {last}, each once")


def no_history(x_T: Float[Array, "b *d"]) -> tuple[()]:
    """The init of a sampler that remembers nothing."""
    del x_T
    return ()


def predict_x_0(
    reverse: Reverse,
    treatment: str,
    x_t: Float[Array, "b *d"],
    log_snr: Float[Array, "b"],
    condition: PyTree | None,
) -> Float[Array, "b *d"]:
    """The treated prediction of x_0."""
    return X_0_TREATMENTS[treatment](reverse.predict("x_0", x_t, log_snr, condition))


def scales(
    log_snr: Float[Array, "b"], like: Float[Array, "b *d"]
) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """α and σ at a log-SNR, shaped to broadcast against `like`."""
    return expand(alpha(log_snr), like), expand(sigma(log_snr), like)


def is_last(step: Step) -> Array:
    """Whether the step goes to the data; one answer for all rows."""
    return jnp.isinf(step.gap[0])
