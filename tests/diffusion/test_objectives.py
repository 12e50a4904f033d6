"""Losses: weightings of the per-timestep KL, unbiased for their sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import bound, decoders, forward, objectives, reverse, schedules
from diffusion.model import DiffusionModel
from diffusion.reverse import Reverse
from tests.diffusion import problems

pytestmark = pytest.mark.usefixtures("quick_compiles")

QUANTIZATION = decoders.Quantization(17)
NUM_TIMESTEPS = 6
LEVELS = schedules.linear_log_snr(5.0, -5.0).levels(NUM_TIMESTEPS)
RNG = np.random.default_rng(0)
X_0 = np.asarray(QUANTIZATION.to_data(RNG.integers(0, 17, (3, 2, 2, 1))))
TABLE = RNG.normal(size=(3, NUM_TIMESTEPS + 1, 2, 2, 1)).astype(np.float32)


def total(loss):
    return loss.term + loss.rest


def network(theta, name="eps", variance="beta_tilde", decoder="categorical"):
    reverse = Reverse(lambda x, l, condition=None: jnp.tanh(theta * x), name, variance)
    return DiffusionModel(reverse, decoders.DECODERS[decoder](QUANTIZATION), LEVELS)


@pytest.mark.parametrize(
    ("decoder", "variance"), [("discretized_gaussian", "beta_tilde"), ("categorical", "beta")]
)
def test_expectation_of_vlb_over_all_timesteps_is_the_bound(decoder, variance):
    """With the noise of (example, t) fixed the mean over t = 1 … T is exactly the full sum."""
    model = network(0.5, "v", variance, decoder)

    @jax.jit
    def both():
        noise = problems.tabulated(TABLE, np.arange(3))

        def at(t):
            t = jnp.full(3, t)
            return total(objectives.vlb().discrete(model, X_0, noise(t), t))

        return jax.vmap(at)(jnp.arange(1, NUM_TIMESTEPS + 1)), bound.bound(model, X_0, noise)

    losses, whole = both()
    np.testing.assert_allclose(losses.mean(0), np.asarray(whole.total) / (4 * np.log(2)), rtol=2e-6)


def test_vlb_of_a_single_noisy_level_is_the_bound():
    levels = schedules.linear_beta(10, 0.1, 0.5).levels(1)
    model, eps = network(0.5)._replace(levels=levels), TABLE[:, 1]

    @jax.jit
    def both():
        whole = bound.bound(model, X_0, problems.constant(eps))
        return total(objectives.vlb().discrete(model, X_0, eps, np.ones(3, int))), whole.total

    loss, whole = both()
    np.testing.assert_allclose(loss, np.asarray(whole) / (4 * np.log(2)), rtol=1e-6)


@pytest.mark.parametrize("name", list(reverse.PARAMETERIZATIONS))
def test_simple_is_the_mean_squared_error_of_eps_and_the_kl_without_its_weight(name):
    """KL_t = w_t d L_simple, with Ho et al.'s weight w in α and β, whatever is predicted."""
    alpha_bar = 1 / (1 + np.exp(-LEVELS.log_snr[1:]))
    alpha = alpha_bar[1:] / alpha_bar[:-1]
    beta_tilde = (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:]) * (1 - alpha)
    weight = (1 - alpha) ** 2 / (2 * beta_tilde * alpha * (1 - alpha_bar[1:]))
    model = network(0.5, name)

    @jax.jit
    def losses(t):
        noise = problems.tabulated(TABLE, np.arange(3))
        eps, step = noise(t), LEVELS.step(t)
        x_t = forward.diffuse(X_0, step.log_snr, eps)
        return (
            objectives.simple().discrete(model, X_0, eps, t).term,
            bound.step_terms(model.reverse, X_0, eps, step).kl,
            (eps - model.reverse.predict("eps", x_t, step.log_snr)) ** 2,
        )

    for t in range(1, NUM_TIMESTEPS + 1):
        simple, kl, squared = (np.asarray(of, np.float64) for of in losses(np.full(3, t)))
        assert simple.shape == (3,)
        # Recovering ε̂ at λ = 5 costs e^5 roundings; the loss itself never does.
        np.testing.assert_allclose(simple, squared.mean((1, 2, 3)), rtol=2e-4)
        if t > 1:
            np.testing.assert_allclose(kl, weight[t - 2] * 4 * simple, rtol=1e-5)


