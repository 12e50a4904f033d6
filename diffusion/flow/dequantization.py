"""Bounds on −log P of grey levels from the probability flow's density of noised data.

Grey levels have no density: noise is added, and its entropy is a term of the bound.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float, PyTree

from diffusion.bound import reconstruction
from diffusion.decoders import Decoder
from diffusion.flow.likelihood import OdeLogProb, Probes, log_prob
from diffusion.flow.ode import Solver
from diffusion.forward import diffuse
from diffusion.gaussian import expand, sum_per_example
from diffusion.reverse import Reverse
from diffusion.schedules import Array, Levels, alpha


class DiscreteBound(NamedTuple):
    """Terms of a bound on −log P(x_0) in nats, per example. Its mean over the noise is the bound.

    Attributes:
      ode: log-density, at λ_1, of x_0 with noise added.
      scaling: log-volume that a unit volume has at λ_1, where the noise was added in data units.
      entropy: −log q(noise added | x_0), whose mean is the noise's entropy.
      reconstruction: −log p(x_0 | x_0 with noise added).
    """

    ode: OdeLogProb
    scaling: Float[Array, "b"]
    entropy: Float[Array, "b"]
    reconstruction: Float[Array, "b"]

    @property
    def total(self) -> Float[Array, "b"]:
        """The bound on −log P(x_0)."""
        return self.reconstruction - self.ode.log_prob - self.scaling - self.entropy


def uniform_dequantization(
    reverse: Reverse,
    x_0: Float[Array, "b *d"],
    uniform: Float[Array, "b *d"],
    spacing: float,
    levels: Levels,
    solver: Solver,
    probes: Probes | None = None,
    condition: PyTree | None = None,
    chunk_size: int | None = None,
) -> DiscreteBound:
    """−log P(x_0) bounded with noise y = x_0 + spacing (u − ½), uniform over x_0's bin.

    P(x_0) = ∫ p(y) dy over the bin, and by Jensen −log P(x_0) ≤ −E log p(y) − d log spacing. The
    model's density in data units is p(y) = α_1ᵈ p(α_1 y), from its density at λ_1. The terms:

      ode: log p(α_1 y) at λ_1.
      scaling: d log α_1.
      entropy: d log spacing, that of the noise.
      reconstruction: zero; y tells x_0.

    The gap falls as spacing², but not where the model puts its mass into peaks narrower than a
    bin. Theis et al. (2016), section 3.1.

    Args:
      reverse: the model.
      x_0: data on grey levels.
      uniform: u in [0, 1], uniform and independent.
      spacing: of neighbouring grey levels, in data units, as `Quantization.spacing`.
      levels: noise levels, of which λ_1 and λ_T are used.
      solver, probes, condition, chunk_size: see `log_prob`.
    """
    y = jnp.asarray(x_0) + spacing * (jnp.asarray(uniform) - 0.5)
    log_snr_1, log_snr_T = levels.log_snr[1], levels.log_snr[-1]
    scale = alpha(jnp.asarray(log_snr_1, y.dtype))
    ode = log_prob(reverse, scale * y, log_snr_1, log_snr_T, solver, probes, condition, chunk_size)
    like, num_dims = jnp.ones_like(ode.log_prob), y[0].size
    return DiscreteBound(
        ode=ode,
        scaling=num_dims * jnp.log(scale) * like,
        entropy=num_dims * jnp.log(spacing) * like,
        reconstruction=0 * like,
    )


def noise_dequantization(
    reverse: Reverse,
    decoder: Decoder,
    x_0: Float[Array, "b *d"],
    eps: Float[Array, "b *d"],
    levels: Levels,
    solver: Solver,
    probes: Probes | None = None,
    condition: PyTree | None = None,
    chunk_size: int | None = None,
) -> DiscreteBound:
    """−log P(x_0) bounded with the model's first latent, x_1 = α_1 x_0 + σ_1 ε.

    P(x_0) = ∫ p(x_1) p(x_0 | x_1) dx_1, and by Jensen
    −log P(x_0) ≤ E[−log p(x_0 | x_1) − log p(x_1) + log q(x_1 | x_0)]. The terms:

      ode: log p(x_1) at λ_1.
      scaling: zero; x_1 lives at λ_1.
      entropy: −log q(x_1 | x_0), of mean d/2 log(2πe σ_1²). It is taken at the x_1 drawn, since
        it rises and falls with log p(x_1).
      reconstruction: −log p(x_0 | x_1), the decoder's.

    Exact, at every ε, where p(x_1) and the decoder are those of the data.

    Args:
      reverse: the model.
      decoder: p(x_0 | x_1).
      x_0: data on the decoder's grey levels.
      eps: standard normal noise.
      levels: noise levels, of which λ_1 and λ_T are used, and what the decoder needs.
      solver, probes, condition, chunk_size: see `log_prob`.
    """
    x_0, eps = jnp.asarray(x_0), jnp.asarray(eps)
    log_snr_1, log_snr_T = levels.log_snr[1], levels.log_snr[-1]
    log_snr = levels.step(jnp.ones(len(x_0), jnp.int32)).log_snr
    x_1 = diffuse(x_0, log_snr, eps)
    log_variance = jax.nn.log_sigmoid(-log_snr)
    # From ε itself: (x_1 − α_1 x_0)/σ_1 would cancel.
    minus_log_q = 0.5 * sum_per_example(eps**2 + jnp.log(2 * jnp.pi) + expand(log_variance, x_0))
    ode = log_prob(reverse, x_1, log_snr_1, log_snr_T, solver, probes, condition, chunk_size)
    return DiscreteBound(
        ode=ode,
        scaling=jnp.zeros_like(ode.log_prob),
        entropy=minus_log_q,
        reconstruction=reconstruction(reverse, decoder, x_0, eps, levels, condition),
    )
