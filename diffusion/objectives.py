"""Training losses, as weightings of the per-timestep KL.

With Σ_θ = β̃ the KL at t is ½ expm1(λ_{t−1} − λ_t) ‖ε − ε̂‖², so a loss is a choice of weight.
Each takes one t per example; the mean over uniform t is the loss.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree

from diffusion.bound import kl_of_error, prior_kl
from diffusion.decoders import Decoder
from diffusion.forward import diffuse
from diffusion.gaussian import expand
from diffusion.reverse import Reverse, convert
from diffusion.schedules import Array, Levels, Step


def vlb(
    reverse: Reverse,
    decoder: Decoder,
    x_0: Float[Array, "b *d"],
    eps: Float[Array, "b *d"],
    t: Int[Array, "b"],
    levels: Levels,
    condition: PyTree | None = None,
) -> Float[Array, "b"]:
    """The bound itself, (13.26), in bits/dim: prior + T times the term at t.

    The term is the KL for t ≥ 2 and the reconstruction at t = 1, so that the mean over uniform t
    is the bound.
    """
    step = levels.step(t)
    x_t = diffuse(x_0, step.log_snr, eps)
    prediction, extra = reverse.outputs(x_t, step.log_snr, condition)
    error = reverse.eps_error_of(prediction, x_0, eps, step.log_snr) ** 2
    inner = Step(step.log_snr, jnp.where(t == 1, 1.0, step.gap))  # t = 1 has no KL
    kl = kl_of_error(error, inner, reverse.log_variance_ratio(inner, error, extra))
    x_0_hat = convert(prediction, x_t, step.log_snr, reverse.parameterization, "x_0")
    x_0_hat = jnp.where(expand(t == 1, x_0), x_0_hat, x_0)  # elsewhere there is nothing to decode
    reconstruction = -decoder(x_0, x_t, x_0_hat, levels)
    term = jnp.where(t == 1, reconstruction, kl)
    last = levels.step(jnp.full_like(t, levels.num_timesteps)).log_snr
    nats = prior_kl(x_0, last) + levels.num_timesteps * term
    return nats / (np.log(2.0) * np.prod(x_0.shape[1:]))


def simple(
    reverse: Reverse,
    decoder: Decoder,
    x_0: Float[Array, "b *d"],
    eps: Float[Array, "b *d"],
    t: Int[Array, "b"],
    levels: Levels,
    condition: PyTree | None = None,
) -> Float[Array, "b"]:
    """L_simple: ‖ε − ε̂‖² averaged over dimensions, every t = 1 … T alike.

    The KL with its weight ½ expm1(gap) divided out. Ho et al. (2020), equation 14.
    """
    del decoder
    error = reverse.squared_eps_error(x_0, eps, levels.step(t).log_snr, condition)
    return error.mean(axis=tuple(range(1, error.ndim)))


OBJECTIVES: dict[str, Callable[..., Float[Array, "b"]]] = {"vlb": vlb, "simple": simple}
