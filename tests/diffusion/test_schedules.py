"""Schedules against the published tables, and steps in float32 against α-β formulas."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import (
    bound,
    decoders,
    forward,
    learned_schedule,
    objectives,
    reverse,
    schedules,
    timesteps,
)
from diffusion.flow import ode
from diffusion.samplers import guidance
from diffusion.schedules import Levels, Step
from tests.diffusion import oracles, problems
from tests.diffusion.oracles import needs_long_double

X_0, EPS = np.float32(np.random.default_rng(5).normal(size=(2, 2, 3)))


def linear_betas(n: int) -> np.ndarray:
    """Ho et al. (2020), section 4."""
    return 1e-4 + (0.02 - 1e-4) * np.arange(n) / (n - 1)


def cosine_betas(n: int) -> np.ndarray:
    """Nichol and Dhariwal (2021), equation 17 and the clip below it."""
    f = [np.cos((t / n + 0.008) / 1.008 * np.pi / 2) ** 2 for t in range(n + 1)]
    return np.array([min(1 - after / before, 0.999) for before, after in itertools.pairwise(f)])


def sigmoid_betas(n: int, start: float, end: float, temperature: float) -> np.ndarray:
    """Jabri et al. (2022), algorithm 4: γ = ᾱ, clipped as Nichol and Dhariwal clip."""
    rising = 1 / (1 + np.exp(-(np.arange(n + 1) / n * (end - start) + start) / temperature))
    gamma = (rising[-1] - rising) / (rising[-1] - rising[0])
    return np.minimum(1 - gamma[1:] / gamma[:-1], 0.999)


def test_constants_of_ddpm_schedule():
    levels = schedules.linear_beta().levels(1000)
    weight = 0.5 * np.expm1(levels.gap)
    # Tolerance: the digits printed in docs/lecture.md.
    np.testing.assert_allclose(levels.alpha_bar[-1], 4.035830e-5, rtol=2e-7)
    np.testing.assert_allclose(levels.log_snr[[1, -1]], [9.21024, -10.11767], atol=5e-6)
    np.testing.assert_allclose(levels.posterior_variance[2], 5.45319e-5, rtol=1e-6)
    np.testing.assert_allclose(weight[[2, 1000]], [0.599672, 0.0102045], rtol=5e-6)


@pytest.mark.parametrize(
    ("schedule", "betas"),
    [
        (schedules.linear_beta(), linear_betas(1000)),
        (schedules.linear_beta(50, 1e-3, 0.5), 1e-3 + 0.499 * np.arange(50) / 49),
        (schedules.cosine(), cosine_betas(1000)),
        (schedules.cosine(4000), cosine_betas(4000)),
        (schedules.sigmoid(), sigmoid_betas(1000, -3, 3, 1)),
        (schedules.sigmoid(100, 0.0, 3.0, 0.7), sigmoid_betas(100, 0, 3, 0.7)),
        (schedules.from_betas(np.array([0.3, 0.1, 0.9])), np.array([0.3, 0.1, 0.9])),
        (schedules.from_betas(np.array([0.25])), np.array([0.25])),
    ],
    ids=["ddpm", "linear50", "iddpm", "iddpm4000", "jabri", "jabri100", "explicit", "single"],
)
def test_tables_are_the_published_ones(schedule, betas):
    levels, chain = schedule.levels(len(betas)), oracles.from_betas(betas)
    # The oracle's own 1 − ᾱ_{t−1}, at least 1e-5 here, carries a rounding error of 1e-16.
    np.testing.assert_allclose(levels.beta, chain.beta, rtol=1e-10)
    np.testing.assert_allclose(levels.alpha_bar, chain.alpha_bar, rtol=1e-10)
    np.testing.assert_allclose(levels.sigma2, 1 - chain.alpha_bar, rtol=1e-10)
    np.testing.assert_allclose(levels.posterior_variance, chain.posterior_variance, rtol=1e-9)
    np.testing.assert_allclose(0.5 * np.expm1(levels.gap[2:]), chain.eps_weight[2:], rtol=1e-9)
    assert levels.num_timesteps == len(betas)


@pytest.mark.parametrize("kind", [list, tuple])
def test_an_explicit_table_may_be_that_of_a_config(kind):
    levels = schedules.from_betas(kind([0.1, 0.2, 0.3])).levels(3)
    np.testing.assert_allclose(levels.beta, [0, 0.1, 0.2, 0.3], rtol=1e-14)


def test_cosine_alpha_bar_is_the_squared_cosine():
    u = np.arange(1, 1000) / 1000  # without t = T, whose β is clipped
    angle = (u + 0.008) / 1.008 * np.pi / 2
    expected = np.cos(angle) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(schedules.cosine().levels(1000).alpha_bar[1:-1], expected, rtol=1e-9)


def test_linear_log_snr_is_equally_spaced_with_both_ends():
    levels = schedules.linear_log_snr(13.3, -5.0).levels(101)
    np.testing.assert_allclose(levels.log_snr[1:], 13.3 - 18.3 * np.arange(101) / 100, atol=1e-13)
    np.testing.assert_allclose(levels.gap[2:], 0.183, rtol=1e-12)


@pytest.mark.parametrize("name", list(schedules.SCHEDULES))
@pytest.mark.parametrize("num_timesteps", [2, 3, 1000, 1777])
def test_every_schedule_falls_from_the_data_at_any_number_of_steps(name, num_timesteps):
    arguments = {"betas": [linear_betas(1000)]}.get(name, [])
    levels = schedules.SCHEDULES[name](*arguments).levels(num_timesteps)
    assert levels.log_snr[0] == np.inf
    assert np.all(np.diff(levels.log_snr) < 0)
    assert levels.alpha_bar[0] == 1
    assert levels.sigma2[0] == 0
    assert np.all((levels.beta[1:] > 0) & (levels.beta[1:] < 1))
    assert np.all(levels.posterior_variance[2:] < levels.beta[2:])
    assert levels.posterior_variance[1] == 0
    np.testing.assert_allclose(levels.alpha_bar + levels.sigma2, 1, rtol=1e-15)
    # Each factor 1 − β has the absolute rounding error of one.
    tolerance = 1e-16 * np.cumsum(1 / (1 - levels.beta))
    error = np.abs(np.cumprod(1 - levels.beta) / levels.alpha_bar - 1)
    assert np.all(error <= 10 * tolerance)


@pytest.mark.parametrize("schedule", [schedules.linear_beta(), schedules.cosine()])
@pytest.mark.parametrize("num_timesteps", [2, 3, 10, 37, 250, 999, 1000])
def test_fewer_steps_take_levels_of_the_table_and_keep_its_ends(schedule, num_timesteps):
    native, levels = schedule.levels(1000), schedule.levels(num_timesteps)
    assert levels.num_timesteps == num_timesteps
    assert np.all(np.isin(levels.log_snr, native.log_snr))
    assert levels.log_snr[1] == native.log_snr[1]
    assert levels.log_snr[-1] == native.log_snr[-1]
    # The nearest to even spacing in the table's index.
    index = np.searchsorted(-native.log_snr, -levels.log_snr[1:])
    assert np.all(np.abs(index - np.linspace(1, 1000, num_timesteps)) <= 0.5)
    # Respaced in ᾱ: the β of the coarse chain is what composes the fine one.
    np.testing.assert_allclose(
        levels.beta[1:], oracles.from_alpha_bars(levels.alpha_bar[1:]).beta[1:], rtol=1e-10
    )


def test_more_steps_than_the_table_keep_its_ends_and_pass_through_it():
    schedule = schedules.linear_beta(100)
    native, levels = schedule.levels(100), schedule.levels(199)
    np.testing.assert_allclose(levels.log_snr[1::2], native.log_snr[1:], rtol=1e-13)
    assert np.all(np.diff(levels.log_snr) < 0)
    huge = schedule.levels(10**6)
    assert huge.log_snr[1] == native.log_snr[1]
    assert huge.log_snr[-1] == native.log_snr[-1]
    assert np.all(huge.gap[2:] > 0)


def test_one_step_is_the_noisiest_level():
    levels = schedules.linear_beta().levels(1)
    assert levels.log_snr.tolist() == [np.inf, schedules.linear_beta().levels(1000).log_snr[-1]]
    assert levels.beta[1] == levels.sigma2[1]


def test_continuous_time_passes_through_the_levels():
    schedule = schedules.linear_beta()
    time = np.linspace(0, 1, 1000)
    # float32 time has an error of 6e-8, and the steepest slope of λ is about 1e3 at time 0.
    np.testing.assert_allclose(
        jax.jit(schedule.log_snr)(time), schedule.levels(1000).log_snr[1:], atol=2e-4
    )
    ends = schedules.linear_log_snr(13.0, -5.0).log_snr(np.array([0.0, 0.25, 1.0], np.float32))
    np.testing.assert_allclose(ends, [13.0, 8.5, -5.0], atol=1e-5)


@pytest.mark.parametrize(
    ("betas", "message"),
    [
        ([0.1, 1.0], r"beta_2 = 1;"),
        ([0.1, 1.5, 0.2], r"beta_2 = 1.5;"),
        ([0.0, 0.1], r"beta_1 = 0;"),
        ([0.1, 0.2, -0.3], r"beta_3 = -0.3;"),
        ([0.1, np.nan], r"beta_2 = nan;"),
        ([np.inf], r"beta_1 = inf;"),
        ([], "at least one"),
    ],
)
def test_a_bad_beta_table_is_an_error_that_names_the_entry(betas, message):
    with pytest.raises(ValueError, match=message):
        schedules.from_betas(np.array(betas))


def test_other_bad_schedules_are_errors():
    with pytest.raises(ValueError, match="beta_10 = 1;"):
        schedules.linear_beta(10, 1e-4, 1.0)
    with pytest.raises(ValueError, match="beta_1 = 0;"):
        schedules.linear_beta(10, 0.0, 0.1)
    with pytest.raises(ValueError, match="at least one"):
        schedules.linear_beta(0)
    with pytest.raises(ValueError, match="num_timesteps = 0"):
        schedules.linear_beta().levels(0)
    with pytest.raises(ValueError, match="max = -3"):
        schedules.linear_log_snr(-3.0, 3.0)
    with pytest.raises(ValueError, match="max = 3"):
        schedules.linear_log_snr(3.0, 3.0)
    with pytest.raises(ValueError, match="fall strictly"):
        schedules.linear_log_snr(1.0 + 1e-15, 1.0).levels(100)  # finer than float64 resolves
    with pytest.raises(ValueError, match="at t = 3"):
        Levels.from_log_snr(np.array([3.0, 2.0, 2.5]))
    for bad in ([np.nan, 0.0], [np.inf, 0.0], []):
        with pytest.raises(ValueError, match="finite"):
            Levels.from_log_snr(np.array(bad))


@jax.jit
def derived(step: Step) -> dict:
    return {
        "c": step.c,
        "beta": step.beta,
        "posterior_variance": step.posterior_variance,
        "log_beta_ratio": step.log_beta_ratio,
        "eps_weight": 0.5 * jnp.expm1(step.gap),
        "alpha": schedules.alpha(step.log_snr),
        "sigma": schedules.sigma(step.log_snr),
        "alpha_s": schedules.alpha(step.log_snr_s),
        "sigma_s": schedules.sigma(step.log_snr_s),
    }


@needs_long_double
@pytest.mark.parametrize(
    ("schedule", "num_timesteps"),
    [
        (schedule, num_timesteps)
        for schedule in (
            schedules.linear_log_snr(10.0, -10.0),
            schedules.linear_log_snr(20.0, -20.0),
            schedules.linear_beta(),
            schedules.cosine(),
        )
        for num_timesteps in (2, 3, 10, 1000, 10**5, 10**6)
    ],
    ids=lambda value: value if isinstance(value, int) else f"{value.knots[0]:.0f}",
)
def test_every_derived_quantity_of_a_float32_step_to_1e_5(schedule, num_timesteps):
    levels = schedule.levels(num_timesteps)
    chain = oracles.from_log_snr(levels.log_snr[1:])
    t = np.arange(2, num_timesteps + 1)
    beta, alpha_bar, previous = chain.beta[2:], chain.alpha_bar[2:], chain.previous[2:]
    expected = {
        "c": beta / (1 - alpha_bar),
        "beta": beta,
        "posterior_variance": chain.posterior_variance[2:],
        "log_beta_ratio": np.log((1 - alpha_bar) / (1 - previous)),
        "eps_weight": chain.eps_weight[2:],
        "alpha": np.sqrt(alpha_bar),
        "sigma": np.sqrt(1 - alpha_bar),
        "alpha_s": np.sqrt(previous),
        "sigma_s": np.sqrt(1 - previous),
    }
    actual = derived(levels.step(t))
    assert actual["beta"].dtype == jnp.float32
    for name, values in actual.items():
        error = np.abs(np.asarray(values, np.longdouble) / expected[name] - 1)
        assert error.max() < 1e-5, f"{name}: {error.max():.1e} at t = {t[error.argmax()]}"


def test_first_step_reaches_the_data():
    step = schedules.linear_beta().levels(1000).step(np.array([1]))
    actual = derived(step)
    np.testing.assert_allclose(actual["beta"], 1e-4, rtol=1e-5)
    assert actual["c"] == actual["alpha_s"] == 1
    assert actual["posterior_variance"] == actual["sigma_s"] == 0
    assert actual["log_beta_ratio"] == np.inf


def test_gradients_at_the_first_step_are_finite():
    """∂β = ∂σ_1² = −ᾱσ² there, and nothing else of the step depends on λ_1 or on the gap."""
    log_snr = np.array([-20.0, -1.0, 0.0, 9.2, 20.0], np.float32)

    def values(log_snr, gap):
        step = Step(log_snr, gap)
        s = step.log_snr_s
        return jnp.stack(
            [step.c, step.beta, step.posterior_variance, schedules.alpha(s), schedules.sigma(s)]
        )

    @jax.jit
    @jax.vmap
    def gradients(log_snr):
        of = (log_snr, jnp.inf)
        return jax.jacfwd(values, (0, 1))(*of), jax.jacrev(values, (0, 1))(*of)

    for of_log_snr, of_gap in gradients(log_snr):
        expected = np.zeros((5, 5))
        expected[:, 1] = -1 / (2 + 2 * np.cosh(log_snr))
        # XLA differentiates a sigmoid as p(1 − p), which rounds near p = 1.
        np.testing.assert_allclose(of_log_snr, expected, rtol=1e-5, atol=oracles.EPS32)
        np.testing.assert_array_equal(of_gap, np.zeros((5, 5)))


def test_a_step_starts_from_1_to_T():
    """NumPy's rules would take −1 for T and t = 0 for a step of gap +∞; a tracer is not checked."""
    levels = schedules.linear_log_snr(6.0, -6.0).levels(5)
    for t in (0, -1, 6, [1, 2, 6], np.array([3, 0])):
        with pytest.raises(ValueError, match=r"t = (0|-1|6); it must lie in 1 … 5"):
            levels.step(t)
    for t in (True, 1.5, [1.0, 2.0]):
        with pytest.raises(TypeError, match=r"t is of type (bool|float64); .* whole numbers"):
            levels.step(t)
    model = problems.without_decoder(problems.imperfect(), levels)
    with pytest.raises(ValueError, match=r"t = 1; it must lie in 2 … 5"):
        bound.terms_at(model, X_0, np.array([[2, 1], [3, 3]]), problems.constant(EPS))
    expected = levels.step(np.array([1, 5]))
    assert [*expected.log_snr] == [6, -6]
    for same in (levels.step([1, 5]), jax.jit(levels.step)(np.array([1, 5]))):
        jax.tree.map(np.testing.assert_array_equal, same, expected)
    assert levels.step(5).log_snr == -6


