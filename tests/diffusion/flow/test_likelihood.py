"""The probability-flow likelihood against densities that are known at every log-SNR."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffusion import reverse, schedules
from diffusion.exact import distributions
from diffusion.flow import likelihood
from diffusion.flow.ode import Adaptive, FixedGrid
from tests.diffusion import problems

pytestmark = pytest.mark.usefixtures("quick_compiles")

LOG_SNR_MAX, LOG_SNR_MIN = 6.0, -4.0
ROOT = np.array([[1.0, 0.0, 0.0], [0.5, 0.6, 0.0], [0.2, -0.3, 0.3]])
NORMAL = distributions.normal(np.array([0.3, -0.2, 0.1]), ROOT @ ROOT.T)
# Where the solver's error is no matter:
COARSE, LOOSE = FixedGrid(8, "heun"), Adaptive(1e-3, 1e-3, method="heun")


def moments(log_snr):
    """α m, and the eigenvalues and eigenvectors of α² C + σ² I, of the normal."""
    alpha_bar = 1 / (1 + np.exp(-log_snr))
    variances, basis = np.linalg.eigh(NORMAL.covariance)
    return np.sqrt(alpha_bar) * NORMAL.mean, alpha_bar * variances + 1 - alpha_bar, basis


def of_normal(x):
    """log N(x at λ_min; 0, I), and the matrix whose trace is added, for the model of the normal.

    The flow is linear with one set of axes: it scales them by √(variance at λ_min/at λ_max), and
    the log of that is the integral of its Jacobian.
    """
    mean, variances, basis = moments(LOG_SNR_MAX)
    end_mean, end_variances, _ = moments(LOG_SNR_MIN)
    log_scale = 0.5 * np.log(end_variances / variances)
    x_end = ((x - mean) @ basis * np.exp(log_scale)) @ basis.T + end_mean
    return scipy.stats.norm.logpdf(x_end).sum(axis=1), (basis * log_scale) @ basis.T


def log_prob_of_normal(x):
    """The model's density in closed form; what N(0, I) at λ_min makes of it included."""
    base, matrix = of_normal(x)
    return base + np.trace(matrix)


def draw(n, seed=0, dtype=np.float32):
    """Draws of the noised normal at λ_max."""
    mean, variances, basis = moments(LOG_SNR_MAX)
    z = np.random.default_rng(seed).normal(size=(n, 3))
    return ((z * np.sqrt(variances)) @ basis.T + mean).astype(dtype)


def rademacher(*shape, seed=1, dtype=np.float32):
    return np.random.default_rng(seed).choice([-1.0, 1.0], size=shape).astype(dtype)


def between(p, log_snr_max, log_snr_min):
    """A model with two levels, whose density at the first is computed."""
    return problems.without_decoder(
        p, schedules.Levels.from_log_snr(np.array([log_snr_max, log_snr_min]))
    )


@functools.partial(jax.jit, static_argnames=("solver", "chunk_size"))
def solve(x, solver, probes=None, chunk_size=None):
    """`log_prob` of the normal's model."""
    model = between(reverse.Reverse(NORMAL.denoiser, "x_0"), LOG_SNR_MAX, LOG_SNR_MIN)
    return likelihood.log_prob(model, x, solver, probes, chunk_size)


@pytest.mark.parametrize("solver", [Adaptive(1e-6, 1e-6), FixedGrid(32)])
def test_normal_in_closed_form(solver):
    """In float32, to 1e-3 nats."""
    x = draw(6)
    result = solve(x, solver)
    assert result.log_prob.shape == (6,)
    np.testing.assert_allclose(result.log_prob, log_prob_of_normal(x), atol=1e-3)
    assert np.all(result.trace_se == 0)
    assert np.all(result.solver_error < 5e-3)


def test_mixture_at_a_high_log_snr():
    """The true marginal at λ_min = −12 is not N(0, I), but nearly, for data of mean zero.

    Their log-ratio is ½ α² Σ (Cov − I)_ij (x_i x_j − δ_ij) to first order: about 1e-5 nats.
    """
    means, root = np.array([[-1.0, 0.5], [1.0, -0.5]]), np.array([[0.3, 0.0], [0.2, 0.1]])
    data = distributions.Mixture(np.ones(2), means, np.stack([root @ root.T, root.T @ root]))
    rng = np.random.default_rng(0)
    grid = rng.uniform(-1.5, 1.5, size=(12, 2)).astype(np.float32)  # valleys and tails too
    model = between(problems.predicting(data, "v"), 5.0, -12.0)
    result = jax.jit(
        lambda x: likelihood.log_prob(model, x, Adaptive(1e-6, 1e-6, method="dopri8"))
    )(grid)
    truth = data.noised_log_prob(grid, np.full(12, 5.0, np.float32))
    # Float32 keeps about 1e-6 of the largest term: the log-density spans −80 … 0 here.
    np.testing.assert_allclose(result.log_prob, truth, rtol=1e-4, atol=1e-3)
    assert np.all(np.abs(result.log_prob - truth) < result.solver_error + 1e-3)


