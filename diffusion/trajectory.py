"""The bound along one trajectory (13.7–13.10), and the K-sample bound made of several.

This is the estimator as the lecture first writes it, before its variance is reduced: the log-ratio
of q and p at a sample of x_1 … x_T. With x_t = α_t x_0 + σ_t ε_t the forward chain given x_0 is

    ε_t = ρ ε_{t−1} + √c n_t,    ρ = exp(−gap/2),  c = 1 − ρ².

Every log-ratio is written in ε, n and the denoiser's error, so that no large terms cancel.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffusion.bound import reconstruction
from diffusion.forward import Noise, diffuse
from diffusion.gaussian import expand, sum_per_example
from diffusion.model import DiffusionModel
from diffusion.reverse import Reverse
from diffusion.schedules import Array, Levels, Step


class Trajectory(NamedTuple):
    """The terms of (13.10) at one trajectory of each example, in nats, with the sign of −log p.

    Attributes:
      end: −log p(x_T).
      steps: log q(x_t | x_{t−1}) − log p(x_{t−1} | x_t) for t = 2 … T.
      first: log q(x_1 | x_0) − log p(x_0 | x_1).
    """

    end: Float[Array, "b"]
    steps: Float[Array, "b T-1"]
    first: Float[Array, "b"]

    @property
    def total(self) -> Float[Array, "b"]:
        """log q(x_1 … x_T | x_0) − log p(x_0 … x_T): unbiased for the bound on −log p(x_0)."""
        return self.end + self.steps.sum(axis=-1) + self.first


def trajectory(model: DiffusionModel, x_0: Float[Array, "b *d"], noise: Noise) -> Trajectory:
    """Draws x_1 … x_T one after another and computes every log-ratio: T network evaluations.

    Args:
      model: p.
      x_0: data, on the decoder's grey levels if the decoder is discrete.
      noise: standard normal noise as a function of t: ε_1 at t = 1, n_t for t ≥ 2.
    """
    batch, levels = jnp.shape(x_0)[0], model.levels

    def advance(eps_s, t):
        t = jnp.full(batch, t)
        return step_log_ratio(model.reverse, x_0, eps_s, noise(t), levels.step(t))

    eps_1 = noise(jnp.ones(batch, jnp.int32))
    eps_T, steps = jax.lax.scan(advance, eps_1, jnp.arange(2, levels.num_timesteps + 1))
    return Trajectory(
        end=end_log_ratio(x_0, eps_T, levels),
        steps=steps.T,
        first=first_log_ratio(model, x_0, eps_1),
    )


def step_log_ratio(
    reverse: Reverse,
    x_0: Float[Array, "b *d"],
    eps_s: Float[Array, "b *d"],
    n: Float[Array, "b *d"],
    step: Step,
) -> tuple[Float[Array, "b *d"], Float[Array, "b"]]:
    """(ε_t, log q(x_t | x_s) − log p_θ(x_s | x_t)) at x_s = α_s x_0 + σ_s ε_s, for s ≥ 1.

    By Bayes' rule (13.15) the log-ratio is the sum of two parts. The first is a sample of the KL
    of (13.26), at x_s = μ̃ + √β̃ z with z = √c ε_s − ρ n. The second is
    log q(x_t | x_0) − log q(x_s | x_0): it telescopes along a trajectory, and at a single t it has
    most of the variance.
    """
    # ρ − 1 and not ρ, whose rounding errors would add up along a long trajectory.
    fall, root_c = expand(jnp.expm1(-0.5 * step.gap), x_0), expand(jnp.sqrt(step.c), x_0)
    eps_t = eps_s + (fall * eps_s + root_c * n)
    z = root_c * eps_s - (1 + fall) * n
    x_t = diffuse(x_0, step.log_snr, eps_t)
    outputs = reverse.outputs(x_t, step.log_snr)
    error = reverse.eps_error(outputs.prediction, x_0, eps_t, step.log_snr)
    r = reverse.log_variance_ratio(step, error, outputs.extra)
    # The square of (x_s − S_θ)/√β̃ = z − √expm1(gap) (ε − ε̂), minus z², multiplied out.
    shift = expand(jnp.sqrt(jnp.expm1(step.gap)), x_0) * error
    kl_sample = r + jnp.expm1(-r) * z**2 + jnp.exp(-r) * (shift - 2 * z) * shift
    # ‖ε_s‖² − ‖ε_t‖², which telescopes for any rounding of ε_t, and log σ_s²/σ_t².
    norms = -(fall * eps_s + root_c * n) * (eps_s + eps_t)
    log_ratio = -jnp.log1p(jax.nn.sigmoid(step.log_snr) * jnp.expm1(step.gap))
    return eps_t, 0.5 * sum_per_example(kl_sample + norms + expand(log_ratio, x_0))


def first_log_ratio(
    model: DiffusionModel, x_0: Float[Array, "b *d"], eps_1: Float[Array, "b *d"]
) -> Float[Array, "b"]:
    """log q(x_1 | x_0) − log p(x_0 | x_1) at x_1 = α_1 x_0 + σ_1 ε_1."""
    log_snr = model.levels.step(jnp.ones(jnp.shape(x_0)[0], jnp.int32)).log_snr
    log_variance = expand(jax.nn.log_sigmoid(-log_snr), x_0)
    log_q = -0.5 * sum_per_example(eps_1**2 + np.log(2 * np.pi) + log_variance)
    return log_q + reconstruction(model, x_0, eps_1)


def end_log_ratio(
    x_0: Float[Array, "b *d"], eps_T: Float[Array, "b *d"], levels: Levels
) -> Float[Array, "b"]:
    """−log p(x_T) at x_T = α_T x_0 + σ_T ε_T."""
    last = jnp.full(jnp.shape(x_0)[0], levels.num_timesteps)
    x_T = diffuse(x_0, levels.step(last).log_snr, eps_T)
    return 0.5 * sum_per_example(x_T**2 + np.log(2 * np.pi))


def k_sample_bound(totals: Float[Array, "k b"]) -> Float[Array, "b"]:
    """−log (1/K) Σ_k p(x_0, z_k)/q(z_k | x_0) from K trajectories' totals, in nats.

    Its expectation decreases with K, from the ELBO's bound at K = 1 to −log p(x_0). Burda et al.
    (2016), equation 8.
    """
    return np.log(totals.shape[0]) - jax.nn.logsumexp(-totals, axis=0)
