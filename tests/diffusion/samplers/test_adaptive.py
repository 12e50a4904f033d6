"""The adaptive sampler: errors follow the tolerance, and every example is a solve of its own."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import schedules
from diffusion.exact import distributions
from diffusion.reverse import Reverse
from diffusion.samplers import adaptive, base, registry
from diffusion.samplers.treatments import treated
from diffusion.schedules import Step
from tests.diffusion import problems

pytestmark = pytest.mark.usefixtures("quick_compiles")

VARIANCES = np.array([2.0, 1.0, 0.5, 0.1])
NORMAL = distributions.normal(np.full(4, 0.3), np.diag(VARIANCES))
X = np.random.default_rng(0).normal(size=(7, 4))


def step_of(x, log_snr=-5.0, gap=8.0):
    return Step(jnp.full(len(x), log_snr), jnp.full(len(x), gap))


def solve(sampler, x, step):
    """x after one step, and the evaluations."""

    def run(x):
        after = sampler.step(sampler.init(x), x, step, None)
        return after[1], sampler.evaluations(after[0], 1)

    return jax.jit(run)(jnp.asarray(x))


def flow(x, log_snr, gap):
    """The flow of N(m, v) data: y − m grows as √(v + σ̃²), where y = x/α and σ̃ = σ/α."""

    def root_alpha_bar(log_snr):
        return 1 / np.sqrt(1 + np.exp(-log_snr))

    y = x / root_alpha_bar(log_snr)
    ratio = (VARIANCES + np.exp(-log_snr - gap)) / (VARIANCES + np.exp(-log_snr))
    return root_alpha_bar(log_snr + gap) * (0.3 + np.sqrt(ratio) * (y - 0.3))


@pytest.mark.parametrize("method", ["tsit5", "dopri8", "heun"])
def test_errors_follow_the_tolerance(method, float64):
    """In proportion, and no more than the steps' own errors added up; against the flow itself."""
    model, errors = problems.without_decoder(problems.predicting(NORMAL, "eps")), []
    tolerances = np.array([1e-4, 1e-5, 1e-6] if method == "heun" else [1e-4, 1e-6, 1e-8])
    for tolerance in tolerances:
        sampler = adaptive.adaptive(model, tolerance=tolerance, method=method)
        x, _ = solve(sampler, X, step_of(X))
        errors.append(np.abs(x - flow(X, -5.0, 8.0)).max())
    errors = np.array(errors)
    assert np.all(errors < 20 * tolerances)
    slope = np.polyfit(np.log10(tolerances), np.log10(errors), 1)[0]
    assert slope == pytest.approx(1, abs=0.3)


def test_many_levels_end_where_one_solve_does(float64):
    """And where 2000 steps of Heun's method do, on a mixture and with x̂_0 clipped."""
    data = distributions.Mixture(
        np.array([0.6, 0.4]),
        np.array([[-0.9] * 4, [0.8] * 4]),
        np.array([0.05 * np.eye(4), 0.1 * np.eye(4)]),
    )
    reverse = Reverse(lambda x, l, c=None: 1.4 * data.denoiser(x, l), "x_0")
    model = treated(problems.without_decoder(reverse), "clip")

    def draw(name, num_timesteps, **options):
        sampler = registry.SAMPLERS[name](model, **options)
        levels = schedules.linear_log_snr(6.0, -4.0).levels(num_timesteps)
        return jax.jit(
            lambda: base.sample(sampler, levels, lambda t: 0.0 * X, len(X), x_T=X, record=(1,))
        )()

    one, many = (draw("adaptive", n, tolerance=1e-7) for n in (2, 6))
    fine = draw("heun", 2000)
    np.testing.assert_allclose(one.x_t, many.x_t, atol=1e-5)
    np.testing.assert_allclose(one.x_t, fine.x_t, atol=3e-5)  # Heun's, across the clip's corner
    assert np.abs(one.x_0).max() == 1
    # A step takes at least one evaluation for x̂_0 and one step of Tsit5.
    assert np.all(many.evaluations > one.evaluations)
    assert np.all(one.evaluations > 1 + 1 + 7)


def stiff(x_t, log_snr, condition=None):
    """x̂_0 that draws x to zero, the more steeply the larger the condition."""
    return -jnp.tanh(condition[:, None] * x_t)


def test_an_example_that_needs_too_many_steps_is_nan_and_no_other():
    steepness = jnp.array([0.5, 0.0, 2e5])
    x = jnp.full((3, 1), 0.7)
    model = problems.without_decoder(Reverse(stiff, "x_0"))
    levels = schedules.linear_log_snr(6.0, -4.0).levels(4)

    def draw(rows):
        sampler = adaptive.adaptive(model.given(steepness[rows]), max_steps=40, tolerance=1e-5)
        return jax.jit(
            lambda: base.sample(sampler, levels, lambda t: 0.0 * x[rows], len(rows), x_T=x[rows])
        )()

    together = draw(np.arange(3))
    assert np.isfinite(together.x_0[:2]).all()
    assert np.isnan(together.x_0[2]).all()
    for row in range(2):
        alone = draw(np.array([row]))
        np.testing.assert_allclose(alone.x_0[0], together.x_0[row], rtol=1e-6)
        assert alone.evaluations[0] == together.evaluations[row]
    # Three solves of at most 40 steps of six evaluations and one, and x̂_0 at every level.
    assert np.all(together.evaluations <= 3 * (40 * 6 + 1) + 4)


def test_single_precision_at_the_ends_of_the_log_snr():
    """λ from −20 to 20 in one solve, by predictions of the noise and of the data."""
    for name in ("eps", "x_0"):
        sampler = adaptive.adaptive(problems.without_decoder(problems.predicting(NORMAL, name)))
        x, evaluations = solve(sampler, X.astype(np.float32), step_of(X, -20.0, 40.0))
        np.testing.assert_allclose(x, flow(X, -20.0, 40.0), atol=3e-3)
        assert np.all(evaluations < 1000)


def test_without_diffrax(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match="package diffrax"):
        adaptive.adaptive(problems.without_decoder(problems.imperfect()))
