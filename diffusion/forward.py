"""q, the forward process: it turns data into noise and has no parameters.

Functions take noise levels as log-SNRs or a `Step`, one per example or one for all. Noise is an
argument, so that quadrature and Monte Carlo run the same code.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, Key

from diffusion.gaussian import Gaussian, expand
from diffusion.schedules import Array, Levels, Numbers, Step, alpha, floats, sigma

Noise = Callable[[Int[Array, "b"]], Float[Array, "b *d"]]
"""t -> standard normal noise, with one timestep per example; a pure function."""


def marginal(x_0: Float[Array, "b *d"], log_snr: Numbers) -> Gaussian:
    """q(x_t | x_0) = N(√ᾱ_t x_0, (1 − ᾱ_t) I).

    Lecture 13, Fact 1 (13.14).
    """
    return Gaussian(
        expand(alpha(log_snr), x_0) * x_0, expand(jax.nn.sigmoid(-floats(log_snr)), x_0)
    )


def diffuse(
    x_0: Float[Array, "b *d"], log_snr: Numbers, eps: Float[Array, "b *d"]
) -> Float[Array, "b *d"]:
    """x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε: a sample of the marginal with the noise ε."""
    return expand(alpha(log_snr), x_0) * x_0 + expand(sigma(log_snr), x_0) * eps


def transition(x_s: Float[Array, "b *d"], step: Step) -> Gaussian:
    """q(x_t | x_s) = N(√(1 − β_t) x_s, β_t I), one step of the chain.

    The lecture writes β_{t−1} here, an index slip: docs/lecture.md, forward step.
    """
    scale = alpha(step.log_snr) / alpha(step.log_snr_s)
    return Gaussian(expand(scale, x_s) * x_s, expand(step.beta, x_s))


def posterior(x_t: Float[Array, "b *d"], x_0: Float[Array, "b *d"], step: Step) -> Gaussian:
    """q(x_s | x_t, x_0), the posterior of the earlier level given x_t and x_0.

    Args:
      x_t: noisy sample at time t, in data units.
      x_0: clean sample.
      step: the log-SNRs of s and t, one per example.

    Returns:
      Mean and variance, each broadcastable to x_t. At s = 0 it is the point mass at x_0.

    Lecture 13, Fact 2 (13.18–13.20).
    """
    alpha_s = alpha(step.log_snr_s)
    weight_t = alpha_s / alpha(step.log_snr) * jnp.exp(-step.gap)
    weight_0 = alpha_s * step.c
    mean = expand(weight_t, x_t) * x_t + expand(weight_0, x_t) * x_0
    return Gaussian(mean, expand(step.posterior_variance, x_t))


def trajectory(x_0: Float[Array, "b *d"], levels: Levels, noise: Noise) -> Float[Array, "T b *d"]:
    """A sample of q(x_1 … x_T | x_0), drawn one transition after another.

    Args:
      x_0: clean samples, in data units.
      levels: the noise levels.
      noise: gives the noise of each transition, a function of t [b].

    Returns:
      x_1 … x_T along the first axis: x_t is at t − 1, and x_0 is not included.
    """
    batch = jnp.shape(x_0)[0]

    def advance(x_s, t):
        t = jnp.full(batch, t)
        x_t = transition(x_s, levels.step(t)).sample(noise(t))
        return x_t, x_t

    return jax.lax.scan(advance, jnp.asarray(x_0), jnp.arange(1, levels.num_timesteps + 1))[1]


def example_noise(
    key: Key[Array, ""], index: Int[Array, "b"], shape: tuple[int, ...], draw: int = 0
) -> Noise:
    """Noise as a pure function of (key, example, t, draw).

    An evaluation does not depend on the batch size, the order of examples or the devices.

    Args:
      key: the seed.
      index: the position of each row in the data set.
      shape: shape of one example, without the batch axis.
      draw: the number of the draw; draws of the same example and t are independent.
    """
    keys = jax.vmap(lambda i: jax.random.fold_in(jax.random.fold_in(key, draw), i))(index)

    def noise(t):
        at_t = jax.vmap(jax.random.fold_in)(keys, t)
        return jax.vmap(lambda k: jax.random.normal(k, shape))(at_t)

    return noise


def array_noise(eps: Float[Array, "numbers b *d"]) -> Noise:
    """Noise from an array: `eps[t]` at timestep t, so that the bound at T needs T + 1 of them.

    A number that the array does not have gives NaN.
    """
    eps = jnp.asarray(eps)
    rows = jnp.arange(eps.shape[1])
    return lambda t: eps.at[t, rows].get(
        mode="fill", fill_value=jnp.nan, wrap_negative_indices=False
    )
