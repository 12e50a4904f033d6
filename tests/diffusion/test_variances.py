"""Σ_θ learned or worked out from errors: against the best there is, and Analytic-DPM's testbed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import bound, schedules, variances
from diffusion.exact import distributions
from diffusion.reverse import Reverse
from diffusion.schedules import Step
from tests.diffusion import oracles, problems

TESTBED = np.array([4.0, 1.0, 0.25, 0.01])


def optimal_error(log_snr, coordinates=TESTBED):
    """E[(ε − ε̂)²] of each coordinate of the testbed's optimal denoiser: SNR v/(1 + SNR v)."""
    product = np.exp(np.asarray(log_snr, np.float64))[:, None] * coordinates
    return product / (1 + product)


def saying(data, extra):
    """The optimal model of `data`, followed by what it says of Σ_θ: a function of λ."""

    def denoiser(x_t, log_snr, condition=None):
        said = jnp.broadcast_to(extra(log_snr), x_t.shape)
        return jnp.concatenate([data.denoiser(x_t, log_snr), said], axis=-1)

    return denoiser


def gap_of(model, num_steps, dtype):
    """E[prior + ΣKL] − I(x; x_1) in nats, exact at sigma points."""
    data = distributions.normal(np.zeros(4), np.diag(TESTBED))
    levels = schedules.linear_log_snr(10.0, -10.0).levels(num_steps + 1)
    points = oracles.sigma_points(8)
    x_0 = (points[:, :4] * np.sqrt(TESTBED)).astype(dtype)
    eps = points[:, 4:].astype(dtype)
    t = np.broadcast_to(np.arange(2, num_steps + 2), (16, num_steps))

    @jax.jit
    def terms(x_0, eps, t):
        whole = problems.without_decoder(model, levels)
        kl = bound.terms_at(whole, x_0, t, problems.constant(eps), chunk_size=100).kl
        return bound.prior_kl(x_0, levels.step(t[:, -1]).log_snr), kl

    prior, kl = (np.asarray(term, np.float64) for term in terms(x_0, eps, t))
    return prior.mean() + kl.mean(0).sum() - data.mutual_information(levels.log_snr[1])


@pytest.mark.parametrize(
    ("num_steps", "gap"), [(10, 1.05729), (100, 0.123221), (1000, 0.0124493), (10_000, 0.00124613)]
)
def test_measured_isotropic_error_gives_the_best_isotropic_row(num_steps, gap):
    """In float32, where 1e-3 of the gap at 10⁴ steps is 1e-7 of the sum of KLs."""
    levels = schedules.linear_log_snr(10.0, -10.0).levels(num_steps + 1).log_snr[1:]
    measured = variances.from_measured_error(levels, optimal_error(levels).mean(axis=1))
    model = Reverse(problems.testbed().denoiser, "x_0", measured)
    assert gap_of(model, num_steps, np.float32) == pytest.approx(gap, rel=1e-3)


@pytest.mark.parametrize("num_steps", [10, 100, 1000, 10_000])
def test_matched_diagonals_leave_the_priors_gap_alone(num_steps, float64):
    """The row 5.43e-9: with each coordinate's own error the chain is exact but for p(x_T)."""
    levels = schedules.linear_log_snr(10.0, -10.0).levels(num_steps + 1).log_snr[1:]
    data = distributions.normal(np.zeros(4), np.diag(TESTBED))
    measured = variances.from_measured_error(levels, optimal_error(levels))
    learned = saying(data, lambda l: jnp.log(jax.nn.sigmoid(l[:, None] + np.log(TESTBED))))
    for model in (
        Reverse(data.denoiser, "x_0", measured),
        Reverse(learned, "x_0", "learned_diagonal"),
    ):
        assert gap_of(model, num_steps, np.float64) == pytest.approx(5.43e-9, rel=1e-3)


def test_no_isotropic_variance_does_better_than_the_measured_one(float64):
    levels = schedules.linear_log_snr(10.0, -10.0).levels(11).log_snr[1:]
    error, data = optimal_error(levels).mean(axis=1), problems.testbed()

    def gap(factor):
        measured = variances.from_measured_error(levels, factor * error)
        return gap_of(Reverse(data.denoiser, "x_0", measured), 10, np.float64)

    assert gap(0.97) > gap(1.0) < gap(1.03)


def test_learned_range_runs_from_beta_tilde_to_beta():
    levels = schedules.linear_beta().levels(50)
    step = levels.step(np.array([2, 3, 25, 50]))
    learned = variances.learned_range()
    for extra, fixed in ((-1.0, variances.beta_tilde()), (1.0, variances.beta())):
        said = jnp.full(4, extra)
        np.testing.assert_allclose(learned.value(step, said), fixed.value(step), rtol=1e-5)
        np.testing.assert_allclose(
            learned.log_ratio(step, said), fixed.log_ratio(step), rtol=1e-6, atol=1e-7
        )
    # Half way is the geometric mean.
    middle = np.sqrt(step.beta * step.posterior_variance)
    np.testing.assert_allclose(learned.value(step, jnp.zeros(4)), middle, rtol=1e-5)


