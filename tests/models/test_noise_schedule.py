"""The learned schedule: a falling function with exact ends, and what each gradient reaches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion.learned_schedule import diffusion_term, value_and_slope, variance_surrogate
from models.noise_schedule import NoiseSchedule, tabulate
from tests.diffusion.oracles import EPS32

MAX, MIN, FEATURES = 10.0, -6.0, 32
WIDTH = MAX - MIN
PINNED = NoiseSchedule(MAX, MIN, FEATURES)
TRAINED = NoiseSchedule(MAX, MIN, FEATURES, train_ends=True)
BOTH = pytest.mark.parametrize("net", [PINNED, TRAINED], ids=["pinned", "trained"])
END_NAMES = {"middle", "log_width"}


@functools.cache
def _initial(net):
    variables = jax.jit(net.init)(jax.random.key(0, impl="rbg"), jnp.zeros(1))
    return jax.tree.map(np.asarray, variables)


def initial(net):
    """The initial parameters, in the default precision."""
    return moved(net, size=0.0)


def recast(variables):
    """The same numbers in the default precision, which the `float64` fixture changes."""
    return jax.tree.map(lambda p: jnp.asarray(p, float), variables)


def moved(net, seed: int = 0, size: float = 1.0):
    """Random parameters, far enough from the initial ones to make steps and plateaus."""
    rng = np.random.default_rng(seed)
    return recast(jax.tree.map(lambda p: p + size * rng.normal(size=p.shape), _initial(net)))


def root_h(log_snr):
    """√h: a bump over a floor."""
    return 0.1 + jnp.exp(-0.5 * ((log_snr - 3) / 1.2) ** 2)


def midpoints(n: int):
    """Equally spaced times; the mean over them is the integral, to O(1/n²)."""
    return (jnp.arange(n) + 0.5) / n


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply(net, variables, time, method="__call__"):
    return net.apply(variables, time, method=method)


@functools.partial(jax.jit, static_argnums=(0, 3))
def derivatives(net, variables, time, order: int = 1):
    """λ and its derivatives in time up to an order."""

    def derivative(order):
        if order == 0:
            return lambda time: net.apply(variables, time)
        return lambda time: value_and_slope(derivative(order - 1), time)[1]

    return [derivative(n)(jnp.asarray(time)) for n in range(order + 1)]


@BOTH
@pytest.mark.parametrize("size", [0.0, 1.0, 3.0])
def test_the_log_snr_falls_strictly(float64, net, size):
    variables = moved(net, size=size)
    time = jnp.linspace(0, 1, 10_001)
    log_snr, slope = derivatives(net, variables, time)
    assert np.diff(log_snr).max() < 0
    assert slope.max() < 0


@pytest.mark.parametrize("size", [0.0, 1.0, 3.0])
def test_float32_falls_to_rounding(size):
    log_snr, slope = derivatives(PINNED, moved(PINNED, size=size), jnp.linspace(0, 1, 4001))
    # A rise from the nearer end is a sum of positive terms: its relative error is their number.
    assert np.diff(log_snr).max() <= FEATURES * EPS32 * WIDTH
    assert slope.max() < 0


@BOTH
@pytest.mark.parametrize("batch", [2, 7, 64])
def test_ends_are_exact(net, batch):
    """To the last bit in float32, wherever in a batch they are; at first they are the settings.

    Pinned ends are no parameters, so that nothing moves them, and a compiled program has them too.
    """
    assert bool(END_NAMES & set(initial(net)["params"])) == net.train_ends
    np.testing.assert_allclose(net.apply(initial(net), method="ends"), (MAX, MIN), rtol=4 * EPS32)
    time = np.resize(np.array([0.0, 1.0], np.float32), batch)
    for seed in range(3):
        variables = moved(net, seed)
        ends = np.resize(np.array(net.apply(variables, method="ends")), batch)
        np.testing.assert_array_equal(net.apply(variables, time), ends)
        if not net.train_ends:
            np.testing.assert_array_equal(apply(net, variables, time), ends)
            np.testing.assert_array_equal(ends, np.resize([MAX, MIN], batch))


@pytest.mark.parametrize("log_width", [-8.0, 0.0, 3.0])
def test_trained_ends_stay_apart(log_width):
    params = initial(TRAINED)["params"] | {"log_width": jnp.asarray(log_width)}
    max, min = TRAINED.apply({"params": params}, method="ends")
    # The middle is 2: an end is rounded to EPS32 of itself.
    np.testing.assert_allclose(max - min, np.exp(log_width), rtol=1e-5, atol=4 * EPS32)
    assert max > min


@pytest.mark.parametrize(
    ("features", "tolerance"), [(1, 0.006), (2, 0.006), (8, 0.006), (32, 3e-5), (64, 1e-7)]
)
def test_the_initial_schedule_is_linear(float64, features, tolerance):
    net = NoiseSchedule(MAX, MIN, features)
    time = jnp.linspace(0, 1, 1001)
    error = apply(net, initial(net), time) - (MAX - WIDTH * time)
    assert np.abs(error).max() < tolerance * WIDTH


def test_every_unit_can_learn_from_the_start():
    def loss(variables):
        def schedule_fn(time):
            return PINNED.apply(variables, time)

        return variance_surrogate(schedule_fn, time, root_h(schedule_fn(time))).mean()

    time = midpoints(256)
    for leaf in jax.tree.leaves(jax.jit(jax.grad(loss))(initial(PINNED))):
        assert np.abs(leaf).min() > 0


@pytest.mark.parametrize("size", [1.0, 2.0])
def test_slope_is_the_derivative(float64, size):
    variables = moved(PINNED, size=size)
    time, h = midpoints(200), 1e-5
    _, slope, _, _ = derivatives(PINNED, variables, time, 3)
    _, _, _, third = derivatives(PINNED, variables, jnp.linspace(0, 1, 2001), 3)
    after, before = apply(PINNED, variables, time + h), apply(PINNED, variables, time - h)
    # Central differences are off by h²/6 times the third derivative, and by 1e-15 |λ|/h.
    tolerance = h**2 * np.abs(third).max() / 6 + 1e-8
    np.testing.assert_allclose((after - before) / (2 * h), slope, rtol=0, atol=tolerance)


def test_a_wide_schedule_has_finite_gradients():
    net = NoiseSchedule(20.0, -20.0, FEATURES, train_ends=True)
    variables = moved(net, size=3.0)

    def loss(variables):
        time = jnp.linspace(0, 1, 257)
        log_snr, slope = net.apply(variables, time, method="ends_only")
        half_error = jax.nn.sigmoid(log_snr)
        surrogate = variance_surrogate(
            lambda u: net.apply(variables, u, method="interior_only"), time, half_error
        )
        return diffusion_term(slope, half_error).mean() + surrogate.mean()

    value, gradient = jax.jit(jax.value_and_grad(loss))(variables)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((value, gradient)))


def test_table_is_the_network():
    variables = moved(TRAINED)
    table = tabulate(TRAINED.apply, variables, num_knots=1025)
    assert table.knots.dtype == np.float64
    fine = np.linspace(0, 1, 16 * 1024 + 1)
    with jax.enable_x64(True):
        double = recast(variables)
        max, min = TRAINED.apply(double, method="ends")
        log_snr, _, curvature = map(np.asarray, derivatives(TRAINED, double, fine, 2))
    assert table.knots[0] == float(max)
    assert table.knots[-1] == float(min)
    np.testing.assert_allclose(table.knots, log_snr[::16], rtol=0, atol=1e-13 * WIDTH)
    # Linear interpolation is off by at most |λ''| Δ²/8; its maximum over a grid is a little low.
    between = np.interp(fine, np.linspace(0, 1, 1025), table.knots)
    error = np.abs(between - log_snr).max()
    assert error < 1.05 * np.abs(curvature).max() / (8 * 1024**2)


def test_levels_of_a_table_have_true_gaps():
    variables = moved(PINNED)
    gap = tabulate(PINNED.apply, variables).levels(2**20 + 1).gap
    with jax.enable_x64(True):
        double = recast(variables)
        fine = np.linspace(0, 1, 2**14 + 1)
        _, slope, curvature = map(np.asarray, derivatives(PINNED, double, fine, 2))
    # The slope of a piece is the network's somewhere in it: at most a knot away.
    tolerance = 1.05 * np.abs(curvature).max() / 2**16
    np.testing.assert_allclose(gap[2::64] * 2**20, -slope[:-1], rtol=0, atol=tolerance)


def test_a_knot_for_each_level_is_the_network_at_each_level():
    table = tabulate(PINNED.apply, moved(PINNED), num_knots=100)
    np.testing.assert_array_equal(table.levels(100).log_snr[1:], table.knots)


def test_an_invalid_table_is_refused():
    with pytest.raises(ValueError, match=r"num_knots = 1; .* two ends"):
        tabulate(PINNED.apply, initial(PINNED), num_knots=1)
    with pytest.raises(ValueError, match="fall strictly"):
        tabulate(lambda params, time: params * time, jnp.ones(()), num_knots=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max": -1.0, "min": 2.0}, r"schedule.learned.max = -1.0; it must exceed .*min = 2.0"),
        ({"max": 2.0, "min": 2.0}, r"schedule.learned.max = 2.0; it must exceed"),
        ({"max": float("inf")}, r"schedule.learned.max = inf; it must be finite"),
        ({"min": float("nan")}, r"schedule.learned.min = nan; it must be finite"),
        ({"features": 0}, r"schedule.learned.features = 0; it must be at least 1"),
    ],
)
def test_validate(settings, message):
    net = NoiseSchedule(**settings)
    with pytest.raises(ValueError, match=message):
        net.validate()
    with pytest.raises(ValueError, match=message):
        initial(net)


def losses(net, params, time):
    """A training step's two losses; the denoiser is the number `params["denoiser"]`."""
    log_snr, slope = net.apply(params["schedule"], time, method="ends_only")
    half_error = params["denoiser"] * root_h(log_snr)

    def interior(time):
        return net.apply(params["schedule"], time, method="interior_only")

    bound = diffusion_term(slope, half_error).mean()
    return bound, variance_surrogate(interior, time, half_error).mean()


