"""Samplers that solve the probability flow: their order, and what they are special cases of."""

import functools

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import schedules
from diffusion.exact import distributions
from diffusion.reverse import Reverse
from diffusion.samplers import base, ddpm, registry, solvers, unipc
from diffusion.samplers.treatments import X_0_TREATMENTS
from diffusion.schedules import Step, alpha
from tests.diffusion import problems

pytestmark = pytest.mark.usefixtures("quick_compiles")

MIXTURE = distributions.Mixture(
    np.array([0.5, 0.3, 0.2]),
    np.array([[-1.2], [0.4], [1.5]]),
    np.array([[[0.09]], [[0.2]], [[0.05]]]),
)
OF_MIXTURE = problems.without_decoder(Reverse(MIXTURE.denoiser, "x_0"))
NOISE = np.random.default_rng(0).normal(size=(40, 13, 3)).astype(np.float32)


def solve(sampler, num_steps, x, log_snr=(-5.0, 3.0)):
    """From one log-SNR to another in equal steps, without the last one to the data."""
    gap = (log_snr[1] - log_snr[0]) / num_steps
    ones = jnp.ones(len(x))

    def advance(state, i):
        step = Step((log_snr[0] + i * gap) * ones, gap * ones)
        return base.State(*sampler.step(state.history, state.x, step, lambda k: 0.0 * x)), None

    steps = jnp.arange(num_steps, dtype=float)
    return jax.jit(lambda: jax.lax.scan(advance, base.start(sampler, x), steps)[0].x)()


# Every grid of the order tests is part of this one. The second has steps of ratio 2 : 1 in turn.
FINE = np.linspace(-5.0, 3.0, 481)
SIZES = (40, 80, 160)
GRIDS = {
    "uniform": lambda n: np.linspace(0, 480, n + 1).astype(int),
    "alternating": lambda n: 320 // n * (np.arange(n + 1) + (np.arange(n + 1) + 1) // 2),
}


@functools.cache
def true_path():
    """The flow at every level of FINE, by a method of order eight at a tolerance of 1e-12."""

    def velocity(log_snr, x, _):
        a = alpha(log_snr)
        return 0.5 * a * (MIXTURE.denoiser(x, jnp.full(len(x), log_snr)) - a * x)

    return diffrax.diffeqsolve(
        diffrax.ODETerm(velocity),
        diffrax.Dopri8(),
        FINE[0],
        FINE[-1],
        0.01,
        jnp.linspace(-2.0, 2.0, 9)[:, None],
        saveat=diffrax.SaveAt(ts=jnp.asarray(FINE)),
        stepsize_controller=diffrax.PIDController(rtol=1e-12, atol=1e-12),
    ).ys


def slope(sampler, kind, warm):
    """− d log error/d log steps, by regression.

    At the first `warm` levels x is put on the true path, so that the history is exact.
    """
    truth, log_snr = true_path(), jnp.asarray(FINE)
    ones = jnp.ones(truth.shape[1])

    def error(at, n):
        def advance(state, i):
            t, s = log_snr[at[i]], log_snr[at[i + 1]]
            x = jnp.where(i <= warm, truth[at[i]], state.x)
            step = Step(t * ones, jnp.where(i < n, s - t, 1.0) * ones)
            after = base.State(*sampler.step(state.history, x, step, lambda k: 0.0 * x))
            return jax.tree.map(lambda new, old: jnp.where(i < n, new, old), after, state), None

        start = base.start(sampler, truth[0])
        end = jax.lax.scan(advance, start, jnp.arange(SIZES[-1]))[0].x
        return jnp.abs(end - truth[-1]).mean()

    grids = [np.pad(GRIDS[kind](n), (0, SIZES[-1] - n), mode="edge") for n in SIZES]
    errors = jax.jit(jax.vmap(error))(jnp.asarray(np.stack(grids)), jnp.asarray(SIZES))
    return -np.polyfit(np.log(SIZES), np.log(errors), 1)[0]


@pytest.mark.parametrize("kind", list(GRIDS))
@pytest.mark.parametrize(
    ("name", "options", "order", "warm"),
    [
        ("ddim", {}, 1, 0),
        ("euler", {}, 1, 0),
        ("heun", {}, 2, 0),
        ("dpm_solver_pp_2m", {}, 2, 1),
        ("dpm_solver_pp_3m", {}, 3, 2),
        ("dpm_solver_pp_3m_published", {}, 2, 2),
        # The corrector gains an order over the predictor's, which is `order`.
        ("unipc", {"order": 1, "variant": "bh1"}, 2, 1),
        ("unipc", {"order": 1, "variant": "bh2"}, 2, 1),
        ("unipc", {"order": 2, "variant": "bh1"}, 3, 2),
        ("unipc", {"order": 2, "variant": "bh2"}, 3, 2),
        ("unipc", {"order": 3}, 4, 3),
    ],
)
def test_errors_fall_at_the_nominal_order(name, options, order, warm, kind, float64):
    """On a mixture, started exactly; 3M as published has order two, for all its three levels."""
    sampler = registry.SAMPLERS[name](OF_MIXTURE, **options)
    assert slope(sampler, kind, warm) == pytest.approx(order, abs=0.3)


