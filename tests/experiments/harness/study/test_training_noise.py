"""The noise of the training loss against its closed form, and against independent draws."""

import jax
import jax.flatten_util
import numpy as np
import pytest
from etils import epath

from experiments.harness.data import splits
from experiments.harness.setup.definition import define_model
from experiments.harness.setup.params import init_params
from experiments.harness.setup.trained import Run
from experiments.harness.study.training_noise import training_noise
from experiments.harness.training.loss import init_history, make_draw, make_loss
from tests.experiments import tiny

pytestmark = pytest.mark.usefixtures("quick_compiles")


def run_of(**overrides):
    config = tiny.config(**{"train__batch_size": 32} | overrides)
    definition = define_model(config)
    params = init_params(definition, 0)
    return Run(config, epath.Path("unused"), definition.learned(params), params, 1, False)


@pytest.fixture(scope="module")
def dataset():
    return splits.load_data(tiny.config(), "validation", splits.first(64))


def independent_draws(run, dataset, repeats):
    """Losses of batches and gradients by draw, with other keys: [batches k], [batches k p]."""
    config, definition = run.config, run.definition
    draw, loss_fn = make_draw(config), make_loss(config, definition)
    history = init_history(config, definition)
    x_0 = definition.quantization.to_data(dataset.images).reshape(2, 32, 8, 8, 1)

    def one(x_0, key):
        inputs, _ = draw(key, x_0, None)
        (_, batch), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            run.params, inputs, None, history
        )
        return batch.losses.mean(), jax.flatten_util.ravel_pytree(grads)[0]

    keys = jax.random.split(jax.random.key(99), (2, repeats))
    losses, grads = jax.jit(jax.vmap(jax.vmap(one, (None, 0))))(x_0, keys)
    return np.asarray(losses, np.float64), np.asarray(grads, np.float64)


@pytest.mark.parametrize(("objective", "timesteps"), [("vlb", "uniform"), ("simple", "stratified")])
def test_the_noise_is_the_scatter_of_batches(dataset, objective, timesteps):
    """Each estimate has 200 draws of two batches: variances to 4 of their standard errors."""
    run = run_of(train__objective=objective, train__timesteps=timesteps, train__time="discrete")
    noise = training_noise(run, dataset, 200)
    losses, grads = independent_draws(run, dataset, 200)
    variance = 32 * losses.var(axis=1, ddof=1).mean()
    assert abs(noise.loss_variance - variance) < 4 * np.sqrt(2) * noise.loss_variance_se
    # The relative error of a variance of k normal values is √(2/(k − 1)), and more for heavy tails.
    assert 0.06 < noise.loss_variance_se / noise.loss_variance < 0.25
    trace = 32 * grads.var(axis=1, ddof=1).sum(axis=1).mean()
    mean = (grads.mean(axis=1) ** 2).sum(axis=1).mean() - trace / 32 / 200
    assert noise.gradient_noise == pytest.approx(trace / mean, rel=0.3)


def test_stratified_times_lower_the_variance_and_importance_sampling_does_too(dataset):
    noise = {
        name: training_noise(run_of(train__timesteps=name, train__time="discrete"), dataset, 100)
        for name in ("uniform", "stratified", "importance")
    }
    uniform = noise["uniform"]
    for name in ("stratified", "importance"):
        lower = noise[name]
        error = np.hypot(uniform.loss_variance_se, lower.loss_variance_se)
        assert lower.loss_variance < uniform.loss_variance - 3 * error


def test_the_noise_is_that_of_an_example_whatever_the_batch_size(dataset):
    """With independent times, batches of 8 and 32 examples, the same 32 in all."""
    first = dataset._replace(images=dataset.images[:32])
    large, small = (
        training_noise(
            run_of(train__timesteps="uniform", train__time="discrete", train__batch_size=size),
            first,
            repeats,
        )
        for size, repeats in ((32, 200), (8, 100))
    )
    error = np.hypot(large.loss_variance_se, small.loss_variance_se)
    assert abs(large.loss_variance - small.loss_variance) < 4 * error


def test_a_small_set_fills_a_batch_and_equal_seeds_draw_the_same(dataset):
    few = dataset._replace(images=dataset.images[:5])
    run = run_of()
    first, second = training_noise(run, few, 3), training_noise(run, few, 3)
    assert first == second
    assert np.isfinite(first).all()
    other = run.config.copy_and_resolve_references()
    other.seed = 1
    assert training_noise(run._replace(config=other), few, 3) != first