def by_part(gradient):
    """The gradients of the ends, of the interior and of the denoiser."""
    schedule = gradient["schedule"]["params"]
    ends = {name: leaf for name, leaf in schedule.items() if name in END_NAMES}
    interior = {name: leaf for name, leaf in schedule.items() if name not in END_NAMES}
    return ends, interior, gradient["denoiser"]


@BOTH
def test_bound_and_variance_train_different_parameters(net):
    params = {"schedule": moved(net), "denoiser": jnp.asarray(1.5)}
    time = midpoints(200)
    gradients = jax.jit(jax.jacrev(lambda p: losses(net, p, time)))(params)
    bound, variance = (by_part(gradient) for gradient in gradients)

    def all_zero(tree):
        return all(np.all(leaf == 0) for leaf in jax.tree.leaves(tree))

    def none_zero(tree):
        return all(np.any(leaf != 0) for leaf in jax.tree.leaves(tree))

    assert set(bound[0]) == (END_NAMES if net.train_ends else set())
    assert none_zero(bound[0])
    assert all_zero(bound[1])
    assert none_zero(bound[2])
    assert all_zero(variance[0])
    assert none_zero(variance[1])
    assert all_zero(variance[2])


def test_paths_have_one_value():
    variables, time = moved(TRAINED), midpoints(50)
    log_snr, slope = derivatives(TRAINED, variables, time)
    on_bound = apply(TRAINED, variables, time, "ends_only")
    on_variance = apply(TRAINED, variables, time, "interior_only")
    # Programs may round differently; sums of positive terms by their number at most.
    np.testing.assert_allclose(on_bound[0], log_snr, rtol=0, atol=FEATURES * EPS32 * WIDTH)
    np.testing.assert_allclose(on_variance, log_snr, rtol=0, atol=FEATURES * EPS32 * WIDTH)
    np.testing.assert_allclose(on_bound[1], slope, rtol=FEATURES * EPS32)