def test_levels_may_be_the_argument_of_a_compiled_function():
    levels = schedules.linear_beta().levels(20)
    names = ("alpha_bar", "sigma2", "beta", "posterior_variance")

    @jax.jit
    def tables(levels):
        return [getattr(levels, name) for name in names]

    for name, table in zip(names, tables(levels), strict=True):
        assert isinstance(getattr(levels, name), np.ndarray)
        # The exponential of a log-SNR that is rounded near ±10.
        np.testing.assert_allclose(table, getattr(levels, name), rtol=3e-6)


MODEL = problems.without_decoder(problems.imperfect())
OF_LOG_SNR = {
    "alpha": schedules.alpha,
    "sigma": schedules.sigma,
    "marginal": lambda l: forward.marginal(X_0, l).log_prob(EPS),
    "diffuse": lambda l: forward.diffuse(X_0, l, EPS),
    "convert": lambda l: reverse.convert(EPS, X_0, l, "v", "score"),
    "predict": lambda l: MODEL.reverse.predict("eps", X_0, l),
    "eps_error": lambda l: MODEL.reverse.squared_eps_error(X_0, EPS, l),
    "prior_kl": lambda l: bound.prior_kl(X_0, l),
    "continuous_rate": lambda l: bound.continuous_rate(MODEL.reverse, X_0, EPS, l, -3).kl,
    "categorical": lambda l: decoders.categorical_log_prob(X_0, EPS, l, decoders.Quantization(17)),
    "denoiser": lambda l: problems.NORMAL.denoiser(X_0, l),
    "score": lambda l: problems.NORMAL.score(X_0, l),
    "noised": lambda l: problems.NORMAL.noised_log_prob(X_0, l),
    "velocity": lambda l: ode.velocity(MODEL.reverse, X_0, l),
    "inside": lambda l: guidance.evaluations_at(l, 3.0, (1.0, 4.0)),
    "of_time": lambda u: schedules.linear_beta().log_snr(u),
    "slope": lambda u: schedules.linear_beta().slope(u),
    "timestep": lambda u: timesteps.to_timestep(u, 3),
    "learned": lambda u: learned_schedule.value_and_slope(lambda u: -(u**2), u)[1],
    "loss": lambda l: objectives.sigmoid().continuous(MODEL, X_0, EPS, l, -3).term,
}


@pytest.mark.parametrize("name", list(OF_LOG_SNR))
def test_a_log_snr_is_whatever_numpy_takes(name):
    """A list, whole numbers, float64, and one number for all examples."""
    function = OF_LOG_SNR[name]
    expected = function(np.array([2.0, 2.0], np.float32))
    for same in ([2, 2], [2.0, 2.0], np.array([2, 2]), np.array([2.0, 2.0]), jnp.array([2, 2])):
        np.testing.assert_array_equal(function(same), expected)
    for one in (2, 2.0, np.float32(2), np.array(2), jnp.array(2.0)):
        np.testing.assert_allclose(*np.broadcast_arrays(function(one), expected), rtol=1e-6)