def test_any_model_is_normalised():
    """A denoiser that is nobody's: its density integrates to one by the change of variables."""
    p = reverse.Reverse(
        lambda x_t, log_snr, condition=None: jnp.tanh(2 * x_t + 0.1 * log_snr[:, None]), "x_0"
    )
    model = between(p, 3.0, -5.0)
    x = np.linspace(-6, 6, 601, dtype=np.float32)
    result = jax.jit(lambda x: likelihood.log_prob(model, x, FixedGrid(48)))(x[:, None])
    density = np.exp(np.asarray(result.log_prob, np.float64))
    assert np.trapezoid(density, x) == pytest.approx(1, abs=1e-4)
    assert density.max() > 1.5 * scipy.stats.norm.pdf(0)  # and it is no N(0, I)


def test_each_probe_in_closed_form():
    x, probes = draw(6), rademacher(6, 1, 3)
    base, matrix = of_normal(x)
    result = solve(x, FixedGrid(32), probes)
    truth = base + np.einsum("bi,ij,bj->b", probes[:, 0], matrix, probes[:, 0])
    np.testing.assert_allclose(result.log_prob, truth, atol=1e-3)
    assert np.all(np.isnan(result.trace_se))  # a single probe says nothing of its spread


def test_hutchinson_is_unbiased_and_its_error_calibrated():
    """Many estimates of one example. Rademacher probes: Var v·Av = 2 Σ_{i≠j} A_ij²."""
    n, k = 1000, 4
    x = np.repeat(draw(1), n, axis=0)
    result = jax.tree.map(np.asarray, solve(x, FixedGrid(32), rademacher(n, k, 3)))
    _, matrix = of_normal(x)
    variance = 2 * (np.sum(matrix**2) - np.sum(np.diag(matrix) ** 2)) / k
    bias = result.log_prob.astype(np.float64).mean() - log_prob_of_normal(x[:1])[0]
    assert abs(bias) < 4 * np.sqrt(variance / n)
    # A sum of few terms scatters less than a normal's, whose variance is known to √(2/n); the
    # variance from 4 probes scatters by about √(2/3), and n of them by 0.026.
    assert result.log_prob.var() / variance == pytest.approx(1, abs=4 * np.sqrt(2 / n))
    assert np.mean(result.trace_se**2) / variance == pytest.approx(1, abs=0.11)


def test_step_sizes_ignore_the_number_of_probes(float64):
    """The same probe four times over is one probe, to the error control as to the trace.

    In float64: rounding is a part of a step's error in float32, and so of the next step's length.
    """
    x, probes = draw(4, dtype=np.float64), rademacher(4, 1, 3, dtype=np.float64)
    once, often = (solve(x, LOOSE, np.repeat(probes, k, axis=1)) for k in (1, 4))
    np.testing.assert_array_equal(once.evaluations / 2, often.evaluations / 5)
    np.testing.assert_allclose(once.log_prob, often.log_prob, rtol=1e-10)
    np.testing.assert_allclose(often.trace_se, 0, atol=1e-10)


def test_probes_are_functions_of_key_and_example():
    key = jax.random.key(3)
    probes = likelihood.example_probes(key, np.arange(50), 8, (2, 2, 3))
    assert probes.shape == (50, 8, 2, 2, 3)
    np.testing.assert_array_equal(np.abs(probes), 1)
    again = likelihood.example_probes(key, np.array([7, 3]), 8, (2, 2, 3))
    np.testing.assert_array_equal(again, probes[np.array([7, 3])])
    assert abs(np.mean(probes)) < 4 / np.sqrt(probes.size)


def test_an_example_ignores_its_neighbours():
    """The first of four is the same to the last bit, whoever the others are."""
    x = draw(4)
    neighbours = np.concatenate([x[:1], 10 * draw(3, seed=5)])
    a, b = solve(x, LOOSE), solve(neighbours, LOOSE)
    for before, after in zip(a, b, strict=True):
        np.testing.assert_array_equal(before[0], after[0])
    assert len(np.unique(b.evaluations)) > 1  # though the others take other steps


