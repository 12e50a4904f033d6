"""The compiled training step, and its sums for the log."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.objectives import OBJECTIVES, Loss, Objective
from experiments.harness import devices
from experiments.harness.data import order, splits
from experiments.harness.processes import cores
from experiments.harness.training import gradients, step
from experiments.harness.training.optimizer import learning_rate, make_optimizer
from experiments.harness.training.state import first_state, make_setup
from tests.experiments import tiny

pytest_plugins = ["tests.experiments.tiny"]
pytestmark = pytest.mark.usefixtures("quick_compiles")


class Stepper:
    """The training step of a config with its state, on examples that default to the digits."""

    def __init__(self, config, examples=None):
        self.config, setup = config, make_setup(config)
        if examples is None:
            examples = splits.load_data(config, "train").examples(slice(None))
        self.examples = devices.place(examples, devices.replicated(setup.mesh))
        self.compiled = step.make_train_step(setup)
        self.packed = self.compiled.packing.pack(first_state(setup))

    @property
    def state(self):
        return self.compiled.packing.unpack(self.packed)

    def step(self):
        sizes = len(self.examples.images), self.config.train.batch_size
        indices = order.batch_indices(self.config.seed, int(self.packed.step), *sizes)
        self.packed = self.compiled(self.packed, self.examples, indices)
        return self.state


def test_a_step_is_compiled_once_and_donates_its_state():
    stepper = Stepper(tiny.config())
    for _ in range(4):
        before = stepper.packed
        stepper.step()
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
    assert stepper.compiled.program._cache_size() == 1
    assert int(stepper.state.step) == 4


@pytest.mark.parametrize("timesteps", ["stratified", "importance"])
def test_parts_at_once_take_the_step_of_parts_in_turn(timesteps, monkeypatch):
    """With their dropout, up to the order of sums; and count the same operations."""
    config = tiny.config(train__accumulate=2, train__timesteps=timesteps)
    steppers, flops = [], []
    for number in (1, 2):
        monkeypatch.setattr(cores, "num_cores", lambda number=number: number)
        stepper = Stepper(config)
        batch = stepper.examples, order.batch_indices(0, 0, 1000, 16)
        count = stepper.compiled.compile(stepper.packed, *batch)
        before = stepper.packed
        stepper.step()
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before))
        stepper.step()
        steppers.append(stepper)
        flops.append(count)
    in_turn, at_once = (jax.device_get(stepper.state) for stepper in steppers)
    assert isinstance(steppers[1].compiled, step.StepInParts)
    assert flops[0] == flops[1]
    # Adam divides a gradient by its size: where that is near zero, rounding counts in full.
    for a, b in zip(jax.tree.leaves(at_once), jax.tree.leaves(in_turn), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("parts", "num_cores"), [(1, 2), (4, 2), (2, 1)])
def test_parts_for_memory_follow_one_another(parts, num_cores, monkeypatch):
    """More of them than cores, or of a large network."""
    monkeypatch.setattr(cores, "num_cores", lambda: num_cores)
    setup = make_setup(tiny.config(train__accumulate=parts))
    assert not isinstance(step.make_train_step(setup), step.StepInParts)
    monkeypatch.setattr(cores, "num_cores", lambda: 4)
    setup = make_setup(tiny.config(train__accumulate=2))
    assert isinstance(step.make_train_step(setup), step.StepInParts)
    monkeypatch.setattr(step, "SMALL_NETWORK", 10)
    assert not isinstance(step.make_train_step(setup), step.StepInParts)


@pytest.mark.parametrize("decay", [0.3, 0.9999])
def test_the_average_is_an_average_with_warm_up(decay):
    """e ← r e + (1 − r) p in float64, with r = (1 + k)/(10 + k) after k steps, at most `decay`.

    The smaller decay is reached at k = 3, the larger one never here.
    """
    stepper = Stepper(tiny.config(train__ema_decay=decay))
    expected = jax.tree.map(np.float64, stepper.state.ema_params)
    largest = 0.0
    for k in range(20):
        state = stepper.step()
        rate = min(decay, (1 + k) / (10 + k))
        expected = jax.tree.map(
            lambda e, p, rate=rate: rate * e + (1 - rate) * np.float64(p), expected, state.params
        )
        largest = max(largest, *(np.abs(p).max() for p in jax.tree.leaves(state.params)))
    # Four roundings a step, each of half an ulp, none of them amplified by later steps.
    tolerance = 20 * 4 * 2**-24 * largest
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=0, atol=tolerance),
        jax.device_get(stepper.state.ema_params),
        expected,
    )


@pytest.mark.parametrize("warmup", [0, 1, 5, 20])
@pytest.mark.parametrize("decay", ["constant", "cosine"])
def test_the_rate_warms_up_and_decays(warmup, decay):
    """A straight line from 0 to the peak, then the peak, or half a cosine to 0 at the end."""
    last, peak = 20, 0.5
    train = tiny.config(
        train__num_steps=last,
        train__warmup_steps=warmup,
        train__decay=decay,
        train__learning_rate=peak,
    ).train
    k = np.arange(last + 1)
    cosine = (1 + np.cos(np.pi * (k - warmup) / max(last - warmup, 1))) / 2
    expected = peak * np.where(k < warmup, k / max(warmup, 1), cosine if decay == "cosine" else 1.0)
    schedule = learning_rate(train)
    # float32: the angle is rounded to 2⁻²⁴ · π, and so, in units of the peak, is its cosine.
    np.testing.assert_allclose([schedule(i) for i in k], expected, rtol=1e-6, atol=2e-7 * peak)
    assert schedule(0) == (0 if warmup else peak)


def updates(config, gradients, params=None):
    """The optimizer's updates for a sequence of gradients, at parameters that do not change."""
    optimizer = make_optimizer(config)
    params = jnp.zeros(3) if params is None else params
    state, sequence = optimizer.init(params), []
    for gradient in gradients:
        update, state = optimizer.update(jnp.asarray(gradient), state, params)
        sequence.append(update)
    return np.stack(sequence)


