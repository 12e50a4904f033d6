"""Samplers that solve the probability flow: their order, and what they are special cases of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import exact, samplers, schedules
from diffusion.reverse import Reverse
from diffusion.schedules import Step
from tests.diffusion import problems

MIXTURE = exact.MixtureData(
    np.array([0.5, 0.3, 0.2]),
    np.array([[-1.2], [0.4], [1.5]]),
    np.array([[[0.09]], [[0.2]], [[0.05]]]),
)
NOISE = np.random.default_rng(0).normal(size=(40, 13, 3)).astype(np.float32)


def solve(sampler, num_steps, x, log_snr=(-5.0, 3.0)):
    """From one log-SNR to another in equal steps, without the last one to the data."""
    gap = (log_snr[1] - log_snr[0]) / num_steps
    ones = jnp.ones(len(x))

    def advance(carry, i):
        step = Step((log_snr[0] + i * gap) * ones, gap * ones)
        carry, x_s, _ = sampler.step(carry, step, jnp.zeros_like(x))
        return carry, x_s

    steps = jnp.arange(num_steps, dtype=float)
    return jax.jit(lambda: jax.lax.scan(advance, sampler.init(x), steps)[1][-1])()


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("dpm_solver_pp_2m", 2), ("heun", 2)])
def test_errors_fall_at_the_nominal_order(name, order, float64):
    """On a mixture, against the other solver at 2¹⁴ steps and extrapolated; slope by regression."""
    x = jnp.linspace(-2.0, 2.0, 9)[:, None]
    make = samplers.SAMPLERS[name](Reverse(MIXTURE.denoiser, "x_0"))
    other = "ddim" if name == "dpm_solver_pp_2m" else "dpm_solver_pp_2m"
    reference = samplers.SAMPLERS[other](Reverse(MIXTURE.denoiser, "x_0"))
    coarse, fine = (solve(reference, n, x) for n in (2**13, 2**14))
    factor = {"ddim": 2, "dpm_solver_pp_2m": 4}[other]
    truth = (factor * fine - coarse) / (factor - 1)
    sizes = (40, 80, 160, 320)
    errors = [float(jnp.abs(solve(make, n, x) - truth).mean()) for n in sizes]
    slope = np.polyfit(np.log(sizes), np.log(errors), 1)[0]
    assert -slope == pytest.approx(order, abs=0.3)


def test_flow_carries_the_mixtures_quantiles(float64):
    """In one dimension a flow keeps order: x goes to the same quantile at the other end."""
    x = jnp.linspace(-1.5, 1.5, 7)[:, None]
    solver = samplers.dpm_solver_pp_2m(Reverse(MIXTURE.denoiser, "x_0"))
    end = solve(solver, 2000, x)

    def below(x, log_snr):
        grid = np.linspace(-12, 0, 6001) + np.asarray(x)
        density = np.exp(MIXTURE.noised_log_prob(grid.reshape(-1, 1), np.full(grid.size, log_snr)))
        return np.trapezoid(density.reshape(grid.shape), grid, axis=1)

    np.testing.assert_allclose(below(x, -5.0), below(end, 3.0), atol=2e-5)


def draw(name, levels, rows=40, **options):
    model = problems.predicting(exact.NormalData(np.full(3, 0.3), np.diag([0.5, 1.0, 0.1])), "v")
    sampler = samplers.SAMPLERS[name](model, **options)
    noise = problems.tabulated(NOISE, np.arange(rows))
    return jax.jit(lambda: samplers.sample(sampler, levels, noise, rows, (1, 5)))()


def test_ddim_with_all_its_noise_is_ancestral_sampling():
    levels = schedules.cosine(100).levels(12)
    for one, other in zip(draw("ddim", levels, eta=1.0), draw("ancestral", levels), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-4, atol=2e-4)


def test_deterministic_samplers_take_no_noise_but_the_first():
    levels = schedules.cosine(100).levels(12)
    changed = NOISE.copy()
    changed[:, :12] += 1.0
    model = problems.predicting(exact.NormalData(np.zeros(3), np.eye(3)), "eps")
    for name in ("ddim", "dpm_solver_pp_2m", "heun"):
        sampler = samplers.SAMPLERS[name](model)
        both = [
            samplers.sample(sampler, levels, problems.tabulated(table, np.arange(40)), 40).x_0
            for table in (NOISE, changed)
        ]
        np.testing.assert_array_equal(*both)


@pytest.mark.parametrize("name", list(samplers.SAMPLERS))
@pytest.mark.parametrize("num_timesteps", [1, 2])
def test_few_steps_are_finite_and_end_in_the_last_prediction(name, num_timesteps):
    levels = schedules.linear_log_snr(20.0, -20.0).levels(num_timesteps)
    model = problems.predicting(exact.NormalData(np.zeros(3), np.eye(3)), "x_0")
    noise = problems.tabulated(NOISE, np.arange(4))
    made = samplers.sample(samplers.SAMPLERS[name](model), levels, noise, 4, (1,))
    assert np.all(np.isfinite(made.x_0))
    np.testing.assert_allclose(made.x_0, made.x_0_hat[0], rtol=1e-6)


def test_dynamic_thresholding_is_of_each_example_alone():
    """Within [−1, 1] nothing changes; beyond, the quantile becomes 1 and what exceeds it too."""
    x = np.stack([np.linspace(-0.9, 0.9, 201), np.linspace(-4.0, 4.0, 201)]).astype(np.float32)
    treated = np.asarray(samplers.X_0_TREATMENTS["dynamic"](x.reshape(2, 67, 3)))
    treated = treated.reshape(2, 201)
    np.testing.assert_array_equal(treated[0], x[0])
    size = np.quantile(np.abs(x[1]), 0.995)
    np.testing.assert_allclose(treated[1], np.clip(x[1] / size, -1, 1), rtol=1e-5)
    assert np.abs(treated[1]).max() == 1


# Encoding


def decode(model, x_T, levels):
    def noise(t):
        return jnp.where(t[0] == levels.num_timesteps, 1.0, 0.0) * x_T

    return samplers.sample(samplers.ddim(model), levels, noise, len(x_T)).x_0


def test_an_encoded_sample_is_decoded_to_itself(float64):
    """Each step is inverted to rounding once the iteration has converged; the first one is not."""
    model = Reverse(MIXTURE.denoiser, "x_0")
    x_0 = jnp.linspace(-1.8, 1.8, 13)[:, None]
    levels = schedules.linear_log_snr(12.0, -8.0).levels(200)

    def error(iterations):
        x_T = samplers.ddim_encode(model, x_0, levels, iterations)
        return float(jnp.abs(jax.jit(lambda: decode(model, x_T, levels))() - x_0).max())

    explicit, converged = error(1), error(8)
    # x̂_0(x_1) misses x_0 by σ_1² times a score of order ten.
    assert converged < 10 * np.exp(-12.0)
    assert explicit > 10 * converged


def test_encoded_data_are_normal_noise():
    """Samples of the mixture, carried to λ = −8 by the flow, have the moments of N(0, 1)."""
    model = Reverse(MIXTURE.denoiser, "x_0")
    x_0 = MIXTURE.sample(jax.random.key(0), 4000)
    levels = schedules.linear_log_snr(10.0, -8.0).levels(100)
    x_T = np.asarray(jax.jit(lambda: samplers.ddim_encode(model, x_0, levels))(), np.float64)
    # Of 4000 draws, and of a first-order solver at 100 steps.
    assert x_T.mean() == pytest.approx(0, abs=0.08)
    assert x_T.std() == pytest.approx(1, abs=0.06)
    assert np.mean(x_T**4) == pytest.approx(3, abs=0.5)
