"""Interpolation between data by the noise that they are encoded to."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, PyTree

from diffusion.gaussian import expand, sum_per_example
from diffusion.reverse import Reverse
from diffusion.samplers.base import Sampler, sample
from diffusion.samplers.ddpm import ddim_encode
from diffusion.schedules import Array, Levels


def slerp(
    a: Float[Array, "b *d"],
    b: Float[Array, "b *d"],
    weight: float | Float[Array, ""] | Float[Array, "b"],
) -> Float[Array, "b *d"]:
    """sin((1 − w)θ)/sin θ a + sin(wθ)/sin θ b, where θ is the angle between an example's a and b.

    Between vectors of one length every point has that length, as normal noise in many dimensions
    has. Parallel vectors are interpolated along their line; between opposite ones there is no
    shortest way, and the result means nothing.

    Args:
      a: at weight 0.
      b: at weight 1.
      weight: one for all examples, or one for each.
    """
    unit_a, unit_b = _unit(a), _unit(b)
    # Unlike the arc cosine of a·b this is exact for small angles. Kahan.
    angle = 2 * jnp.arctan2(_norm(unit_a - unit_b), _norm(unit_a + unit_b))
    weight = jnp.broadcast_to(jnp.asarray(weight, angle.dtype), angle.shape)
    of_a, of_b = _share(1 - weight, angle), _share(weight, angle)
    return expand(of_a, a) * a + expand(of_b, b) * b


def interpolate(
    reverse: Reverse,
    sampler: Sampler,
    x_0_a: Float[Array, "b *d"],
    x_0_b: Float[Array, "b *d"],
    weights: Float[Array, "w"],
    levels: Levels,
    iterations: int = 3,
    condition: PyTree | None = None,
) -> Float[Array, "w b *d"]:
    """Data between two others: both are encoded, their noises `slerp`ed, and the result decoded.

    At weights 0 and 1 it is what each image is encoded and decoded to.
    Song et al. (2021), Denoising Diffusion Implicit Models, section 5.3.

    Args:
      reverse: the model that encodes.
      sampler: what decodes: deterministic, of the same model and the same condition.
      x_0_a: data, at weight 0.
      x_0_b: data, at weight 1.
      weights: any number of them, each for all examples.
      levels: the noise levels of both ways.
      iterations: of `ddim_encode`.
      condition: passed to the denoiser when it encodes.

    Raises:
      ValueError: if the sampler draws noise.
    """
    if sampler.num_draws:
        raise ValueError("interpolation needs a sampler that draws no noise, such as ddim at eta 0")
    ends = (ddim_encode(reverse, x_0, levels, iterations, condition) for x_0 in (x_0_a, x_0_b))
    noise_a, noise_b = ends

    def decode(weight):
        x_T = slerp(noise_a, noise_b, weight)
        return sample(sampler, levels, lambda t: jnp.zeros_like(x_T), len(x_T), x_T=x_T).x_0

    # One weight after another: the batch, and with it the condition, stays as it is.
    return jax.lax.map(decode, jnp.asarray(weights, float))


def _share(weight: Float[Array, "b"], angle: Float[Array, "b"]) -> Float[Array, "b"]:
    """sin(wθ)/sin θ, by its series where θ is so small that the quotient's derivative cancels."""
    small = angle < 1e-3
    quotient = jnp.sin(weight * angle) / jnp.sin(jnp.where(small, 1.0, angle))
    return jnp.where(small, weight * (1 + (1 - weight**2) * angle**2 / 6), quotient)


def _norm(x: Float[Array, "b *d"]) -> Float[Array, "b"]:
    """Euclidean length, whose gradient at zero is zero."""
    squared = sum_per_example(x**2)
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)


def _unit(x: Float[Array, "b *d"]) -> Float[Array, "b *d"]:
    """x over its length; zero where x is."""
    norm = _norm(x)
    return x / expand(jnp.where(norm > 0, norm, 1.0), x)
