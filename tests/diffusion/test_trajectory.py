"""13.7–13.10 along a trajectory: against its densities one by one, its variance, and K of them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import bound, decoders, schedules, trajectory
from diffusion.exact import distributions
from diffusion.model import DiffusionModel
from diffusion.reverse import PARAMETERIZATIONS, Reverse
from tests.diffusion import oracles, problems
from tests.diffusion.test_elbo import trajectory_estimate

pytestmark = pytest.mark.usefixtures("quick_compiles")


def draws(key, shape):
    """Noise as a function of t, independent at every t."""
    return lambda t: jax.random.normal(jax.random.fold_in(key, t[0]), shape)


@pytest.mark.parametrize("variance", ["beta_tilde", "beta", "learned_diagonal"])
@pytest.mark.parametrize("num_timesteps", [1, 2, 7])
def test_total_is_the_log_ratio_of_the_densities(num_timesteps, variance, float64):
    """The lecture's sum of log-densities at the same x_1 … x_T, one after another."""
    levels = schedules.linear_log_snr(5.0, -6.0).levels(num_timesteps)
    base = problems.imperfect()

    def denoiser(x_t, log_snr, condition=None):
        prediction = base.denoiser(x_t, log_snr)
        return jnp.concatenate([prediction, jnp.sin(prediction)], axis=-1)

    model = DiffusionModel(Reverse(denoiser, "x_0", variance), decoders.gaussian(0.03), levels)
    x_0 = np.random.default_rng(0).normal(size=(4, 3))
    noise = draws(jax.random.key(0), x_0.shape)
    mine = jax.jit(lambda: trajectory.trajectory(model, x_0, noise))()
    assert mine.steps.shape == (4, num_timesteps - 1)
    # The oracle has no word for the extra output.
    plain = model.reverse._replace(denoiser=lambda *a: denoiser(*a)[:, :3])
    if variance == "learned_diagonal":
        plain = _with_extra(model.reverse)
    theirs = trajectory_estimate(model._replace(reverse=plain), x_0, noise)
    np.testing.assert_allclose(mine.total, theirs, rtol=1e-10)


class _with_extra:
    """A model whose `step` asks the denoiser for its extra output itself."""

    def __init__(self, model):
        self.model, self.predict = model, model.predict

    def step(self, x_t, x_0_hat, step):
        extra = self.model.outputs(x_t, step.log_snr).extra
        return self.model.step(x_t, x_0_hat, step, extra)


def test_every_parameterization_has_the_same_log_ratio(float64):
    levels, base = schedules.cosine().levels(20), problems.imperfect("beta")
    x_0, eps_s, n = np.random.default_rng(1).normal(size=(3, 5, 2))
    step = levels.step(np.array([2, 3, 9, 15, 20]))
    terms = [
        trajectory.step_log_ratio(
            Reverse(lambda x, l, c, name=name: base.predict(name, x, l), name, "beta"),
            *(x_0, eps_s, n, step),
        )[1]
        for name in PARAMETERIZATIONS
    ]
    for term in terms:
        np.testing.assert_allclose(term, terms[0], rtol=1e-8)


def test_variance_of_a_whole_trajectory_is_twice_the_gap():
    """log q/p is nearly Gaussian given x_0, and then its variance is twice its mean's excess.

    The testbed with the true p(x_0 | x_1), so that the excess over −log p(x_0) is the gap. Over
    4000 trajectories a variance is known to √(2/4000) = 2 %, if heavy tails double that.
    """
    data, levels = problems.testbed(), schedules.linear_log_snr(10.0, -10.0).levels(101)
    model = DiffusionModel(problems.predicting(data, "eps"), data.decoder(), levels)
    n = 4000
    x_0 = np.broadcast_to(np.array([1.5, -0.3, 0.6, 0.05], np.float32), (n, 4))
    noise = draws(jax.random.key(1), (n, 4))

    @jax.jit
    def totals():
        whole = trajectory.trajectory(model, x_0, noise)
        reduced = bound.bound(model, x_0, noise, chunk_size=10)
        return whole.total, reduced.total

    whole, reduced = (np.asarray(total, np.float64) for total in totals())
    gap = reduced.mean() + float(data.log_prob(x_0[:1])[0])
    assert gap == pytest.approx(1.67, rel=0.5)  # at this x_0; 1.673 on average
    assert whole.var() == pytest.approx(2 * gap, rel=0.2)
    # The same expectation.
    difference = whole - reduced
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(n)


def test_a_tight_bound_has_no_variance_along_a_trajectory(float64):
    """With each coordinate's own Σ the reverse chain is exact: log q/p = −log p(x_0), always.

    But for p(x_T) = N(0, I) in place of the marginal at λ = −25, a matter of e^{−25}.
    """
    data = distributions.normal(np.array([0.3, -0.2]), np.diag([2.0, 0.1]))
    levels = schedules.linear_log_snr(6.0, -25.0).levels(9)

    def denoiser(x_t, log_snr, condition=None):
        error = jax.nn.log_sigmoid(log_snr[:, None] + np.log([2.0, 0.1]))
        return jnp.concatenate([data.denoiser(x_t, log_snr), error], axis=-1)

    reverse = Reverse(denoiser, "x_0", "learned_diagonal")
    model = DiffusionModel(reverse, data.decoder(), levels)
    x_0 = np.random.default_rng(2).normal(size=(6, 2))
    noise = draws(jax.random.key(2), (6, 2))
    total = trajectory.trajectory(model, x_0, noise).total
    # e^{−12.5} is the scale of α_T x_0 ε_T, which p(x_T) takes for noise.
    np.testing.assert_allclose(total, -data.log_prob(x_0), atol=2e-4)