@pytest.mark.parametrize(
    ("decoder", "variance"), [("categorical", "beta_tilde"), ("discretized_gaussian", "beta")]
)
def test_gradients_are_finite_at_every_timestep_and_those_of_the_terms(decoder, variance):
    """At t = 1 the gap is infinite, and the loss there is the reconstruction alone."""
    t = np.arange(1, NUM_TIMESTEPS + 1)
    rows = np.arange(NUM_TIMESTEPS) % 3
    x_0, eps = X_0[rows], TABLE[rows, t]

    @jax.jit
    @jax.jacrev
    def gradients(theta):
        model = network(theta, "v", variance, decoder)
        return (
            objectives.vlb().discrete(model, x_0, eps, t).term,
            objectives.simple().discrete(model, x_0, eps, t).term,
            bound.reconstruction(model, x_0[:1], eps[:1]),
        )

    vlb, simple, reconstruction = gradients(0.4)
    assert np.all(np.isfinite(vlb))
    assert np.all(np.isfinite(simple))
    assert np.all(np.asarray(simple) != 0)
    expected = NUM_TIMESTEPS * float(reconstruction[0]) / (4 * np.log(2))
    assert float(vlb[0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", list(objectives.OBJECTIVES))
def test_objectives_take_a_batch_of_one_in_any_shape(name):
    x_0 = np.zeros((1, 5, 3, 3), np.float32)
    reverse = Reverse(lambda x, l, condition=None: jnp.concatenate([x, x], axis=-1), "eps", "beta")
    model = network(1.0)._replace(reverse=reverse)
    objective = objectives.OBJECTIVES[name]()
    losses = [objective.discrete(model, x_0, x_0 + 1, np.ones(1, int))]
    if objective.continuous:
        at = np.zeros(1, np.float32)
        losses.append(objective.continuous(model, x_0, x_0 + 1, at, at - 3))
    for loss in losses:
        assert total(loss).shape == (1,)
        assert np.isfinite(total(loss)[0])


LOG_SNR = np.linspace(-20, 20, 41).astype(np.float32)


def weight_of(objective):
    """The factor of ‖ε − ε̂‖²/d at every λ: the loss of a model that is off by one."""
    x_0 = np.zeros((41, 2), np.float32)
    model = problems.without_decoder(Reverse(lambda x, l, condition=None: x_0 + 1, "eps"))
    return objective.continuous(model, x_0, x_0, LOG_SNR, np.full(41, -1.0, np.float32)).term


def test_weightings_are_the_published_ones():
    """On the squared error of ε; published on x_0's, times SNR, for three of them."""
    snr = np.exp(np.float64(LOG_SNR))
    published = {
        "simple": np.ones(41),
        "min_snr": np.minimum(snr, 5.0) / snr,
        "truncated": np.maximum(snr, 1.0) / snr,
        "p2": 1 / (1 + snr),
        # The bound's ½ a unit of log-SNR, for two dimensions, in bits/dim.
        "sigmoid": 1 / (1 + np.exp(LOG_SNR - 2.0)) / (2 * np.log(2)),
    }
    for name, expected in published.items():
        np.testing.assert_allclose(
            weight_of(objectives.OBJECTIVES[name]()), expected, rtol=2e-5, err_msg=name
        )
    np.testing.assert_allclose(
        weight_of(objectives.p2(k=0.3, gamma=1.5)), (0.3 + snr) ** -1.5, rtol=3e-5
    )
    np.testing.assert_allclose(
        weight_of(objectives.min_snr(1.0)), np.minimum(1 / snr, 1), rtol=1e-5
    )


def test_a_discrete_weighting_is_the_continuous_one_at_the_same_level():
    t = np.array([1, 3, 6])
    step, model = LEVELS.step(t), network(0.5, "v")
    for name in ("simple", "min_snr", "truncated", "p2"):
        objective = objectives.OBJECTIVES[name]()
        discrete = objective.discrete(model, X_0, TABLE[:, 1], t)
        continuous = objective.continuous(model, X_0, TABLE[:, 1], step.log_snr, -jnp.ones(3))
        np.testing.assert_allclose(discrete.term, continuous.term, rtol=1e-6)


def test_a_sigmoid_far_to_the_right_is_the_bound():
    args = network(0.5, "v"), X_0, TABLE[:, 2], np.array([2, 4, 6])
    np.testing.assert_allclose(
        objectives.sigmoid(40.0).discrete(*args).term,
        objectives.vlb().discrete(*args).term,
        rtol=1e-6,
    )
    assert np.all(objectives.sigmoid().discrete(*args[:3], np.ones(3, int)).term == 0)


def test_continuous_vlb_is_the_limit_of_the_discrete_one(float64):
    """Its mean over time, against the mean over t at T = 20 001: the gap falls as 1/T."""
    schedule = schedules.linear_log_snr(5.0, -5.0)
    model, eps = network(0.5, "v")._replace(levels=schedule.levels(20_001)), TABLE[:, 1]
    whole = jax.jit(lambda: bound.bound(model, X_0, problems.constant(eps), 500))()

    @jax.jit
    def loss(time):
        at = jnp.full(3, 1.0)
        log_snr, slope = schedule.log_snr(time * at), schedule.slope(time * at)
        return total(objectives.vlb().continuous(model, X_0, eps, log_snr, slope))

    mean = jax.lax.map(loss, (jnp.arange(2000) + 0.5) / 2000).mean(0)
    np.testing.assert_allclose(mean, np.asarray(whole.total) / (4 * np.log(2)), rtol=1e-3)


def test_hybrid_moves_the_mean_by_l_simple_and_the_variance_by_the_bound():
    """Gradients: of the mean, L_simple's; of the extra, 0.001 of the bound's; of each, not both."""
    t = np.array([1, 2, 5])

    def losses(objective):
        def of(mean, extra):
            def denoiser(x, l, condition=None):
                return jnp.concatenate([mean * x, extra + 0 * x], axis=-1)

            model = network(1.0)._replace(reverse=Reverse(denoiser, "eps", "learned_range"))
            return total(objective.discrete(model, X_0, TABLE[:, 1], t)).sum()

        return [float(g) for g in jax.jit(jax.grad(of, argnums=(0, 1)))(0.5, 0.2)]

    hybrid, simple, vlb = map(losses, (objectives.hybrid(), objectives.simple(), objectives.vlb()))
    assert hybrid[0] == pytest.approx(simple[0], rel=1e-5)
    assert hybrid[1] == pytest.approx(0.001 * vlb[1], rel=1e-4)
    assert simple[1] == 0
    assert vlb[0] != 0
