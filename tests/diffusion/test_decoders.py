"""p(x_0 | x_1): probabilities of pixels, against scipy in float64 and the published floors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from diffusion import decoders, schedules
from diffusion.decoders import Quantization
from tests.diffusion import oracles

QUANTIZATIONS = [
    Quantization(num_levels, scaling)
    for num_levels in (2, 17, 256)
    for scaling in decoders.SCALINGS
]
by_quantization = pytest.mark.parametrize(
    "quantization", QUANTIZATIONS, ids=lambda q: f"{q.num_levels} {q.scaling}"
)


def test_scalings_are_the_published_ones():
    k = np.arange(256)
    np.testing.assert_allclose(Quantization(256).values, k / 127.5 - 1, atol=1e-15)
    np.testing.assert_allclose(
        Quantization(256, "midpoints").values, 2 * (k + 0.5) / 256 - 1, atol=1e-15
    )
    # What a density on [−1, 1] differs by from a probability of bytes, in bits/dim.
    assert -np.log2(Quantization(256).spacing) == pytest.approx(6.9944, abs=5e-5)
    assert -np.log2(Quantization(256, "midpoints").spacing) == 7
    np.testing.assert_allclose(Quantization(17).values, np.arange(17) / 8 - 1, atol=1e-15)


@by_quantization
def test_values_are_evenly_spaced_about_zero_and_round_trip(quantization):
    values, level = quantization.values, np.arange(quantization.num_levels)
    np.testing.assert_allclose(np.diff(values), quantization.spacing, rtol=1e-12)
    np.testing.assert_allclose(values, -values[::-1], atol=1e-15)
    edge = 1 if quantization.scaling == "endpoints" else 1 - quantization.spacing / 2
    assert values[-1] == pytest.approx(edge, abs=1e-15)
    data = quantization.to_data(level)
    np.testing.assert_array_equal(quantization.to_level(data), level)
    # Anywhere in its bin a value belongs to its level; beyond the ends, to the last one.
    for shift in (-0.49, 0.49):
        shifted = np.asarray(data) + np.float32(shift * quantization.spacing)
        np.testing.assert_array_equal(quantization.to_level(shifted), level)
    far = quantization.to_level(np.array([-7.0, 7.0], np.float32))
    np.testing.assert_array_equal(far, level[[0, -1]])


def test_bytes_become_data():
    data = Quantization(256).to_data(np.array([[0, 255]], np.uint8))
    np.testing.assert_array_equal(data, [[-1.0, 1.0]])
    assert data.dtype == jnp.float32


STDS = np.array([1e-3, 7e-3, 0.03, 0.2, 1.0, 10.0], np.float32)
MEANS = np.array([0.0, 0.1234, -0.999, 1.0, 1.7], np.float32)


@functools.partial(jax.jit, static_argnames="quantization")
def gaussian_log_prob(x_0, mean, std, quantization):
    return decoders.discretized_gaussian_log_prob(x_0, mean, std, quantization)


@by_quantization
def test_discretised_gaussian_sums_to_one_over_the_levels(quantization):
    x_0 = np.float32(quantization.values)[None]
    std, mean = (grid.reshape(-1, 1) for grid in np.meshgrid(STDS, MEANS))
    shape = (len(std), quantization.num_levels)
    log_prob = gaussian_log_prob(
        np.broadcast_to(x_0, shape), np.broadcast_to(mean, shape), std, quantization
    )
    # Each bin's edges are computed twice, from either side. Their rounding, eps·|x|/σ in units of
    # σ, times the density there is what the sum can miss; the densest levels' own error is 1e-6.
    tolerance = 4e-6 + 2 * oracles.EPS32 * 2 / std[:, 0]
    total = np.exp(np.asarray(log_prob, np.float64)).sum(1)
    assert np.all(np.abs(total - 1) < tolerance)


@by_quantization
def test_categorical_sums_to_one_over_the_levels(quantization):
    log_snr = np.repeat(np.linspace(-10, 14, 9), 5).astype(np.float32)[:, None]
    x_1 = np.tile(MEANS, 9)[:, None] * np.ones(quantization.num_levels, np.float32)
    x_0 = np.broadcast_to(np.float32(quantization.values), x_1.shape)

    @jax.jit
    def log_prob(x_0, x_1):
        return decoders.categorical_log_prob(x_0, x_1, log_snr[:, 0], quantization)

    total = np.exp(np.asarray(log_prob(x_0, x_1), np.float64)).sum(1)
    # Normalised by construction, up to the sum's rounding.
    np.testing.assert_allclose(total, 1, atol=4e-6)


@by_quantization
def test_categorical_is_bayes_rule_with_equally_likely_levels(quantization):
    rng = np.random.default_rng(0)
    n = 400
    level = rng.integers(0, quantization.num_levels, (n, 1))
    log_snr = np.float32(rng.uniform(-8, 13, n))
    alpha_bar = 1 / (1 + np.exp(-np.float64(log_snr)))[:, None]
    eps = rng.normal(size=(n, 1))
    x_1 = np.sqrt(alpha_bar) * quantization.values[level] + np.sqrt(1 - alpha_bar) * eps
    x_1 = np.float32(x_1)
    joint = scipy.stats.norm.logpdf(
        x_1, np.sqrt(alpha_bar) * quantization.values, np.sqrt(1 - alpha_bar)
    )
    expected = np.take_along_axis(joint, level, 1) - scipy.special.logsumexp(
        joint, 1, keepdims=True
    )
    x_0 = quantization.to_data(level)
    actual = jax.jit(decoders.categorical_log_prob, static_argnums=3)(
        x_0, x_1, log_snr, quantization
    )
    # A distance in units of σ is rounded by eps/σ, and log p moves by it times a spacing over σ.
    sigma = np.sqrt(1 - alpha_bar)
    tolerance = 4e-6 + 4 * oracles.EPS32 / sigma * np.minimum(quantization.spacing / sigma, 8)
    assert np.all(np.abs(actual - expected) < tolerance * (1 + np.abs(expected)))


def log_bin(centre, half):
    """log(Φ(c + h) − Φ(c − h)) in float64, on the side of the mean where Φ is small.

    Good where h is above 1e-5 or so: the difference of two nearby log Φ cancels below.
    """
    centre = np.abs(centre)
    upper = scipy.special.log_ndtr(half - centre)
    return upper + np.log(-np.expm1(scipy.special.log_ndtr(-half - centre) - upper))


def interior_grid():
    """Pixel, mean and std over bins from 1e-4 to 1e3 standard deviations and tails to 4e4."""
    std = np.float32(np.geomspace(4.5e-5, 10, 23))
    offset = np.concatenate([[0.0], np.geomspace(1e-4, 1.9, 40)])
    std, offset = (grid.ravel() for grid in np.meshgrid(std, np.concatenate([offset, -offset[1:]])))
    return std, offset


INTERIOR = {2: None, 17: 3, 256: 100}


@pytest.mark.parametrize("num_levels", [17, 256])
def test_interior_bins_are_differences_of_cdfs_in_value_and_gradient(num_levels):
    """∂ log P/∂μ = (φ(a) − φ(b))/(σP), ∂ log P/∂ log σ = (aφ(a) − bφ(b))/P between edges a, b."""
    quantization = Quantization(num_levels)
    std, offset = interior_grid()
    x_0 = np.full_like(std, np.float32(quantization.values[INTERIOR[num_levels]]))
    mean = x_0 - np.float32(offset)

    def log_prob(mean, log_std):
        args = (x_0[:, None], mean[:, None], jnp.exp(log_std)[:, None], quantization)
        return decoders.discretized_gaussian_log_prob(*args)[:, 0]

    @jax.jit
    def value_and_gradients(mean, log_std):
        value, pull = jax.vjp(log_prob, mean, log_std)
        return value, *pull(jnp.ones_like(value))

    log_std = np.log(std)
    value, of_mean, of_log_std = (
        np.asarray(v, np.float64) for v in value_and_gradients(mean, log_std)
    )
    s = np.exp(np.float64(log_std))
    centre, half = (np.float64(x_0) - mean) / s, quantization.spacing / 2 / s
    expected = log_bin(centre, half)
    a, b = centre - half, centre + half
    at_a = np.exp(scipy.stats.norm.logpdf(a) - expected)
    at_b = np.exp(scipy.stats.norm.logpdf(b) - expected)

    # log P ≈ −z²/2: roundings of z, of σ = exp(log σ) (|log σ| up to 10) and of x − μ move it by
    # a few eps z², and where P is near one only absolutely.
    scale = np.abs(expected) + np.abs(a * b) * np.minimum(1, at_a + at_b)
    assert np.all(np.abs(value - expected) < 3e-6 * scale + 3e-6)
    # A gradient's relative error is that of z, unless it is the small difference of its two parts.
    for actual, exact, parts in (
        (of_mean, (at_a - at_b) / s, (at_a + at_b) / s),
        (of_log_std, a * at_a - b * at_b, np.abs(a) * at_a + np.abs(b) * at_b),
    ):
        assert np.all(np.isfinite(actual))
        # Where the edges lie in the tails of a bin that holds all the mass, φ has the relative
        # error of exp(−z²/2): eps z²; it underflows past z = 13.
        near = np.minimum(np.abs(a), np.abs(b))
        sensitivity = np.where(np.sign(a) != np.sign(b), 1 + near**2, 1)
        underflow = 1e-36 * (1 + 1 / s) * (1 + np.abs(centre))
        bad = np.abs(actual - exact) > 2e-5 * sensitivity * parts + underflow
        worst = np.flatnonzero(bad)[:5]
        assert not bad.any(), (
            f"{bad.sum()} of {bad.size}: σ = {std[worst]}, x − μ = {offset[worst]}: "
            f"{actual[worst]} where {exact[worst]}"
        )
    # Far outside its bin a mean is still pulled towards it.
    outside = np.abs(centre) > half + 1
    assert np.all(np.sign(of_mean[outside]) == np.sign(centre[outside]))


def test_bins_are_exact_in_float64(float64):
    """Also in the far tail of a narrow bin, and with no bias where the density is flat.

    The oracle rounds log Φ, and its difference cancels by 1/half where half · centre is small.
    """
    half, centre = (
        grid.ravel()
        for grid in np.meshgrid(
            np.append(np.geomspace(1e-3, 50, 40), 0.2499999),
            np.concatenate([[0.0], np.geomspace(1e-2, 2e3, 60)]),
        )
    )
    quantization = Quantization(17)
    std = 0.5 * quantization.spacing / half
    x_0 = np.full_like(std, quantization.values[8])
    mean = x_0 - centre * std
    args = (x_0[:, None], mean[:, None], std[:, None], quantization)
    actual = np.asarray(decoders.discretized_gaussian_log_prob(*args))[:, 0]
    expected = log_bin(centre, half)
    tolerance = 2e-14 * (1 + np.abs(expected)) + 2e-15 / half
    assert actual.dtype == np.float64
    assert np.all(np.abs(actual - expected) < tolerance)
    # The worst of the eight nodes' errors, 7e-6 of it, is at (c, h) ≈ (85, 0.25).
    value = -float(decoders._log_interval(np.array([85.0]), np.array([0.2499]))[0])
    assert value == pytest.approx(-log_bin(85.0, 0.2499), rel=1e-13)


@pytest.mark.parametrize("num_levels", [2, 256])
def test_edge_bins_are_open_in_value_and_gradient(num_levels):
    """The last bin is Φ((μ − edge)/σ), whose ∂/∂μ is φ/(σΦ); the first is its mirror image."""
    quantization = Quantization(num_levels, "midpoints")
    std, offset = interior_grid()
    last = np.full_like(std, np.float32(quantization.values[-1]))
    mean = last - np.float32(offset)

    @jax.jit
    def value_and_gradient(x_0, mean):
        def log_prob(mean):
            args = (x_0[:, None], mean[:, None], std[:, None], quantization)
            return decoders.discretized_gaussian_log_prob(*args)[:, 0]

        value, pull = jax.vjp(log_prob, mean)
        return value, pull(jnp.ones_like(value))[0]

    value, gradient = (np.asarray(v, np.float64) for v in value_and_gradient(last, mean))
    s = np.float64(std)
    z = (np.float64(mean) - last + quantization.spacing / 2) / s
    expected = scipy.special.log_ndtr(z)
    slope = np.exp(scipy.stats.norm.logpdf(z) - expected) / s
    assert np.all(np.abs(value - expected) < 3e-6 * (np.abs(expected) + z**2 * (z < 0)) + 3e-6)
    sensitivity = np.where(z > 0, 1 + z**2, 1)
    bad = np.abs(gradient - slope) > 2e-5 * sensitivity * slope + 1e-36 * (1 + 1 / s)
    worst = np.flatnonzero(bad)[:5]
    assert not bad.any(), f"{bad.sum()}: z = {z[worst]}: {gradient[worst]} where {slope[worst]}"
    assert np.all(np.isfinite(gradient))
    assert np.all(gradient[z < 3] > 0)
    mirrored = value_and_gradient(-last, -mean)
    np.testing.assert_allclose(mirrored[0], value, rtol=1e-6)
    np.testing.assert_allclose(mirrored[1], -gradient, rtol=1e-6)


def test_floor_of_the_reconstruction_with_a_perfect_mean():
    levels, quantization = schedules.linear_beta().levels(1000), Quantization(256)
    x_0 = quantization.to_data(np.full((3, 4, 4, 1), 100))
    for variance, expected in (("beta_tilde", 1.30538), ("beta", 1.71285)):
        decoder = decoders.discretized_gaussian(quantization, variance)
        bits = -jax.jit(lambda decoder=decoder: decoder(x_0, x_0, x_0, levels))() / np.log(2) / 16
        assert bits.shape == (3,)
        np.testing.assert_allclose(bits, expected, atol=1e-5)


def test_cost_of_the_categorical_decoder_is_vdms():
    """E_ε of −log2 p(x_0 | x_1) over the 256 values, by the trapezoid rule: spectral here."""
    quantization = Quantization(256, "midpoints")
    decoder = decoders.categorical(quantization)
    eps = np.linspace(-6.5, 6.5, 105)
    weight = scipy.stats.norm.pdf(eps)
    weight /= weight.sum()
    x_0 = np.repeat(np.float32(quantization.values)[:, None], len(eps), axis=1)
    expected = {13.3: 0.01041, 12.0: 0.41666, 11.0: 1.10785, 10.0: 1.82535, 8.0: 3.25263}
    for log_snr, bits in expected.items():
        levels = schedules.Levels.from_log_snr(np.array([log_snr, -5.0]))
        alpha_bar = 1 / (1 + np.exp(-log_snr))
        x_1 = np.sqrt(alpha_bar) * x_0 + np.sqrt(1 - alpha_bar) * eps
        columns = (np.reshape(x, (-1, 1)) for x in (x_0, np.float32(x_1)))
        log_prob = np.asarray(decoder(*columns, None, levels), np.float64).reshape(x_0.shape)
        actual = -(log_prob @ weight).mean() / np.log(2)
        # The digits printed, and x_1's rounding: 6e-8/σ of a standard deviation, averaging out.
        assert actual == pytest.approx(bits, abs=2e-5)


def test_first_variance_is_that_of_the_second_steps_posterior_or_beta_1():
    levels = schedules.linear_beta().levels(1000)
    assert decoders.first_variance(levels, "beta_tilde") == pytest.approx(5.45319e-5, rel=1e-6)
    assert decoders.first_variance(levels, "beta") == pytest.approx(1e-4, rel=1e-12)
    single = schedules.from_betas(np.array([0.3])).levels(1)
    assert decoders.first_variance(single, "beta_tilde") == pytest.approx(0.3)
    assert decoders.first_variance(single, "beta") == pytest.approx(0.3)


@pytest.mark.parametrize("name", list(decoders.DECODERS))
def test_decoders_take_any_shape_and_treat_pixels_alike(name):
    quantization = Quantization(17)
    levels = schedules.linear_log_snr(6.0, -6.0).levels(4)
    decoder = jax.jit(lambda *x: decoders.DECODERS[name](quantization)(*x, levels))
    rng = np.random.default_rng(1)
    level = rng.integers(0, 17, (3, 5, 4, 3))
    x_0 = quantization.to_data(level)
    x_1, x_0_hat = np.asarray(x_0) + 0.1 * rng.normal(size=(2, *level.shape)).astype(np.float32)
    log_prob = decoder(x_0, x_1, x_0_hat)
    assert log_prob.shape == (3,)
    pixels = decoder(*(np.reshape(x, (-1, 1)) for x in (x_0, x_1, x_0_hat)))
    np.testing.assert_allclose(log_prob, pixels.reshape(3, -1).sum(axis=1), rtol=1e-5)
    assert np.all(np.asarray(log_prob) <= 0)


@pytest.mark.parametrize("name", list(decoders.DECODERS))
def test_data_off_the_grey_levels_are_refused(name):
    """Nobody scaled the levels 0 … 16; under jit the values are not known, and pass."""
    quantization, levels = Quantization(17), schedules.linear_log_snr(6.0, -6.0).levels(4)
    decoder = decoders.DECODERS[name](quantization)
    x_0 = quantization.values[None, :].astype(np.float32)
    log_prob = decoder(x_0, x_0, x_0, levels)
    slightly = x_0 * np.float32(1 + 1e-4)  # a scaling in half precision
    np.testing.assert_allclose(decoder(slightly, x_0, x_0, levels), log_prob, rtol=1e-2)
    Quantization(256).check(np.float16(Quantization(256).values))  # rounding of 1/80 of the spacing
    for wrong in (np.arange(17.0)[None], x_0 + 0.06, x_0 * np.nan, -np.inf + 0 * x_0):
        with pytest.raises(ValueError, match=r"no grey level: .* 17 levels are -1, -0.875 … 1;"):
            decoder(wrong, x_0, x_0, levels)
    traced = jax.jit(lambda x_0: decoder(x_0, x_0, x_0, levels))(8 * x_0 + 8)
    assert np.isfinite(traced).all()


@pytest.mark.parametrize("scale", [0.3, 1.0, 30.0])
def test_default_variance_of_the_density_is_the_best_for_flat_data(scale, float64):
    """For x_0 ~ N(0, s²) with the optimal x̂_0 the mean of (x_0 − x̂_0)² is g e^{−λ_1}.

    g = s² SNR/(1 + s² SNR), so the default costs ½ (g − 1 − log g) more than the entropy of
    x_0 given x_1: of order (s² SNR)^{−2}, where no other constant is as good for all s.
    """
    levels = schedules.linear_log_snr(6.0, -6.0).levels(4)
    snr = np.exp(6.0)
    eps = oracles.sigma_points(2)  # of (x_0, ε), in which the log-density is quadratic
    x_0, eps = scale * eps[:, :1], eps[:, 1:]
    alpha, sigma = schedules.alpha(levels.log_snr[1]), schedules.sigma(levels.log_snr[1])
    x_1 = alpha * x_0 + sigma * eps
    x_0_hat = alpha * scale**2 / (alpha**2 * scale**2 + sigma**2) * x_1

    with pytest.raises(ValueError, match=r"variance = -1\.0; it must be positive"):
        decoders.gaussian(-1.0)

    def cost(variance=None):
        return -float(jnp.mean(decoders.gaussian(variance)(x_0, x_1, x_0_hat, levels)))

    g = scale**2 * snr / (1 + scale**2 * snr)
    entropy = 0.5 * np.log(2 * np.pi * np.e * g / snr)
    assert cost() - entropy == pytest.approx(0.5 * (g - 1 - np.log(g)), abs=1e-12)
    assert cost(g / snr) == pytest.approx(entropy, abs=1e-12)
    for factor in (0.1, 10.0):
        excess = cost(factor * g / snr) - entropy
        assert excess == pytest.approx(0.5 * (np.log(factor) + 1 / factor - 1), abs=1e-12)
