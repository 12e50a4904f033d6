"""What the training step is given: held on the devices or streamed, one step or several at once."""

import jax
import numpy as np
import pytest

from experiments.harness import devices
from experiments.harness.data import splits
from experiments.harness.data.feed import Feed, require_same_data
from experiments.harness.errors import ConfigError
from experiments.harness.processes import distributed
from experiments.harness.setup.definition import define_model
from experiments.harness.training import step
from experiments.train import train
from tests.experiments import tiny

pytest_plugins = ["tests.experiments.tiny"]
pytestmark = pytest.mark.usefixtures("quick_compiles")


def images_of(config, first, calls):
    """Of each call from a step on, looked up where they are given by their places."""
    feed, found = Feed(config, devices.mesh(config)), []
    with feed.start(first):
        for _ in range(calls):
            examples, indices = feed.next()
            assert examples.labels is None  # the model is numbers none
            images = np.asarray(examples.images)
            found.append(images if indices is None else images[indices])
    return feed, found


def test_processes_with_other_images_are_refused(monkeypatch):
    """Processes compare a number of their data with that of the first process."""
    source = splits.describe_data(tiny.config(), "train")
    require_same_data(source)
    numbers = []
    monkeypatch.setattr(
        distributed, "broadcast_first", lambda number: numbers.append(number) or numbers[0]
    )
    require_same_data(source)
    for other in (source._replace(num_examples=999), source._replace(fingerprint=lambda: "1")):
        with pytest.raises(ConfigError, match=r"do not all have the same ones; give each"):
            require_same_data(other)
    assert all(0 <= number < 2**31 for number in numbers)


def test_streamed_batches_are_those_that_lie_on_the_devices():
    held = tiny.config(data__stream="never")
    streamed = tiny.config(data__stream="always", data__workers=0)
    one, expected = images_of(held, first=3, calls=5)
    other, found = images_of(streamed, first=3, calls=5)
    assert (one.streamed, other.streamed) == (False, True)
    np.testing.assert_array_equal(found, expected)
    assert one.read_waited() > 0
    assert other.read_waited() > 0
    assert other.read_waited() == 0
    examples, indices = other.of_step(4)
    assert indices is None
    np.testing.assert_array_equal(examples.images, expected[1])


@pytest.mark.parametrize("stream", ["never", "always"])
def test_several_steps_at_once_are_given_their_batches(stream):
    _, expected = images_of(tiny.config(), first=4, calls=4)
    several = tiny.config(train__steps_per_dispatch=2, data__stream=stream, data__workers=0)
    feed, found = images_of(several, first=4, calls=2)
    assert found[0].shape[:2] == (2, 16)
    np.testing.assert_array_equal(np.concatenate(found), expected)
    examples, indices = feed.of_step(6)
    one = examples.images if indices is None else np.asarray(examples.images)[indices]
    np.testing.assert_array_equal(one, expected[2])


def test_dispatching_several_steps_at_once_is_the_same_run(tmp_path, monkeypatch):
    """The loop that accelerators are given, here with a network that no convolution is slow in."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = tiny.config(train__steps_per_dispatch=2)
    step.check(config, define_model(config))
    state = train(config, tmp_path / "two")
    expected = train(tiny.config(), tmp_path / "one")
    assert int(state.step) == int(expected.step) == 12
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * np.abs(b).max())
    lines = tiny.metrics(tmp_path / "two")
    assert [line["step"] for line in lines] == [
        line["step"] for line in tiny.metrics(tmp_path / "one")
    ]
