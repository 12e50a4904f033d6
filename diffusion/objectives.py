"""Training losses, as weightings of the per-timestep KL.

With Σ_θ = β̃ the KL at t is ½ expm1(λ_{t−1} − λ_t) ‖ε − ε̂‖², so a loss is a choice of weight.
Each takes one t per example and is an unbiased estimate of its sum over t.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PyTree

from diffusion.bound import prior_kl, reconstruction, step_terms
from diffusion.decoders import Decoder
from diffusion.reverse import Reverse
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
    inner = Step(step.log_snr, jnp.where(t == 1, 1.0, step.gap))  # s ≥ 1: t = 1 has no KL
    kl = step_terms(reverse, x_0, eps, inner, condition).kl
    term = jnp.where(t == 1, reconstruction(reverse, decoder, x_0, eps, levels, condition), kl)
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
