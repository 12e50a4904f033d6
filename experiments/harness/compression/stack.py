"""The stack of bits: constriction's ANS coder, with initial bits that are borrowed as needed."""

import functools
import time
from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt32

from diffusion.coding import GridGaussian
from experiments.harness.errors import ConfigError, RunError

REACH_Q, REACH_P = 5.0, 8.0  # std around the mean that are coded directly
_LARGEST_REACH = 2**20
_LARGEST_CENTRE = 2**30
_DIGIT = 2**16  # two digits of a distance
_PRECISION = 24  # bits of a probability; constriction's default
_MARGIN = 3  # words that stay below those that were used: the coder's own state
_BLOCK = 4096  # words that are borrowed at least


def constriction() -> ModuleType:
    """The package, an optional one.

    Raises:
      ConfigError: if it is not installed.
    """
    try:
        import constriction
    except ImportError as error:
        raise ConfigError(
            "compression needs the package constriction >= 0.4; pip install constriction"
        ) from error
    return constriction


def _timed(method: Callable) -> Callable:
    """Adds the time of a method's calls to the stack's seconds."""

    @functools.wraps(method)
    def timed(self, *arguments):
        start = time.perf_counter()
        result = method(self, *arguments)
        self.seconds += time.perf_counter() - start
        return result

    return timed


class Stack:
    """A `diffusion.coding.Coder` that compresses into 32-bit words.

    Three things keep it at the rate of an ideal coder.

    constriction gives each integer of a model's support a probability of at least 2⁻²⁴, so a
    support of N integers loses N/2²⁴ of the probability. Supports are therefore narrow: a few std
    around the mean. A value beyond the support of a p is coded as the end of the support, and its
    distance from there follows in two digits.

    A word that a push puts on the stack holds the quantile of the value that was pushed. If the
    next pop read this word as it is, the value that it draws would have the same quantile, and
    where p is too narrow the noise of the trajectory would be too wide. So q sees the words through
    a mask: each is XORed with a random word, a function of the seed and of the place on the stack.

    An encoder that pops more bits than the stack holds borrows random words, another function of
    the seed. They lie at the bottom, and words that were never used are left out of the result.

    Attributes:
      seconds: time spent in the coder.
    """

    def __init__(
        self, seed: int, words: UInt32[np.ndarray, "words"] | None = None, initial: int = 0
    ):
        """A stack that is empty and can borrow; or, for a decoder, one that holds these words.

        Args:
          seed: determines the borrowed words and the mask.
          words: the result of an encoder.
          initial: how many of these were borrowed.

        Raises:
          ConfigError: if constriction is not installed.
        """
        stream = constriction().stream
        self._new_coder, models = stream.stack.AnsCoder, stream.model
        self._gaussian = functools.cache(lambda reach: models.QuantizedGaussian(-reach, reach))
        self._choice, self._uniform = models.Categorical(perfect=False), models.Uniform(_DIGIT)
        self._can_borrow = words is None
        self._words = np.zeros(0, np.uint32) if words is None else words.copy()
        self._size = self._lowest = len(self._words)
        self._borrowed = initial  # words at the bottom
        self._loan, self._above, self._below = (_Random(seed, part) for part in range(3))
        self.seconds = 0.0
        if self._can_borrow:
            self._borrow(_BLOCK)

    @_timed
    def push(self, k: Int[np.ndarray, "b *d"], gaussian: GridGaussian) -> None:
        frame = _frame(gaussian)
        offset = np.ravel(k) - frame.centre
        inside = np.clip(offset, -frame.reach, frame.reach)
        is_end = np.abs(inside) == frame.reach
        if not gaussian.is_q and is_end.any():
            for digit in np.divmod(np.abs(offset[is_end]) - frame.reach, _DIGIT)[::-1]:
                self._encode(digit, self._uniform)
        model = self._gaussian(frame.reach)
        self._encode(inside, model, frame.mean, frame.std, is_q=gaussian.is_q)

    @_timed
    def pop(self, gaussian: GridGaussian) -> Int[np.ndarray, "b *d"]:
        frame = _frame(gaussian)
        model, count = self._gaussian(frame.reach), len(frame.mean)
        offset = self._decode(count, model, frame.mean, frame.std, is_q=gaussian.is_q)
        is_end = np.abs(offset) == frame.reach
        if not gaussian.is_q and is_end.any():
            count = int(is_end.sum())
            high, low = (self._decode(count, self._uniform, count) for _ in range(2))
            offset[is_end] += np.sign(offset[is_end]) * (high * _DIGIT + low)
        return np.reshape(frame.centre + offset, gaussian.mean.shape)

    @_timed
    def push_choice(
        self, choice: Int[np.ndarray, "b *d"], probs: Float[np.ndarray, "b *d K"]
    ) -> None:
        self._encode(np.ravel(choice), self._choice, _table(probs))

    @_timed
    def pop_choice(self, probs: Float[np.ndarray, "b *d K"]) -> Int[np.ndarray, "b *d"]:
        table = _table(probs)
        return np.reshape(self._decode(len(table), self._choice, table), probs.shape[:-1])

    @property
    def num_initial(self) -> int:
        """Words of the result that were borrowed."""
        return min(self._borrowed, self._borrowed - self._lowest + _MARGIN)

    def words(self) -> UInt32[np.ndarray, "words"]:
        """The content of the stack, without borrowed words that were never used."""
        return self._words[self._borrowed - self.num_initial : self._size].copy()

    def holds_initial(self) -> bool:
        """Whether only the borrowed words are left, as when the encoder began."""
        borrowed = _loan(self._loan, self._borrowed)
        return np.array_equal(self._words[: self._size], borrowed)

    def _encode(self, symbols: np.ndarray, *model: Any, is_q: bool = False) -> None:
        coder = self._take(_MARGIN, is_q)
        coder.encode_reverse(symbols.astype(np.int32), *model)
        self._put(coder, is_q)

    def _decode(self, count: int, *model: Any, is_q: bool = False) -> Int[np.ndarray, "n"]:
        needed = count * _PRECISION // 32 + 1 + _MARGIN
        if self._can_borrow and needed > self._size:
            self._borrow(max(needed - self._size, _BLOCK))
        coder = self._take(needed, is_q)
        symbols = coder.decode(*model).astype(np.int64)
        self._put(coder, is_q)
        self._lowest = min(self._lowest, self._size)
        return symbols

    def _take(self, count: int, is_q: bool) -> Any:
        """Moves at most `count` words from the top of the stack to a new coder."""
        start = max(self._size - count, 0)
        words = self._words[start : self._size]
        self._size = start
        return self._new_coder(self._masked(words) if is_q else words)

    def _put(self, coder: Any, is_q: bool) -> None:
        """Puts the words of a coder on top of the stack."""
        words = coder.get_compressed()
        words = self._masked(words) if is_q else words
        end = self._size + len(words)
        if end > len(self._words):
            self._words = np.concatenate([self._words, np.zeros(end, np.uint32)])
        self._words[self._size : end] = words
        self._size = end

    def _masked(self, words: UInt32[np.ndarray, "words"]) -> UInt32[np.ndarray, "words"]:
        """Applies the mask to words that belong above the present top; the mask is its own inverse.

        The last two words are the coder's own state and are not masked.
        """
        count = max(len(words) - 2, 0)
        # Places count from the borrowed words up, and from there down.
        start = self._size - self._borrowed
        below = min(max(-start, 0), count)
        mask = (
            self._below.words(-start - below, below)[::-1],
            self._above.words(max(start, 0), count - below),
            np.zeros(len(words) - count, np.uint32),
        )
        return words ^ np.concatenate(mask)

    def _borrow(self, count: int) -> None:
        """Puts random words below all others."""
        self._borrowed += count
        new = _loan(self._loan, self._borrowed)[:count]
        self._words = np.concatenate([new, self._words[: self._size]])
        self._size += count
        self._lowest += count