@pytest.mark.parametrize("name", ["learned_range", "learned_diagonal"])
def test_variance_is_beta_tilde_times_its_ratio(name, float64):
    step = schedules.cosine().levels(30).step(np.array([2, 5, 17, 30]))
    said = np.random.default_rng(0).normal(size=4)
    variance = variances.VARIANCES[name]()
    expected = step.posterior_variance * np.exp(variance.log_ratio(step, said))
    np.testing.assert_allclose(variance.value(step, said), expected, rtol=1e-9)


def test_at_the_data_the_error_is_that_of_x_0_hat():
    """Σ at s = 0 is E[(x_0 − x̂_0)²] = e/SNR_1; a learned range has β_1 there."""
    step = Step(jnp.array([3.0]), jnp.array([jnp.inf]))
    said = jnp.array([np.log(0.3)])
    of_error = variances.learned_diagonal().value(step, said)
    assert float(of_error[0]) == pytest.approx(0.3 * np.exp(-3.0), rel=1e-6)
    assert float(variances.learned_range().value(step, said)[0]) == pytest.approx(
        1 / (1 + np.exp(3.0)), rel=1e-6
    )


def test_measured_error_is_log_linear_between_levels_and_constant_outside():
    error = np.array([[1.0, 4.0], [0.1, 1.0]])
    measured = variances.from_measured_error(np.array([2.0, -2.0]), error)
    at = jnp.array([5.0, 2.0, 0.0, -2.0, -7.0])
    step = Step(at[:, None], jnp.full((5, 1), 0.5))
    found = np.expm1(measured.log_ratio(step, None)) / np.expm1(0.5)
    middle = np.sqrt(error[0] * error[1])
    expected = np.stack([error[0], error[0], middle, error[1], error[1]])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_measured_errors_of_images_broadcast():
    error = np.random.default_rng(1).uniform(0.1, 1.0, (3, 4, 4, 2))
    levels = np.array([4.0, 0.0, -4.0])
    eps = np.zeros((3, 4, 4, 2), np.float32)
    model = Reverse(lambda x, l, c=None: x, "eps", variances.from_measured_error(levels, error))
    step = Step(jnp.array(levels), jnp.full(3, 0.2))
    ratio = model.log_variance_ratio(step, eps)
    np.testing.assert_allclose(ratio, np.log1p(np.expm1(0.2) * error), rtol=1e-5)
    one = Reverse(
        model.denoiser, "eps", variances.from_measured_error(levels, error.mean((1, 2, 3)))
    )
    assert one.log_variance_ratio(step, eps).shape == (3, 1, 1, 1)


def test_a_learned_variance_needs_a_denoiser_that_tells_it():
    model = Reverse(lambda x, l, c=None: x, "eps", "learned_range")
    with pytest.raises(ValueError, match="whose last axis is 6"):
        model.outputs(jnp.zeros((2, 3)), jnp.zeros(2))


def test_measured_errors_must_be_positive_and_levels_fall():
    with pytest.raises(ValueError, match="smallest is 0"):
        variances.from_measured_error(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    with pytest.raises(ValueError, match="must decrease"):
        variances.from_measured_error(np.array([0.0, 1.0]), np.array([1.0, 1.0]))


@pytest.mark.parametrize("name", ["learned_range", "learned_diagonal"])
@pytest.mark.parametrize("num_timesteps", [2, 1000, 10**6])
def test_learned_kl_is_finite_with_its_gradient(name, num_timesteps):
    levels = schedules.linear_log_snr(20.0, -20.0).levels(num_timesteps)
    t = np.unique(np.geomspace(2, num_timesteps, 20).astype(int))
    step = levels.step(t)
    x_0, eps = np.random.default_rng(2).normal(size=(2, len(t), 3)).astype(np.float32)

    def kl(extra):
        model = Reverse(
            lambda x, l, c=None: jnp.concatenate([0.5 * x, extra + 0 * x], axis=-1), "eps", name
        )
        return bound.step_terms(model, x_0, eps, step).kl

    for extra in {"learned_range": (-1.5, 0.0, 1.5), "learned_diagonal": (-8.0, 0.0, 8.0)}[name]:
        value, gradient = jax.jvp(kl, (jnp.float32(extra),), (jnp.float32(1.0),))
        assert np.all(np.isfinite(value)), extra
        assert np.all(np.isfinite(gradient)), extra
