"""From noise to data. A sampler is (init, step), scanned over steps computed beforehand."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree

from diffusion.forward import Noise
from diffusion.gaussian import expand
from diffusion.reverse import Reverse, convert
from diffusion.schedules import Array, Levels, Step, alpha, sigma

Treatment = Callable[[Float[Array, "b *d"]], Float[Array, "b *d"]]


def dynamic_threshold(
    x_0_hat: Float[Array, "b *d"], quantile: float = 0.995
) -> Float[Array, "b *d"]:
    """Clips each example at a quantile of its |x̂_0|, at least 1, and scales it back to [−1, 1].

    Saharia et al. (2022), Imagen, section 2.3.
    """
    size = jnp.quantile(jnp.abs(x_0_hat).reshape(len(x_0_hat), -1), quantile, axis=1)
    size = expand(jnp.maximum(size, 1.0), x_0_hat)
    return jnp.clip(x_0_hat, -size, size) / size


X_0_TREATMENTS: dict[str, Treatment] = {
    "none": lambda x_0_hat: x_0_hat,
    "clip": lambda x_0_hat: jnp.clip(x_0_hat, -1.0, 1.0),
    "dynamic": dynamic_threshold,
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


def ddim(
    reverse: Reverse,
    x_0_treatment: str = "none",
    condition: PyTree | None = None,
    eta: float = 0.0,
) -> Sampler:
    """x_s = α_s x̂_0 + σ_s √(1 − η² c) ε̂ + η √β̃ z: deterministic at η = 0, ancestral at η = 1.

    At η = 0 it is the probability flow's exponential Euler step, of order one. Its noise does not
    depend on Σ_θ. Song et al. (2021), Denoising Diffusion Implicit Models, equation 12.

    Args:
      reverse: the model.
      x_0_treatment: a name in X_0_TREATMENTS; ε̂ is what the treated x̂_0 leaves of x_t.
      condition: passed to the denoiser.
      eta: how much of the posterior's noise is drawn, from 0 to 1.
    """

    def step(x_t, step, noise):
        x_0_hat = _x_0_hat(reverse, x_0_treatment, x_t, step.log_snr, condition)
        a, s = _scales(step.log_snr, x_t)
        eps_hat = (x_t - a * x_0_hat) / s
        a_s, s_s = _scales(step.log_snr_s, x_t)
        kept = expand(jnp.sqrt(1 - eta**2 * step.c), x_t)
        drawn = eta * s_s * expand(jnp.sqrt(step.c), x_t)
        x_s = a_s * x_0_hat + s_s * kept * eps_hat + drawn * noise
        return x_s, x_s, x_0_hat

    return Sampler(init=lambda x_t: x_t, step=step)


def ddim_encode(
    reverse: Reverse,
    x_0: Float[Array, "b *d"],
    levels: Levels,
    iterations: int = 3,
    condition: PyTree | None = None,
) -> Float[Array, "b *d"]:
    """The noise x_T that deterministic DDIM turns into x_0, so that an image can be encoded.

    Each step is inverted by iterating x_t = α_t x̂_0(x_t) + σ_t (x_s − α_s x̂_0(x_t))/σ_s from the
    prediction at x_s, which converges where steps are small. The step to the data has no inverse:
    it starts from x_1 = α_1 x_0 + σ_1 ε̂(α_1 x_0).

    Args:
      reverse: the model.
      x_0: data.
      levels: T noise levels; decode with the same, by `ddim` and `sample`.
      iterations: network evaluations a step, at least one. One is the usual explicit inversion.
      condition: passed to the denoiser.
    """
    ones = jnp.ones(len(x_0), jnp.int32)
    first = levels.step(ones).log_snr
    a, s = _scales(first, x_0)
    x_1 = a * x_0 + s * reverse.predict("eps", a * x_0, first, condition)

    def advance(x_s, t):
        step = levels.step(t * ones)
        a, s = _scales(step.log_snr, x_s)
        a_s, s_s = _scales(step.log_snr_s, x_s)

        def improve(_, x_and_level):
            x, level = x_and_level
            x_0_hat = reverse.predict("x_0", x, level, condition)
            return a * x_0_hat + s * (x_s - a_s * x_0_hat) / s_s, step.log_snr

        x_t, _ = jax.lax.fori_loop(0, iterations, improve, (x_s, step.log_snr_s))
        return x_t, None

    return jax.lax.scan(advance, x_1, jnp.arange(2, levels.num_timesteps + 1))[0]


def dpm_solver_pp_2m(
    reverse: Reverse, x_0_treatment: str = "none", condition: PyTree | None = None
) -> Sampler:
    """DPM-Solver++(2M): the probability flow at order two, one evaluation a step.

    x_s = σ_s/σ_t x_t + α_s (1 − e^{−h}) D with h = ½ (λ_s − λ_t), and D the last two x̂_0 carried
    half a step forward; x̂_0 itself in the first step, and in the last, which goes to the data.
    Lu et al. (2022), algorithm 2.
    """

    def step(carry, step, noise):
        del noise
        x_t, before, gap_before = carry
        x_0_hat = _x_0_hat(reverse, x_0_treatment, x_t, step.log_snr, condition)
        is_inner = (gap_before > 0) & ~jnp.isinf(step.gap)
        ratio = jnp.where(is_inner, step.gap, 0.0) / jnp.where(is_inner, gap_before, 1.0)
        ahead = x_0_hat + expand(0.5 * ratio, x_t) * (x_0_hat - before)
        fall = expand(sigma(step.log_snr_s) / sigma(step.log_snr), x_t)
        rise = expand(-alpha(step.log_snr_s) * jnp.expm1(-0.5 * step.gap), x_t)
        x_s = fall * x_t + rise * ahead
        return (x_s, x_0_hat, step.gap), x_s, x_0_hat

    def init(x_t):
        return x_t, jnp.zeros_like(x_t), jnp.zeros(len(x_t), x_t.dtype)

    return Sampler(init, step)


def heun(reverse: Reverse, x_0_treatment: str = "none", condition: PyTree | None = None) -> Sampler:
    """Heun's method on dy/dσ̃ = ε̂ with y = x/α, σ̃ = σ/α: order two, two evaluations a step.

    The last step, to the data, is Euler's. Karras et al. (2022), algorithm 1 without churn, for
    whatever levels the sampler is given.
    """

    def step(x_t, step, noise):
        del noise
        a_t, s_t = _scales(step.log_snr, x_t)
        a_s, s_s = _scales(step.log_snr_s, x_t)
        x_0_hat = _x_0_hat(reverse, x_0_treatment, x_t, step.log_snr, condition)
        eps_hat = (x_t - a_t * x_0_hat) / s_t

        def move(eps):
            return a_s / a_t * x_t + (s_s - a_s / a_t * s_t) * eps

        is_last = expand(jnp.isinf(step.gap), x_t)
        # Where s is the data the second evaluation is not used; any finite level will do.
        log_snr = jnp.where(jnp.isinf(step.gap), step.log_snr, step.log_snr_s)
        euler = jnp.where(is_last, x_t, move(eps_hat))
        a, s = _scales(log_snr, x_t)
        again = (euler - a * _x_0_hat(reverse, x_0_treatment, euler, log_snr, condition)) / s
        x_s = jnp.where(is_last, x_0_hat, move(0.5 * (eps_hat + again)))
        return x_s, x_s, x_0_hat

    return Sampler(init=lambda x_t: x_t, step=step)


def _x_0_hat(
    reverse: Reverse,
    treatment: str,
    x_t: Float[Array, "b *d"],
    log_snr: Float[Array, "b"],
    condition: PyTree | None,
) -> Float[Array, "b *d"]:
    """The treated prediction of x_0."""
    return X_0_TREATMENTS[treatment](reverse.predict("x_0", x_t, log_snr, condition))


def _scales(
    log_snr: Float[Array, "b"], like: Float[Array, "b *d"]
) -> tuple[Float[Array, "b ..."], Float[Array, "b ..."]]:
    """α and σ at a log-SNR, shaped to broadcast against `like`."""
    return expand(alpha(log_snr), like), expand(sigma(log_snr), like)


SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ancestral": ancestral,
    "ddim": ddim,
    "dpm_solver_pp_2m": dpm_solver_pp_2m,
    "heun": heun,
}


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