class _Random:
    """A sequence of random words, a function of the seed; computed as far as it is needed."""

    def __init__(self, *seed: int):
        self._generator, self._words = np.random.PCG64(seed), np.zeros(0, np.uint32)

    def words(self, start: int, count: int) -> UInt32[np.ndarray, "words"]:
        """`count` words, starting at index `start`. No word is zero."""
        missing = start + count - len(self._words)
        if missing > 0:
            raw = self._generator.random_raw(max(missing, len(self._words), _BLOCK))
            words = np.maximum((raw >> np.uint64(32)).astype(np.uint32), 1)
            self._words = np.concatenate([self._words, words])
        return self._words[start : start + count]


def _loan(random: _Random, count: int) -> UInt32[np.ndarray, "words"]:
    """The first words of a sequence, from the top of the stack down."""
    return random.words(0, count)[::-1]


class _Frame(NamedTuple):
    """A Gaussian relative to the integer next to its mean, flat: |k − centre| ≤ reach."""

    centre: Int[np.ndarray, "n"]
    mean: Float[np.ndarray, "n"]
    std: Float[np.ndarray, "n"]
    reach: int


def _frame(gaussian: GridGaussian) -> _Frame:
    mean, std = np.ravel(gaussian.mean), np.ravel(gaussian.std)
    largest = std.max(initial=0.0)
    if not np.isfinite(mean).all() or not 0 < std.min(initial=1.0) <= largest < np.inf:
        raise RunError(
            "the mean or the variance of a latent is not finite and positive; this network cannot "
            "compress these images"
        )
    reach = int(np.ceil((REACH_Q if gaussian.is_q else REACH_P) * largest)) + 1
    centre = np.clip(np.rint(mean), -_LARGEST_CENTRE, _LARGEST_CENTRE)
    return _Frame(centre.astype(np.int64), mean - centre, std, min(reach, _LARGEST_REACH))


def _table(probs: Float[np.ndarray, "b *d K"]) -> Float[np.ndarray, "n K"]:
    if not np.isfinite(probs).all():
        raise RunError("p(x_0 | x_1) is not finite; this network cannot compress these images")
    return np.ascontiguousarray(probs.reshape(-1, probs.shape[-1]), np.float32)
