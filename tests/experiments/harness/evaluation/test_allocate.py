"""The bound at a price: held against its truth, and against the error that it states.

The denoiser is the best one for some normal data, so that every term is a quadratic in ε. Its mean
over ε is then its mean over the 2d points ±√d e_i, exactly. Whatever has to be told apart from
luck is drawn over and over, with other numbers for the noise and one compiled program.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.bound import bound, continuous_rate, prior_kl
from diffusion.exact.distributions import normal
from diffusion.model import DiffusionModel
from diffusion.reverse import Reverse
from diffusion.schedules import linear_log_snr
from diffusion.statistics.control import GaussianControl, PixelControl
from experiments.harness.data import splits
from experiments.harness.errors import RunError
from experiments.harness.evaluation import allocate
from experiments.harness.evaluation.allocate import (
    Estimator,
    allocated_bound,
    fit_controls,
    pilot,
)
from experiments.harness.evaluation.subject import Subject, subject_of
from experiments.harness.setup.definition import define_model
from tests.diffusion.problems import constant
from tests.experiments import tiny

pytest_plugins = ["tests.experiments.tiny"]
pytestmark = pytest.mark.usefixtures("quick_compiles")

D = 3
N = 30
REPEATS = 60
NEVER = 1e-9  # bits/dim: a target that no budget reaches
MAX, MIN = 4.0, -6.0
BITS = D * np.log(2.0)
MODEL = normal(
    np.float32([0.3, -0.2, 0.1]),
    np.float32([[1.0, 0.5, 0.0], [0.5, 0.8, 0.1], [0.0, 0.1, 0.05]]),
)


SPACING = 0.25
VALUES = SPACING * np.arange(-16, 17)


def grey_levels(n=N):
    sample = np.asarray(MODEL.sample(jax.random.key(7), N))[:n]
    return np.abs(sample[..., None] - VALUES).argmin(axis=-1)


def examples(n=N):
    return np.float32(VALUES[grey_levels(n)])


def sigma_points():
    """2d values of ε over which the mean of a quadratic is its mean over N(0, I)."""
    return np.sqrt(D) * np.concatenate([np.eye(D), -np.eye(D)])


def exact_control():
    """The control of the model's own mean and covariance."""
    root = np.linalg.cholesky(np.float64(MODEL.covariance))
    return GaussianControl.fit(MODEL.mean + sigma_points() @ root.T, 0.0)


def poor_controls():
    """Controls of other data, broader and without correlations."""
    gaussian = GaussianControl.fit(sigma_points() * [1.5, 0.7, 0.4], 0.0)
    return gaussian, PixelControl.fit(grey_levels(), VALUES, gaussian)


def make(num_timesteps=50, n=N, continuous=False, denoiser=MODEL.denoiser, **settings):
    """Estimates with the best denoiser of normal data, and a control of other data."""
    schedule = linear_log_snr(MAX, MIN)
    levels = schedule.levels(num_timesteps)
    model = DiffusionModel(Reverse(denoiser, "x_0"), MODEL.decoder(), levels)
    subject = Subject(
        model=lambda params, labels: model,
        params=(),
        schedule=schedule,
        levels=levels,
        dataset=splits.Dataset(examples(n), None, 0, "normal", "test"),
        to_data=jnp.asarray,
        spacing=0.0,
        **{"seed": 0, "batch_size": N, "chunk_size": 4} | settings,
    )
    return Estimator(subject, poor_controls(), continuous)


class Repeated(Estimator):
    """The same estimator with other numbers for its noise and times, and no new program."""

    def __init__(self, of, number):
        self.__dict__ |= of.__dict__
        self.offset, self.subject = 1000 * number, of.subject._replace(seed=number)

    def rates(self, time, draw, bar=None):
        return super().rates(time, self.offset + draw, bar)

    def ends(self, draw, m, bar=None):
        return super().ends(self.offset + draw, m, bar)


