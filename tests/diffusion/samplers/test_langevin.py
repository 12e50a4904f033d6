"""Langevin dynamics: the distribution that it settles at, alone and between a sampler's steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.scipy.stats import norm

from diffusion import schedules
from diffusion.exact import distributions
from diffusion.forward import example_noise
from diffusion.reverse import Reverse
from diffusion.samplers import base, ddpm, langevin, registry, solvers
from diffusion.schedules import Step
from tests.diffusion import oracles, problems

pytestmark = pytest.mark.usefixtures("quick_compiles")

MEAN, VARIANCE = 0.3, 0.5
NORMAL = distributions.normal(np.array([MEAN]), np.array([[VARIANCE]]))
MIXTURE = distributions.Mixture(
    np.array([0.3, 0.7]), np.array([[-1.0], [0.8]]), np.array([[[0.1]], [[0.2]]])
)
MIXTURE_MEAN = 0.3 * -1.0 + 0.7 * 0.8
MIXTURE_VARIANCE = 0.3 * (0.1 + 1.0) + 0.7 * (0.2 + 0.64) - MIXTURE_MEAN**2


def linear_moments(make_sampler, levels, num_dims=1):
    """Exact mean and covariance of the samples of a linear model, by the response to each noise.

    Row 0 has no noise at all, and every other row one coordinate of one noise.

    Args:
      make_sampler: from the number of rows.
      levels: noise levels.
      num_dims: of a sample.
    """
    numbers = max(make_sampler(1).num_draws, 1) * (levels.num_timesteps + 1)
    rows = 1 + numbers * num_dims
    number, coordinate = np.divmod(np.arange(rows) - 1, num_dims)
    unit = np.eye(num_dims)[coordinate] * (np.arange(rows) > 0)[:, None]

    def noise(t):
        return jnp.where(number == t, 1.0, 0.0)[:, None] * unit

    run = jax.jit(lambda: base.sample(make_sampler(rows), levels, noise, rows).x_0)
    x_0 = np.asarray(run(), np.float64)
    responses = x_0[1:] - x_0[0]
    return x_0[0], responses.T @ responses


def settled(log_snr, snr):
    """Variance of x̂_0 at a level where the moves have settled.

    There x has v/(1 − η/(2v)) in the place of its v = α² VARIANCE + σ².
    """
    alpha_bar = 1 / (1 + np.exp(-log_snr))
    variance = alpha_bar * VARIANCE + 1 - alpha_bar
    gain = np.sqrt(alpha_bar) * VARIANCE / variance
    return gain**2 * variance / (1 - snr**2 * (1 - alpha_bar) / variance)


@pytest.mark.parametrize("eta", [1e-3, 0.1, 0.9])
def test_moves_on_a_normal_settle_at_its_variance_enlarged(eta, float64):
    """x' = a x + b z settles at b²/(1 − a²), which is v/(1 − η/(2v))."""

    def move(x, z):
        x, z = jnp.full((1, 1), x), jnp.full((1, 1), z)
        score = NORMAL.score(x, jnp.full(1, jnp.inf))
        return float(langevin.langevin_step(x, score, eta, z)[0, 0]) - MEAN

    assert move(MEAN, 0.0) == pytest.approx(0, abs=1e-15)
    a, b = move(MEAN + 1, 0.0), move(MEAN, 1.0)
    assert b**2 / (1 - a**2) == pytest.approx(VARIANCE / (1 - eta / (2 * VARIANCE)), rel=1e-12)


def test_moves_on_a_mixture_reach_its_moments():
    """From standard normal noise. A mode's bias is η/(2v) of its variance, at most 5%."""
    n, eta = 3000, 0.01

    @jax.jit
    def run():
        def move(x, key):
            score = MIXTURE.score(x, jnp.full(n, jnp.inf))
            return langevin.langevin_step(x, score, eta, jax.random.normal(key, x.shape)), None

        start, *keys = jax.random.split(jax.random.key(0), 801)
        return jax.lax.scan(move, jax.random.normal(start, (n, 1)), jnp.stack(keys))[0]

    x = np.asarray(run(), np.float64)
    assert abs(x.mean() - MIXTURE_MEAN) < 4 * np.sqrt(MIXTURE_VARIANCE / n)
    bias = eta / (2 * 0.1) * MIXTURE_VARIANCE
    assert abs(x.var() - MIXTURE_VARIANCE) < 4 * ((x - x.mean()) ** 2).std() / np.sqrt(n) + bias


