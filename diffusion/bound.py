"""The evidence lower bound (13.26): prior + Σ_t KL_t + reconstruction, per example.

All terms are in nats and have the sign of −log p: the total bounds −log p(x_0) from above. The
noise ε is an argument, so that quadrature and Monte Carlo run the same code.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from diffusion.forward import Noise, diffuse
from diffusion.gaussian import expand, sum_per_example
from diffusion.model import DiffusionModel
from diffusion.reverse import Reverse
from diffusion.schedules import Array, Numbers, Step, floats


class StepTerms(NamedTuple):
    """The terms of one reverse step, per example.

    Attributes:
      kl: KL(q(x_s | x_t, x_0) ‖ p_θ(x_s | x_t)) in nats.
      eps_error: ‖ε − ε̂‖². Divided by SNR_t it is the distortion ‖x_0 − x̂_0‖².
    """

    kl: Float[Array, "*b"]
    eps_error: Float[Array, "*b"]


class Bound(NamedTuple):
    """The terms of the bound for each example, in nats.

    Attributes:
      prior: KL(q(x_T | x_0) ‖ p(x_T)).
      kl: KL(q(x_{t−1} | x_t, x_0) ‖ p_θ(x_{t−1} | x_t)) for t = 2 … T.
      reconstruction: −log p(x_0 | x_1).
      eps_error: ‖ε − ε̂‖² for t = 1 … T, the distortion at each t. It is no term of the bound.
    """

    prior: Float[Array, "b"]
    kl: Float[Array, "b T-1"]
    reconstruction: Float[Array, "b"]
    eps_error: Float[Array, "b T"]

    @property
    def total(self) -> Float[Array, "b"]:
        """The bound on −log p(x_0)."""
        return self.prior + self.kl.sum(axis=-1) + self.reconstruction


def prior_kl(x_0: Float[Array, "b *d"], log_snr: Numbers) -> Float[Array, "b"]:
    """KL(q(x_T | x_0) ‖ N(0, I)), the last term of (13.26), from λ_T.

    The lecture prints it between q(x_1 | x_0) and q(x_T | x_0), a slip: docs/lecture.md, 13.21.
    """
    log_snr = floats(log_snr)
    alpha_bar = jax.nn.sigmoid(log_snr)
    from_variance = -alpha_bar - jax.nn.log_sigmoid(-log_snr)
    return 0.5 * sum_per_example(expand(alpha_bar, x_0) * x_0**2 + expand(from_variance, x_0))


def step_terms(
    reverse: Reverse, x_0: Float[Array, "b *d"], eps: Float[Array, "b *d"], step: Step
) -> StepTerms:
    """KL(q(x_s | x_t, x_0) ‖ p_θ(x_s | x_t)) at x_t = α_t x_0 + σ_t ε, for s ≥ 1.

    With r = log(Σ_θ/β̃) the KL is ½ Σ [r + expm1(−r) + e^{−r} expm1(λ_s − λ_t) (ε − ε̂)²], summed
    over coordinates, where expm1(λ_s − λ_t) = SNR_s/SNR_t − 1. If Σ_θ = β̃ this is
    ½ expm1(gap) ‖ε − ε̂‖².

    In float32 the rounding of a prediction that is almost exact remains: up to 2e-3 of one KL
    near λ = −20 for ε and score and near λ = 20 for x_0, 1e-6 for v, 2e-5 of the sum over t.
    """
    outputs = reverse.outputs(diffuse(x_0, step.log_snr, eps), step.log_snr)
    error = reverse.eps_error(outputs.prediction, x_0, eps, step.log_snr) ** 2
    r = reverse.log_variance_ratio(step, error, outputs.extra)
    return StepTerms(kl_from_error(error, step, r), sum_per_example(error))


def kl_from_error(
    error: Float[Array, "b *d"], step: Step, log_variance_ratio: Float[Array, "b ..."]
) -> Float[Array, "b"]:
    """The KL of `step_terms` from (ε − ε̂)² and r = log(Σ_θ/β̃), isotropic or per coordinate."""
    r = log_variance_ratio
    weight = jnp.exp(-r) * expand(jnp.expm1(step.gap), error)
    return 0.5 * sum_per_example(_expm1_excess(-r) + weight * error)


def _expm1_excess(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """expm1(x) − x ≥ 0, by its series where the difference would cancel."""
    series = 1.0  # 1 + x/3 (1 + x/4 (…)), accurate to rounding in float64 too
    for divisor in range(8, 2, -1):
        series = 1 + x / divisor * series
    series = 0.5 * x**2 * series
    return jnp.where(jnp.abs(x) < 0.1, series, jnp.expm1(x) - x)


def reconstruction(
    model: DiffusionModel, x_0: Float[Array, "b *d"], eps: Float[Array, "b *d"]
) -> Float[Array, "b"]:
    """−log p(x_0 | x_1) in nats at x_1 = α_1 x_0 + σ_1 ε, the first term of (13.26)."""
    log_snr = model.levels.step(jnp.ones(jnp.shape(x_0)[0], jnp.int32)).log_snr
    x_1 = diffuse(x_0, log_snr, eps)
    x_0_hat = model.reverse.predict("x_0", x_1, log_snr)
    return -model.decoder(x_0, x_1, x_0_hat, model.levels)


def terms_at(
    model: DiffusionModel,
    x_0: Float[Array, "b *d"],
    t: Int[Array, "b m"],
    noise: Noise,
    chunk_size: int = 1,
) -> StepTerms:
    """The KL and the error of each example at chosen timesteps t ≥ 2, with one noise for each.

    Args:
      model: p; its decoder is not used.
      x_0: data.
      t: m timesteps for each example.
      noise: standard normal noise as a function of t.
      chunk_size: timesteps evaluated at once; memory grows with chunk_size times the batch.

    Returns:
      Both terms as [b, m], in nats.

    Raises:
      ValueError: if a t is not in 2 … T, unless JAX traces it.
    """

    def at(t):
        return step_terms(model.reverse, x_0, noise(t), model.levels.step(t))

    model.levels.check(t, first=2)
    t = jnp.asarray(t)
    m = t.shape[1]
    if m == 0:
        return StepTerms(jnp.zeros(t.shape), jnp.zeros(t.shape))
    # Padded to whole chunks, so that the denoiser is compiled for one shape.
    chunk_size = min(chunk_size, m)
    padded = jnp.pad(t, ((0, 0), (0, -m % chunk_size)), constant_values=2)
    terms = jax.lax.map(at, padded.T, batch_size=chunk_size)
    return StepTerms(terms.kl[:m].T, terms.eps_error[:m].T)


def continuous_rate(
    reverse: Reverse,
    x_0: Float[Array, "b *d"],
    eps: Float[Array, "b *d"],
    log_snr: Numbers,
    slope: Numbers,
) -> StepTerms:
    """The KL per unit of time in the limit T → ∞: −½ dλ/dt ‖ε − ε̂‖², for any Σ_θ.

    Its mean over uniform time in [0, 1] is the diffusion term, ½ ∫ E‖ε − ε̂‖² dλ. That depends on
    the schedule through its two ends only. Kingma et al. (2021), equation 17.

    Args:
      reverse: p_θ.
      x_0: data.
      eps: standard normal noise.
      log_snr: λ at the time of each example.
      slope: dλ/dt at that time, negative.
    """
    error = sum_per_example(reverse.squared_eps_error(x_0, eps, log_snr))
    return StepTerms(-0.5 * floats(slope) * error, error)


def bound(
    model: DiffusionModel, x_0: Float[Array, "b *d"], noise: Noise, chunk_size: int = 1
) -> Bound:
    """The bound (13.26) with the full sum over t and one noise for each example and t.

    Args:
      model: p.
      x_0: data, on the decoder's grey levels if the decoder is discrete.
      noise: standard normal noise as a function of t, such as `forward.example_noise`.
      chunk_size: timesteps evaluated at once; memory grows with chunk_size times the batch.

    Returns:
      Every term for each example, in nats.
    """
    levels = model.levels
    t = jnp.broadcast_to(
        jnp.arange(1, levels.num_timesteps + 1), (jnp.shape(x_0)[0], levels.num_timesteps)
    )
    middle = terms_at(model, x_0, t[:, 1:], noise, chunk_size)
    eps_1 = noise(t[:, 0])
    error_1 = model.reverse.squared_eps_error(x_0, eps_1, levels.step(t[:, 0]).log_snr)
    return Bound(
        prior=prior_kl(x_0, levels.step(t[:, -1]).log_snr),
        kl=middle.kl,
        reconstruction=reconstruction(model, x_0, eps_1),
        eps_error=jnp.concatenate([sum_per_example(error_1)[:, None], middle.eps_error], axis=1),
    )
