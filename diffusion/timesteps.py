"""How a training batch draws its timesteps t = 1 … T, each marginally uniform."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Key


def uniform(key: Key[Array, ""], batch_size: int, num_timesteps: int) -> Int[Array, "b"]:
    """Independent uniform draws."""
    return jax.random.randint(key, (batch_size,), 1, num_timesteps + 1)


def stratified(key: Key[Array, ""], batch_size: int, num_timesteps: int) -> Int[Array, "b"]:
    """One draw in each of `batch_size` equal strata, by a common shift (Kingma et al. 2021, I.1).

    Each draw is uniform, but they depend on one another: a standard error over the batch that
    takes them as independent is wrong.
    """
    time = jax.random.uniform(key) + jnp.arange(batch_size) / batch_size
    t = 1 + jnp.floor(jnp.mod(time, 1.0) * num_timesteps).astype(jnp.int32)
    return jnp.minimum(t, num_timesteps)


TIMESTEPS: dict[str, Callable[..., Int[Array, "b"]]] = {
    "uniform": uniform,
    "stratified": stratified,
}
