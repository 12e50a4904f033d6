"""Draws of t: each marginally uniform on 1 … T, and stratified draws one to a stratum."""

import functools

import jax
import numpy as np
import pytest
import scipy.stats

from diffusion.timesteps import TIMESTEPS, stratified

NUM_SEEDS = 4000


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def draws(name, batch_size, num_timesteps):
    """[seed, b] draws."""
    keys = jax.random.split(jax.random.key(0), NUM_SEEDS)
    return jax.vmap(lambda key: TIMESTEPS[name](key, batch_size, num_timesteps))(keys)


@pytest.mark.parametrize("name", list(TIMESTEPS))
@pytest.mark.parametrize(("batch_size", "num_timesteps"), [(6, 10), (1, 4), (5, 3), (3, 1)])
def test_every_draw_is_uniform(name, batch_size, num_timesteps):
    """Row by row over seeds, since rows of one batch may depend on one another."""
    t = np.asarray(draws(name, batch_size, num_timesteps))
    assert t.shape == (NUM_SEEDS, batch_size)
    assert t.min() == 1
    assert t.max() == num_timesteps
    for row in t.T if num_timesteps > 1 else ():
        counts = np.bincount(row, minlength=num_timesteps + 1)[1:]
        # Some twenty such tests with a fixed seed: one in 2000 would fail by chance.
        assert scipy.stats.chisquare(counts).pvalue > 2.5e-5


@pytest.mark.parametrize(("batch_size", "num_timesteps"), [(5, 20), (8, 8), (12, 4), (1, 7)])
def test_stratified_draws_are_one_to_a_stratum(batch_size, num_timesteps):
    """With T a multiple of b, one draw in each b-th of the steps; with b one of T, b/T each."""
    t = np.sort(np.asarray(draws("stratified", batch_size, num_timesteps)), axis=1)
    strata = min(batch_size, num_timesteps)
    expected = np.repeat(np.arange(strata), batch_size // strata)
    np.testing.assert_array_equal(
        (t - 1) * strata // num_timesteps, np.broadcast_to(expected, t.shape)
    )


def test_uniform_draws_are_independent():
    t = np.asarray(draws("uniform", 6, 10), float)
    correlation = np.corrcoef(t.T)[np.triu_indices(6, 1)]
    assert np.all(np.abs(correlation) < 4.5 / np.sqrt(NUM_SEEDS))


def test_stratified_draws_stay_in_range_at_a_million_steps():
    """float32 resolves the unit interval to 6e-8: no draw falls off its end."""
    t = np.asarray(jax.jit(stratified, static_argnums=(1, 2))(jax.random.key(1), 10**5, 10**6))
    assert t.min() >= 1
    assert t.max() <= 10**6
    assert len(np.unique((t - 1) // 10)) > 0.99 * 10**5
