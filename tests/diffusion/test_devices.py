"""The pure functions under jax.pmap, on whatever devices there are: one is enough."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import bound, decoders, objectives, schedules
from diffusion.model import DiffusionModel
from diffusion.reverse import Reverse
from diffusion.samplers import base, ddpm

QUANTIZATION = decoders.Quantization(17)
LEVELS = schedules.linear_beta().levels(4)


def model(theta):
    reverse = Reverse(lambda x, l, condition=None: jnp.tanh(theta * x), "eps")
    return DiffusionModel(reverse, decoders.categorical(QUANTIZATION), LEVELS)


def measured(theta, x_0, noise):
    """The bound's terms, and both losses with the mean gradient that training takes."""
    b = bound.bound(model(theta), x_0, lambda t: noise[t[0]])
    t = jnp.arange(1, x_0.shape[0] + 1)

    def loss(theta):
        losses = [
            make().discrete(model(theta), x_0, noise[1], t)
            for make in objectives.OBJECTIVES.values()
        ]
        return sum(of.term.mean() for of in losses), losses

    gradient, losses = jax.grad(loss, has_aux=True)(theta)
    return b, losses, gradient


def test_bound_objectives_and_sampler_under_pmap():
    num_devices, rng = jax.device_count(), np.random.default_rng(0)
    x_0 = QUANTIZATION.values[rng.integers(0, 17, (num_devices, 3, 2, 2, 1))].astype(np.float32)
    noise = rng.normal(size=(num_devices, 5, 3, 2, 2, 1)).astype(np.float32)

    def everything(x_0, noise):
        sampler = ddpm.ancestral(model(0.4))
        x = base.sample(sampler, LEVELS, lambda t: noise[t[0]], 3).x_0
        return *measured(0.4, x_0, noise), x

    alone = jax.jit(everything)
    together = jax.pmap(everything)(x_0, noise)
    for device in range(num_devices):
        expected = alone(x_0[device], noise[device])
        actual = jax.tree.map(lambda of, device=device: of[device], together)
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