def test_gradient_of_trained_ends_is_the_boundary_terms(float64):
    """d/dmax ∫ e dλ = e(max) and d/dmin = −e(min), though each draw moves every λ(u)."""
    schedule = moved(TRAINED)
    params = {"schedule": schedule, "denoiser": jnp.asarray(1.0)}
    bound = jax.jit(jax.grad(lambda p: losses(TRAINED, p, midpoints(2**14))[0]))(params)
    ends, _, _ = by_part(bound)
    max, min = TRAINED.apply(schedule, method="ends")
    # max and min are middle ± ½ width. The tolerance is the midpoint rule's.
    at_max, at_min = root_h(max), root_h(min)
    expected = {"middle": at_max - at_min, "log_width": 0.5 * (max - min) * (at_max + at_min)}
    for name in END_NAMES:
        np.testing.assert_allclose(ends[name], expected[name], rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def trained():
    """Parameters after 300 steps of Adam on stratified draws, in float32."""
    optimizer = optax.adam(0.03)

    def step(state, key):
        variables, moments = state
        time = (jax.random.uniform(key) + jnp.arange(128)) / 128

        def loss(variables):
            params = {"schedule": variables, "denoiser": jnp.asarray(1.0)}
            return losses(PINNED, params, time)[1]

        updates, moments = optimizer.update(jax.grad(loss)(variables), moments)
        return (optax.apply_updates(variables, updates), moments), None

    variables = initial(PINNED)
    keys = jax.random.split(jax.random.key(0), 300)
    state = (variables, optimizer.init(variables))
    return jax.jit(lambda state, keys: jax.lax.scan(step, state, keys)[0][0])(state, keys)


def moments_of_a_draw(variables):
    """E[L] and E[L²] over uniform u, by quadrature."""
    log_snr, slope = derivatives(PINNED, variables, midpoints(2**14))
    draws = diffusion_term(slope, root_h(log_snr))
    return float(draws.mean()), float((draws**2).mean())


def test_training_reaches_the_least_variance(float64, trained):
    log_snr = jnp.linspace(MIN, MAX, 100_001)
    integral = float(jnp.trapezoid(root_h(log_snr), log_snr))
    _, before = moments_of_a_draw(initial(PINNED))
    _, after = moments_of_a_draw(recast(trained))
    assert before > 2 * integral**2
    # Cauchy–Schwarz: E[L²] ≥ (∫ √h dλ)².
    assert integral**2 * (1 - 1e-9) < after < 1.02 * integral**2


def test_training_leaves_the_mean_alone(float64, trained):
    log_snr = jnp.linspace(MIN, MAX, 100_001)
    integral = float(jnp.trapezoid(root_h(log_snr), log_snr))
    for variables in (initial(PINNED), recast(trained)):
        np.testing.assert_allclose(moments_of_a_draw(variables)[0], integral, rtol=1e-6)


def test_each_noise_level_gets_time_in_proportion_to_root_h(float64, trained):
    """The share of time between two log-SNRs is that of ∫ √h dλ."""
    knots = tabulate(PINNED.apply, trained).knots
    log_snr = np.linspace(MIN, MAX, 17)
    time = np.interp(log_snr, knots[::-1], np.linspace(1, 0, len(knots)))
    fine = np.linspace(MIN, MAX, 16 * 1000 + 1)
    values = np.asarray(root_h(fine))
    area = np.concatenate([[0.0], np.cumsum(0.5 * (values[1:] + values[:-1]))])[::1000]
    # r = |λ'| √h/∫ √h dλ has mean one over u, and a variance below 0.02 by the test above. The
    # share of the area up to u is ∫_0^u r, which is off u by at most sd(r) √(u(1 − u)).
    np.testing.assert_allclose(1 - time, area / area[-1], rtol=0, atol=0.5 * np.sqrt(0.02))
