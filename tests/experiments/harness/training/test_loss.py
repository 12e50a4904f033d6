"""The training loss over its draws of time, and steps that carry a history or a noise schedule."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion.timesteps import HISTORY_LENGTH, LossHistory
from experiments.harness.data import order, splits
from experiments.harness.seeds import stream
from experiments.harness.setup.definition import define_model
from experiments.harness.setup.params import init_params
from experiments.harness.training.loss import init_history, make_draw, make_loss
from experiments.harness.training.optimizer import make_optimizer
from experiments.harness.training.state import first_state, make_setup
from experiments.harness.training.step import make_train_step
from experiments.train import train
from tests.experiments import tiny

pytest_plugins = ["tests.experiments.tiny"]
pytestmark = pytest.mark.usefixtures("quick_compiles")

LEARNED = {"schedule__name": "learned", "train__time": "continuous"}
LEARNED |= {"schedule__learned__max": 8.0, "schedule__learned__min": -5.0}
# Every t has its ten losses after two steps: 8 of 64 at each.
IMPORTANCE = {"train__timesteps": "importance", "train__batch_size": 64}


def digits(config, n):
    definition = define_model(config)
    return definition.quantization.to_data(splits.load_data(config, "train").images[:n])


class Fixed:
    """A config's loss at fixed parameters and data, as (keys, history) -> (totals, Batches)."""

    def __init__(self, config, x_0=None, params=None):
        self.definition = define_model(config)
        self.params = init_params(self.definition, config.seed) if params is None else params
        self.x_0 = digits(config, config.train.batch_size) if x_0 is None else x_0
        self.history = init_history(config, self.definition)
        draw, loss_fn = make_draw(config), make_loss(config, self.definition)
        self.loss = lambda params, key, history: loss_fn(params, *draw(key, self.x_0), history)
        self.compiled = jax.jit(
            lambda keys, history: jax.lax.map(
                lambda key: self.loss(self.params, key, history), keys
            )
        )

    def draw(self, n, seed=0, history=None):
        keys = jax.random.split(jax.random.key(seed), n)
        history = self.history if history is None else history
        return jax.device_get(self.compiled(keys, history))


def stepped(config, num_steps):
    """The states of some steps from step 0, on the host."""
    setup = make_setup(config)
    examples = splits.load_data(config, "train").examples(slice(None))
    compiled = make_train_step(setup)
    pack, unpack = compiled.packing.pack, compiled.packing.unpack
    state = pack(first_state(setup))
    states = [jax.device_get(unpack(state))]
    for step in range(num_steps):
        sizes = len(examples.images), config.train.batch_size
        state = compiled(state, examples, order.batch_indices(config.seed, step, *sizes))
        states.append(jax.device_get(unpack(state)))
    return setup.definition, states


def changed(before, after):
    """The paths of the leaves that differ."""
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True)
    return {jax.tree_util.keystr(path) for (path, a), b in pairs if not np.array_equal(a, b)}


def paths(tree):
    return {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)}


def difference(first, second):
    """Of two means, with its standard error, from independent batch means."""
    variance = first.var(ddof=1) / len(first) + second.var(ddof=1) / len(second)
    return first.mean() - second.mean(), np.sqrt(variance)


@pytest.mark.parametrize("train_ends", [False, True])
def test_steps_train_the_network_and_the_schedule_and_average_both(train_ends):
    """The ends are pinned to the last bit, or they move; in between the schedule moves."""
    ends = {"schedule__learned__train_ends": train_ends, "train__warmup_steps": 0}
    definition, states = stepped(tiny.config(**LEARNED, **ends), 4)
    first, last = states[0], states[-1]
    assert set(first.params) == {"network", "noise_schedule"}
    assert changed(first.params, last.params) == paths(first.params)
    assert changed(first.ema_params, last.ema_params) == paths(first.params)
    assert changed(last.params, last.ema_params) == paths(first.params)
    for params in (last.params, last.ema_params):
        levels = definition.learned(params).levels
        assert levels.num_timesteps == 8
        pinned = [levels.log_snr[1] == 8.0, levels.log_snr[8] == -5.0]
        assert pinned == [not train_ends, not train_ends]
        inside = np.linspace(8.0, -5.0, 8)[1:-1]
        assert np.abs(levels.log_snr[2:8] - inside).min() > 1e-3