def test_a_hundred_thousand_steps_in_float32():
    """A term at T = 10⁵, λ ± 20, against float64.

    What rounding is left is that of x_t, the network's input: ε − ε̂ moves by eps32 e^{λ/2}, and the
    term by √gap times that.
    """
    levels = schedules.linear_log_snr(20.0, -20.0).levels(10**5)
    t = np.array([2, 100, 10**4, 5 * 10**4, 9 * 10**4, 10**5])
    x_0, eps_s, n = np.random.default_rng(3).normal(size=(3, 6, 3)).astype(np.float32)
    model = problems.predicting(distributions.normal(np.zeros(3), np.diag([2.0, 1.0, 0.1])), "v")

    def terms(step):
        return trajectory.step_log_ratio(model, x_0, eps_s, n, step)[1]

    exact_step = schedules.Step(levels.log_snr[t], levels.gap[t])
    single = np.asarray(terms(levels.step(t)))
    with jax.enable_x64(True):
        double = np.asarray(terms(exact_step))
    of_input = oracles.EPS32 * np.sqrt(np.exp(levels.log_snr[t]) * levels.gap[t])
    assert np.all(np.abs(single - double) < 1e-5 * np.abs(double) + of_input + 1e-8)


def test_a_long_trajectory_keeps_its_noise_and_telescopes_in_float32():
    """A point mass at 0 and its own denoiser: no KL is left, and the log-ratios of q telescope.

    Their sum is ½(‖ε_1‖² − ‖ε_T‖²) + d log σ_1/σ_T, and ε_T is as normal as ε_1 was.
    """
    num_timesteps, shape = 10**5, (200, 2)
    levels = schedules.linear_log_snr(10.0, -10.0).levels(num_timesteps)
    reverse = Reverse(lambda x_t, log_snr, condition=None: 0 * x_t, "x_0")
    model = DiffusionModel(reverse, decoders.gaussian(1.0), levels)
    noise, x_0 = draws(jax.random.key(4), shape), np.zeros(shape, np.float32)
    path = jax.jit(lambda: trajectory.trajectory(model, x_0, noise))()
    first = np.asarray((noise(jnp.ones(200, int)) ** 2).sum(1), np.float64)
    sigma2 = levels.sigma2
    last = (2 * np.asarray(path.end, np.float64) - 2 * np.log(2 * np.pi)) / sigma2[-1]
    expected = 0.5 * (first - last) + np.log(sigma2[1] / sigma2[-1])
    # 10⁵ roundings of terms of about 1e-2, each of half an ulp at random.
    np.testing.assert_allclose(path.steps.sum(axis=1), expected, atol=2e-3)
    assert last.mean() == pytest.approx(2, abs=4 * 2 / np.sqrt(200))


def test_k_sample_bound_has_its_log_k():
    totals = jnp.full((8, 3), 2.5)
    np.testing.assert_allclose(trajectory.k_sample_bound(totals), 2.5, rtol=1e-6)
    mixed = jnp.array([[1.0, 700.0], [2.0, 800.0]])
    expected = [-np.log((np.exp(-1.0) + np.exp(-2.0)) / 2), 700.0 + np.log(2)]
    np.testing.assert_allclose(trajectory.k_sample_bound(mixed), expected, rtol=1e-6)


def test_k_sample_bound_falls_with_k_towards_the_log_likelihood():
    """On the testbed at 30 steps, with Σ = β so that the gap is of order one; one group of 64."""
    data, levels = problems.testbed(), schedules.linear_log_snr(10.0, -10.0).levels(31)
    model = DiffusionModel(problems.predicting(data, "eps", "beta"), data.decoder(), levels)
    n, k = 300, 64
    x_0 = np.asarray(data.sample(jax.random.key(3), n))

    @jax.jit
    def draw(key):
        noise = draws(key, (n, 4))
        return trajectory.trajectory(model, x_0, noise).total

    totals = jnp.stack([draw(jax.random.key(100 + i)) for i in range(k)])
    truth = -np.asarray(data.log_prob(x_0), np.float64)
    excess = [
        np.mean(
            [trajectory.k_sample_bound(group) for group in totals.reshape(-1, size, n)], axis=0
        ).astype(np.float64)
        - truth
        for size in (1, 4, 16, 64)
    ]
    for fewer, more in itertools.pairwise(excess):
        difference = fewer - more  # the same trajectories, grouped otherwise
        assert difference.mean() > 4 * difference.std() / np.sqrt(n)
    assert excess[-1].mean() > -3 * excess[-1].std() / np.sqrt(n)
    assert excess[0].mean() > 10 * excess[0].std() / np.sqrt(n)
