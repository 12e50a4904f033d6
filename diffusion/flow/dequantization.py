"""Bounds on −log P of grey levels, from the density of noisy data under the probability flow.

Grey levels have no density. Noise is added to them, and its entropy is a term of the bound.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from diffusion.bound import reconstruction
from diffusion.flow.likelihood import OdeLogProb, Probes, log_prob
from diffusion.flow.ode import Solver
from diffusion.forward import diffuse
from diffusion.gaussian import expand, sum_per_example
from diffusion.model import DiffusionModel
from diffusion.schedules import Array, alpha


class DiscreteBound(NamedTuple):
    """Terms of a bound on −log P(x_0) in nats, per example. The mean over the noise is the bound.

    Attributes:
      ode: log-density at λ_1 of the noisy x_0.
      scaling: log-volume at λ_1 of a unit volume in data units, if the noise is in data units.
      entropy: −log q(noise | x_0), whose mean is the entropy of the noise.
      reconstruction: −log p(x_0 | noisy x_0).
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
    model: DiffusionModel,
    y: Float[Array, "b *d"],
    spacing: float,
    solver: Solver,
    probes: Probes | None = None,
    chunk_size: int | None = None,
) -> DiscreteBound:
    """A bound on −log P(x_0) from y = x_0 + spacing (u − ½), u ~ U[0, 1]: uniform over x_0's bin.

    P(x_0) = ∫ p(y) dy over the bin, and by Jensen −log P(x_0) ≤ −E log p(y) − d log spacing. The
    model's density in data units is p(y) = α_1ᵈ p(α_1 y), from its density at λ_1. The terms:

      ode: log p(α_1 y) at λ_1.
      scaling: d log α_1.
      entropy: d log spacing, that of the noise.
      reconstruction: zero, because y determines x_0.

    The gap falls as spacing² if the model's density is smooth over a bin, but not if it has
    narrower peaks. Theis et al. (2016), section 3.1.

    Args:
      model: p; its decoder is not used.
      y: grey levels with uniform noise added, in data units.
      spacing: distance of neighbouring grey levels in data units, `Quantization.spacing`.
      solver, probes, chunk_size: see `log_prob`.
    """
    y = jnp.asarray(y)
    scale = alpha(jnp.asarray(model.levels.log_snr[1], y.dtype))
    ode = log_prob(model, scale * y, solver, probes, chunk_size)
    like, num_dims = jnp.ones_like(ode.log_prob), y[0].size
    return DiscreteBound(
        ode=ode,
        scaling=num_dims * jnp.log(scale) * like,
        entropy=num_dims * jnp.log(spacing) * like,
        reconstruction=0 * like,
    )


def noise_dequantization(
    model: DiffusionModel,
    x_0: Float[Array, "b *d"],
    eps: Float[Array, "b *d"],
    solver: Solver,
    probes: Probes | None = None,
    chunk_size: int | None = None,
) -> DiscreteBound:
    """A bound on −log P(x_0) from the model's first latent, x_1 = α_1 x_0 + σ_1 ε.

    P(x_0) = ∫ p(x_1) p(x_0 | x_1) dx_1, and by Jensen
    −log P(x_0) ≤ E[−log p(x_0 | x_1) − log p(x_1) + log q(x_1 | x_0)]. The terms:

      ode: log p(x_1) at λ_1.
      scaling: zero, because x_1 is already at λ_1.
      entropy: −log q(x_1 | x_0) at the x_1 drawn; its mean is d/2 log(2πe σ_1²). The sample value
        has less variance in the sum than the mean, because it varies with log p(x_1).
      reconstruction: −log p(x_0 | x_1), from the decoder.

    If p(x_1) and the decoder are those of the data, the bound is exact at every ε.

    Args:
      model: p.
      x_0: data on the decoder's grey levels.
      eps: standard normal noise.
      solver, probes, chunk_size: see `log_prob`.
    """
    x_0, eps = jnp.asarray(x_0), jnp.asarray(eps)
    log_snr = model.levels.step(jnp.ones(len(x_0), jnp.int32)).log_snr
    x_1 = diffuse(x_0, log_snr, eps)
    log_variance = jax.nn.log_sigmoid(-log_snr)
    # From ε itself, because (x_1 − α_1 x_0)/σ_1 cancels.
    minus_log_q = 0.5 * sum_per_example(eps**2 + jnp.log(2 * jnp.pi) + expand(log_variance, x_0))
    ode = log_prob(model, x_1, solver, probes, chunk_size)
    return DiscreteBound(
        ode=ode,
        scaling=jnp.zeros_like(ode.log_prob),
        entropy=minus_log_q,
        reconstruction=reconstruction(model, x_0, eps),
    )
