"""The evidence lower bound (13.26): prior + Σ_t KL_t + reconstruction, per example.

Everything here is −log p in nats, so that the total bounds −log p(x_0) from above. The terms take
(x_0, ε): under quadrature points or random noise they are the same code.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, PyTree

from diffusion.decoders import Decoder
from diffusion.forward import Noise, diffuse
from diffusion.gaussian import expand, sum_per_example
from diffusion.reverse import Reverse
from diffusion.schedules import Array, Levels, Step


class StepTerms(NamedTuple):
    """What one reverse step contributes, per example.

    Attributes:
      kl: KL(q(x_s | x_t, x_0) ‖ p_θ(x_s | x_t)) in nats.
      eps_error: ‖ε − ε̂‖²; divided by SNR_t it is the distortion ‖x_0 − x̂_0‖².
    """

    kl: Float[Array, "*b"]
    eps_error: Float[Array, "*b"]


class Bound(NamedTuple):
    """The terms of the bound for each example, in nats.

    Attributes:
      prior: KL(q(x_T | x_0) ‖ p(x_T)).
      kl: KL(q(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t)) for t = 2 … T.
      reconstruction: −log p(x_0 | x_1).
      eps_error: ‖ε − ε̂‖² for t = 1 … T. No term of the bound; the distortion at each t.
    """

    prior: Float[Array, "b"]
    kl: Float[Array, "b T-1"]
    reconstruction: Float[Array, "b"]
    eps_error: Float[Array, "b T"]

    @property
    def total(self) -> Float[Array, "b"]:
        """The bound on −log p(x_0)."""
        return self.prior + self.kl.sum(axis=-1) + self.reconstruction


def prior_kl(x_0: Float[Array, "b *d"], log_snr: Float[Array, "b"]) -> Float[Array, "b"]:
    """KL(q(x_T | x_0) ‖ N(0, I)), the last term of (13.26), from λ_T.

    The lecture prints this KL between q(x_1 | x_0) and q(x_T | x_0); docs/lecture.md, 13.21.
    """
    alpha_bar = jax.nn.sigmoid(jnp.asarray(log_snr))
    from_variance = -alpha_bar - jax.nn.log_sigmoid(-jnp.asarray(log_snr))
    return 0.5 * sum_per_example(expand(alpha_bar, x_0) * x_0**2 + expand(from_variance, x_0))


def step_terms(
    reverse: Reverse,
    x_0: Float[Array, "b *d"],
    eps: Float[Array, "b *d"],
    step: Step,
    condition: PyTree | None = None,
) -> StepTerms:
    """KL(q(x_s | x_t, x_0) ‖ p_θ(x_s | x_t)) at x_t = α_t x_0 + σ_t ε, for s ≥ 1.

    With r = log(Σ_θ/β̃) it is ½ Σ [r + expm1(−r) + e^{−r} expm1(λ_s − λ_t) (ε − ε̂)²]; the last
    factor is SNR_s/SNR_t − 1. At Σ_θ = β̃ only ½ expm1(gap) ‖ε − ε̂‖² is left.
    """
    outputs = reverse.outputs(diffuse(x_0, step.log_snr, eps), step.log_snr, condition)
    error = reverse.eps_error_of(outputs.prediction, x_0, eps, step.log_snr) ** 2
    r = reverse.log_variance_ratio(step, error, outputs.extra)
    return StepTerms(kl_of_error(error, step, r), sum_per_example(error))


def kl_of_error(
    error: Float[Array, "b *d"], step: Step, log_variance_ratio: Float[Array, "b ..."]
) -> Float[Array, "b"]:
    """The KL of `step_terms` from (ε − ε̂)² and r = log(Σ_θ/β̃), one number or one a coordinate."""
    r = log_variance_ratio
    of_error = jnp.exp(-r) * expand(jnp.expm1(step.gap), error)
    return 0.5 * sum_per_example(_expm1_excess(-r) + of_error * error)


def _expm1_excess(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """expm1(x) − x ≥ 0; by its series where the difference would cancel."""
    series = 1.0  # 1 + x/3 (1 + x/4 (…)), to rounding in float64 too
    for divisor in range(8, 2, -1):
        series = 1 + x / divisor * series
    series = 0.5 * x**2 * series
    return jnp.where(jnp.abs(x) < 0.1, series, jnp.expm1(x) - x)


def reconstruction(
    reverse: Reverse,
    decoder: Decoder,
    x_0: Float[Array, "b *d"],
    eps: Float[Array, "b *d"],
    levels: Levels,
    condition: PyTree | None = None,
) -> Float[Array, "b"]:
    """−log p(x_0 | x_1) at x_1 = α_1 x_0 + σ_1 ε, the first term of (13.26)."""
    log_snr = levels.step(jnp.ones(jnp.shape(x_0)[0], jnp.int32)).log_snr
    x_1 = diffuse(x_0, log_snr, eps)
    x_0_hat = reverse.predict("x_0", x_1, log_snr, condition)
    return -decoder(x_0, x_1, x_0_hat, levels)


def terms_at(
    reverse: Reverse,
    x_0: Float[Array, "b *d"],
    levels: Levels,
    t: Int[Array, "b m"],
    noise: Noise,
    chunk_size: int = 1,
    condition: PyTree | None = None,
) -> StepTerms:
    """The KL and the error at chosen timesteps t ≥ 2 of each example, one noise each.

    Args:
      reverse: p_θ.
      x_0: data.
      levels: the noise levels.
      t: m timesteps for each example.
      noise: standard normal noise as a function of t.
      chunk_size: timesteps evaluated at once; memory grows with chunk_size times the batch.
      condition: passed to the denoiser.
    """

    def at(t):
        return step_terms(reverse, x_0, noise(t), levels.step(t), condition)

    m = t.shape[1]
    if m == 0:
        return StepTerms(jnp.zeros(t.shape), jnp.zeros(t.shape))
    # Filled up to whole chunks, so that the denoiser is compiled for one shape.
    chunk_size = min(chunk_size, m)
    filled = jnp.pad(t, ((0, 0), (0, -m % chunk_size)), constant_values=2)
    terms = jax.lax.map(at, filled.T, batch_size=chunk_size)
    return StepTerms(terms.kl[:m].T, terms.eps_error[:m].T)


def continuous_rate(
    reverse: Reverse,
    x_0: Float[Array, "b *d"],
    eps: Float[Array, "b *d"],
    log_snr: Float[Array, "b"],
    slope: Float[Array, "b"],
    condition: PyTree | None = None,
) -> StepTerms:
    """The KL per unit of time as T → ∞: −½ dλ/dt ‖ε − ε̂‖², whatever Σ_θ.

    Its mean over uniform time in [0, 1] is the diffusion term: ½ ∫ E‖ε − ε̂‖² dλ between the two
    ends, for any schedule that joins them. Kingma et al. (2021), equation 17.

    Args:
      reverse: the denoiser.
      x_0: data.
      eps: standard normal noise.
      log_snr: λ at the time.
      slope: dλ/dt there, negative.
      condition: passed to the denoiser.
    """
    error = sum_per_example(reverse.squared_eps_error(x_0, eps, log_snr, condition))
    return StepTerms(-0.5 * slope * error, error)


def bound(
    reverse: Reverse,
    decoder: Decoder,
    x_0: Float[Array, "b *d"],
    levels: Levels,
    noise: Noise,
    chunk_size: int = 1,
    condition: PyTree | None = None,
) -> Bound:
    """The whole bound (13.26) with the full sum over t, one noise for each example and t.

    Args:
      reverse: p_θ for the steps to s ≥ 1.
      decoder: p(x_0 | x_1).
      x_0: data on the decoder's grey levels.
      levels: T noise levels.
      noise: standard normal noise as a function of t, such as `forward.example_noise`.
      chunk_size: timesteps evaluated at once.
      condition: passed to the denoiser.
    """
    t = jnp.broadcast_to(
        jnp.arange(1, levels.num_timesteps + 1), (jnp.shape(x_0)[0], levels.num_timesteps)
    )
    middle = terms_at(reverse, x_0, levels, t[:, 1:], noise, chunk_size, condition)
    eps_1 = noise(t[:, 0])
    error_1 = reverse.squared_eps_error(x_0, eps_1, levels.step(t[:, 0]).log_snr, condition)
    return Bound(
        prior=prior_kl(x_0, levels.step(t[:, -1]).log_snr),
        kl=middle.kl,
        reconstruction=reconstruction(reverse, decoder, x_0, eps_1, levels, condition),
        eps_error=jnp.concatenate([sum_per_example(error_1)[:, None], middle.eps_error], axis=1),
    )
