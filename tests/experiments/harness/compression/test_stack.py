"""The stack of bits: push and pop are inverse, and its length is that of an ideal coder."""

import sys

import numpy as np
import pytest

from diffusion.coding import GridGaussian
from experiments.harness.compression.ledger import Ledger
from experiments.harness.compression.stack import Stack
from experiments.harness.errors import ConfigError, RunError

pytest.importorskip("constriction")


def random_operation(rng):
    """A distribution, and a value to push with it; None: to be popped."""
    shape = tuple(rng.integers(1, 40, 2))
    if rng.random() < 1 / 3:
        probs = rng.dirichlet(np.ones(rng.integers(2, 20)), shape).astype(np.float32)
        probs[0, 0, 0] = 0.0  # can be coded all the same
        return probs, np.zeros(shape, np.int64) if rng.random() < 0.1 else probs.argmax(axis=-1)
    mean = rng.normal(size=shape) * 10.0 ** rng.uniform(-2, 6)
    gaussian = GridGaussian(mean, 10.0 ** rng.uniform(-1, 3, shape), is_q=bool(rng.random() < 0.5))
    if gaussian.is_q:
        return gaussian, None
    spread = 10.0 ** rng.uniform(0, 3)  # far beyond the support, some of them
    return gaussian, np.rint(mean + spread * gaussian.std * rng.normal(size=shape)).astype(np.int64)


@pytest.mark.parametrize("seed", range(5))
def test_push_and_pop_are_inverse(seed):
    """Over random grids, means and values, to the last bit of the stack."""
    rng, stack, done = np.random.default_rng(seed), Stack(seed), []
    wide = GridGaussian(np.zeros((99, 99)), np.full((99, 99), 99.0), is_q=True)
    for number in range(60):
        # The stack borrows more than once.
        distribution, value = (wide, None) if number % 20 == 7 else random_operation(rng)
        is_choice = isinstance(distribution, np.ndarray)
        if value is None:
            value = stack.pop(distribution)
            done.append(("push", distribution, value))
        else:
            (stack.push_choice if is_choice else stack.push)(value, distribution)
            done.append(("pop_choice" if is_choice else "pop", distribution, value))
    decoder = Stack(seed, stack.words(), stack.num_initial)
    for undo, distribution, value in reversed(done):
        if undo == "push":
            decoder.push(value, distribution)
        else:
            np.testing.assert_array_equal(getattr(decoder, undo)(distribution), value)
    assert decoder.holds_initial()


def test_a_wrong_decoder_is_noticed():
    stack = Stack(0)
    gaussian = GridGaussian(np.zeros((4, 9)), np.full((4, 9), 8.0), is_q=True)
    k = stack.pop(gaussian)
    decoder = Stack(0, stack.words(), stack.num_initial)
    k[0, 0] += 1
    decoder.push(k, gaussian)
    assert not decoder.holds_initial()


def test_few_words_are_borrowed():
    """As many as the popped values take, a part of a word, and the coder's own state."""
    stack, gaussian = Stack(0), GridGaussian(np.zeros((64, 8)), np.full((64, 8), 8.0), is_q=True)
    ledger = Ledger(stack)
    ledger.start(64)
    ledger.pop(gaussian)
    popped = -ledger.bins.sum() / np.log(2) / 32
    assert popped < stack.num_initial < popped + 5


@pytest.mark.parametrize("is_narrow", [False, True])
def test_what_is_popped_does_not_depend_on_what_was_pushed(is_narrow):
    """The noise of q has variance one, that of the bins added, even where p was too narrow.

    Without a mask each new word shows q the quantile of a value that was pushed.
    """
    rng, stack, shape = np.random.default_rng(0), Stack(0), (20, 100)
    p = GridGaussian(np.zeros(shape), np.full(shape, 8.0), is_q=False)
    q, squares = p._replace(is_q=True), []
    for _ in range(100):
        std = 8 * np.sqrt(1.3 if is_narrow else 1)
        stack.push(np.rint(std * rng.normal(size=shape)).astype(np.int64), p)
        squares.append((stack.pop(q) / 8.0) ** 2)
    error = np.sqrt(2 / np.size(squares))
    assert abs(np.mean(squares) - (1 + 1 / 12 / 8**2)) < 4 * error


def test_the_length_is_that_of_an_ideal_coder():
    """Within 1e-4 bits a value and three words, though std is not what p has."""
    rng, stack, shape = np.random.default_rng(0), Stack(0), (50, 1000)
    ledger = Ledger(stack)
    ledger.start(50)
    gaussian = GridGaussian(rng.normal(size=shape) * 100, np.full(shape, 8.0), is_q=False)
    k = np.rint(gaussian.mean + gaussian.std * rng.normal(size=shape) * 1.5).astype(np.int64)
    ledger.push(k, gaussian)
    bits = 32 * (len(stack.words()) - stack.num_initial)
    assert abs(bits - ledger.bins.sum() / np.log(2)) < 1e-4 * k.size + 96
    # The density at the middle of a bin is not its mean: the difference has the order of 1/8².
    assert 0 < (ledger.density.sum() - ledger.bins.sum()) / k.size < 1.25 / 24 / 8**2


@pytest.mark.parametrize(("mean", "std"), [(np.nan, 1.0), (0.0, np.inf), (0.0, 0.0), (0.0, np.nan)])
def test_a_distribution_that_is_none_is_one_line(mean, std):
    gaussian = GridGaussian(np.full((1, 2), mean), np.full((1, 2), std), is_q=False)
    with pytest.raises(RunError, match="is not finite and positive; this network cannot"):
        Stack(0).push(np.zeros((1, 2), np.int64), gaussian)
    with pytest.raises(RunError, match=r"p\(x_0 \| x_1\) is not finite"):
        Stack(0).push_choice(np.zeros((1, 1), np.int64), np.full((1, 1, 2), np.nan))


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ConfigError, match=r"needs the package constriction .* pip install"):
        Stack(0)
