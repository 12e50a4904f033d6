"""Interpolation between data by their DDIM encodings."""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from diffusion.gaussian import expand, sum_per_example
from diffusion.model import DiffusionModel
from diffusion.samplers.base import Sampler, sample
from diffusion.samplers.ddpm import ddim_encode
from diffusion.schedules import Array


def slerp(
    a: Float[Array, "b *d"],
    b: Float[Array, "b *d"],
    weight: float | Float[Array, ""] | Float[Array, "b"],
) -> Float[Array, "b *d"]:
    """sin((1 − w)θ)/sin θ a + sin(wθ)/sin θ b, where θ is the angle between an example's a and b.

    Between two vectors of the same length every point has that length, which is nearly constant for
    normal noise in many dimensions. Parallel vectors are interpolated along their line. Between
    opposite vectors there is no shortest path, and the result is meaningless.

    Args:
      a: the result at weight 0.
      b: the result at weight 1.
      weight: one number for all examples, or one for each.
    """
    unit_a, unit_b = _unit(a), _unit(b)
    # Unlike the arc cosine of a·b this is accurate for small angles (Kahan).
    angle = 2 * jnp.arctan2(_norm(unit_a - unit_b), _norm(unit_a + unit_b))
    weight = jnp.broadcast_to(jnp.asarray(weight, angle.dtype), angle.shape)
    weight_a, weight_b = _sine_weight(1 - weight, angle), _sine_weight(weight, angle)
    return expand(weight_a, a) * a + expand(weight_b, b) * b


def interpolate(
    model: DiffusionModel,
    sampler: Sampler,
    x_0_a: Float[Array, "b *d"],
    x_0_b: Float[Array, "b *d"],
    weights: Float[Array, "w"],
    iterations: int = 3,
) -> Float[Array, "w b *d"]:
    """Encodes two batches, interpolates their noises by `slerp`, and decodes the result.

    At weights 0 and 1 the result is each image, encoded and decoded.
    Song et al. (2021), Denoising Diffusion Implicit Models, section 5.3.

    Args:
      model: p, which encodes; decoding uses the same levels.
      sampler: the decoder: a deterministic sampler of the same model.
      x_0_a: data, at weight 0.
      x_0_b: data, at weight 1.
      weights: any number of weights, each for all examples.
      iterations: see `ddim_encode`.

    Raises:
      ValueError: if the sampler draws noise.
    """
    if sampler.num_draws:
        raise ValueError("interpolation needs a sampler that draws no noise, such as ddim at eta 0")
    noise_a, noise_b = (ddim_encode(model, x_0, iterations) for x_0 in (x_0_a, x_0_b))

    def decode(weight):
        x_T = slerp(noise_a, noise_b, weight)
        return sample(sampler, model.levels, lambda t: jnp.zeros_like(x_T), len(x_T), x_T=x_T).x_0

    # One weight after another, so that the batch keeps the size of its condition.
    return jax.lax.map(decode, jnp.asarray(weights, float))


def _sine_weight(weight: Float[Array, "b"], angle: Float[Array, "b"]) -> Float[Array, "b"]:
    """sin(wθ)/sin θ, by its series at small θ, where the quotient's derivative cancels."""
    small = angle < 1e-3
    quotient = jnp.sin(weight * angle) / jnp.sin(jnp.where(small, 1.0, angle))
    return jnp.where(small, weight * (1 + (1 - weight**2) * angle**2 / 6), quotient)


def _norm(x: Float[Array, "b *d"]) -> Float[Array, "b"]:
    """Euclidean length; its gradient at zero is zero."""
    squared = sum_per_example(x**2)
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)


def _unit(x: Float[Array, "b *d"]) -> Float[Array, "b *d"]:
    """x divided by its length; zero where x is zero."""
    norm = _norm(x)
    return x / expand(jnp.where(norm > 0, norm, 1.0), x)
