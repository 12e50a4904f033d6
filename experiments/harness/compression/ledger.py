"""What images would take with an ideal coder: the log-ratios of q and p, image by image."""

import time

import numpy as np
from jaxtyping import Float, Int

from diffusion.coding import Coder, GridGaussian


class Ledger:
    """A coder that passes everything on to another one and adds up −log p and log q, in nats.

    Attributes:
      seconds: time spent in adding up.
    """

    def __init__(self, coder: Coder):
        self._coder = coder
        self._density: list[np.ndarray] = []
        self._bins: list[np.ndarray] = []
        self.seconds = 0.0

    @property
    def density(self) -> Float[np.ndarray, "n"]:
        """log q(x_1 … x_T | x_0) − log p(x_0 … x_T) of each image's trajectory, as densities."""
        return np.concatenate(self._density)

    @property
    def bins(self) -> Float[np.ndarray, "n"]:
        """The same with the probabilities of the grids' bins."""
        return np.concatenate(self._bins)

    def start(self, batch: int) -> None:
        """Begins a batch of images."""
        self._density.append(np.zeros(batch))
        self._bins.append(np.zeros(batch))

    def push(self, k: Int[np.ndarray, "b *d"], gaussian: GridGaussian) -> None:
        self._coder.push(k, gaussian)
        self._count(k, gaussian, -1)

    def pop(self, gaussian: GridGaussian) -> Int[np.ndarray, "b *d"]:
        k = self._coder.pop(gaussian)
        self._count(k, gaussian, 1)
        return k

    def push_choice(
        self, choice: Int[np.ndarray, "b *d"], probs: Float[np.ndarray, "b *d K"]
    ) -> None:
        self._coder.push_choice(choice, probs)
        start = time.perf_counter()
        chosen = np.take_along_axis(probs, choice[..., None], axis=-1)
        length = -_per_example(np.log(np.maximum(np.float64(chosen), 1e-30)))
        self._add(length, length, start)

    def pop_choice(self, probs: Float[np.ndarray, "b *d K"]) -> Int[np.ndarray, "b *d"]:
        raise NotImplementedError("only an encoder has a ledger, and it pops no pixels")

    def _count(self, k: np.ndarray, gaussian: GridGaussian, sign: int) -> None:
        start = time.perf_counter()
        precision = gaussian.std**-2.0
        square = (k - gaussian.mean) ** 2 * precision
        density = -0.5 * (square + np.log(2 * np.pi / precision))
        # The mean of the density over a bin, by its second and fourth derivative.
        second, fourth = square - 1, square * (square - 6) + 3
        excess = precision * (second / 24 + precision * fourth / 1920)
        mean = np.log1p(np.maximum(excess, -0.9))  # a bin wider than std has no such series
        self._add(sign * _per_example(density), sign * _per_example(density + mean), start)

    def _add(self, density: np.ndarray, bins: np.ndarray, start: float) -> None:
        self._density[-1] += density
        self._bins[-1] += bins
        self.seconds += time.perf_counter() - start


def _per_example(values: Float[np.ndarray, "b *d"]) -> Float[np.ndarray, "b"]:
    return values.reshape(len(values), -1).sum(axis=1)
