"""The bound on a mixture of Gaussians, example by example: it tends to −log p(x_0) as T → ∞.

The optimal denoiser and the true p(x_0 | x_1); expectations over ε by Gauss-Hermite quadrature, in
one dimension and in two, in float64.
"""

import jax
import numpy as np
import pytest

from diffusion import bound, schedules
from diffusion.exact import distributions
from diffusion.model import DiffusionModel
from diffusion.reverse import Reverse
from tests.diffusion import problems

pytestmark = pytest.mark.usefixtures("quick_compiles")

SCHEDULE = schedules.linear_log_snr(8.0, -12.0)


def mixture(num_dims):
    """Three broad, overlapping components, not along the axes."""
    weights, rng = np.array([0.5, 0.3, 0.2]), np.random.default_rng(num_dims)
    means = np.array([[-1.2], [0.4], [1.5]]) * np.array([1.0, -0.6])[:num_dims]
    factors = np.eye(num_dims) * 0.5 + 0.15 * rng.normal(size=(3, num_dims, num_dims))
    return distributions.Mixture(weights, means, factors @ factors.swapaxes(1, 2))


def quadrature(num_dims, order):
    """Nodes [n, d] and weights [n] of E over N(0, I)."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(order)
    grids = np.meshgrid(*[nodes] * num_dims, indexing="ij")
    products = np.meshgrid(*[weights / weights.sum()] * num_dims, indexing="ij")
    return np.stack([g.ravel() for g in grids], -1), np.prod(products, axis=0).ravel()


def bounds(data, x_0, levels, order):
    """The bound on −log p(x_0) of each example."""
    eps, weight = quadrature(x_0.shape[1], order)
    n, nodes = len(x_0), len(eps)
    all_x, all_eps = np.repeat(x_0, nodes, axis=0), np.tile(eps, (n, 1))
    model = DiffusionModel(Reverse(data.denoiser, "x_0"), data.decoder(), levels)

    def total():
        return bound.bound(model, all_x, problems.constant(all_eps), chunk_size=20).total

    return np.asarray(jax.jit(total)()).reshape(n, nodes) @ weight


@pytest.mark.parametrize(("num_dims", "order"), [(1, 64), (2, 24)])
def test_bound_falls_to_minus_log_p_example_by_example(num_dims, order, float64):
    """The gap KL(q(z | x_0) ‖ p(z | x_0)) ≥ 0 falls as 1/T for every x_0, likely ones and not."""
    data = mixture(num_dims)
    x_0 = np.array([[-1.5, 0.3], [0.0, 0.0], [0.6, -0.9], [2.6, 1.0]])[:, :num_dims]
    truth = -np.asarray(data.log_prob(x_0))
    gaps = np.stack([bounds(data, x_0, SCHEDULE.levels(t), order) - truth for t in (101, 201, 401)])
    # What is left at T = ∞ is the prior's: x_T is not quite N(0, I) at λ = −12.
    assert np.all(gaps > 0)
    slope = np.log2(gaps[:-1] / gaps[1:])
    np.testing.assert_allclose(slope, 1, atol=0.05)
    # Extrapolated over 1/T and 1/T² (Richardson), nothing else remains.
    first = 2 * gaps[1:] - gaps[:-1]
    np.testing.assert_allclose((4 * first[1] - first[0]) / 3, 0, atol=1e-3)
