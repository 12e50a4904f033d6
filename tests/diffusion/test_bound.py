"""The ELBO against closed forms: Gaussian data, a linear-Gaussian chain, discrete data."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import bound, decoders, forward, reverse, schedules
from diffusion.exact import distributions
from diffusion.gaussian import Gaussian
from diffusion.model import DiffusionModel
from diffusion.reverse import Reverse
from diffusion.schedules import Step
from tests.diffusion import oracles, problems
from tests.diffusion.oracles import needs_long_double

pytestmark = pytest.mark.usefixtures("quick_compiles")

BOTH = ["beta_tilde", "beta"]


@pytest.mark.parametrize("name", ["eps", "x_0"])
@pytest.mark.parametrize(
    ("num_steps", "gap"), [(10, 32.4626), (100, 1.67299), (1000, 0.158007), (10_000, 0.0157120)]
)
def test_gap_on_gaussian_data_is_the_published_table(num_steps, gap, name):
    """E[prior + ΣKL] − I(x; x_1): exact at 2·2d sigma points, since the terms are quadratic.

    The table counts the steps between T + 1 noisy levels. Tolerance: 1e-3 of the gap, which at
    10 000 steps is 1e-6 of the sum of KLs in float32.
    """
    data = problems.testbed()
    levels = schedules.linear_log_snr(10.0, -10.0).levels(num_steps + 1)
    points = oracles.sigma_points(8)
    x_0 = np.float32(points[:, :4] * np.sqrt(np.diag(data.covariance)))
    eps = np.float32(points[:, 4:])
    model = problems.without_decoder(problems.predicting(data, name), levels)
    t = np.broadcast_to(np.arange(2, num_steps + 2), (16, num_steps))

    @jax.jit
    def terms(x_0, eps, t):
        kl = bound.terms_at(model, x_0, t, problems.constant(eps), chunk_size=100).kl
        return bound.prior_kl(x_0, levels.step(t[:, -1]).log_snr), kl

    prior, kl = (np.asarray(term, np.float64) for term in terms(x_0, eps, t))
    measured = prior.mean() + kl.mean(0).sum() - data.mutual_information(levels.log_snr[1])
    assert measured == pytest.approx(gap, rel=1e-3)


def test_optimal_denoiser_minimises_every_term(float64):
    """Moving x̂_0 by δ costs exactly ½ (SNR_s − SNR_t) δ² per dimension: errors are orthogonal."""
    data = distributions.normal(np.array([0.3, -1.0]), np.array([[1.0, 0.4], [0.4, 0.3]]))
    levels, delta = schedules.linear_log_snr(6.0, -6.0).levels(12), 0.05
    points = oracles.sigma_points(4)
    x_0 = data.mean + points[:, :2] @ np.linalg.cholesky(data.covariance).T
    t = np.broadcast_to(np.arange(2, 13), (8, 11))

    @jax.jit
    def mean_kl(delta):
        moved = Reverse(lambda x, l, condition=None: data.denoiser(x, l) + delta, "x_0")
        model = problems.without_decoder(moved, levels)
        return bound.terms_at(model, x_0, t, problems.constant(points[:, 2:])).kl.mean(0)

    snr = np.exp(levels.log_snr[1:])
    cost = 0.5 * (snr[:-1] - snr[1:]) * delta**2 * 2
    for sign in (-1, 1):
        np.testing.assert_allclose(mean_kl(sign * delta) - mean_kl(0.0), cost, rtol=1e-8)


@pytest.mark.parametrize("variance", BOTH)
def test_every_term_is_the_kl_of_two_gaussians(variance, float64):
    """Whatever the coordinates: KL(forward.posterior ‖ reverse_step), for any model."""
    levels = schedules.linear_beta().levels(200)
    t = np.array([2, 3, 10, 50, 150, 200])
    step = levels.step(t)
    x_0, eps = np.random.default_rng(0).normal(size=(2, len(t), 3))
    base = problems.imperfect(variance)

    @jax.jit
    def both(x_0, eps):
        x_t = forward.diffuse(x_0, step.log_snr, eps)
        q = forward.posterior(x_t, x_0, step)
        p = base.step(x_t, base.predict("x_0", x_t, step.log_snr), step)
        of = {}
        for name in reverse.PARAMETERIZATIONS:
            model = Reverse(lambda x, l, c, name=name: base.predict(name, x, l), name, variance)
            of[name] = bound.step_terms(model, x_0, eps, step)
        return q.kl(p), of, base.predict("eps", x_t, step.log_snr)

    expected, of, eps_hat = both(x_0, eps)
    assert len(of) == 4
    for name, terms in of.items():
        # The KL of two densities cancels: its parts are of order one.
        np.testing.assert_allclose(terms.kl, expected, rtol=1e-8, atol=1e-12, err_msg=name)
        np.testing.assert_allclose(
            terms.eps_error, ((eps - eps_hat) ** 2).sum(1), rtol=1e-8, err_msg=name
        )


def test_price_of_the_larger_variance_alone(float64):
    """A perfect mean with Σ_θ = β costs ½ (r + e^{−r} − 1) a dimension, with r = log(β/β̃)."""
    chain = oracles.from_betas(np.linspace(1e-4, 0.02, 1000))
    t = np.arange(2, 1001)
    r = np.log(chain.beta[t] / chain.posterior_variance[t])
    x_0, eps = np.random.default_rng(1).normal(size=(2, 999, 2))
    model = Reverse(lambda x, l, condition=None: eps, "eps", "beta")
    kl = bound.step_terms(model, x_0, eps, schedules.linear_beta().levels(1000).step(t)).kl
    # In float64 the oracle's own sum cancels to r²/2, and r is as small as 2e-6 at t = T.
    np.testing.assert_allclose(kl, r + np.expm1(-r), rtol=1e-4, atol=1e-14)


@needs_long_double
@pytest.mark.parametrize("num_timesteps", [2, 3, 10, 1000, 10**5, 10**6])
def test_price_of_the_larger_variance_in_float32(num_timesteps):
    levels = schedules.linear_log_snr(10.0, -10.0).levels(num_timesteps)
    chain = oracles.from_log_snr(levels.log_snr[1:])
    t = np.unique(np.geomspace(2, num_timesteps, 300).astype(int))
    r = np.log(chain.beta[t] / chain.posterior_variance[t])
    # r + e^{−r} − 1 in long double, by its series where it cancels.
    series = r**2 / 2 * (1 - r / 3 * (1 - r / 4 * (1 - r / 5)))
    expected = 0.5 * np.where(r < 1e-3, series, r + np.expm1(-r))
    zero = np.zeros((len(t), 1), np.float32)
    model = Reverse(lambda x, l, condition=None: zero, "eps", "beta")
    kl = jax.jit(lambda step: bound.step_terms(model, zero, zero, step).kl)(levels.step(t))
    np.testing.assert_allclose(kl, expected.astype(float), rtol=3e-5)


@needs_long_double
@pytest.mark.parametrize("variance", BOTH)
@pytest.mark.parametrize("name", ["linear_beta", "cosine", "linear_log_snr"])
def test_a_million_steps_are_as_exact_as_ten(name, variance):
    """With ε̂ off by δ the KL is Ho et al.'s weight times δ², plus the price of the variance."""
    num_timesteps, delta = 10**6, 0.37
    levels = schedules.SCHEDULES[name]().levels(num_timesteps)
    chain = oracles.from_log_snr(levels.log_snr[1:])
    t = np.array([2, 3, 1000, 10**5, 5 * 10**5, 10**6 - 1, 10**6])
    r = np.log(chain.beta[t] / chain.posterior_variance[t]) if variance == "beta" else np.zeros(7)
    expected = 3 * (chain.eps_weight[t] * delta**2 * np.exp(-r) + 0.5 * (r**2 / 2 - r**3 / 6))
    x_0, eps = np.random.default_rng(2).normal(size=(2, 7, 3)).astype(np.float32)

    def kl(delta):
        moved = Reverse(lambda x, l, condition=None: eps + delta, "eps", variance)
        model = problems.without_decoder(moved, levels)
        return bound.terms_at(model, x_0, t[:, None], problems.constant(eps)).kl[:, 0]

    value, gradient = jax.jit(lambda delta: jax.jvp(kl, (delta,), (1.0,)))(delta)
    # The rounding of ε + δ and of the price, relative to a term of about 1e-6, comes to 1e-5.
    assert np.all(np.abs(value / expected.astype(float) - 1) < 2e-5)
    assert np.all(np.isfinite(gradient))
    assert np.all(gradient > 0)