def test_exponential_moments_are_the_closed_forms(float64):
    """∫ e^{−(h − τ)} (τ/h)^i dτ: I_0 = 1 − e^{−h}, and I_i = 1 − i I_{i−1}/h by parts."""
    h = jnp.array([0.5, 1.0, 3.0, 10.0, 20.0, 40.0])
    closed = -jnp.expm1(-h)
    for i, moment in enumerate(solvers.exact_moments(h, 3), 1):
        closed = 1 - i * closed / h
        np.testing.assert_allclose(moment, closed, rtol=1e-11)
    # At small h, where the closed forms cancel, I_i = h/(i + 1) (1 − h/(i + 2) + …).
    small = jnp.array([1e-8, 1e-6])
    for i, moment in enumerate(solvers.exact_moments(small, 3), 1):
        np.testing.assert_allclose(moment, small / (i + 1) * (1 - small / (i + 2)), rtol=1e-11)


def test_moments_keep_their_digits_in_single_precision():
    h = np.float32([2e-5, 1e-3, 0.1, 5.0])
    with jax.enable_x64(True):
        expected = solvers.exact_moments(jnp.asarray(h, jnp.float64), 3)
    for single, double in zip(solvers.exact_moments(jnp.asarray(h), 3), expected, strict=True):
        assert single.dtype == jnp.float32
        np.testing.assert_allclose(single, double, rtol=1e-6)


def test_flow_carries_the_mixtures_quantiles(float64):
    """In one dimension a flow keeps order: x goes to the same quantile at the other end."""
    x = jnp.linspace(-1.5, 1.5, 7)[:, None]
    solver = solvers.dpm_solver_pp_2m(OF_MIXTURE)
    end = solve(solver, 2000, x)

    def below(x, log_snr):
        grid = np.linspace(-12, 0, 6001) + np.asarray(x)
        density = np.exp(MIXTURE.noised_log_prob(grid.reshape(-1, 1), np.full(grid.size, log_snr)))
        return np.trapezoid(density.reshape(grid.shape), grid, axis=1)

    np.testing.assert_allclose(below(x, -5.0), below(end, 3.0), atol=2e-5)


def draw(name, levels, rows=40, record=(1, 5), **options):
    data = distributions.normal(np.full(3, 0.3), np.diag([0.5, 1.0, 0.1]))
    model = problems.without_decoder(problems.predicting(data, "v"))
    sampler = registry.SAMPLERS[name](model, **options)
    noise = problems.tabulated(NOISE, np.arange(rows))
    return jax.jit(lambda: base.sample(sampler, levels, noise, rows, record))()


def same(one, other):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4)


def test_ddim_with_all_its_noise_is_ancestral_sampling():
    levels = schedules.cosine(100).levels(12)
    same(draw("ddim", levels, eta=1.0), draw("ancestral", levels))


def test_euler_is_deterministic_ddim():
    levels = schedules.cosine(100).levels(12)
    same(draw("euler", levels), draw("ddim", levels))


def test_the_sde_solver_is_ancestral_sampling_at_first_order():
    """With two levels there is one step with nothing to extrapolate from, and one to the data."""
    levels = schedules.cosine(100).levels(2)
    same(*(draw(name, levels, record=(1, 2)) for name in ("dpm_solver_pp_2m_sde", "ancestral")))


@pytest.mark.parametrize("name", list(registry.SAMPLERS))
def test_evaluations_are_the_networks(name):
    calls = []

    def denoiser(x_t, log_snr, condition=None):
        jax.debug.callback(lambda level: calls.append(level), log_snr)
        return jnp.tanh(x_t)

    levels = schedules.cosine(100).levels(5)
    sampler = registry.SAMPLERS[name](problems.without_decoder(Reverse(denoiser, "x_0")))
    noise = problems.tabulated(NOISE, np.arange(1))
    made = jax.jit(lambda: base.sample(sampler, levels, noise, 1))()
    jax.effects_barrier()
    assert made.evaluations.tolist() == [len(calls)]


MEAN, VARIANCE = 0.3, 0.5
NORMAL = distributions.normal(np.array([MEAN]), np.array([[VARIANCE]]))
OF_NORMAL = problems.without_decoder(Reverse(NORMAL.denoiser, "x_0"))


