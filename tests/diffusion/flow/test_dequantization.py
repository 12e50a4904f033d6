"""Bounds on grey levels by the flow: never below −log P, and close to it where they can be."""

import jax
import numpy as np
import pytest
import scipy.stats

from diffusion import decoders, reverse, schedules
from diffusion.exact import distributions
from diffusion.flow.dequantization import noise_dequantization, uniform_dequantization
from diffusion.flow.ode import Adaptive, FixedGrid
from diffusion.model import DiffusionModel
from tests.diffusion import problems

pytestmark = pytest.mark.usefixtures("quick_compiles")

QUANTIZATION = decoders.Quantization(5)
LEVELS = schedules.linear_log_snr(4.0, -12.0).levels(3)
UNIT_NODES, UNIT_WEIGHTS = np.polynomial.legendre.leggauss(40)
UNIT_NODES, UNIT_WEIGHTS = np.float32(0.5 + UNIT_NODES / 2), UNIT_WEIGHTS / 2
NORMAL_NODES, NORMAL_WEIGHTS = np.polynomial.hermite_e.hermegauss(30)
NORMAL_WEIGHTS = NORMAL_WEIGHTS / NORMAL_WEIGHTS.sum()


def model_of(data):
    return DiffusionModel(reverse.Reverse(data.denoiser, "x_0"), data.decoder(), LEVELS)


def test_uniform_dequantization_in_data_units():
    """A model whose density in data units is N(m, C + I/SNR_1): the flow's α_1 is undone."""
    data = problems.testbed()
    rng = np.random.default_rng(0)
    x_0, u = np.float32(rng.normal(size=(5, 4))), np.float32(rng.uniform(size=(5, 4)))
    y = x_0 + 0.25 * (u - 0.5)
    bound = uniform_dequantization(model_of(data), y, 0.25, FixedGrid(48))
    covariance = data.covariance + np.exp(-4.0) * np.eye(4)
    density = scipy.stats.multivariate_normal.logpdf(y, None, covariance)
    np.testing.assert_allclose(bound.total, -density - 4 * np.log(0.25), atol=1e-3, rtol=1e-5)
    np.testing.assert_allclose(bound.entropy, 4 * np.log(0.25), rtol=1e-6)
    np.testing.assert_array_equal(bound.reconstruction, 0)


def test_gap_of_uniform_dequantization_in_a_smooth_density():
    """With log-density ℓ it is ℓ'² spacing²/24 to leading order: it goes as the bins narrow."""
    data = distributions.normal(np.zeros(1), np.ones((1, 1)))
    model, std, spacing = model_of(data), np.sqrt(1 + np.exp(-4.0)), 0.4
    centres = np.float32([0.7, 1.3, -2.0])
    x_0, u = np.repeat(centres, len(UNIT_NODES))[:, None], np.tile(UNIT_NODES, 3)[:, None]
    y = x_0 + spacing * (u - 0.5)
    bound = jax.jit(lambda y: uniform_dequantization(model, y, spacing, FixedGrid(32)))(y)
    mean = np.asarray(bound.total, np.float64).reshape(3, -1) @ UNIT_WEIGHTS
    ends = scipy.stats.norm.cdf((centres[:, None] + np.array([-0.5, 0.5]) * spacing) / std)
    gap = mean + np.log(np.diff(ends)[:, 0])
    np.testing.assert_allclose(gap, (centres / std**2 * spacing) ** 2 / 24, rtol=0.1)


def test_uniform_dequantization_of_narrow_peaks_stays_above():
    """Five equally likely levels whose peaks are narrow in their bins: above log 5, by a lot."""
    values = np.float32(QUANTIZATION.values)
    data = distributions.points(values[:, None])
    x_0 = np.repeat(values, len(UNIT_NODES))[:, None]
    u = np.tile(UNIT_NODES, 5)[:, None]
    spacing, model = QUANTIZATION.spacing, model_of(data)
    y = x_0 + spacing * (u - 0.5)
    bound = jax.jit(lambda y: uniform_dequantization(model, y, spacing, Adaptive(1e-6, 1e-6)))(y)
    std = np.exp(-2.0)
    density = scipy.stats.norm.pdf((y - values) / std).mean(axis=1) / std
    np.testing.assert_allclose(bound.total, -np.log(density) - np.log(spacing), atol=2e-3)
    per_level = np.asarray(bound.total).reshape(5, -1) @ UNIT_WEIGHTS
    assert np.all(per_level > np.log(5) + 0.05)


def test_noise_dequantization_is_exact_at_every_eps():
    """Bayes: log p(x_0) = log p(x_0 | x_1) + log p(x_1) − log q(x_1 | x_0), were all three true.

    Of three terms of several nats each none can be missing.
    """
    points = np.float32([[-1, 0.5], [0.5, 0.5], [0.5, -1], [0, 0]])
    points = points - points.mean(axis=0)  # N(0, I) is nearest to the end of centred data
    data = distributions.points(points)
    x_0 = np.repeat(points, 3, axis=0)
    eps = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)
    model = model_of(data)
    bound = jax.jit(lambda x_0: noise_dequantization(model, x_0, eps, Adaptive(1e-6, 1e-6)))(x_0)
    np.testing.assert_allclose(bound.total, np.log(4), atol=2e-3)
    # The entropy of N(0, σ_1² I) is d/2 log(2πe σ_1²), about the mean of this term.
    entropy = np.log(2 * np.pi * np.e) - np.logaddexp(0, 4.0)
    np.testing.assert_allclose(
        bound.entropy - 0.5 * (np.sum(eps**2, axis=1) - 2), entropy, rtol=1e-5
    )


@pytest.mark.parametrize("name", ["uniform", "noise"])
def test_any_model_obeys_kraft(name):
    """Bounds on −log P of a distribution over the levels: Σ_k e^{−bound_k} ≤ Σ_k P(k) ≤ 1."""
    model = DiffusionModel(problems.imperfect(), decoders.categorical(QUANTIZATION), LEVELS)
    values = np.float32(QUANTIZATION.values)
    nodes, weights = {
        "uniform": (UNIT_NODES, UNIT_WEIGHTS),
        "noise": (np.float32(NORMAL_NODES), NORMAL_WEIGHTS),
    }[name]
    x_0, noise = np.repeat(values, len(nodes))[:, None], np.tile(nodes, 5)[:, None]
    if name == "uniform":
        spacing = QUANTIZATION.spacing
        y = x_0 + spacing * (noise - 0.5)
        bound = uniform_dequantization(model, y, spacing, FixedGrid(32))
    else:
        bound = noise_dequantization(model, x_0, noise, FixedGrid(32))
    per_level = np.asarray(bound.total).reshape(5, -1) @ weights
    assert 0.1 < np.exp(-per_level).sum() < 1
