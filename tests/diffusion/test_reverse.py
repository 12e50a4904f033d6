"""p_θ: parameterisations are one another's linear images, and the mean S_θ is the lecture's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import forward, reverse, schedules
from diffusion.exact import distributions
from diffusion.reverse import Reverse
from diffusion.schedules import Step
from diffusion.variances import VARIANCES
from tests.diffusion import oracles

NAMES = ("eps", "x_0", "v", "score")


def images(x_0, eps, log_snr) -> dict:
    """What each parameterisation predicts of (x_0, ε), and x_t, from SNR = ᾱ/(1 − ᾱ) in float64."""
    odds = np.exp(np.float64(log_snr))[:, None]
    a, s = np.sqrt(odds / (1 + odds)), np.sqrt(1 / (1 + odds))
    return {
        "x_t": a * x_0 + s * eps,
        "eps": eps,
        "x_0": x_0,
        "v": a * eps - s * x_0,
        "score": -eps / s,
    }


@jax.jit
def all_pairs(x_t, log_snr, predictions):
    """Every parameterisation from every other, and back."""
    there = {
        (source, target): reverse.convert(predictions[source], x_t, log_snr, source, target)
        for source in NAMES
        for target in NAMES
    }
    back = {
        (source, target): reverse.convert(value, x_t, log_snr, target, source)
        for (source, target), value in there.items()
    }
    return there, back


def problem(low, high, n=64):
    """Random (x_0, ε) at log-SNRs from `low` to `high`."""
    x_0, eps = np.random.default_rng(0).normal(size=(2, n, 3))
    return x_0, eps, np.linspace(low, high, n)


def test_all_sixteen_pairs_convert_and_round_trip(float64):
    """An error in ε is amplified at most by α/σ and σ/α on its way, twice, and 1/σ in a score."""
    x_0, eps, log_snr = problem(-15, 15)
    truth = images(x_0, eps, log_snr)
    there, back = all_pairs(truth.pop("x_t"), log_snr, truth)
    tolerance = 1e-14 * np.exp(1.5 * np.abs(log_snr))[:, None]
    assert len(there) == 16
    for (source, target), value in there.items():
        assert np.all(np.abs(value - truth[target]) < tolerance), (source, target)
        assert np.all(np.abs(back[source, target] - truth[source]) < tolerance), (source, target)


def test_pairs_convert_in_float32():
    x_0, eps, log_snr = problem(-4, 4)
    truth = {name: np.float32(value) for name, value in images(x_0, eps, log_snr).items()}
    there, _ = all_pairs(truth.pop("x_t"), np.float32(log_snr), truth)
    # Ten roundings of numbers below 10, amplified by at most e^{|λ|/2} twice.
    tolerance = 100 * oracles.EPS32 * np.exp(np.abs(log_snr))[:, None]
    for (source, target), value in there.items():
        assert np.all(np.abs(value - truth[target]) < tolerance), (source, target)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
def test_reverse_step_has_the_lectures_mean_and_variance(name, variance, float64):
    """S_θ = (x_t − β/σ ε̂)/√α_t = (x_t + β s)/√α_t, and Σ_θ is β̃_t or β_t."""
    chain = oracles.from_betas(np.linspace(1e-4, 0.02, 1000))
    t = np.array([2, 3, 10, 100, 500, 999, 1000])
    step = schedules.linear_beta().levels(1000).step(t)
    x_t, eps = np.random.default_rng(1).normal(size=(2, len(t), 5))
    a, s = np.sqrt(chain.alpha_bar[t])[:, None], np.sqrt(1 - chain.alpha_bar[t])[:, None]
    x_0_hat = (x_t - s * eps) / a
    predictions = {"eps": eps, "x_0": x_0_hat, "v": a * eps - s * x_0_hat, "score": -eps / s}
    model = Reverse(lambda x_t, log_snr, condition=None: predictions[name], name, variance)
    p = model.step(x_t, model.predict("x_0", x_t, step.log_snr), step)
    beta, alpha = chain.beta[t][:, None], chain.alpha[t][:, None]
    np.testing.assert_allclose(p.mean, (x_t - beta / s * eps) / np.sqrt(alpha), rtol=1e-9)
    np.testing.assert_allclose(p.mean, (x_t + beta * (-eps / s)) / np.sqrt(alpha), rtol=1e-9)
    expected = {"beta": chain.beta, "beta_tilde": chain.posterior_variance}[variance][t]
    np.testing.assert_allclose(p.variance[:, 0], expected, rtol=1e-9)
    assert p.variance.shape == (len(t), 1)


@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
def test_variance_ratio_is_that_of_the_variances(variance):
    step = schedules.linear_beta().levels(100).step(np.arange(2, 101))
    log_of = np.log(np.asarray(VARIANCES[variance]().value(step), np.float64))
    log_tilde = np.log(np.asarray(VARIANCES["beta_tilde"]().value(step), np.float64))
    # Two variances in float32, at λ ≤ 9.2: the rounding of λ is 5e-7 of each.
    np.testing.assert_allclose(VARIANCES[variance]().log_ratio(step), log_of - log_tilde, atol=3e-6)


def test_condition_and_arguments_reach_the_denoiser():
    seen = {}

    def denoiser(x_t, log_snr, condition=None):
        seen.update(log_snr=log_snr, condition=condition)
        return x_t * condition["scale"]

    x_t, log_snr = np.ones((2, 3), np.float32), np.array([1.0, 2.0], np.float32)
    model = Reverse(denoiser, "eps", condition={"scale": 3.0})
    prediction = model.predict("eps", x_t, log_snr)
    np.testing.assert_array_equal(prediction, 3 * x_t)
    np.testing.assert_array_equal(seen["log_snr"], log_snr)
    error = model.given({"scale": 0.0}).squared_eps_error(x_t, x_t, log_snr)
    np.testing.assert_array_equal(error, np.ones((2, 3)))


def wrong_by(delta, log_snr, name, x_0, eps):
    """A denoiser off by δ in ε, whatever it predicts: x̂_0 = x_0 − δ σ/α, and so on."""
    x_0_hat = x_0 - delta * np.exp(-np.float64(log_snr) / 2)[:, None]
    prediction = images(x_0_hat, eps + delta, log_snr)[name]
    return lambda x_t, log_snr, condition=None: jnp.asarray(prediction)


@pytest.mark.parametrize("name", NAMES)
def test_squared_error_is_that_of_eps_in_every_parameterisation(name, float64):
    x_0, eps, log_snr = problem(-20, 20)
    delta = np.random.default_rng(2).normal(size=x_0.shape)
    model = Reverse(wrong_by(delta, log_snr, name, x_0, eps), name)
    error = model.squared_eps_error(x_0, eps, log_snr)
    # A prediction of x_0 at λ = −20 is 2e4 δ wide of x_0; one of ε at any λ is exact.
    np.testing.assert_allclose(error, delta**2, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["x_0", "v", "eps"])
def test_squared_error_does_not_cancel_at_high_snr_in_float32(name):
    """Recovering ε from x_t at λ = 20 would cost 1e-3; in its own coordinates it costs 1e-5.

    A prediction of x_0 or v has an error of δ e^{−10} = 4.5e-5 δ there: one that large is made
    about x_0 = 0, where float32 resolves it.
    """
    n = 50
    log_snr = np.full(n, 20.0, np.float32)
    x_0, (eps, delta) = np.zeros((n, 1)), np.random.default_rng(3).normal(size=(2, n, 1))
    x_0, eps, delta = np.float32(x_0), np.float32(eps), np.float32(delta)
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-20.0))), np.sqrt(1 / (1 + np.exp(20.0)))
    # At x_0 = 0: x_t = σ ε, x̂_0 = −δ σ/α, ε̂ = ε + δ and v̂ = α ε + δ/α.
    prediction = {
        "x_0": -delta * sigma / alpha,
        "eps": eps + delta,
        "v": alpha * eps + delta / alpha,
    }
    prediction = np.float32(prediction[name])
    model = Reverse(lambda x_t, log_snr, condition=None: prediction, name)
    error = np.sqrt(np.asarray(model.squared_eps_error(x_0, eps, log_snr), np.float64))
    np.testing.assert_allclose(error, np.abs(delta), rtol=1e-5, atol=4 * oracles.EPS32)


DATA = {
    "normal": distributions.normal(np.array([0.5, -1.0]), np.array([[2.0, 0.6], [0.6, 0.5]])),
    "discrete": distributions.points(np.array([[1.0, 0.0], [-0.5, 0.25], [0.0, -1.0]])),
}


def log_marginal(data, x_t, alpha, variance):
    """log p(x_t) of one x_t, from the distribution of x_0."""
    if data.covariances is not None:
        covariance = alpha**2 * data.covariance + variance * jnp.eye(2)
        return jax.scipy.stats.multivariate_normal.logpdf(x_t, alpha * data.mean, covariance)
    squared = jnp.sum((x_t - alpha * data.means) ** 2, axis=-1)
    return jax.nn.logsumexp(-0.5 * squared / variance)


@pytest.mark.parametrize("name", list(DATA))
def test_tweedie_score_of_the_marginal_from_the_optimal_denoiser(name, float64):
    """∇ log p(x_t) = (α E[x_0|x_t] − x_t)/σ², by differentiating log p(x_t)."""
    data, log_snr = DATA[name], np.linspace(-6, 6, 13)
    alpha_bar = 1 / (1 + np.exp(-log_snr))
    x_t = np.random.default_rng(4).normal(size=(13, 2))
    score = jax.vmap(lambda x, a, v: jax.grad(lambda x: log_marginal(data, x, a, v))(x))
    expected = jax.jit(score)(x_t, np.sqrt(alpha_bar), 1 - alpha_bar)
    model = Reverse(data.denoiser, "x_0")
    actual = jax.jit(lambda x_t: model.predict("score", x_t, log_snr))(x_t)
    np.testing.assert_allclose(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
def test_ancestral_step_is_an_ode_step_then_a_langevin_step(variance, float64):
    """13.1–13.4, to first order in β.

    Langevin with step size η has a drift of η s and a noise variance of 2η; the ancestral step's
    noise variance is about β with a drift of about β s. What is left when η = β/2 is a
    probability-flow Euler step ½β(x + s). The remainder is of second order: slope 2 in log-log.
    """
    data = distributions.normal(np.array([0.7]), np.array([[0.3]]))
    beta = np.geomspace(1e-4, 1e-2, 9)
    log_snr = np.full(9, 0.4)
    sigma2 = 1 / (1 + np.exp(log_snr))
    step = Step(log_snr, -np.log1p(-beta / sigma2))  # β = σ_t² (1 − e^{−gap})
    x = np.full((9, 1), 1.3)
    model = Reverse(data.denoiser, "x_0", variance)

    @jax.jit
    def both(x):
        ancestral = model.step(x, model.predict("x_0", x, log_snr), step)
        flowed = x + 0.5 * beta[:, None] * (x + model.predict("score", x, log_snr))
        eta = beta[:, None] / 2
        mean = flowed + eta * model.predict("score", flowed, log_snr)
        return ancestral.mean - mean, ancestral.variance - 2 * eta

    of_mean, of_variance = (np.abs(np.asarray(r)[:, 0]) for r in both(x))
    slope = np.polyfit(np.log(beta), np.log(of_mean), 1)[0]
    assert slope == pytest.approx(2, abs=0.02)
    if variance == "beta":
        assert np.all(of_variance < 1e-15)
    else:
        assert np.polyfit(np.log(beta), np.log(of_variance), 1)[0] == pytest.approx(2, abs=0.02)


def test_ancestral_noise_is_half_of_langevins_for_its_score_coefficient():
    """(x + β s)/√α + √Σ z: Langevin with η = β would have the noise variance 2β, not β."""
    step = schedules.linear_beta().levels(1000).step(np.array([500]))
    x = np.zeros((1, 1), np.float32)
    model = Reverse(lambda *_: x + 1, "score", "beta")
    p = model.step(x, x, step)
    shifted = model.step(x, model.predict("x_0", x, step.log_snr), step)
    coefficient_of_score = float((shifted.mean - p.mean)[0, 0])
    assert float(p.variance[0, 0]) == pytest.approx(coefficient_of_score, rel=0.02)


def test_forward_and_reverse_agree_where_the_prediction_is_right():
    step = schedules.cosine().levels(50).step(np.array([2, 25, 50]))
    x_0, x_t = np.random.default_rng(5).normal(size=(2, 3, 4)).astype(np.float32)
    p = Reverse(lambda *_: x_0, "x_0").step(x_t, x_0, step)
    q = forward.posterior(x_t, x_0, step)
    np.testing.assert_array_equal(p.mean, q.mean)
    np.testing.assert_array_equal(p.variance, q.variance)