@pytest.mark.parametrize("log_snr", [-15.0, 0.0, 15.0])
def test_a_move_has_the_signal_to_noise_ratio_asked_for(log_snr):
    """‖η s‖/‖√(2η) z‖ is r where ε̂ and z are of unit size, whatever the level."""
    still = base.Sampler(
        base.no_history, lambda history, x, step, draw: (history, x, x), num_draws=0
    )
    signs = np.where(np.arange(24) % 3, 1.0, -1.0).reshape(2, 12).astype(np.float32)
    model = problems.without_decoder(Reverse(lambda x, l, condition=None: jnp.asarray(signs)))
    sampler = langevin.corrected(still, model, snr=0.2)
    step = Step(jnp.full(2, log_snr), jnp.ones(2))

    def moved(z):
        return np.asarray(sampler.step((), jnp.zeros((2, 12)), step, lambda k: z)[1], np.float64)

    drift = moved(jnp.zeros((2, 12)))
    noise = moved(jnp.ones((2, 12))) - drift
    assert np.linalg.norm(drift) / np.linalg.norm(noise) == pytest.approx(0.2, rel=1e-4)
    assert np.all(drift * signs < 0)  # downhill from the noise


@pytest.mark.parametrize("name", ["annealed", "ancestral", "ddim", "heun"])
def test_many_moves_settle_wherever_the_predictor_came_from(name, float64):
    """At level 1 all of the past is forgotten: a closed form, for each predictor."""
    snr, levels = 0.5, schedules.linear_log_snr(2.0, -2.0).levels(3)
    model = problems.without_decoder(problems.predicting(NORMAL, "v"))

    def make(rows):
        if name == "annealed":
            return langevin.annealed(model, num_steps=120, snr=snr)
        return langevin.corrected(registry.SAMPLERS[name](model), model, num_steps=120, snr=snr)

    mean, covariance = linear_moments(make, levels)
    assert mean[0] == pytest.approx(MEAN, abs=1e-5)
    assert covariance[0, 0] == pytest.approx(settled(2.0, snr), rel=1e-6)


@pytest.mark.parametrize(("num_steps", "snr"), [(4, 0.1), (4, 0.2), (4, 0.4)])
def test_annealed_dynamics_approach_the_variance_of_the_data(num_steps, snr, float64):
    """The variance of y = x/α has an excess e over v + τ, where τ = (σ/α)².

    A move takes away 4 r² τ/(v + τ) of e, and cooling adds −dτ = τ dλ. With n moves per unit of λ
    and K = 4 r² n: de/dτ = K e/(v + τ) − 1, which e = (v + τ)/(K − 1) solves; v/(K − 1) at τ = 0.
    """
    levels = schedules.linear_log_snr(8.0, -6.0).levels(281)
    model = problems.without_decoder(problems.predicting(NORMAL, "eps"))
    mean, covariance = linear_moments(
        lambda rows: langevin.annealed(model, num_steps=num_steps, snr=snr), levels
    )
    assert mean[0] == pytest.approx(MEAN, abs=1e-4)
    excess = 1 / (4 * snr**2 * num_steps * 280 / 14 - 1)
    # To first order in the step r².
    assert covariance[0, 0] / VARIANCE - 1 == pytest.approx(excess, rel=2 * snr**2)


@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
def test_moments_of_corrected_ancestral_sampling_are_the_linear_recursions(variance, float64):
    """Two moves, then (13.19): a recursion in α and β, in which every noise is drawn afresh."""
    num_steps, snr = 2, 0.3
    levels = schedules.linear_log_snr(4.0, -4.0).levels(5)
    chain = oracles.from_betas(levels.beta[1:])
    mean, spread = 0.0, 1.0
    for t in range(5, 0, -1):
        root, sigma2 = np.sqrt(chain.alpha_bar[t]), 1 - chain.alpha_bar[t]
        noised, eta = root**2 * VARIANCE + sigma2, 2 * snr**2 * sigma2
        for _ in range(num_steps):
            mean -= eta * (mean - root * MEAN) / noised
            spread = (1 - eta / noised) ** 2 * spread + 2 * eta
        after = oracles.ancestral_step(chain, t, variance, MEAN, VARIANCE, mean, spread)
        mean, spread = after

    model = problems.without_decoder(problems.predicting(NORMAL, "v", variance))
    found_mean, found = linear_moments(
        lambda rows: langevin.corrected(ddpm.ancestral(model), model, num_steps, snr),
        levels,
    )
    assert found_mean[0] == pytest.approx(mean, rel=1e-6)
    assert found[0, 0] == pytest.approx(spread, rel=1e-6)