def constant_rate(**overrides):
    rate = {"train__warmup_steps": 0, "train__decay": "constant", "train__learning_rate": 0.1}
    return tiny.config(**rate | {f"train__{k}": v for k, v in overrides.items()})


def test_gradients_are_clipped_by_their_norm():
    """Adam forgets the scale of its first gradient, but not that of one to the next."""
    long, short = np.float32([6.0, 0.0, 8.0]), np.float32([0.3, -0.4, 0.0])
    clipped = updates(constant_rate(gradient_clip=2.0), [long, short, long])
    # |long| = 10, so that a fifth of it is left; |short| = 0.5 < 2.
    by_hand = updates(constant_rate(gradient_clip=0.0), [long / 5, short, long / 5])
    np.testing.assert_allclose(clipped, by_hand, rtol=1e-5, atol=1e-8)
    unclipped = updates(constant_rate(gradient_clip=0.0), [long, short, long])
    assert np.abs(clipped - unclipped).max() > 0.01


def test_two_updates_of_adam_in_closed_form():
    """After gradients a and b, Adam divides by the root of (β₂ a² + b²)/(1 + β₂), unbiased."""
    a, b, beta1, beta2 = 1.0, 3.0, 0.9, 0.75
    second = updates(constant_rate(gradient_clip=0.0, beta2=beta2), [[a] * 3, [b] * 3])[1]
    mean = (beta1 * a + b) / (1 + beta1)
    square = (beta2 * a**2 + b**2) / (1 + beta2)
    np.testing.assert_allclose(second, -0.1 * mean / np.sqrt(square), rtol=1e-5)


def test_weight_decay_shrinks_the_weights_without_a_gradient():
    config = constant_rate(optimizer="adamw", weight_decay=0.5)
    params = jnp.float32([1.0, -2.0, 4.0])
    update = updates(config, [[0.0, 0.0, 0.0]], params)
    np.testing.assert_allclose(update[0], -0.1 * 0.5 * params, rtol=1e-6)


