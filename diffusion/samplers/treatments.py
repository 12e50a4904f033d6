"""Treatments of x̂_0 that keep samples in the data's range. For samplers only, never for a bound."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Float

from diffusion.gaussian import expand
from diffusion.model import DiffusionModel
from diffusion.reverse import Outputs, convert
from diffusion.schedules import Array


def dynamic_threshold(
    x_0_hat: Float[Array, "b *d"], quantile: float = 0.995
) -> Float[Array, "b *d"]:
    """Clips each example at a quantile of its |x̂_0|, at least 1, and scales it back to [−1, 1].

    Saharia et al. (2022), Imagen, section 2.3.
    """
    size = jnp.quantile(jnp.abs(x_0_hat).reshape(len(x_0_hat), -1), quantile, axis=1)
    size = expand(jnp.maximum(size, 1.0), x_0_hat)
    return jnp.clip(x_0_hat, -size, size) / size


X_0_TREATMENTS: dict[str, Callable[[Float[Array, "b *d"]], Float[Array, "b *d"]]] = {
    "none": lambda x_0_hat: x_0_hat,
    "clip": lambda x_0_hat: jnp.clip(x_0_hat, -1.0, 1.0),
    "dynamic": dynamic_threshold,
}


def treated(model: DiffusionModel, treatment: str) -> DiffusionModel:
    """The model whose x̂_0 is treated; ε̂ and the score are computed from the treated x̂_0.

    A learned Σ_θ does not change. With "none" it is the model itself.

    Args:
      model: p.
      treatment: a name in X_0_TREATMENTS.
    """
    treat, reverse = X_0_TREATMENTS[treatment], model.reverse
    if treatment == "none":
        return model

    def denoiser(x_t, log_snr, condition=None):
        prediction, extra = reverse.given(condition).outputs(x_t, log_snr)
        x_0_hat = convert(prediction, x_t, log_snr, reverse.parameterization, "x_0")
        return Outputs(treat(x_0_hat), extra).joined()

    return model._replace(reverse=reverse._replace(denoiser=denoiser, parameterization="x_0"))