def truth(estimator):
    """Each example's bound in nats, in float64."""
    with jax.enable_x64(True):
        x_0 = np.float64(estimator.subject.dataset.images)
        model = estimator.subject.model((), None)
        points = [np.tile(e, (len(x_0), 1)) for e in sigma_points()]
        terms = jax.jit(lambda e: bound(model, x_0, constant(e)))
        full = [terms(e) for e in points]
        total = np.mean([of.total for of in full], axis=0)
        if not estimator.continuous:
            return total
        slope = -np.ones(len(x_0))
        rate = jax.jit(lambda e, at: continuous_rate(model.reverse, x_0, e, at, slope).kl)
        # Gauss and Legendre's 40 nodes: the integrand is smooth over 10 nats of log-SNR.
        nodes, weights = np.polynomial.legendre.leggauss(40)
        integral = np.zeros(len(x_0))
        for node, weight in zip(nodes, weights, strict=True):
            at = np.full(len(x_0), (MAX + MIN) / 2 + (MAX - MIN) / 2 * node)
            integral += (MAX - MIN) / 2 * weight * np.mean([rate(e, at) for e in points], axis=0)
        return total - np.mean([of.kl.sum(axis=1) for of in full], axis=0) + integral


def mc_se(found):
    """In nats, of the mean over examples."""
    return np.sqrt(found.noise_variance.sum()) / len(found.total)


@pytest.fixture(scope="module", params=[False, True], ids=["discrete", "continuous"])
def estimator(request, quick_compiles):
    return make(continuous=request.param)


@pytest.fixture(scope="module")
def expected(estimator):
    return truth(estimator)


@pytest.mark.parametrize("num_controls", [2, 0])
def test_the_estimate_misses_the_truth_by_as_much_as_it_says(estimator, expected, num_controls):
    """z = (estimate − truth)/error has mean 0 and variance 1 over repeats.

    Their own errors: 1/√R of the mean, and 1/√(2R) of the standard deviation. The error is known
    from N squared differences, so that z is Student's with at most N degrees of freedom, and its
    standard deviation a few per cent above 1.
    """
    found = [
        allocated_bound(Repeated(estimator, r), 0.08, 0, 4, num_controls) for r in range(REPEATS)
    ]
    errors = np.array([of.total.mean() - expected.mean() for of in found])
    z = errors / [mc_se(of) for of in found]
    assert abs(z.mean()) < 3 / np.sqrt(REPEATS)
    assert abs(z.std(ddof=1) - np.sqrt(N / (N - 2))) < 3 / np.sqrt(2 * REPEATS)
    # The stated variance is a mean over repeats of N squared differences: much the surer of two.
    stated = np.mean([mc_se(of) ** 2 for of in found])
    assert (errors**2).mean() / stated == pytest.approx(1, abs=3.5 * np.sqrt(2 / REPEATS))
    # Each example has its own truth, and none another's.
    totals = np.stack([of.total for of in found])
    z = (totals.mean(axis=0) - expected) / (totals.std(axis=0, ddof=1) / np.sqrt(REPEATS))
    assert np.abs(z).max() < 4.5
    assert np.std(expected) > 0.5


def test_the_control_and_the_allocation_pay(estimator, expected):
    """A control of other data lowers the error at the same price."""
    budget = 22 * N
    repeats = [Repeated(estimator, r) for r in range(10)]
    plans = [[pilot(of, 4, number) for number in (2, 0)] for of in repeats]
    assert all(with_.variance < without.variance for with_, without in plans)
    stated = [
        np.mean([mc_se(allocated_bound(of, NEVER, budget, 4, number)) ** 2 for of in repeats])
        for number in (2, 0)
    ]
    assert stated[0] < 0.8 * stated[1]


def test_the_best_denoiser_and_its_own_control_leave_no_noise_but_times(estimator):
    """Then the control is the error's own deviation from its mean, and its coefficient one."""
    estimator = Repeated(estimator, 0)
    estimator.controls = (exact_control(),)
    plan = pilot(estimator, 4)
    np.testing.assert_allclose(plan.coefficients, 1, rtol=1e-4)
    # float32: values lose about 1e-6 of themselves.
    assert plan.variance < 1e-8 * pilot(estimator, 4, num_controls=0).variance
    time = np.random.default_rng(0).random((N, 5))
    first, second = (estimator.rates(time, draw) for draw in (10, 11))
    assert np.abs(first.value - second.value).max() > 1
    left = [of.value - of.controls[..., 0] for of in (first, second)]
    np.testing.assert_allclose(*left, rtol=1e-4, atol=1e-4 * np.abs(left).max())


