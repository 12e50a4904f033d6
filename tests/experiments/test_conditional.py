"""Class labels: how training withholds them, and that every measurement gives each example its own.

With labels y the bound is on log p(x | y). One network has both bounds, since no label is a label
too: number `num_classes`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.statistics.control import GaussianControl
from experiments import variance
from experiments.evaluate import evaluate, result_line
from experiments.harness.data import order, splits
from experiments.harness.data.sources import source
from experiments.harness.errors import ConfigError
from experiments.harness.evaluation import programs
from experiments.harness.evaluation.subject import subject_of
from experiments.harness.setup.definition import define_model
from experiments.harness.setup.trained import load
from experiments.harness.training import gradients
from experiments.harness.training.gradients import drop_labels
from experiments.harness.training.state import first_state, make_setup
from experiments.harness.training.step import make_train_step
from tests.experiments import tiny

pytest_plugins = ["tests.experiments.tiny"]
pytestmark = pytest.mark.usefixtures("quick_compiles")

K = 10
NONE = K


def conditional(**overrides):
    return tiny.config(**{"model__class_conditional": True} | overrides)


def stepped(config, labels=None, num_steps=3):
    """The state before and after some steps, the training labels replaced where some are given."""
    setup = make_setup(config)
    examples = splits.load_data(config, "train").examples(slice(None))
    examples = examples if labels is None else examples._replace(labels=labels)
    before = jax.device_get(first_state(setup))
    run = make_train_step(setup)
    state = run.packing.pack(before)
    for step in range(num_steps):
        indices = order.batch_indices(config.seed, step, 1000, config.train.batch_size)
        state = run(state, examples, indices)
    return before, jax.device_get(run.packing.unpack(state))


def label_rows(state):
    return state.params["network"]["label"]["embedding"]


def test_labels_are_loaded_where_the_model_is_given_them():
    for split in source.SPLITS:
        whole, told = splits.load("digits", split), splits.load_data(conditional(), split)
        assert splits.load_data(tiny.config(), split).labels is None
        assert splits.load_measured(conditional(evaluate__labels=False), split).labels is None
        np.testing.assert_array_equal(told.labels, whole.labels)
        index = np.array([5, 0, 5])
        examples = told.examples(index)
        np.testing.assert_array_equal(examples.images, whole.images[index])
        np.testing.assert_array_equal(examples.labels, whole.labels[index])
        assert np.isin(told.labels, np.arange(splits.describe("digits", split).num_classes)).all()


@pytest.mark.parametrize("probability", [0.1, 0.6])
def test_labels_are_withheld_with_their_probability(probability):
    """Over 200 keys and 100 labels: the share is binomial, and the other labels stay."""
    labels = jnp.arange(100) % K
    keys = jax.random.split(jax.random.key(0), 200)
    drop = jax.vmap(lambda key: drop_labels(key, labels, probability, K))
    dropped = np.asarray(drop(keys))
    withheld = dropped == NONE
    se = np.sqrt(probability * (1 - probability) / withheld.size)
    assert abs(withheld.mean() - probability) < 4 * se
    assert (dropped == np.where(withheld, NONE, labels)).all()
    # No label is withheld more than another: a χ² of 99 has the standard deviation √198.
    per_label = withheld.sum(axis=0) - 200 * probability
    chi_2 = (per_label**2).sum() / (200 * probability * (1 - probability))
    assert abs(chi_2 - 100) < 4 * np.sqrt(200)


def test_labels_are_withheld_apart_from_a_step_s_other_random_numbers():
    """Whether an image is flipped says nothing of its label: they agree half the time."""
    labels = jnp.zeros(100, jnp.int32)

    def agree(key):
        of_others = jax.random.split(key)
        withheld = drop_labels(jax.random.fold_in(key, gradients.LABELS), labels, 0.5, K) == NONE
        return jnp.stack([withheld == jax.random.bernoulli(k, shape=(100,)) for k in of_others])

    agreement = jax.vmap(agree)(jax.random.split(jax.random.key(1), 100))
    se = 0.5 / np.sqrt(100 * 100)
    assert np.abs(agreement.mean(axis=(0, 2)) - 0.5).max() < 4 * se


def test_with_none_withheld_nothing_is_learned_of_no_label():
    before, after = stepped(conditional(train__label_dropout=0.0))
    moved = np.abs(label_rows(after) - label_rows(before)).max(axis=1)
    assert moved[NONE] == 0
    assert moved[:K].min() > 0


def test_with_all_withheld_nothing_is_learned_of_labels():
    """Other labels make no difference at all."""
    config = conditional(train__label_dropout=1.0)
    before, after = stepped(config)
    moved = np.abs(label_rows(after) - label_rows(before)).max(axis=1)
    assert moved[NONE] > 0
    assert moved[:K].max() == 0
    _, other = stepped(config, labels=np.zeros(1000, np.int32))
    tiny.assert_bit_equal(other, after)


def test_a_step_sees_the_labels_of_its_own_images():
    """With a single class in the batches, its embedding alone is trained."""
    config = conditional(train__label_dropout=0.0)
    indices = order.batch_indices(config.seed, 0, 1000, config.train.batch_size)
    labels = np.full(1000, 3, np.int32)
    labels[indices] = 7
    before, after = stepped(config, labels, num_steps=2)
    moved = np.abs(label_rows(after) - label_rows(before)).max(axis=1)
    assert set(np.flatnonzero(moved)) == {3, 7}


def test_an_unconditional_run_knows_nothing_of_withheld_labels():
    (_, one), (_, other) = (stepped(tiny.config(train__label_dropout=p)) for p in (0.1, 0.9))
    tiny.assert_bit_equal(one, other)


@pytest.fixture
def workdir(tmp_path):
    """A class-conditional network of random weights."""
    return tiny.untrained(tmp_path, conditional(), scale=0.3)


def test_a_checkpoint_has_both_bounds(workdir):
    """The line says which, and so do the settings that a result is of."""
    given, withheld = (
        evaluate(conditional(evaluate__labels=is_), workdir) for is_ in (True, False)
    )
    assert given["bits_per_dim"] != withheld["bits_per_dim"]
    assert given["prior"] == withheld["prior"]
    assert result_line(given).startswith("test bits/dim given labels ")
    assert "given labels" not in result_line(withheld)
    assert given["settings"]["evaluate.labels"] is True
    assert withheld["settings"]["evaluate.labels"] is False


def test_errors_are_measured_with_labels_and_without(workdir):
    """What was measured one way is not taken for the other."""

    def errors(is_given):
        config = conditional(evaluate__labels=is_given, analytic__levels=3, analytic__examples=64)
        return load(config, workdir).measured_errors()[1]

    given, withheld, again = errors(True), errors(False), errors(True)
    assert (given != withheld).mean() > 0.9
    np.testing.assert_array_equal(given, again)


B = 4
LABELS = np.array([7, 0, NONE, 3], np.int32)


def measurements():
    """Every program as labels -> an array with the examples first, for one set of weights."""
    config = conditional(
        decoder__name="discretized_gaussian", evaluate__ode__num_steps=2, evaluate__chunk_size=3
    )
    dataset = splits.load_data(config, "test", splits.first(B))
    params = tiny.state_of(config, 0.3).ema_params
    subject = subject_of(config, define_model(config), params, dataset)
    controls = (GaussianControl.fit(np.asarray(subject.to_data(dataset.images)), 0.01),)
    index, draw = np.arange(B, dtype=np.int32), np.zeros(B, np.int32)
    time, slot = np.array([0.1, 0.5, 0.6, 0.9]), np.arange(B)
    at_t, in_time = (programs.Points.at(subject, time, slot, is_) for is_ in (False, True))
    ode = config.evaluate.ode
    calls = {
        "bound": (programs.make_bound(subject), ()),
        "terms_at": (programs.make_terms_at(subject, 0), (np.tile(np.int32([2, 4, 7]), (B, 1)),)),
        "rates": (programs.make_rates(subject, False), (at_t, draw, controls)),
        "continuous_rates": (programs.make_rates(subject, True), (in_time, draw, controls)),
        "log_ratios": (programs.make_log_ratios(subject), (at_t, draw)),
        "ends": (programs.make_ends(subject), (draw, slot)),
        "trajectory": (programs.make_trajectory(subject), (draw,)),
        "ode": (programs.make_ode(subject, ode), (draw,)),
    }
    results = {
        "bound": lambda bound: bound.total,
        "terms_at": lambda bound: bound.kl,
        "rates": lambda rates: rates.value,
        "continuous_rates": lambda rates: rates.value,
        "ends": lambda ends: ends[1],
        "ode": lambda bound: bound.total,
    }

    def measure(name):
        program, others = calls[name]

        def run(labels):
            labelled = subject._replace(dataset=dataset._replace(labels=labels))
            result = program(labelled, index, *others)
            return np.float64(results[name](result) if name in results else result)

        return run

    return {name: measure(name) for name in calls}


@pytest.mark.parametrize(
    "name",
    ["bound", "terms_at", "rates", "continuous_rates", "log_ratios", "ends", "trajectory", "ode"],
)
def test_each_example_is_measured_with_its_own_label(name):
    """Row i is row i of a batch whose labels are all the i-th; no label at all is the last one."""
    run = measurements()[name]
    found = run(LABELS)
    for i, label in enumerate(LABELS):
        alike = run(np.full(B, label, np.int32))
        np.testing.assert_allclose(found[i], alike[i], rtol=1e-5)
    without = run(None)
    np.testing.assert_allclose(without, run(np.full(B, NONE, np.int32)), rtol=1e-5)
    changed = np.abs(found / without - 1).reshape(B, -1).max(axis=1) > 1e-4
    assert changed.tolist() == (LABELS != NONE).tolist()


def test_what_estimators_cost_is_told_with_labels(workdir):
    """The examples are a split's first, and the table's name says what they come with."""
    config = conditional(variance__examples=5)
    case = variance.trained_case(load(config, workdir))
    assert case.name.endswith("given labels")
    whole = splits.load("digits", "test")
    np.testing.assert_array_equal(case.subject.dataset.labels, whole.labels[:5])
    np.testing.assert_array_equal(case.subject.dataset.images, whole.images[:5])


def without_labels(labels):
    images = np.zeros((1000, 8, 8, 1), np.uint8)
    num_classes = 0 if labels is None else K
    return lambda split: source.Source(1000, (8, 8, 1), 17, lambda: (images, labels), num_classes)


def test_a_set_without_labels_is_named(monkeypatch):
    monkeypatch.setitem(splits.DATASETS, "plain", without_labels(None))
    define_model(tiny.config(data__name="plain"))
    message = r"config\.model\.class_conditional = True: .* of plain, train, .* use False"
    with pytest.raises(ConfigError, match=message):
        define_model(conditional(data__name="plain"))


def test_an_example_whose_label_is_missing_is_named(monkeypatch):
    """tensorflow-datasets has −1 for it, as in the test splits of some sets."""
    monkeypatch.setitem(splits.DATASETS, "hidden", without_labels(np.int32([3] * 999 + [-1])))
    config = conditional(data__name="hidden")
    define_model(config)
    message = r"class_conditional = True: .* of hidden, test, .*the one at 999 has -1.* use False"
    with pytest.raises(ConfigError, match=message):
        splits.load_data(config, "test")
