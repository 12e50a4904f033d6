"""Ancestral sampling of Gaussian data, whose exact moments a linear recursion gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import schedules
from diffusion.exact import distributions
from diffusion.reverse import Reverse
from diffusion.samplers import base, ddpm
from diffusion.samplers.treatments import treated
from tests.diffusion import oracles, problems

pytestmark = pytest.mark.usefixtures("quick_compiles")

MEAN, VARIANCE = 0.3, 0.5
TABLE = np.random.default_rng(0).normal(size=(5000, 13, 1)).astype(np.float32)
DATA = distributions.normal(np.array([MEAN], np.float32), np.array([[VARIANCE]], np.float32))


def recursion(levels, variance):
    """Mean and variance of x_{T−1} … x_1 and of x̂_0, in α and β."""
    chain, moments = oracles.from_betas(levels.beta[1:]), [(0.0, 1.0)]
    for t in range(levels.num_timesteps, 0, -1):
        after = oracles.ancestral_step(chain, t, variance, MEAN, VARIANCE, *moments[-1])
        moments.append(after)
    return np.array(moments[1:])


@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
@pytest.mark.parametrize("num_timesteps", [1, 2, 30])
def test_moments_of_samples_are_the_linear_recursions(num_timesteps, variance):
    """Row 0 has no noise at all and row j that of one level only: exact moments, no sampling."""
    levels = schedules.linear_log_snr(7.0, -7.0).levels(num_timesteps)
    rows = np.arange(num_timesteps + 1)
    sampler = ddpm.ancestral(problems.without_decoder(problems.predicting(DATA, "v", variance)))

    @jax.jit
    def run():
        def noise(t):
            return jnp.where(rows == t, 1.0, 0.0)[:, None]

        return base.sample(sampler, levels, noise, num_timesteps + 1, record=(1,))

    samples = run()
    moments = recursion(levels, variance)
    for values, (mean, spread) in (
        (samples.x_0, moments[-1]),
        (samples.x_t[0], moments[-2] if num_timesteps > 1 else (0.0, 1.0)),
    ):
        values = np.asarray(values, np.float64)[:, 0]
        assert values[0] == pytest.approx(mean, abs=1e-5)
        assert ((values[1:] - values[0]) ** 2).sum() == pytest.approx(spread, rel=2e-5)


@pytest.mark.parametrize("variance", ["beta_tilde", "beta"])
def test_samples_of_a_fine_chain_have_the_moments_of_the_data(variance):
    """The recursion tends to the data's as T grows, at first order in 1/T."""
    errors = []
    for num_timesteps in (200, 400, 800):
        mean, spread = recursion(
            schedules.linear_log_snr(10.0, -10.0).levels(num_timesteps), variance
        )[-1]
        errors.append([mean - MEAN, spread - VARIANCE])
    errors = np.abs(errors)
    assert np.all(errors[-1] < [1e-3, 2e-2])
    np.testing.assert_allclose(errors[0, 1] / errors[1, 1], 2, rtol=0.1)
    np.testing.assert_allclose(errors[1, 1] / errors[2, 1], 2, rtol=0.1)


def normal_samples(batch, record=(), treatment="none", scale=1.0, num_timesteps=12):
    """Samples of examples 0 … batch − 1 of the seed."""
    levels = schedules.cosine(100).levels(num_timesteps)
    reverse = Reverse(lambda x, l, c=None: scale * DATA.denoiser(x, l), "x_0")
    sampler = ddpm.ancestral(treated(problems.without_decoder(reverse), treatment))
    noise = problems.tabulated(TABLE[:batch], np.arange(batch))
    return base.sample(sampler, levels, noise, batch, record)


draw = functools.partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))(normal_samples)


def test_a_sample_does_not_depend_on_its_batch():
    np.testing.assert_allclose(draw(3).x_0, draw(7).x_0[:3], rtol=1e-6)
    np.testing.assert_allclose(draw(1).x_0, draw(7).x_0[:1], rtol=1e-6)


def test_recording_keeps_levels_in_the_order_asked_and_changes_no_sample():
    plain, some, every = draw(7), draw(7, (6, 12, 1)), draw(7, tuple(range(12, 0, -1)))
    # Three programs: a compiler may round each in its own way.
    same = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    same(some.x_0, plain.x_0)
    assert plain.x_t.shape == plain.x_0_hat.shape == (0, 7, 1)
    assert some.x_t.shape == some.x_0_hat.shape == (3, 7, 1)
    for slot, t in enumerate((6, 12, 1)):
        same(some.x_t[slot], every.x_t[12 - t])
        same(some.x_0_hat[slot], every.x_0_hat[12 - t])
    # x_T is the noise of level T itself; the last prediction is the sample.
    same(some.x_t[1], TABLE[:7, 12])
    # Without a compiler, which may compute the prediction twice and round it in two ways.
    with jax.disable_jit():
        uncompiled = normal_samples(7, (6, 12, 1))
    np.testing.assert_array_equal(uncompiled.x_0, uncompiled.x_0_hat[2])
    same(some.x_0, some.x_0_hat[2])
    # And each recorded prediction is the denoiser's at the recorded state.
    levels = schedules.cosine(100).levels(12)
    t = np.arange(12, 0, -1)
    log_snr = np.float32(np.repeat(levels.log_snr[t][:, None], 7, 1))
    same(every.x_0_hat, jax.vmap(DATA.denoiser)(every.x_t, log_snr))


def test_clipping_is_of_the_prediction_and_only_when_asked_for():
    record = tuple(range(1, 13))
    wild, clipped = (draw(64, record, treatment, 3.0) for treatment in ("none", "clip"))
    assert np.abs(wild.x_0).max() > 1.5
    assert np.abs(clipped.x_0_hat).max() == 1
    assert np.abs(clipped.x_0).max() <= 1
    assert np.abs(clipped.x_t).max() > 1  # states are not clipped
    # At T both start from the same noise, and clip acts on that prediction.
    np.testing.assert_allclose(wild.x_t[-1], clipped.x_t[-1], rtol=1e-6)
    np.testing.assert_allclose(np.clip(wild.x_0_hat[-1], -1, 1), clipped.x_0_hat[-1], rtol=1e-5)


def test_one_step_is_the_prediction_from_pure_noise():
    samples = draw(4, (1,), "none", 1.0, 1)
    levels = schedules.cosine(100).levels(1)
    expected = DATA.denoiser(TABLE[:4, 1], np.full(4, levels.log_snr[1], np.float32))
    np.testing.assert_allclose(samples.x_t[0], TABLE[:4, 1], rtol=1e-6)
    np.testing.assert_allclose(samples.x_0, expected, rtol=1e-6)


def test_images_are_sampled_in_their_shape():
    reverse = Reverse(lambda x, l, condition=None: jnp.zeros_like(x) + condition, "x_0")
    sampler = ddpm.ancestral(problems.without_decoder(reverse).given(0.25))
    noise = problems.constant(np.ones((2, 5, 3, 3), np.float32))
    levels = schedules.linear_beta().levels(3)
    samples = jax.jit(lambda: base.sample(sampler, levels, noise, 2, np.array([2])))()
    assert samples.x_t.shape == (1, 2, 5, 3, 3)
    np.testing.assert_array_equal(samples.x_0, np.full((2, 5, 3, 3), 0.25))