def test_the_control_has_mean_zero_and_the_integrand_the_bounds_mean(estimator, expected):
    """At times that are one in each of many strata, the mean over draws is the diffusion term."""
    time = (np.arange(49) + 0.5) / 49 * np.ones((N, 1))
    found = [estimator.rates(time, draw) for draw in range(20, 60)]
    control = np.stack([of.controls[..., 0] for of in found])
    z = control.mean(axis=0) / (control.std(axis=0, ddof=1) / np.sqrt(len(found)))
    # Of 1470 correlated z's, Student's and skewed, the mean is small and the square about one.
    assert abs(z.mean()) < 0.2
    assert np.sqrt((z**2).mean()) < 1.3
    value = np.stack([of.value.mean() for of in found])
    ends = [sum(x.mean() for x in estimator.ends(draw, 1)) for draw in range(20, 60)]
    total = value + ends
    # The midpoint rule in continuous time is off by a part of 1e-3 at most.
    error = total.std(ddof=1) / np.sqrt(len(total)) + 1e-3 * np.abs(value).mean()
    assert abs(total.mean() - expected.mean()) < 3.5 * error


def test_the_curve_of_the_integrand_sums_to_the_diffusion_term(estimator):
    """Equal bins of time share it; that they are drawn unequally is accounted for."""
    found = allocated_bound(Repeated(estimator, 3), NEVER, 80 * N, 8)
    assert 1 < len(found.rate) == len(found.eps_error) <= allocate.MAX_BINS
    assert found.rate.mean() == pytest.approx(found.diffusion.mean(), rel=0.05)
    # An error of d dimensions: ε̂ is near ε where there is nothing but noise.
    assert found.eps_error[0] > found.eps_error[-1] > 0


class Redrawn(Repeated):
    """The same estimator with the same pilot, and other noise in its replicates."""

    def __init__(self, of, number):
        super().__init__(of, 0)
        self.redrawn = 1000 * number

    def rates(self, time, draw, bar=None):
        return super().rates(time, draw + self.redrawn * (draw > 1), bar)


def test_the_pilot_alone_determines_the_evaluations(estimator):
    """A rule that stops at a small estimated error prefers errors that are too low."""
    found = [allocated_bound(Redrawn(estimator, r), 0.05, 0, 4) for r in range(4)]
    assert len({of.evaluations for of in found}) == 1
    assert len({mc_se(of) for of in found}) == 4


def test_the_target_is_reached_at_about_the_price_foretold():
    """Half the error for four times the replicates' evaluations, give or take the pilot.

    With 30 examples and a pilot of 120 pairs, the error scatters by 0.2 around the target.
    """
    estimator, used = make(), []
    mean = truth(estimator).mean()
    for target in (0.06, 0.03):
        found = allocated_bound(estimator, target, 0, 4)
        assert 0.5 < mc_se(found) / BITS / target < 1.5
        used.append(found.evaluations)
        assert abs(found.total.mean() - mean) < 4 * target * BITS
    assert used[0] < used[1] < 8 * used[0]
    # No more than the pilot and two replicates where the target is met at once.
    least = allocated_bound(estimator, 1e3, 0, 4)
    assert least.evaluations == N * (2 * 4 + 2 + 2 * (1 + 1))
    assert least.diffusion.shape == (2, N)


@pytest.mark.parametrize("budget", [1, 14 * N, 14 * N + 1, 15 * N, 19 * N - 1, 33 * N])
def test_the_budget_holds_above_the_least_that_is_needed(estimator, budget):
    """That is the pilot, and two replicates of a time and a reconstruction: here 14 an example.

    What is left of it is less than one replicate more.
    """
    found = allocated_bound(Repeated(estimator, 1), NEVER, budget, 4)
    least = 14 * N
    assert least <= found.evaluations <= max(budget, least)
    replicate = (found.evaluations - 10 * N) / len(found.diffusion)
    assert budget - found.evaluations < replicate