def test_a_learned_schedule_has_an_optimizer_of_its_own():
    """The network's updates are what they are without it, whatever the schedule's gradient.

    The clip is of the network's gradient alone, and the schedule's rate knows no warm-up.
    """
    config = tiny.config(train__gradient_clip=0.5, train__schedule_learning_rate=0.125)
    alone = make_optimizer(config)
    config.schedule.name = "learned"
    both = make_optimizer(config)
    params = {"network": {"a": jnp.ones(3), "b": jnp.ones(())}, "noise_schedule": jnp.ones(2)}
    state_alone, state_both = alone.init(params["network"]), both.init(params)
    rng = np.random.default_rng(0)
    for step in range(5):
        network = jax.tree.map(lambda a: np.float32(rng.normal(size=a.shape)), params["network"])
        of_schedule = np.float32(1e4 * rng.normal(size=2))
        expected, state_alone = alone.update(network, state_alone, params["network"])
        grads = {"network": network, "noise_schedule": of_schedule}
        updates, state_both = both.update(grads, state_both, params)
        tiny.assert_bit_equal(updates["network"], expected)
        if step == 0:  # Adam begins with steps of the rate; the network's rate begins with zero
            expected = -0.125 * np.sign(of_schedule)
            np.testing.assert_allclose(updates["noise_schedule"], expected, rtol=1e-5)
            assert optax.tree.norm(updates["network"]) == 0


def test_a_new_learned_schedule_is_the_linear_one():
    """λ is linear to 1e-7 of its range and its slope to 1e-5 or so; the loss follows the slope."""
    linear = {"train__time": "continuous"}
    linear |= {"schedule__linear_log_snr__max": 8.0, "schedule__linear_log_snr__min": -5.0}
    learned, fixed = (Fixed(tiny.config(**of)) for of in (LEARNED, linear))
    tiny.assert_bit_equal(learned.params["network"], fixed.params["network"])
    (total, batch), (expected, expected_batch) = learned.draw(4), fixed.draw(4)
    np.testing.assert_allclose(total, expected, rtol=1e-4)
    np.testing.assert_array_equal(batch.time, expected_batch.time)
    np.testing.assert_allclose(batch.losses, expected_batch.losses, rtol=1e-4)


@pytest.mark.parametrize("train_ends", [False, True])
def test_the_variance_moves_the_schedule_and_not_the_loss(train_ends):
    """The loss is the mean of its examples' to the last bit, and the gradient reaches all."""
    fixed = Fixed(tiny.config(**LEARNED, schedule__learned__train_ends=train_ends))
    compiled = jax.jit(jax.value_and_grad(fixed.loss, has_aux=True))
    (total, batch), grads = compiled(fixed.params, jax.random.key(1), {})
    # The same sum, in another program.
    assert float(total) == pytest.approx(float(batch.losses.mean()), rel=1e-6)
    np.testing.assert_array_equal(batch.losses, batch.unweighted)
    of_schedule = {k: float(optax.tree.norm(v)) for k, v in grads["noise_schedule"].items()}
    assert {"log_weight", "log_steepness", "shift"} < set(of_schedule)
    assert ("middle" in of_schedule) == train_ends
    # At first the units add up to a line themselves: to give the line more weight changes nothing.
    assert of_schedule.pop("line_log_weight") < 1e-4
    assert all(norm > 1e-3 for norm in of_schedule.values()), of_schedule
    assert float(optax.tree.norm(grads["network"])) > 0


def known_history(fixed, num_timesteps=8):
    """A history of ten uniform draws at least at every t, and its losses by t."""
    _, batch = fixed.draw(80, seed=5)
    t, losses = batch.t.ravel(), batch.unweighted.ravel()
    history = LossHistory.empty(num_timesteps).update(jnp.asarray(t), jnp.asarray(losses))
    assert history.count.min() >= HISTORY_LENGTH
    return history, np.array([(losses[t == i] ** 2).mean() for i in range(1, num_timesteps + 1)])


def test_draws_are_uniform_until_every_t_has_its_losses():
    importance = Fixed(tiny.config(train__timesteps="importance"))
    stratified = Fixed(tiny.config(train__timesteps="stratified"))
    almost, _ = known_history(stratified)
    almost = almost._replace(count=almost.count.at[3].set(HISTORY_LENGTH - 1))
    expected, expected_batch = stratified.draw(6)
    for history in (importance.history, almost):
        total, batch = importance.draw(6, history=history)
        np.testing.assert_array_equal(batch.t, expected_batch.t)
        np.testing.assert_allclose(batch.losses, batch.unweighted, rtol=1e-6)
        np.testing.assert_allclose(total, expected, rtol=1e-5)