@pytest.mark.parametrize("num_timesteps", [1, 2, 3, 6, 7, 8, 12, 100])
def test_losses_are_summed_by_quartile_of_t(num_timesteps, monkeypatch):
    """With a loss of t itself, and batches in which every t appears twice.

    Quartile q has the t with (q − 1) T/4 < t ≤ q T/4. All sums are of small integers: exact.
    """

    def timestep(model, x_0, eps, t):
        return Loss(t.astype(jnp.float32), jnp.zeros(len(t)))

    monkeypatch.setitem(OBJECTIVES, "timestep", lambda: Objective(timestep, None))
    stepper = Stepper(
        tiny.config(
            train__objective="timestep",
            train__batch_size=2 * num_timesteps,
            train__log_every=3,
            schedule__num_timesteps=num_timesteps,
        )
    )
    t = np.arange(1, num_timesteps + 1)
    quartile = [
        [(q - 1) * num_timesteps < 4 * i <= q * num_timesteps for i in t] for q in range(1, 5)
    ]
    for done in range(1, 6):
        window = jax.device_get(stepper.step().window)
        summed = (done - 1) % 3 + 1  # the window starts anew after each line of the log
        assert window.steps == summed
        assert window.loss == pytest.approx(summed * (num_timesteps + 1) / 2, rel=1e-6)
        assert window.quartile_count.tolist() == [2 * summed * sum(inside) for inside in quartile]
        assert window.quartile_loss.tolist() == [
            2 * summed * t[inside].sum() for inside in quartile
        ]
        assert window.grad_norm == 0
        assert window.first_bad_step == -1


def test_the_logged_gradient_norm_is_from_before_the_clip():
    norms = [
        float(Stepper(tiny.config(train__gradient_clip=clip)).step().window.grad_norm)
        for clip in (0.0, 1e-3)
    ]
    assert norms[0] == norms[1] > 1e-3


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_first_bad_step_is_remembered(bad, monkeypatch):
    """Also over lines of the log, and where later losses are finite."""

    def sometimes(model, x_0, eps, t):
        # Bad where the first image is all white, which is so in one batch alone.
        term = jnp.where((x_0[0] == 1).all(), bad, 1.0) * jnp.ones(len(t))
        return Loss(term, jnp.zeros(len(t)))

    monkeypatch.setitem(OBJECTIVES, "sometimes", lambda: Objective(sometimes, None))
    config = tiny.config(train__objective="sometimes", train__batch_size=8)
    white = order.batch_indices(config.seed, 2, 1000, 8)[0]
    images = np.zeros((1000, 8, 8, 1), np.uint8)
    images[white] = 16
    stepper = Stepper(config, splits.Examples(images, None))
    seen = [int(stepper.step().window.first_bad_step) for _ in range(8)]
    assert seen == [-1, -1, 3, 3, 3, 3, 3, 3]


def test_about_half_the_images_are_mirrored_left_to_right():
    images = jax.random.normal(jax.random.key(0), (1000, 4, 6, 3))
    flipped = gradients.random_flip(jax.random.key(1), images)
    is_same = (flipped == images).all(axis=(1, 2, 3))
    is_mirrored = (flipped == images[:, :, ::-1, :]).all(axis=(1, 2, 3))
    assert (is_same ^ is_mirrored).all()
    # Binomial: a standard deviation of √1000/2 < 16, and four of them.
    assert abs(int(is_mirrored.sum()) - 500) < 64


@pytest.mark.parametrize("symmetric", [True, False])
def test_flips_change_a_step_unless_the_images_are_symmetric(symmetric):
    images = splits.load_data(tiny.config(), "train").images
    images = np.maximum(images, images[:, :, ::-1]) if symmetric else images
    losses, params = [], []
    for flip in (False, True):
        stepper = Stepper(tiny.config(data__flip=flip), splits.Examples(images, None))
        losses.append(float(stepper.step().window.loss))
        params.append(stepper.step().params)
    assert (losses[0] == losses[1]) == symmetric
    if symmetric:
        tiny.assert_bit_equal(params[1], params[0])
