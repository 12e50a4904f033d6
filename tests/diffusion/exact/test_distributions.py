"""Closed forms of known distributions against quadrature, calculus and scipy, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from diffusion import schedules
from diffusion.exact.distributions import Mixture, normal, points
from tests.diffusion import oracles, problems
from tests.diffusion.problems import DISCRETE, NORMAL

pytestmark = pytest.mark.usefixtures("quick_compiles")

MIXTURE = problems.mixture(4, 3)
DATA = {"normal": NORMAL, "mixture": MIXTURE, "discrete": DISCRETE}
LOG_SNR = np.linspace(-20, 20, 81)
SNR = np.exp(LOG_SNR)
ALPHA, SIGMA = np.sqrt(SNR / (1 + SNR)), np.sqrt(1 / (1 + SNR))

every = pytest.mark.parametrize("name", list(DATA))


def noisy(data):
    """x_t at every log-SNR, as its marginal has it."""
    x_0 = np.asarray(data.sample(jax.random.key(0), len(LOG_SNR)), np.float64)
    return ALPHA[:, None] * x_0 + SIGMA[:, None] * np.random.default_rng(1).normal(size=x_0.shape)


@functools.cache
def jitted(name, method):
    """A method of one of DATA, compiled once for each float type."""
    return jax.jit(getattr(DATA[name], method))


def rounded(data):
    """The same distribution from float32 arrays."""
    return jax.tree.map(np.float32, data)


def mixture_oracle(x_t, weights, means, covariances):
    """Conditional means of normals, whose precisions add, weighted by their densities at x_t."""
    log_joint, mean = np.empty((2, len(weights), *x_t.shape))
    for k, (w, m, c) in enumerate(zip(weights, means, covariances, strict=True)):
        precision = np.linalg.inv(c)
        for i, (x, a, s, r) in enumerate(zip(x_t, ALPHA, SIGMA, SNR, strict=True)):
            noised = scipy.stats.multivariate_normal(a * m, a**2 * c + s**2 * np.eye(3))
            log_joint[k, i] = np.log(w) + noised.logpdf(x)
            mean[k, i] = np.linalg.solve(precision + r * np.eye(3), precision @ m + a / s**2 * x)
    return np.sum(scipy.special.softmax(log_joint, axis=0) * mean, axis=0)


def discrete_oracle(x_t):
    """A softmax of the six log-densities of x_t."""
    log_density = scipy.stats.norm.logpdf(
        x_t[:, None], ALPHA[:, None, None] * DISCRETE.means, SIGMA[:, None, None]
    ).sum(-1)
    return scipy.special.softmax(log_density, axis=1) @ DISCRETE.means


ORACLES = {
    "normal": lambda x_t: mixture_oracle(x_t, [1.0], [NORMAL.mean], [NORMAL.covariance]),
    "mixture": lambda x_t: mixture_oracle(x_t, *MIXTURE),
    "discrete": discrete_oracle,
}


@every
def test_denoiser_is_the_conditional_mean(name):
    data, oracle = DATA[name], ORACLES[name]
    x_t = noisy(data)
    with jax.enable_x64(True):
        np.testing.assert_allclose(
            jitted(name, "denoiser")(x_t, LOG_SNR), oracle(x_t), rtol=1e-7, atol=1e-9
        )
    x_t = np.float32(x_t)
    actual = np.asarray(jax.jit(rounded(data).denoiser)(x_t, np.float32(LOG_SNR)))
    assert actual.dtype == np.float32
    # A prediction of the size of the data, by sums of a few of its products.
    error = np.abs(actual - oracle(np.float64(x_t)))
    assert np.all(error < 1e-5), f"{error.max():.1e} at λ = {LOG_SNR[error.max(1).argmax()]}"


@pytest.mark.parametrize("num_dims", [1, 2])
def test_mixture_by_quadrature(num_dims, float64):
    """p(x_t) = ∫ p(x_0) q(x_t | x_0) dx_0, its mean and the mean of ∇ log q, on a grid of x_0.

    The integrand is a sum of normals no narrower than 0.17, so a trapezoid of step 0.07 is off
    by exp(−2π² (0.17/0.07)²), and [−8, 8] leaves out what is more than 7 standard deviations away.
    """
    data = problems.mixture(3, num_dims)
    log_snr = np.repeat([-6.0, -1.0, 0.0, 1.0, 3.0], 3)
    alpha, sigma2 = np.sqrt(scipy.special.expit(log_snr)), scipy.special.expit(-log_snr)
    x_t = np.random.default_rng(3).normal(size=(len(log_snr), num_dims))
    axis = np.arange(-8, 8, 0.07)
    grid = np.stack(np.meshgrid(*[axis] * num_dims), axis=-1).reshape(-1, num_dims)
    log_p = scipy.special.logsumexp(
        [
            np.log(w) + scipy.stats.multivariate_normal(m, c).logpdf(grid)
            for w, m, c in zip(*data, strict=True)
        ],
        axis=0,
    )
    np.testing.assert_allclose(data.log_prob(grid), log_p, rtol=1e-9, atol=1e-9)

    residual = x_t[:, None] - alpha[:, None, None] * grid
    log_q = oracles.normal_log_prob(residual, 0.0, sigma2[:, None, None]).sum(axis=-1)
    joint = np.exp(log_p + log_q) * 0.07**num_dims
    p_t = joint.sum(axis=1)
    mean = joint @ grid / p_t[:, None]
    score = -np.einsum("bn,bnd->bd", joint, residual) / (sigma2 * p_t)[:, None]
    at = x_t, log_snr
    np.testing.assert_allclose(data.noised_log_prob(*at), np.log(p_t), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(data.denoiser(*at), mean, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(data.score(*at), score, rtol=1e-9, atol=1e-9)


@every
def test_score_is_the_gradient_and_tweedies(name, float64):
    """score = ∇ log p(x_t), and E[x_0 | x_t] = (x_t + σ² score)/α, at every λ."""
    x_t = noisy(DATA[name])
    score = np.asarray(jitted(name, "score")(x_t, LOG_SNR))
    gradient = jax.jit(jax.grad(lambda x: DATA[name].noised_log_prob(x, LOG_SNR).sum()))(x_t)
    np.testing.assert_allclose(score, gradient, rtol=1e-9, atol=1e-9)
    tweedie = (x_t + SIGMA[:, None] ** 2 * score) / ALPHA[:, None]
    # Dividing by α = 5e-5 at λ = −20 leaves twelve digits.
    np.testing.assert_allclose(
        jitted(name, "denoiser")(x_t, LOG_SNR), tweedie, rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize(
    ("name", "end"), [(name, "noise") for name in DATA] + [("normal", "data"), ("mixture", "data")]
)
def test_noised_density_meets_the_datas_and_the_noises(name, end, float64):
    """To first order the noise adds 1/SNR of a smooth density's curvature: slope −1 in λ.

    At the other end log p(x_t) − log N(x_t; 0, I) is α m·x_t, with m the mean: slope ½.
    """
    x = np.random.default_rng(4).normal(size=(3, 3))
    if end == "noise":
        limit, span, slope = scipy.stats.norm.logpdf(x).sum(axis=1), (-20, -14), 0.5
    else:
        limit, span, slope = DATA[name].log_prob(x), (10, 16), -1
    log_snr = np.repeat(np.linspace(*span, 7), 3)
    change = jitted(name, "noised_log_prob")(np.tile(x, (7, 1)), log_snr).reshape(7, 3) - limit
    fitted = np.polyfit(log_snr[::3], np.log(np.abs(change)), 1)[0]
    np.testing.assert_allclose(fitted, slope, atol=0.02)


@every
def test_samples_have_the_noised_score(name):
    """E[score] = 0 and E[x_t scoreᵀ] = −I, by parts: draws, noise and density agree."""
    n = 20_000
    x_0 = np.asarray(DATA[name].sample(jax.random.key(5), n))
    for log_snr in (-2.0, 1.0):
        level = np.full(n, log_snr)
        alpha, sigma = np.sqrt(scipy.special.expit([log_snr, -log_snr]))
        x_t = alpha * x_0 + sigma * np.random.default_rng(6).normal(size=x_0.shape)
        at = np.float32(x_t), np.float32(level)
        score = np.asarray(jitted(name, "score")(*at), np.float64)
        for values, expected in ((score, 0.0), (x_t[:, :, None] * score[:, None], -np.eye(3))):
            error = values.std(axis=0) / np.sqrt(n)
            assert np.all(np.abs(values.mean(axis=0) - expected) < 4 * error)


@every
def test_samples_have_their_moments(name):
    n = 4000
    mean, covariance = DATA[name].mean, DATA[name].covariance
    x = np.asarray(DATA[name].sample(jax.random.key(1), n), np.float64)
    products = (x - mean)[:, :, None] * (x - mean)[:, None]
    for values, expected in ((x, mean), (products, covariance)):
        error = values.std(axis=0) / np.sqrt(n)
        assert np.all(np.abs(values.mean(axis=0) - expected) < 4 * error)


@pytest.mark.parametrize("weights", [[1.0], [0.3, 0.7], [3.0, 1.0, 4.0]])
def test_mixture_of_one_and_the_same_normal_is_that_normal(weights, float64):
    k = len(weights)
    same = Mixture(
        np.array(weights), np.tile(NORMAL.mean, (k, 1)), np.tile(NORMAL.covariance, (k, 1, 1))
    )
    x_t = noisy(NORMAL)
    np.testing.assert_allclose(same.log_prob(x_t), NORMAL.log_prob(x_t), rtol=1e-12)
    for method in ("denoiser", "score", "noised_log_prob"):
        np.testing.assert_allclose(
            jax.jit(getattr(same, method))(x_t, LOG_SNR),
            jitted("normal", method)(x_t, LOG_SNR),
            rtol=1e-12,
            atol=1e-12,
        )


def test_mixture_of_narrow_normals_is_discrete_under_noise(float64):
    """A variance of 1e-9 beside noise of variance 1/(1 + e⁵) = 7e-3."""
    x_t, log_snr = noisy(DISCRETE)[:51], LOG_SNR[:51]
    narrow = Mixture(np.ones(6), DISCRETE.means, np.tile(1e-9 * np.eye(3), (6, 1, 1)))
    for method in ("denoiser", "score", "noised_log_prob"):
        np.testing.assert_allclose(
            jax.jit(getattr(narrow, method))(x_t, log_snr),
            jitted("discrete", method)(x_t, log_snr),
            rtol=1e-4,
            atol=1e-5,
        )


def test_flat_covariances_are_refused():
    flat = np.diag([1.0, 0.0])
    mixed = Mixture(np.ones(2), np.zeros((2, 2)), np.stack([np.eye(2), flat]))
    for data in (normal(np.zeros(2), flat), mixed):
        with pytest.raises(ValueError, match="positive definite"):
            data.log_prob(np.zeros((1, 2)))


def test_normal_log_prob_and_information():
    x = np.random.default_rng(2).normal(size=(5, 3))
    expected = scipy.stats.multivariate_normal(NORMAL.mean, NORMAL.covariance).logpdf(x)
    np.testing.assert_allclose(rounded(NORMAL).log_prob(np.float32(x)), expected, rtol=1e-4)
    for log_snr in (-20.0, 0.0, 20.0):
        _, log_det = np.linalg.slogdet(np.eye(3) + np.exp(log_snr) * NORMAL.covariance)
        assert NORMAL.mutual_information(log_snr) == pytest.approx(0.5 * log_det, rel=1e-6)


def test_information_rises_at_half_the_optimal_error():
    """I-MMSE: dI/dλ = ½ E‖ε − ε̂‖², by central differences, good to a relative (1e-4)²."""
    information = NORMAL.mutual_information
    for log_snr in np.arange(-20.0, 21.0, 4.0):
        rise = (information(log_snr + 1e-4) - information(log_snr - 1e-4)) / 2e-4
        rounding = 1e-15 * information(log_snr) / 2e-4
        half = 0.5 * NORMAL.optimal_eps_error(log_snr)
        assert rise == pytest.approx(half, rel=1e-8, abs=rounding)


@pytest.mark.parametrize("log_snr", [-20.0, -3.0, 0.0, 5.0, 20.0])
def test_optimal_eps_error_is_the_denoisers(log_snr, float64):
    """(ε − ε̂)² is quadratic in (x_0, ε), so sigma points give its mean."""
    points = oracles.sigma_points(6)
    x_0 = NORMAL.mean + points[:, :3] @ np.linalg.cholesky(NORMAL.covariance).T
    model = problems.predicting(NORMAL, "x_0")
    error = model.squared_eps_error(x_0, points[:, 3:], np.full(len(points), log_snr))
    expected = NORMAL.optimal_eps_error(log_snr)
    # At λ = 20, x_0 is within 5e-5 of x̂_0: an error of 1e-16 counts 2e-12 of the distance.
    assert float(error.sum(axis=1).mean()) == pytest.approx(expected, rel=1e-10)


def test_entropy_is_the_mean_of_minus_log_prob(float64):
    x_0 = NORMAL.mean + oracles.sigma_points(3) @ np.linalg.cholesky(NORMAL.covariance).T
    assert NORMAL.entropy() == pytest.approx(-float(NORMAL.log_prob(x_0).mean()), rel=1e-12)
    at_points = -float(DISCRETE.log_prob(DISCRETE.means).mean())
    assert DISCRETE.entropy() == pytest.approx(at_points, rel=1e-12)
    with pytest.raises(ValueError, match="single normal"):
        MIXTURE.entropy()


@every
def test_float32_is_finite_in_values_and_gradients(name):
    """At every λ from −20 to 20, at x_t near the marginal and five units away from it."""
    data = rounded(DATA[name])
    log_snr = np.float32(np.tile(LOG_SNR, 2))
    x_t = np.float32(np.concatenate([noisy(data), noisy(data) + 5]))
    x_0 = np.asarray(data.sample(jax.random.key(9), len(x_t)))

    def decode(x_0, x_1, log_snr):
        def one(x_0, x_1, log_snr):
            levels = schedules.Levels(jnp.stack([jnp.inf, log_snr]), jnp.full(2, jnp.inf))
            return data.decoder()(x_0[None], x_1[None], x_1[None], levels)[0]

        return jax.vmap(one)(x_0, x_1, log_snr)

    @jax.jit
    def everything(x_0, x_t, log_snr):
        values, gradients = [], []
        for method in (data.denoiser, data.score, data.noised_log_prob):
            values.append(method(x_t, log_snr))
            gradients.append(jax.grad(lambda *at, f=method: f(*at).sum(), (0, 1))(x_t, log_snr))
        values.append(decode(x_0, x_t, log_snr))
        gradients.append(jax.grad(lambda *at: decode(*at).sum(), (0, 1, 2))(x_0, x_t, log_snr))
        return values, gradients

    for leaf in jax.tree.leaves(everything(x_0, x_t, log_snr)):
        assert leaf.dtype == np.float32
        assert np.all(np.isfinite(leaf))


@every
def test_float32_density_is_off_by_its_rounding_alone(name):
    """Each term is rounded, and x_t − α m is off by ε‖x_t‖, which the score turns into nats."""
    data = rounded(DATA[name])
    x_t = np.float32(noisy(data))
    at = x_t, np.float32(LOG_SNR)
    actual = np.asarray(jax.jit(data.noised_log_prob)(*at), np.float64)
    with jax.enable_x64(True):
        wide = jax.tree.map(np.float64, data)
        at = np.float64(x_t), np.float64(np.float32(LOG_SNR))
        exact = np.asarray(wide.noised_log_prob(*at))
        score = np.asarray(wide.score(*at))
    sizes = np.linalg.norm(x_t, axis=1) * np.linalg.norm(score, axis=1)
    tolerance = 8 * oracles.EPS32 * (1 + np.abs(exact) + 1.5 * np.abs(LOG_SNR) + sizes)
    error = np.abs(actual - exact)
    worst = np.argmax(error / tolerance)
    assert error[worst] < tolerance[worst], f"{error[worst]:.1e} at λ = {LOG_SNR[worst]}"


def test_discrete_log_prob_and_samples():
    data = points(np.float32(DISCRETE.means))
    np.testing.assert_allclose(data.log_prob(data.means), -np.log(6), rtol=oracles.EPS32)
    off = data.means + np.float32([[0.0, 0.0, 1e-3]])
    np.testing.assert_array_equal(data.log_prob(off), np.full(6, -np.inf))
    x = np.asarray(data.sample(jax.random.key(2), 3000))
    counts = [np.all(x == point, axis=1).sum() for point in data.means]
    assert sum(counts) == 3000
    assert scipy.stats.chisquare(counts).pvalue > 1e-4