def moments(name, levels, **options):
    """Mean and variance of x_0, from x_T as it is: every row has the noise of one draw alone.

    Row 0 has none, row 1 that of x_T, and row t + 1 that of the step from t.
    """
    last = levels.num_timesteps
    rows = np.arange(last + 2)
    sampler = registry.SAMPLERS[name](OF_NORMAL, **options)
    a = levels.alpha_bar[last] ** 0.5
    x_T = a * MEAN + np.where(rows == 1, (a**2 * VARIANCE + levels.sigma2[last]) ** 0.5, 0.0)

    def noise(t):
        return jnp.where(rows == t + 2, 1.0, 0.0)[:, None]

    x_0 = jax.jit(
        lambda: base.sample(sampler, levels, noise, last + 2, x_T=x_T[:, None]).x_0[:, 0]
    )()
    return float(x_0[0]), float(((x_0[1:] - x_0[0]) ** 2).sum())


def churned_variance(name, levels, churn=0.0, low=0.0, high=np.inf, churn_noise=1.0):
    """Of x_0: a step multiplies y − m, whose slope is dy/dσ̃ = g(σ̃) (y − m), g = σ̃/(v + σ̃²)."""
    sigmas = np.exp(-0.5 * levels.log_snr)  # σ̃, falling to 0 at the data
    variance = VARIANCE + sigmas[-1] ** 2
    for t in range(levels.num_timesteps, 0, -1):
        up = sigmas[t] * (1 + churn * (low <= sigmas[t] <= high))
        variance += churn_noise**2 * (up**2 - sigmas[t] ** 2)
        here, there = (s / (VARIANCE + s**2) for s in (up, sigmas[t - 1]))
        change = (sigmas[t - 1] - up) * here
        if name == "heun" and t > 1:
            change = 0.5 * (change + (sigmas[t - 1] - up) * there * (1 + change))
        variance *= (1 + change) ** 2
    return variance


@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize(("low", "high"), [(0.0, np.inf), (0.1, 5.0)])
def test_churned_samples_have_the_variance_of_a_linear_recursion(name, low, high, float64):
    levels = schedules.linear_log_snr(7.0, -7.0).levels(20)
    options = {"churn": 0.3, "churn_min": low, "churn_max": high, "churn_noise": 1.05}
    mean, variance = moments(name, levels, **options)
    assert mean == pytest.approx(MEAN, abs=1e-9)
    expected = churned_variance(name, levels, 0.3, low, high, 1.05)
    assert variance == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "churn", "order"),
    [("euler", 5.0, 1), ("heun", 5.0, 2), ("dpm_solver_pp_2m_sde", 0, 2)],
)
def test_samplers_with_noise_tend_to_the_variance_of_the_data(name, churn, order, float64):
    """With S_churn = 5 over T steps; the limit is that of x̂_0 at λ_1, v − e^{−λ_1} and less."""
    variances = []
    for num_timesteps in (100, 200, 400):
        levels = schedules.linear_log_snr(12.0, -8.0).levels(num_timesteps)
        options = {"churn": churn / num_timesteps} if churn else {}
        mean, variance = moments(name, levels, **options)
        assert mean == pytest.approx(MEAN, abs=1e-9)
        variances.append(variance)
    first, second = np.diff(variances)
    assert np.log2(first / second) == pytest.approx(order, abs=0.15)
    # Extrapolated by its own order, half of the next one's error is left.
    extrapolated = variances[-1] + second / (2**order - 1)
    assert extrapolated == pytest.approx(VARIANCE, abs=0.1 * abs(second))


@pytest.mark.parametrize("churn", [-0.1, 0.42])
def test_churn_out_of_range(churn):
    for name in ("euler", "heun"):
        with pytest.raises(ValueError, match=f"churn = {churn}"):
            registry.SAMPLERS[name](OF_NORMAL, churn=churn)


@pytest.mark.parametrize(
    ("options", "message"), [({"order": 4}, "order = 4"), ({"variant": "bh3"}, "'bh3'.*bh1, bh2")]
)
def test_unipc_of_no_such_kind(options, message):
    with pytest.raises(ValueError, match=message):
        unipc.unipc(OF_NORMAL, **options)