def test_chunks_and_batches_of_one():
    """To rounding: batched products of another size may add up in another order."""
    x = draw(4)
    whole = solve(x, COARSE)
    for other in (solve(x, COARSE, chunk_size=3), solve(x[:1], COARSE)):
        mine = slice(len(other.log_prob))
        np.testing.assert_allclose(other.log_prob, whole.log_prob[mine], rtol=1e-5)
        np.testing.assert_array_equal(other.evaluations, whole.evaluations[mine])


def test_what_does_not_reach_the_end_is_nan_alone():
    """A condition makes the second example's flow wiggle, too fast for the steps allowed."""
    p = reverse.Reverse(
        lambda x_t, log_snr, condition: jnp.sin(condition[:, None] * x_t) + x_t, "eps"
    )
    x, condition = np.full((2, 1), 0.5, np.float32), np.array([0.0, 300.0], np.float32)
    model, solver = between(p, 5.0, -5.0), Adaptive(max_steps=60)
    result = jax.jit(lambda c: likelihood.log_prob(model.given(c), x, solver))(condition)
    np.testing.assert_array_equal(np.isnan(result.log_prob), [False, True])
    np.testing.assert_array_equal(np.isnan(result.solver_error), [False, True])


def test_images():
    """[b, h, w, c]: the normal in another shape, by the exact trace and by probes."""

    def denoiser(x_t, log_snr, condition=None):
        return NORMAL.denoiser(x_t.reshape(-1, 3), log_snr).reshape(x_t.shape)

    @jax.jit
    def log_prob(x, probes=None):
        model = between(reverse.Reverse(denoiser, "x_0"), LOG_SNR_MAX, LOG_SNR_MIN)
        return likelihood.log_prob(model, x, FixedGrid(32), probes).log_prob

    x, probes = draw(5), rademacher(5, 1, 3)
    base, matrix = of_normal(x)
    by_probe = base + np.einsum("bi,ij,bj->b", probes[:, 0], matrix, probes[:, 0])
    image = x.reshape(5, 1, 3, 1)
    np.testing.assert_allclose(log_prob(image), log_prob_of_normal(x), atol=1e-3)
    probed = log_prob(image, probes.reshape(5, 1, 1, 3, 1))
    np.testing.assert_allclose(probed, by_probe, atol=1e-3)


@pytest.mark.parametrize("method", ["heun", "tsit5", "dopri8"])
def test_error_falls_at_the_order_and_is_reported(method, float64):
    """The report is the difference to half the grid over 2ᵖ − 1.

    It is the error just where half the grid's error is 2ᵖ times as large.
    """
    x = draw(4, dtype=np.float64)
    result = solve(x, FixedGrid({"heun": 128, "tsit5": 64, "dopri8": 32}[method], method))
    error = np.abs(result.log_prob - log_prob_of_normal(x))
    # One power of h beyond the leading one is left at these steps.
    np.testing.assert_allclose(np.log2(result.solver_error.mean() / error.mean()), 0, atol=0.8)


def test_adaptive_error_follows_the_tolerance(float64):
    x = draw(6, dtype=np.float64)
    evaluations = []
    for tolerance in (1e-6, 1e-8):
        result = solve(x, Adaptive(tolerance, tolerance))
        error = np.abs(result.log_prob - log_prob_of_normal(x))
        # The tolerance is of a step and a dimension; the coarser solve's is ten times that.
        assert np.all(error < 20 * tolerance)
        assert np.all(result.solver_error < 200 * tolerance)
        # One example's two errors may happen to agree, and their difference be small.
        assert error.mean() < result.solver_error.mean()
        evaluations.append(result.evaluations.mean())
    # At order five a hundredth of the tolerance takes 100^(1/5) = 2.5 times the steps.
    assert evaluations[1] / evaluations[0] == pytest.approx(2.5, rel=0.3)


@pytest.mark.parametrize("solver", [FixedGrid(8, "heun"), FixedGrid(4, "dopri8"), Adaptive()])
def test_evaluations_are_those_made(solver):
    calls = []

    def denoiser(x_t, log_snr, condition=None):
        jax.debug.callback(lambda _: calls.append(1), log_snr)
        return NORMAL.denoiser(x_t, log_snr)

    model = between(reverse.Reverse(denoiser, "x_0"), 2.0, -2.0)
    result = likelihood.log_prob(model, draw(1), solver, rademacher(1, 4, 3))
    jax.effects_barrier()
    assert result.evaluations.tolist() == [(1 + 4) * len(calls)]


@pytest.mark.parametrize("num_steps", [0, 1, 7])
def test_a_grid_is_halved(num_steps):
    with pytest.raises(ValueError, match=f"num_steps = {num_steps}; it must be even"):
        FixedGrid(num_steps).coarser()


def test_without_diffrax(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match="package diffrax"):
        likelihood.log_prob(problems.without_decoder(problems.imperfect()), draw(1), COARSE)