@pytest.mark.parametrize(
    ("name", "log_snr", "least", "most"),
    [("eps", -20.0, 1e-5, 3e-3), ("score", -20.0, 1e-5, 3e-3), ("x_0", 20.0, 1e-5, 3e-3)]
    + [("v", log_snr, 0, 2e-6) for log_snr in (-20.0, 20.0)],
)
def test_rounding_of_a_tiny_error_is_as_large_as_the_docs_say(name, log_snr, least, most, float64):
    """The optimum ᾱ x_t/√ᾱ of standard normal data, rounded to float32, against float64."""
    x_0, eps = np.float32(np.random.default_rng(0).normal(size=(2, 20, 64)))

    def kl(dtype):
        def denoiser(x_t, level, condition=None):
            exact = forward.diffuse(np.float64(x_0), np.full(20, log_snr), np.float64(eps))
            x_0_hat = schedules.alpha(log_snr) * exact
            exact = reverse.convert(x_0_hat, exact, np.full(20, log_snr), "x_0", name)
            return exact.astype(dtype)

        step = Step(np.full(20, log_snr, dtype), np.full(20, 4e-5, dtype))
        return bound.step_terms(Reverse(denoiser, name), dtype(x_0), dtype(eps), step).kl

    rounded, exact = np.asarray(kl(np.float32)), np.asarray(kl(np.float64))
    assert rounded.dtype == np.float32
    assert least < np.abs(rounded / exact - 1).max() < most