def ends_with_a_draw_shifted(make, draws):
    """x_0 after three steps with draw k of each step shifted, for each k; the first noise stays."""
    levels = schedules.cosine(100).levels(3)
    data = distributions.normal(np.zeros(3), np.eye(3))
    sampler = make(problems.without_decoder(problems.predicting(data, "eps")))

    def end(shifted):
        def noise(t):
            shift = (t[0] != 3) & (t[0] // 4 == shifted)
            return NOISE[:4, 0] + jnp.where(shift, 1.0, 0.0)

        return base.sample(sampler, levels, noise, 4).x_0

    return jax.jit(jax.vmap(end))(jnp.asarray(draws))


NUM_DRAWS = {name: make(OF_NORMAL).num_draws for name, make in registry.SAMPLERS.items()}


@pytest.mark.parametrize("name", [name for name, draws in NUM_DRAWS.items() if not draws])
def test_deterministic_samplers_take_no_noise_but_the_first(name):
    ends = ends_with_a_draw_shifted(registry.SAMPLERS[name], [-1, 0])
    np.testing.assert_array_equal(*ends)


@pytest.mark.parametrize("name", [name for name, draws in NUM_DRAWS.items() if draws])
def test_samplers_take_as_many_noises_as_they_say(name):
    """Each draw that num_draws announces changes something, and the next one nothing."""
    ends = ends_with_a_draw_shifted(registry.SAMPLERS[name], range(-1, NUM_DRAWS[name] + 1))
    for end in ends[1:-1]:
        assert np.abs(end - ends[0]).max() > 1e-3
    np.testing.assert_array_equal(ends[-1], ends[0])


@pytest.mark.parametrize("name", ["euler", "heun"])
def test_churn_takes_one_noise(name):
    make = functools.partial(registry.SAMPLERS[name], churn=0.2)
    assert make(OF_NORMAL).num_draws == 1
    ends = ends_with_a_draw_shifted(make, [-1, 0, 1])
    assert np.abs(ends[1] - ends[0]).max() > 1e-3
    np.testing.assert_array_equal(ends[2], ends[0])


@pytest.mark.parametrize("name", list(registry.SAMPLERS))
@pytest.mark.parametrize("num_timesteps", [1, 2])
def test_few_steps_are_finite_and_end_in_the_last_prediction(name, num_timesteps):
    levels = schedules.linear_log_snr(20.0, -20.0).levels(num_timesteps)
    data = distributions.normal(np.zeros(3), np.eye(3))
    model = problems.without_decoder(problems.predicting(data, "x_0"))
    noise = problems.tabulated(NOISE, np.arange(4))
    made = base.sample(registry.SAMPLERS[name](model), levels, noise, 4, (1,))
    assert np.all(np.isfinite(made.x_0))
    np.testing.assert_allclose(made.x_0, made.x_0_hat[0], rtol=1e-6)


def test_dynamic_thresholding_is_of_each_example_alone():
    """Within [−1, 1] nothing changes; beyond, the quantile becomes 1 and what exceeds it too."""
    x = np.stack([np.linspace(-0.9, 0.9, 201), np.linspace(-4.0, 4.0, 201)]).astype(np.float32)
    clipped = np.asarray(X_0_TREATMENTS["dynamic"](x.reshape(2, 67, 3)))
    clipped = clipped.reshape(2, 201)
    np.testing.assert_array_equal(clipped[0], x[0])
    size = np.quantile(np.abs(x[1]), 0.995)
    np.testing.assert_allclose(clipped[1], np.clip(x[1] / size, -1, 1), rtol=1e-5)
    assert np.abs(clipped[1]).max() == 1


def decode(model, x_T, levels):
    def noise(t):
        return jnp.where(t[0] == levels.num_timesteps, 1.0, 0.0) * x_T

    return base.sample(ddpm.ddim(model), levels, noise, len(x_T)).x_0


def test_an_encoded_sample_is_decoded_to_itself(float64):
    """Each step is inverted to rounding once the iteration has converged; the first one is not."""
    x_0 = jnp.linspace(-1.8, 1.8, 13)[:, None]
    levels = schedules.linear_log_snr(12.0, -8.0).levels(200)
    model = OF_MIXTURE._replace(levels=levels)

    def error(iterations):
        x_T = ddpm.ddim_encode(model, x_0, iterations)
        return float(jnp.abs(jax.jit(lambda: decode(model, x_T, levels))() - x_0).max())

    explicit, converged = error(1), error(8)
    # x̂_0(x_1) misses x_0 by σ_1² times a score of order ten.
    assert converged < 10 * np.exp(-12.0)
    assert explicit > 10 * converged


def test_encoded_data_are_normal_noise():
    """Samples of the mixture, carried to λ = −8 by the flow, have the moments of N(0, 1)."""
    x_0 = MIXTURE.sample(jax.random.key(0), 4000)
    model = OF_MIXTURE._replace(levels=schedules.linear_log_snr(10.0, -8.0).levels(100))
    x_T = np.asarray(jax.jit(lambda: ddpm.ddim_encode(model, x_0))(), np.float64)
    # Of 4000 draws, and of a first-order solver at 100 steps.
    assert x_T.mean() == pytest.approx(0, abs=0.08)
    assert x_T.std() == pytest.approx(1, abs=0.06)
    assert np.mean(x_T**4) == pytest.approx(3, abs=0.5)
