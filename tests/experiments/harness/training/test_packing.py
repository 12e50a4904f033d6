"""Vectors in place of a network's arrays: nothing is lost, and a step is the same step."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.harness import seeds
from experiments.harness.data import order, splits
from experiments.harness.setup.definition import MODELS
from experiments.harness.training.gradients import make_gradients
from experiments.harness.training.packing import Packing
from experiments.harness.training.state import (
    abstract_state,
    first_state,
    make_setup,
    state_shardings,
)
from experiments.harness.training.step import make_train_step
from tests.experiments import tiny

pytest_plugins = ["tests.experiments.tiny"]
pytestmark = pytest.mark.usefixtures("quick_compiles")


CONFIGS = {
    "plain": {},
    "adamw, clipped": {
        "train__optimizer": "adamw",
        "train__weight_decay": 0.5,
        "train__gradient_clip": 0.01,
    },
    "learned schedule": {"schedule__name": "learned"},
    "history": {"train__timesteps": "importance"},
}


@pytest.fixture(scope="module", params=CONFIGS)
def setup(request):
    """On a CPU; elsewhere there is nothing to pack. The first step has the full rate."""
    made = make_setup(tiny.config(train__warmup_steps=0, **CONFIGS[request.param]))
    state = first_state(made)
    if Packing(made).pack(state) is state:
        pytest.skip("these devices keep the arrays of a network")
    return made


def step_and_batch(setup):
    """The step, the examples and the indices of a batch."""
    examples = splits.load_data(setup.config, "train").examples(slice(None))
    return make_train_step(setup), examples, order.batch_indices(0, 0, 1000, 16)


def test_a_state_comes_back_bit_for_bit_with_its_layout(setup):
    """No two arrays of it are alike."""
    leaves, structure = jax.tree.flatten(first_state(setup))
    leaves = [leaf + np.asarray(i, leaf.dtype) for i, leaf in enumerate(leaves)]
    state = jax.device_put(structure.unflatten(leaves), state_shardings(setup))
    packing = Packing(setup)
    back = packing.unpack(packing.pack(state))
    assert jax.tree.structure(back) == structure
    tiny.assert_bit_equal(back, state)
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding and a.dtype == b.dtype, back, state)
    assert all(jax.tree.leaves(same))


def test_a_network_is_one_vector_wherever_it_is(setup):
    """Parameters, their average and both moments."""
    state, packing = first_state(setup), Packing(setup)
    packed, size = packing.pack(state), optax.tree.size(state.params["network"])
    assert [leaf.size for leaf in jax.tree.leaves(packed)].count(size) == 4
    shapes = jax.tree.map(lambda a: (a.shape, a.dtype), packed)
    assert shapes == jax.tree.map(lambda a: (a.shape, a.dtype), packing.abstract())


def test_unpacked_arrays_are_copies(setup):
    """The step donates the packed state, in whose memory the next one is written."""
    train_step, *batch = step_and_batch(setup)
    state = train_step.packing.pack(first_state(setup))
    kept = train_step.packing.unpack(state)
    shared = [np.shares_memory(a, b) for a in jax.tree.leaves(kept) for b in jax.tree.leaves(state)]
    assert not any(shared)
    before = jax.tree.map(np.array, kept)
    state = train_step(state, *batch)
    tiny.assert_bit_equal(kept, before)
    now = train_step.packing.unpack(state)
    assert optax.tree.norm(optax.tree.sub(now.params, kept.params)) > 0.01


def test_a_packed_step_is_that_of_the_arrays(setup):
    """Gradient, optimizer and average of the arrays themselves, up to the order of sums."""
    train_step, *batch = step_and_batch(setup)
    state, optimizer = first_state(setup), setup.optimizer
    root = seeds.root(setup.config.seed)
    _, grads = jax.jit(make_gradients(setup))(root, state, *batch)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    average = jax.tree.map(lambda e, p: e / 10 + 0.9 * p, state.ema_params, params)
    change = optax.tree.sub(params["network"], state.params["network"])
    assert min(np.abs(leaf).max() for leaf in jax.tree.leaves(change)) > 0.01
    packing = train_step.packing
    after = packing.unpack(train_step(packing.pack(state), *batch))

    def compare(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max())

    jax.tree.map(compare, after.opt_state, opt_state)
    # Adam divides a gradient by its size: near zero rounding counts in full.
    jax.tree.map(compare, (after.params, after.ema_params), (params, average))


class TwoTypes(nn.Module):
    """An output scaled by numbers of half precision, plus others of single precision."""

    def validate(self, image_shape):
        del image_shape

    @nn.compact
    def __call__(self, x_t, log_snr, condition=None, *, train=False):
        scale = self.param("scale", nn.initializers.ones, x_t.shape[1:], jnp.float16)
        return x_t * scale + self.param("shift", nn.initializers.zeros, x_t.shape[1:])


def test_arrays_of_two_types_stay_as_they_are(monkeypatch):
    monkeypatch.setitem(MODELS, "two_types", lambda *_: TwoTypes())
    setup = make_setup(tiny.config("two_types"))
    state, packing = first_state(setup), Packing(setup)
    assert packing.pack(state) is state
    assert packing.unpack(state) is state
    assert packing.abstract() == abstract_state(setup)