@pytest.mark.parametrize("name", ["annealed", "corrected"])
def test_samples_of_a_mixture_have_its_moments(name):
    """Within sampling error, and the share 1/(K − 1) that annealing leaves."""
    n, snr, levels = 3000, 0.4, schedules.linear_log_snr(7.0, -6.0).levels(40)
    model = problems.without_decoder(Reverse(MIXTURE.denoiser, "x_0"))
    if name == "annealed":
        sampler, bias = langevin.annealed(model, num_steps=25, snr=snr), 1 / (4 * snr**2 * 75 - 1)
    else:
        sampler = langevin.corrected(solvers.dpm_solver_pp_2m(model), model, num_steps=5, snr=snr)
        bias = 0.01  # of the solver, at 40 steps
    noise = example_noise(jax.random.key(1), jnp.arange(n), (1,))
    x = np.asarray(jax.jit(lambda: base.sample(sampler, levels, noise, n).x_0)(), np.float64)
    deviation = np.sqrt(MIXTURE_VARIANCE)
    assert abs(x.mean() - MIXTURE_MEAN) < deviation * (4 / np.sqrt(n) + bias)
    error = 4 * ((x - x.mean()) ** 2).std() / np.sqrt(n)
    assert abs(x.var() - MIXTURE_VARIANCE) < error + bias * MIXTURE_VARIANCE
    below = [norm.cdf(0.0, m, np.sqrt(v)) for m, v in ((-1.0, 0.1), (0.8, 0.2))]
    share = float(0.3 * below[0] + 0.7 * below[1])
    assert abs(np.mean(x < 0) - share) < 4 * np.sqrt(share * (1 - share) / n) + bias * share


@pytest.mark.parametrize("name", ["ancestral", "dpm_solver_pp_2m"])
def test_without_moves_the_sampler_is_left_as_it_was(name):
    levels = schedules.linear_log_snr(5.0, -5.0).levels(6)
    model = problems.without_decoder(problems.predicting(NORMAL, "eps"))
    plain = registry.SAMPLERS[name](model)
    noise = example_noise(jax.random.key(0), jnp.arange(5), (1,))
    both = jax.jit(
        lambda: [
            base.sample(sampler, levels, noise, 5, (1, 4))
            for sampler in (plain, langevin.corrected(plain, model, num_steps=0))
        ]
    )()
    for one, other in zip(*both, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_evaluations_are_those_of_the_moves_and_of_the_predictor():
    """And the network is traced as often for many moves as for a few."""
    levels = schedules.linear_log_snr(5.0, -5.0).levels(4)
    traces = []

    def denoiser(x, log_snr, condition=None):
        traces.append(1)
        return NORMAL.denoiser(x, log_snr)

    model = problems.without_decoder(Reverse(denoiser, "x_0"))
    for num_steps in (2, 50):
        made = {
            "annealed": langevin.annealed(model, num_steps=num_steps),
            "ddim": langevin.corrected(ddpm.ddim(model), model, num_steps=num_steps),
            "heun": langevin.corrected(solvers.heun(model), model, num_steps=num_steps),
        }
        counts = {}
        for name, sampler in made.items():
            traces.clear()
            samples = jax.eval_shape(
                lambda sampler=sampler: base.sample(
                    sampler, levels, problems.constant(np.ones((3, 1), np.float32)), 3
                )
            )
            assert samples.evaluations.shape == (3,)
            counts[name] = int(sampler.evaluations((), 4)), len(traces)
        assert counts["annealed"][0] == 4 * num_steps + 1
        assert counts["ddim"][0] == 4 * num_steps + 4
        assert counts["heun"][0] == 4 * num_steps + 7
        assert max(traced for _, traced in counts.values()) <= 4


def test_a_sample_does_not_depend_on_its_batch():
    levels = schedules.linear_log_snr(5.0, -5.0).levels(6)
    sampler = langevin.annealed(problems.without_decoder(Reverse(MIXTURE.denoiser, "x_0")))

    def draw(index):
        noise = example_noise(jax.random.key(0), jnp.asarray(index), (1,))
        return base.sample(sampler, levels, noise, len(index)).x_0

    alone, among = jax.jit(lambda: (draw([3]), draw([7, 1, 3])))()
    np.testing.assert_allclose(alone, among[2:], rtol=1e-5, atol=1e-6)