def test_every_evaluation_is_counted():
    """The network is asked about as many examples as the result says."""
    calls = []

    def counted(x_t, log_snr, condition=None):
        jax.debug.callback(lambda ones: calls.append(ones.size), jnp.ones(len(x_t)))
        return MODEL.denoiser(x_t, log_snr, condition)

    estimator = make(
        num_timesteps=10,
        denoiser=counted,
        chunk_size=1,
    )
    found = allocated_bound(estimator, NEVER, 20 * N, 4)
    jax.effects_barrier()
    assert sum(calls) == found.evaluations == 20 * N


def test_a_term_that_is_not_finite_ends_it():
    broken = MODEL._replace(means=np.float32([[0.0, np.nan, 0.0]]))
    estimator = make(num_timesteps=10, denoiser=broken.denoiser)
    with pytest.raises(RunError, match="not finite"):
        allocated_bound(estimator, 0.01, 0, 4)


@pytest.mark.parametrize("n", [1, 7])
@pytest.mark.parametrize("num_timesteps", [1, 2])
def test_one_level_has_no_kl_and_two_have_one(num_timesteps, n):
    """With one level the network is asked for the reconstruction alone, in the pilot too."""
    estimator, budget = make(num_timesteps, n=n), 20 * n
    found = [allocated_bound(Repeated(estimator, r), NEVER, budget, 4) for r in range(30)]
    pilots = 2 if num_timesteps == 1 else 10
    for of in found:
        replicates, left = len(of.diffusion), budget - of.evaluations
        assert 0 <= left < (of.evaluations - pilots * n) / replicates
        assert of.diffusion.any() == (num_timesteps > 1)
        assert np.isfinite(of.rate).all()
    totals = np.stack([of.total for of in found])
    z = (totals.mean(axis=0) - truth(estimator)) / (totals.std(axis=0, ddof=1) / np.sqrt(30))
    assert np.abs(z).max() < 4
    stated = np.mean([of.noise_variance for of in found], axis=0)
    # A quotient of variances on 29 and 30 degrees of freedom.
    assert np.abs(np.log(totals.var(axis=0, ddof=1) / stated)).max() < 3.5 * np.sqrt(
        2 / 29 + 2 / 30
    )


def test_every_example_counts_once_whatever_the_batches():
    """Thirty in one batch, and in batches of 7 whose last holds two and is filled up."""
    whole, parts = make(), make(batch_size=7, chunk_size=3)
    one, other = (allocated_bound(of, NEVER, 20 * N, 4) for of in (whole, parts))
    last = whole.subject.levels.log_snr[-1]
    np.testing.assert_allclose(one.prior, prior_kl(examples(), np.full(N, last)), rtol=1e-5)
    assert one.evaluations == other.evaluations
    # A coefficient is a quotient of float32 sums, and some totals are differences.
    for a, b in zip(one[:-1], other[:-1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
    np.testing.assert_allclose(one.total, other.total, rtol=1e-4)


def test_the_controls_are_fitted_to_the_training_data():
    """Mean and covariance of the digits, with the variance of rounding to a grey level added."""
    config = tiny.config()
    subject = subject_of(config, define_model(config), None, splits.load_data(config, "test"))
    gaussian, pixels = fit_controls(config, subject)
    levels = splits.load_data(config, "train").images.reshape(-1, 64)
    images, spacing = levels / 8.0 - 1, subject.spacing
    assert spacing == 1 / 8
    np.testing.assert_allclose(gaussian.mean, images.mean(axis=0), atol=1e-6)
    covariance = np.cov(images.T, bias=True) + spacing**2 / 12 * np.eye(64)
    fitted = gaussian.basis * np.exp(gaussian.log_variance) @ np.transpose(gaussian.basis)
    np.testing.assert_allclose(fitted, covariance, atol=1e-6)
    np.testing.assert_allclose(pixels.values, np.arange(17) / 8 - 1, atol=1e-6)
    shares = (levels[..., None] == np.arange(17)).mean(axis=0)
    np.testing.assert_allclose(np.exp(pixels.log_marginal), shares, atol=17 / len(levels))
