"""The full sum over t and the quick bound as functions: against themselves done otherwise."""

import jax
import numpy as np
import pytest

from experiments.harness.data import splits
from experiments.harness.evaluation.full_bound import full_bound, summary
from experiments.harness.evaluation.quick_bound import make_quick_bound
from experiments.harness.evaluation.subject import subject_of
from experiments.harness.setup.definition import define_model
from tests.experiments import tiny

pytest_plugins = ["tests.experiments.tiny"]
pytestmark = pytest.mark.usefixtures("quick_compiles")

NUM_DIMS = 64


def some_digits(config, n, repeats=1):
    """The first n test images, over and over."""
    test = splits.load_data(config, "test")
    return test._replace(images=np.tile(test.images[:n], (repeats, 1, 1, 1)), labels=None)


@pytest.fixture
def optimized(quick_compiles):
    """Programs compiled as outside of these tests."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


def random_weights(config, scale=1.0):
    return tiny.state_of(config, scale).ema_params


def measure(config, params, dataset):
    """The bound's terms, and the variance of each total."""
    subject = subject_of(config, define_model(config), params, dataset)
    return full_bound(subject, config.evaluate.replicates)


def test_batches_and_chunks_change_nothing(optimized):
    """On programs optimised as usual, as what they fuse depends on these sizes."""
    config = tiny.config()
    params, dataset = random_weights(config), some_digits(config, 30)
    expected, expected_variances = measure(config, params, dataset)
    config.evaluate.update(batch_size=7, chunk_size=3)
    terms, variances = measure(config, params, dataset)
    for name, a, e in zip(terms._fields, terms, expected, strict=True):
        assert a.dtype == np.float64
        # Each is a float32 sum of 64 terms of one sign. The log-probability of a sure pixel is one
        # of 1 − 2⁻²⁴ or so: 64 of them are good to 4e-6 nats.
        np.testing.assert_allclose(a, e, rtol=2e-6, atol=4e-6, err_msg=name)
    assert terms.total.mean() == pytest.approx(expected.total.mean(), rel=1e-6)
    np.testing.assert_allclose(variances, expected_variances, rtol=1e-3)


def test_batches_and_chunks_change_nothing_for_the_unet(finished):
    """Thirty examples by seven, three timesteps at once, against the 447 by 64, four at once."""
    config = tiny.config("unet")
    config.evaluate.update(batch_size=7, chunk_size=3)
    params = tiny.restore(config, finished.workdir, tiny.best_step(finished.workdir)).ema_params
    terms, _ = measure(config, params, some_digits(config, 30))
    with np.load(finished.workdir / "evaluation.npz") as arrays:
        expected = arrays["bits_per_dim_per_example"][:30]
    actual = terms.total / (NUM_DIMS * np.log(2))
    np.testing.assert_allclose(actual, expected, rtol=2e-6)
    assert actual.mean() == pytest.approx(expected.mean(), rel=1e-6)


def test_every_example_counts_once_whatever_is_around_it():
    """The last of two batches holds 4 examples and 12 repeats; the first ten alone fill one."""
    config = tiny.config(evaluate__batch_size=16)
    params = random_weights(config)
    twenty, variances = measure(config, params, some_digits(config, 20))
    assert [a.shape for a in twenty] == [(20,), (20, 7), (20,), (20, 8)]
    assert variances.shape == (20,)
    ten, _ = measure(config, params, some_digits(config, 10))
    for a, b in zip(ten, twenty, strict=True):
        np.testing.assert_array_equal(a, b[:10])
    assert len(np.unique(twenty.total)) == 20


def test_the_noise_of_an_example_is_its_own_at_every_t():
    """The same image at two places, and one place under two seeds, have other noise."""
    config = tiny.config()
    params = random_weights(config)
    here, _ = measure(config, params, some_digits(config, 1, repeats=2))
    assert (here.kl[0] != here.kl[1]).all()
    assert here.prior[0] == here.prior[1]
    config.seed = 1
    there, _ = measure(config, params, some_digits(config, 1))
    assert (there.kl[0] != here.kl[0]).all()