def test_prior_is_the_published_value_and_a_kl(float64):
    levels = schedules.linear_beta().levels(1000)
    for second_moment, bits in ((0.25, 7.279e-6), (0.33, 9.608e-6)):
        x_0 = np.full((1, 4, 4, 1), np.sqrt(second_moment))
        nats = bound.prior_kl(x_0, levels.step(np.array([1000])).log_snr)
        assert float(nats[0]) / 16 / np.log(2) == pytest.approx(bits, rel=1e-4)
    log_snr = np.linspace(-8, 8, 9)
    x_0 = np.random.default_rng(3).normal(size=(9, 5))
    standard = Gaussian(np.zeros((9, 5)), np.ones((9, 1)))
    np.testing.assert_allclose(
        bound.prior_kl(x_0, log_snr), forward.marginal(x_0, log_snr).kl(standard), rtol=1e-9
    )


def test_prior_in_float32():
    """At the end of DDPM's schedule it is 1e-5: a sum of terms near one would lose it."""
    log_snr = np.linspace(-20, 0, 41)
    x_0 = np.random.default_rng(4).normal(size=(41, 6)).astype(np.float32)
    alpha_bar = 1 / (1 + np.exp(-log_snr))
    expected = 0.5 * (
        alpha_bar * (np.float64(x_0) ** 2).sum(1) - 6 * (alpha_bar + np.log1p(-alpha_bar))
    )
    actual = bound.prior_kl(x_0, np.float32(log_snr))
    np.testing.assert_allclose(actual, expected, rtol=2e-6)


@pytest.mark.parametrize("num_timesteps", [1, 2, 5])
def test_three_terms_sum_to_the_total_at_any_number_of_steps(num_timesteps):
    levels = schedules.linear_log_snr(5.0, -6.0).levels(num_timesteps)
    quantization = decoders.Quantization(17)
    x_0 = quantization.to_data(np.random.default_rng(5).integers(0, 17, (3, 2)))
    eps = np.random.default_rng(6).normal(size=(3, 2)).astype(np.float32)
    model = DiffusionModel(problems.imperfect(), decoders.categorical(quantization), levels)

    @jax.jit
    def measure():
        b = bound.bound(model, x_0, problems.constant(eps))
        # The ends by hand: the prior at λ_T, the decoder at x_1.
        first, last = (jnp.full(3, levels.log_snr[t]) for t in (1, num_timesteps))
        x_1 = forward.diffuse(x_0, first, eps)
        of_decoder = decoders.categorical_log_prob(x_0, x_1, first, quantization)
        return b, b.total, bound.prior_kl(x_0, last), -of_decoder.sum(1)

    b, total, of_prior, of_decoder = measure()
    assert b.kl.shape == (3, num_timesteps - 1)
    assert b.eps_error.shape == (3, num_timesteps)
    parts = [np.asarray(part, np.float64) for part in (b.prior, b.kl.sum(1), b.reconstruction)]
    np.testing.assert_allclose(total, sum(parts), rtol=4 * oracles.EPS32)
    np.testing.assert_allclose(b.prior, of_prior, rtol=1e-6)
    np.testing.assert_allclose(b.reconstruction, of_decoder, rtol=1e-5)


