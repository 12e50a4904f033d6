"""Draws of t: uniform, stratified, by importance; and allocations of an evaluation's draws."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from diffusion.timesteps import (
    TIMES,
    LossHistory,
    Proposal,
    by_importance,
    jittered,
    stratified,
    to_timestep,
)

NUM_SEEDS = 4000


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def draws(name, batch_size, num_timesteps):
    """[seed, b] draws."""
    keys = jax.random.split(jax.random.key(0), NUM_SEEDS)
    return jax.vmap(lambda key: to_timestep(TIMES[name](key, batch_size), num_timesteps))(keys)


@pytest.mark.parametrize("name", list(TIMES))
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
    t = np.asarray(to_timestep(stratified(jax.random.key(1), 10**5), 10**6))
    assert t.min() >= 1
    assert t.max() <= 10**6
    assert len(np.unique((t - 1) // 10)) > 0.99 * 10**5


def test_importance_draws_have_their_probabilities_and_weights():
    """A mean over uniform t is kept, whatever the probabilities."""
    probabilities = np.array([0.5, 0.2, 0.05, 0.25], np.float32)
    time = (np.arange(20_000) + 0.5) / 20_000
    t, weight = jax.jit(by_importance)(time.astype(np.float32), probabilities)
    counts = np.bincount(t, minlength=5)[1:]
    np.testing.assert_allclose(counts / 20_000, probabilities, atol=1e-4)
    values = np.array([0.0, 3.0, -1.0, 7.0, 2.0])
    # One draw too many or too few of 20 000, times its value and weight.
    assert np.mean(np.asarray(weight) * values[t]) == pytest.approx(11 / 4, abs=5e-3)


def test_history_keeps_the_last_ten_losses_of_each_timestep():
    """Against a list for each t, through batches with repeats, more than ten of one t too."""
    rng, history, kept = np.random.default_rng(0), LossHistory.empty(3), {1: [], 2: [], 3: []}
    update = jax.jit(LossHistory.update)
    for i in range(8):
        t = rng.integers(1, 4, 6) if i != 5 else np.repeat([2, 3], [13, 2])
        losses = rng.uniform(1, 2, len(t)).astype(np.float32)
        history = update(history, jnp.asarray(t), jnp.asarray(losses))
        for step, loss in zip(t, losses, strict=True):
            kept[int(step)] = [*kept[int(step)], loss][-10:]
    for step, losses in kept.items():
        row = np.sort(np.asarray(history.squared[step - 1]))[-len(losses) :]
        np.testing.assert_allclose(row, np.sort(np.square(losses)), rtol=1e-6)


def test_probabilities_are_uniform_until_all_is_known_and_then_follow_the_losses():
    history = LossHistory.empty(4)
    np.testing.assert_allclose(history.probabilities(), 0.25)
    for _ in range(10):
        history = history.update(jnp.arange(1, 4), jnp.array([1.0, 2.0, 5.0]))
    np.testing.assert_allclose(history.probabilities(), 0.25)
    for _ in range(10):
        history = history.update(jnp.array([4]), jnp.array([2.0]))
    expected = 0.999 * np.array([0.1, 0.2, 0.5, 0.2]) + 0.001 / 4
    np.testing.assert_allclose(history.probabilities(), expected, rtol=1e-6)


def test_importance_lowers_the_variance_to_its_optimum():
    """With p ∝ √E[L_t²] the second moment is (Σ √E[L_t²])²/T², the least there is."""
    values = np.array([0.1, 1.0, 6.0, 0.5])
    history = LossHistory(jnp.tile(values[:, None] ** 2, (1, 10)), jnp.full(4, 10))
    time = (np.arange(20_000) + 0.5) / 20_000
    t, weight = by_importance(jnp.asarray(time), history.probabilities())
    second = np.mean((np.asarray(weight) * values[np.asarray(t) - 1]) ** 2)
    assert second == pytest.approx(values.sum() ** 2 / 16, rel=2e-3)


def test_proposal_draws_its_density_and_keeps_the_mean():
    proposal = Proposal.allocate(np.array([1.0, 0.0, 3.0]), uniform_share=0.1)
    np.testing.assert_allclose(proposal.density.mean(), 1)
    np.testing.assert_allclose(proposal.density, 0.9 * np.array([0.75, 0, 2.25]) + 0.1)
    time = proposal.time((np.arange(30_000) + 0.5) / 30_000)
    counts = np.bincount(proposal.bin(time), minlength=3) / 30_000
    np.testing.assert_allclose(counts, proposal.density / 3, atol=1e-4)
    value = np.exp(time) / proposal.density_at(time)
    assert value.mean() == pytest.approx(np.e - 1, rel=1e-4)
    assert proposal.time(np.array([0.0, 1.0])).max() < 1
    np.testing.assert_allclose(Proposal.allocate(np.zeros(4)).density, 1)


def test_jittered_times_are_one_to_a_stratum():
    time = jittered(np.random.default_rng(0), 50, 8)
    np.testing.assert_array_equal(np.floor(time * 8), np.broadcast_to(np.arange(8), (50, 8)))
    assert np.std(time - np.floor(time * 8) / 8) == pytest.approx(1 / 8 / np.sqrt(12), rel=0.1)