@pytest.mark.parametrize("replicates", [7, 3])
def test_the_monte_carlo_error_is_the_scatter_of_repeated_evaluations(replicates):
    """A hundred evaluations of the same four images, each with noise of its own.

    An example's noise is a function of its index, so one pass over 400 copies does it. With m
    evaluations the ratio of the observed variance to the claimed one has mean 1 and a standard
    deviation of √(2/(m − 1)) = 0.14, and the claim itself, from 400 × 3 pairs of draws or more, one
    of some 0.07: four of the two together are 0.65.
    """
    repeats, n = 100, 4
    config = tiny.config(evaluate__replicates=replicates)
    dataset = some_digits(config, n, repeats)
    terms, variances = measure(config, random_weights(config), dataset)
    means = terms.total.reshape(repeats, n).mean(axis=1)
    claims = [
        summary(jax.tree.map(lambda a, rows=rows: a[rows], terms), variances[rows], NUM_DIMS)[
            "bits_per_dim_mc_se"
        ]
        for rows in np.arange(repeats * n).reshape(repeats, n)
    ]
    observed = np.var(means / (NUM_DIMS * np.log(2)), ddof=1)
    assert observed / np.mean(np.square(claims)) == pytest.approx(1, abs=0.65)


@pytest.mark.parametrize("decoder", ["categorical", "discretized_gaussian"])
@pytest.mark.parametrize("num_timesteps", [1, 2])
def test_the_shortest_chains_have_a_bound(num_timesteps, decoder):
    """T = 1 has no KL between steps, T = 2 has one; everything is finite and adds up."""
    config = tiny.config(schedule__num_timesteps=num_timesteps, decoder__name=decoder)
    params = random_weights(tiny.config())
    terms, variances = measure(config, params, some_digits(config, 5))
    assert terms.kl.shape == (5, num_timesteps - 1)
    result = summary(terms, variances, NUM_DIMS)
    assert all(np.isfinite(value) for value in result.values())
    parts = result["prior"] + result["diffusion"] + result["reconstruction"]
    assert parts == pytest.approx(result["bits_per_dim"], rel=1e-6)
    assert (result["diffusion"] > 0) == (num_timesteps == 2)
    # From λ = −5 a pixel of 17 levels costs about what it costs to name one, if not much more.
    assert result["bits_per_dim"] > np.log2(17) / 2


@pytest.mark.parametrize("num_timesteps", [1, 2, 8])
def test_a_quick_bound_at_every_t_is_the_bound(num_timesteps):
    """It has the full bound's noise, so that they differ by float32 sums in another order."""
    config = tiny.config(
        schedule__num_timesteps=num_timesteps, train__validation_timesteps=max(num_timesteps - 1, 1)
    )
    definition, params = define_model(config), random_weights(config)
    dataset = some_digits(config, 70)
    terms, variances = measure(config, params, dataset)
    expected = summary(terms, variances, NUM_DIMS)["bits_per_dim"]
    quick = make_quick_bound(config, definition, dataset)(params)
    assert quick == pytest.approx(expected, rel=1e-6)


def test_a_quick_bound_at_some_t_is_close_and_always_the_same():
    config = tiny.config(train__validation_timesteps=2)
    definition, params = define_model(config), random_weights(config, scale=0.1)
    dataset = splits.load_data(config, "validation")
    terms, _ = measure(config, params, dataset)
    per_example = terms.total / (NUM_DIMS * np.log(2))
    # Two of seven terms each, stratified over t: an error of each of less than the sum's spread
    # over t. Four standard errors of a mean of 350.
    spread = 7 * (terms.kl / (NUM_DIMS * np.log(2))).std(axis=1).mean() / np.sqrt(2)
    quick_bound = make_quick_bound(config, definition, dataset)
    quick = quick_bound(params)
    assert abs(quick - per_example.mean()) < 4 * spread / np.sqrt(350)
    assert quick_bound(params) == quick
    assert make_quick_bound(config, definition, dataset)(params) == quick
