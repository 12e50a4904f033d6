"""How much the training loss and its gradient vary with t and noise, at fixed weights and data."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float

from diffusion.timesteps import HISTORY_LENGTH, LossHistory
from experiments.harness import devices
from experiments.harness.data.splits import Dataset, Examples
from experiments.harness.processes.shared_programs import share
from experiments.harness.seeds import stream
from experiments.harness.setup.trained import Run
from experiments.harness.training.loss import init_history, make_draw, make_loss

MOST_BATCHES = 4  # of examples


class TrainingNoise(NamedTuple):
    """The noise of training that t and ε cause, for an example of a batch.

    The noise of a batch's mean is that of an example divided by the batch size. Where the times of
    a batch are stratified, it is smaller than that of independent times, and so are these numbers.

    Attributes:
      loss_variance: the variance of the loss, in its own unit squared. It compares two settings
        only if their losses estimate the same number, such as the bound (vlb) with different
        distributions of t or schedules with the same ends.
      loss_variance_se: its standard error over the draws, with weights and data fixed.
      gradient_noise: tr Cov(g)/‖E g‖² of the gradient g. It has no unit and compares all settings.
        It is the batch size at which noise and gradient are of equal size, the simple noise scale
        of McCandlish et al. (2018), equation 2.9; NaN where the estimate of ‖E g‖² is not positive.
    """

    loss_variance: float
    loss_variance_se: float
    gradient_noise: float


class _Sums(NamedTuple):
    """The draws of one batch of examples: the loss and ‖g‖² of each, and ‖Σ g‖² over all."""

    losses: Float[np.ndarray, "k"]
    squares: Float[np.ndarray, "k"]
    square_of_sum: float


def training_noise(run: Run, dataset: Dataset, repeats: int) -> TrainingNoise:
    """Measures the noise of a run's training loss by repeated draws of t and noise.

    Without dropout, flips and label dropout. With importance sampling of t the loss history is made
    anew with these weights, as training does at its start.

    Args:
      run: the weights, and the config whose objective, batch size and distribution of t are used.
        Its seed determines the draws: they are the same for all runs with one seed.
      dataset: the examples. Up to 4 batches of them are used, each of `train.batch_size`; a smaller
        set is repeated to fill a batch.
      repeats: the number of draws for each batch of examples, 2 or more.
    """
    batch_size, key = run.config.train.batch_size, stream(run.config.seed, "estimate")
    num_batches = int(np.clip(len(dataset.images) // batch_size, 1, MOST_BATCHES))
    program, params = _make_program(run), devices.place(run.params, _replicated())
    zero = jax.tree.map(jnp.zeros_like, params)
    batches = [
        dataset.examples(np.arange(b * batch_size, (b + 1) * batch_size) % len(dataset.images))
        for b in range(num_batches)
    ]
    with jax.default_matmul_precision("highest"):
        history = _warm_history(run, program, (params, zero), batches, jax.random.fold_in(key, 0))
        sums = []
        for number, examples in enumerate(batches):
            of_batch = jax.random.fold_in(key, 1 + number)
            losses, squares, total = [], [], zero
            for repeat in range(repeats):
                draw_key = jax.random.fold_in(of_batch, repeat)
                loss, square, total, _ = program(params, total, examples, draw_key, history)
                losses.append(loss)
                squares.append(square)
            losses, squares, square_of_sum = jax.device_get((losses, squares, _square(total)))
            arrays = (np.asarray(values, np.float64) for values in (losses, squares))
            sums.append(_Sums(*arrays, float(square_of_sum)))
    return _summary(sums, batch_size)


def _replicated() -> Any:
    return devices.replicated(devices.mesh())


def _square(tree: Any) -> Float[Array, ""]:
    return optax.tree.norm(tree, squared=True)


def _make_program(run: Run) -> Callable[..., tuple[Array, Array, Any, LossHistory | dict]]:
    """(params, Σ g, examples, key, history) -> (loss, ‖g‖², new Σ g, new history)."""
    config, definition = run.config, run.definition
    draw, loss_fn = make_draw(config), make_loss(config, definition)
    split = devices.split_batch(devices.mesh())

    @share
    @jax.jit
    def program(params, total, examples, key, history):
        x_0 = definition.to_data(examples.images)
        x_0 = jax.lax.with_sharding_constraint(x_0, split)
        inputs, _ = draw(key, x_0, examples.labels)
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (_, batch), grads = gradient(params, inputs, None, history)
        if isinstance(history, LossHistory):
            history = history.update(batch.t, batch.unweighted)
        total = jax.tree.map(jnp.add, total, grads)
        return batch.losses.mean(), _square(grads), total, history

    return program


def _warm_history(
    run: Run,
    program: Callable,
    weights: tuple[Any, Any],
    batches: list[Examples],
    key: Array,
) -> LossHistory | dict:
    """A loss history with ten losses at each t, where t is drawn by importance.

    It ends after as many steps as training had, in which the history could stay incomplete too.
    """
    history = init_history(run.config, run.definition)
    if not isinstance(history, LossHistory):
        return history
    for step in range(run.config.train.num_steps):
        if int(history.count.min()) >= HISTORY_LENGTH:
            break
        examples = batches[step % len(batches)]
        *_, history = program(*weights, examples, jax.random.fold_in(key, step), history)
    return history


def _summary(sums: list[_Sums], batch_size: int) -> TrainingNoise:
    """From the sums of each batch of examples."""
    variances, errors, traces, means = [], [], [], []
    for losses, squares, square_of_sum in sums:
        k = len(losses)
        squared = (losses - losses.mean()) ** 2 * k / (k - 1)
        variances.append(squared.mean())
        errors.append(squared.var(ddof=1) / k)
        # Unbiased: E‖Σ g‖² = k tr Cov + k² ‖E g‖².
        trace = (squares.sum() - square_of_sum / k) / (k - 1)
        traces.append(trace)
        means.append(square_of_sum / k**2 - trace / k)
    mean = np.mean(means)
    return TrainingNoise(
        loss_variance=float(batch_size * np.mean(variances)),
        loss_variance_se=float(batch_size * np.sqrt(np.sum(errors)) / len(sums)),
        gradient_noise=float(batch_size * np.mean(traces) / mean) if mean > 0 else np.nan,
    )