def test_importance_keeps_the_mean_and_lowers_the_second_moment():
    """E L² is mean_t E[L_t²] under uniform draws, and (mean_t √E[L_t²])² at best.

    The bound's terms at T = 8 differ by orders of magnitude; the prior, which has no weight, is
    beside them nothing.
    """
    importance = Fixed(tiny.config(train__timesteps="importance"))
    uniform = Fixed(tiny.config(train__timesteps="uniform"))
    history, second_moments = known_history(uniform)
    weighted, batch = importance.draw(1500, seed=1, history=history)
    expected, expected_batch = uniform.draw(1500, seed=2)
    gap, error = difference(weighted, expected)
    assert abs(gap) < 3 * error
    assert error < 0.05 * expected.mean()
    # Not so without the weights.
    unweighted, error = difference(batch.unweighted.mean(axis=1), expected)
    assert abs(unweighted) > 10 * error
    best, plain = np.sqrt(second_moments).mean() ** 2, second_moments.mean()
    assert best < 0.8 * plain
    # The history holds ten losses at each t: what it tells of E L_t² is off by tens of per cent.
    assert (batch.losses**2).mean() == pytest.approx(best, rel=0.15)
    assert (expected_batch.losses**2).mean() == pytest.approx(plain, rel=0.15)
    # Stratified over importance, and independent uniform draws: of batch means.
    assert weighted.var() < 0.8 * expected.var()


def test_a_step_adds_its_unweighted_losses_to_the_history():
    """What a step's history holds is what the loss says at the step's own key and parameters."""
    config = tiny.config(**IMPORTANCE, train__warmup_steps=0)
    definition, states = stepped(config, 4)
    assert [int(of.history.count.sum()) for of in states] == [0, 64, 128, 192, 256]
    assert states[1].history.count.tolist() == [8] * 8
    known = states[2].history.count.min() >= HISTORY_LENGTH
    assert known
    assert np.ptp(states[2].history.probabilities()) > 0.05
    assert np.ptp(states[1].history.probabilities()) < 1e-6
    draw, loss_fn = make_draw(config), make_loss(config, definition)
    images = splits.load_data(config, "train").images
    for before, after in itertools.pairwise(states):
        step = int(before.step)
        _, key = jax.random.split(jax.random.fold_in(stream(config.seed, "train"), step))
        indices = order.batch_indices(config.seed, step, len(images), 64)
        x_0 = definition.quantization.to_data(images[indices])
        _, batch = loss_fn(before.params, *draw(key, x_0), before.history)
        history = LossHistory(*map(jnp.asarray, before.history))
        squared, count = history.update(batch.t, batch.unweighted)
        np.testing.assert_array_equal(after.history.count, count)
        np.testing.assert_allclose(after.history.squared, squared, rtol=1e-4)
        if step >= 2:
            assert np.abs(batch.losses / batch.unweighted - 1).max() > 0.1


def test_the_loss_at_many_levels_is_nearly_that_in_continuous_time():
    """One image 1024 times, stratified, so that each t has it once and a batch is the bound.

    At gap h = 13/1023 a KL's weight expm1(h) is above h by h/2 of itself, and the sum at the
    noisier ends of the steps is off by h/2 of the integrand's change: less than h of it together.
    """
    num_timesteps = 1024
    shared = {"schedule__num_timesteps": num_timesteps, "train__batch_size": num_timesteps}
    discrete, continuous = (
        tiny.config(**shared, train__time=time) for time in ("discrete", "continuous")
    )
    x_0 = jnp.repeat(digits(discrete, 1), num_timesteps, axis=0)
    params = init_params(define_model(discrete), 0)
    at_levels, at_all = (Fixed(of, x_0, params).draw(24) for of in (discrete, continuous))
    assert all(np.array_equal(np.sort(t), np.arange(1, 1025)) for t in at_levels[1].t)
    assert np.all((at_all[1].time > 0) & (at_all[1].time <= 1))
    gap, error = difference(at_levels[0], at_all[0])
    assert error < 0.01 * at_all[0].mean()
    assert abs(gap) < 3 * error + 13 / 1023 * at_all[0].mean()


@pytest.mark.parametrize("overrides", [IMPORTANCE, LEARNED], ids=["importance", "learned"])
def test_a_run_that_stops_goes_on_with_its_history_and_both_optimizers(
    overrides, tmp_path, monkeypatch
):
    """Eight steps, and four and four: the same to the last bit, all that is saved included."""
    config = tiny.config(**overrides, train__num_steps=8, train__sample_every=8)
    expected = train(config, tmp_path / "whole")

    def interrupt():
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        stop = tiny.Interruption(6, order.batch_indices, interrupt)
        patch.setattr(order, "batch_indices", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "parts")
    assert tiny.saved_steps(tmp_path / "parts") == [4]
    state = train(config, tmp_path / "parts")
    tiny.assert_bit_equal(state, expected)
    assert tiny.metrics(tmp_path / "parts") == tiny.metrics(tmp_path / "whole")
    if overrides is IMPORTANCE:
        assert state.history.count.sum() == 8 * 64
    else:
        assert set(state.opt_state.inner_states) == {"network", "noise_schedule"}
        counts = optax.tree.get_all_with_path(state.opt_state, "count")
        assert {int(count) for _, count in counts} == {8}