@pytest.mark.parametrize("num_timesteps", [1, 4])
def test_gradients_through_the_whole_bound_are_finite(num_timesteps):
    """At t = 1 and s = 0 included, with a chunk to fill up: equal to a quotient in float64."""
    levels = schedules.linear_beta(100).levels(num_timesteps)
    quantization = decoders.Quantization(17)
    x_0 = quantization.to_data(np.random.default_rng(6).integers(0, 17, (4, 2)))
    eps = np.random.default_rng(7).normal(size=(4, 2))

    def total(theta):
        values = []
        for make in decoders.DECODERS.values():
            for variance in BOTH:
                network = Reverse(lambda x, l, c=None: jnp.tanh(theta * x), "eps", variance)
                model = DiffusionModel(network, make(quantization), levels)
                noise = problems.constant(eps.astype(x_0.dtype))
                values.append(bound.bound(model, x_0, noise, chunk_size=2).total)
        return jnp.concatenate(values)

    gradient = jax.jit(jax.jacrev(total))(0.4)
    assert np.all(np.isfinite(gradient))
    with jax.enable_x64(True):
        # Truncation h² and rounding 1e-16/h balance near h = 1e-5.
        exact_total = jax.jit(total)
        quotient = (exact_total(0.4 + 1e-5) - exact_total(0.4 - 1e-5)) / 2e-5
    np.testing.assert_allclose(gradient, quotient, rtol=2e-4, atol=1e-4)


def test_chunks_and_batches_change_nothing():
    levels = schedules.cosine(50).levels(14)
    quantization = decoders.Quantization(17)
    rng = np.random.default_rng(8)
    level = rng.integers(0, 17, (7, 2, 2, 1))
    table = rng.normal(size=(7, 15, 2, 2, 1)).astype(np.float32)
    decoder = decoders.discretized_gaussian(quantization)
    model = DiffusionModel(Reverse(lambda x, l, c=None: jnp.tanh(x), "v"), decoder, levels)

    @functools.partial(jax.jit, static_argnames="chunk_size")
    def evaluate(index, chunk_size):
        noise = problems.tabulated(table, index)
        x_0 = quantization.to_data(jnp.asarray(level)[index])
        return bound.bound(model, x_0, noise, chunk_size)

    whole = evaluate(np.arange(7), 1)
    for rows, chunk_size in (([5, 0, 3], 4), ([6], 100)):
        for other, part in zip(evaluate(np.array(rows), chunk_size), whole, strict=True):
            np.testing.assert_allclose(other, part[np.array(rows)], rtol=1e-6)
    for other, part in zip(evaluate(np.arange(7), 1), whole, strict=True):
        np.testing.assert_array_equal(other, part)


def test_bound_closes_in_on_the_entropy_of_discrete_data_from_above():
    """K = 8 vectors of d = 4 integers, the optimal denoiser, λ from +10 to −10, both decoders."""
    quantization, rng = decoders.Quantization(17), np.random.default_rng(9)
    data = distributions.points(np.float32(quantization.values[rng.integers(0, 17, (8, 4))]))
    index = np.arange(400)
    x_0 = data.means[index % 8]
    model = problems.predicting(data, "v")
    categorical = decoders.categorical(quantization)
    gaussian = decoders.discretized_gaussian(quantization)

    def measure(num_timesteps):
        levels = schedules.linear_log_snr(10.0, -10.0).levels(num_timesteps)

        @jax.jit
        def totals(table):
            noise = problems.tabulated(table, index)
            whole = DiffusionModel(model, categorical, levels)
            one = bound.bound(whole, x_0, noise, chunk_size=10)
            eps_1 = noise(np.ones(400, int))
            other = bound.reconstruction(whole._replace(decoder=gaussian), x_0, eps_1)
            return one.total, one._replace(reconstruction=other).total

        nats = totals(rng.normal(size=(400, num_timesteps + 1, 4)).astype(np.float32))
        return np.asarray(nats, np.float64)

    nats = np.stack([measure(num_timesteps) for num_timesteps in (10, 100, 1000)], axis=1)
    for of_decoder in nats:
        above, errors = of_decoder.mean(1) - np.log(8), of_decoder.std(1, ddof=1) / 20
        assert np.all(above > -3 * errors)
        # The gap falls about as 1/T, as on Gaussian data: 4.4, 0.2 and 0.017 in docs/lecture.md.
        assert above[0] > 2
        assert 0.05 < above[1] < 0.5
        assert above[2] < 0.03 + 3 * errors[2]
        assert errors[2] < 0.02
