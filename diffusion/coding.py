"""Images as bits: bits-back coding of x_0 through the latents x_1 … x_T, at the rate of the bound.

A coder is a stack of bits. To push a value with a distribution p adds −log₂ p(value) bits to it; to
pop a value with q removes −log₂ q(value) bits and, since the bits look random, draws it from q. An
encoder pops the latents with q and pushes everything with p, so an image takes
log q(x_1 … x_T | x_0) − log p(x_0 … x_T), the term of (13.7) at the trajectory that was drawn. The
decoder inverts each operation in the opposite order, and gets back the bits that were popped.

The two forms of the bound are two orders of the same operations:

- `bit_swap`, (13.10): one transition after another; the stack lends about two latents.
- `bb_ans`, (13.26): from the top down by the posterior; the stack lends all T latents.

Latents lie on the grid of their level: they are integers times its spacing.

Townsend et al. (2019), "BB-ANS"; Kingma et al. (2019), "Bit-Swap"; Ho et al. (2019), "Compression
with flows via local bits-back coding", for the spacing of the grids.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from diffusion import forward
from diffusion.decoders import Quantization
from diffusion.gaussian import Gaussian
from diffusion.model import DiffusionModel
from diffusion.reverse import convert
from diffusion.schedules import Array, Levels

_FINEST = 2.0**-20  # float32 tells integers times this spacing apart as far as |x| = 8


class GridGaussian(NamedTuple):
    """A Gaussian on the integers: each has the probability of the unit interval around it.

    Attributes:
      mean: in units of the grid's spacing.
      std: in the same units.
      is_q: whether it is q, whose values are drawn, so that a few std around the mean suffice. A
        value that is pushed with p can be any integer.
    """

    mean: Float[np.ndarray, "b *d"]
    std: Float[np.ndarray, "b *d"]
    is_q: bool


@runtime_checkable
class Coder(Protocol):
    """A stack of bits: pop inverts push, and push inverts pop, to the last bit."""

    def push(self, k: Int[np.ndarray, "b *d"], gaussian: GridGaussian) -> None: ...

    def pop(self, gaussian: GridGaussian) -> Int[np.ndarray, "b *d"]: ...

    def push_choice(
        self, choice: Int[np.ndarray, "b *d"], probs: Float[np.ndarray, "b *d K"]
    ) -> None: ...

    def pop_choice(self, probs: Float[np.ndarray, "b *d K"]) -> Int[np.ndarray, "b *d"]: ...


class Conditionals(NamedTuple):
    """The conditionals of q and p as functions of host arrays.

    An encoder and its decoder must call the same compiled functions: their results may not differ
    in any bit.

    Attributes:
      marginal: (x_0, t) -> q(x_t | x_0).
      transition: (x_s, t) -> q(x_t | x_s) with s = t − 1.
      posterior: (x_t, x_0, t) -> q(x_s | x_t, x_0).
      reverse: (x_t, t) -> p_θ(x_s | x_t).
      pixels: (x_1) -> p(x_0 | x_1) of each pixel over its K grey levels.
    """

    marginal: Callable[..., Gaussian]
    transition: Callable[..., Gaussian]
    posterior: Callable[..., Gaussian]
    reverse: Callable[..., Gaussian]
    pixels: Callable[..., Float[Array, "b *d K"]]


def conditionals(
    quantization: Quantization, compile_function: Callable[[str, Callable], Callable]
) -> Conditionals:
    """The five conditionals of a model.

    Args:
      quantization: the grey levels.
      compile_function: takes the name of a conditional and a function (model, *arrays), and returns
        a function of the arrays alone.
    """

    def steps(model, x, t):
        return model.levels.step(jnp.full(jnp.shape(x)[0], t))

    def marginal(model, x_0, t):
        return forward.marginal(x_0, steps(model, x_0, t).log_snr)

    def transition(model, x_s, t):
        return forward.transition(x_s, steps(model, x_s, t))

    def posterior(model, x_t, x_0, t):
        return forward.posterior(x_t, x_0, steps(model, x_t, t))

    def pixels(model, x_1):
        return jnp.exp(pixel_log_probs(model, x_1, quantization))

    functions = {
        "marginal": marginal,
        "transition": transition,
        "posterior": posterior,
        "reverse": reverse_step,
        "pixels": pixels,
    }
    return Conditionals(**{name: compile_function(name, f) for name, f in functions.items()})


def reverse_step(model: DiffusionModel, x_t: Float[Array, "b *d"], t: Int[Array, ""]) -> Gaussian:
    """p_θ(x_s | x_t) for s = t − 1 ≥ 1 from one call of the denoiser."""
    step = model.levels.step(jnp.full(jnp.shape(x_t)[0], t))
    outputs = model.reverse.outputs(x_t, step.log_snr)
    source = model.reverse.parameterization
    x_0_hat = convert(outputs.prediction, x_t, step.log_snr, source, "x_0")
    return model.reverse.step(x_t, x_0_hat, step, outputs.extra)


def pixel_log_probs(
    model: DiffusionModel, x_1: Float[Array, "b *d"], quantization: Quantization
) -> Float[Array, "b *d K"]:
    """log p(x_0 | x_1) of each pixel over all grey levels, for a decoder of independent pixels."""
    log_snr = model.levels.step(jnp.ones(jnp.shape(x_1)[0], jnp.int32)).log_snr
    x_0_hat = model.reverse.predict("x_0", x_1, log_snr)
    # Each pixel is an example of one dimension, so a sum over dimensions has one term.
    column, column_hat = jnp.reshape(x_1, (-1, 1)), jnp.reshape(x_0_hat, (-1, 1))

    def of_level(value):
        return model.decoder(jnp.full_like(column, value), column, column_hat, model.levels)

    values = jnp.asarray(quantization.values, column.dtype)
    log_probs = jax.lax.map(of_level, values, batch_size=min(16, len(values)))
    return jnp.moveaxis(jnp.reshape(log_probs, (-1, *jnp.shape(x_1))), 0, -1)


class Code(NamedTuple):
    """What an encoder and its decoder share.

    Attributes:
      conditionals: of q and p.
      spacing: of the grids of the levels t = 1 … T; the entry at t = 0 is not used.
      values: the data values of the grey levels.
    """

    conditionals: Conditionals
    spacing: Float[np.ndarray, "levels"]
    values: Float[np.ndarray, "K"]

    @property
    def num_timesteps(self) -> int:
        return len(self.spacing) - 1

    def prior(self, shape: tuple[int, ...]) -> GridGaussian:
        """p(x_T)."""
        ones = np.ones(shape)
        return GridGaussian(0 * ones, ones / self.spacing[-1], is_q=False)

    def marginal(self, level: Int[np.ndarray, "b *d"], t: int) -> GridGaussian:
        """q(x_t | x_0) at grey levels."""
        return self._on_grid(self.conditionals.marginal(self._data(level), t), t, is_q=True)

    def transition(self, k: Int[np.ndarray, "b *d"], t: int) -> GridGaussian:
        """q(x_t | x_{t−1}) at the grid point k of the level t − 1."""
        gaussian = self.conditionals.transition(self._latent(k, t - 1), t)
        return self._on_grid(gaussian, t, is_q=True)

    def posterior(
        self, k: Int[np.ndarray, "b *d"], level: Int[np.ndarray, "b *d"], t: int
    ) -> GridGaussian:
        """q(x_{t−1} | x_t, x_0) at the grid point k of the level t."""
        gaussian = self.conditionals.posterior(self._latent(k, t), self._data(level), t)
        return self._on_grid(gaussian, t - 1, is_q=True)

    def reverse(self, k: Int[np.ndarray, "b *d"], t: int) -> GridGaussian:
        """p_θ(x_{t−1} | x_t) at the grid point k of the level t."""
        gaussian = self.conditionals.reverse(self._latent(k, t), t)
        return self._on_grid(gaussian, t - 1, is_q=False)

    def pixels(self, k: Int[np.ndarray, "b *d"]) -> Float[np.ndarray, "b *d K"]:
        """p(x_0 | x_1) at the grid point k of the level 1."""
        return np.asarray(self.conditionals.pixels(self._latent(k, 1)))

    def _data(self, level: np.ndarray) -> Float[np.ndarray, "b *d"]:
        return np.float32(self.values[level])

    def _latent(self, k: np.ndarray, t: int) -> Float[np.ndarray, "b *d"]:
        return np.float32(k * self.spacing[t])

    def _on_grid(self, gaussian: Gaussian, t: int, is_q: bool) -> GridGaussian:
        mean = np.asarray(gaussian.mean, np.float64) / self.spacing[t]
        std = np.sqrt(np.asarray(gaussian.variance, np.float64)) / self.spacing[t]
        return GridGaussian(mean, np.broadcast_to(std, mean.shape), is_q)


def make_code(
    model: DiffusionModel, quantization: Quantization, order: str, bins_per_std: float = 8.0
) -> Code:
    """The code of a model, compiled for this process, with the grids of `grid_spacing`."""
    spacing = grid_spacing(model.levels, ORDERS[order], bins_per_std)
    compiled = conditionals(quantization, lambda _, f: jax.jit(functools.partial(f, model)))
    return Code(compiled, spacing, quantization.values)


def _push_bit_swap(coder: Coder, code: Code, level: Int[np.ndarray, "b *d"]) -> None:
    k_s = coder.pop(code.marginal(level, 1))
    coder.push_choice(level, code.pixels(k_s))
    for t in range(2, code.num_timesteps + 1):
        k_t = coder.pop(code.transition(k_s, t))
        coder.push(k_s, code.reverse(k_t, t))
        k_s = k_t
    coder.push(k_s, code.prior(k_s.shape))


def _pop_bit_swap(coder: Coder, code: Code, shape: tuple[int, ...]) -> Int[np.ndarray, "b *d"]:
    k_t = coder.pop(code.prior(shape))
    for t in range(code.num_timesteps, 1, -1):
        k_s = coder.pop(code.reverse(k_t, t))
        coder.push(k_t, code.transition(k_s, t))
        k_t = k_s
    level = coder.pop_choice(code.pixels(k_t))
    coder.push(k_t, code.marginal(level, 1))
    return level


def _push_bb_ans(coder: Coder, code: Code, level: Int[np.ndarray, "b *d"]) -> None:
    k = {code.num_timesteps: coder.pop(code.marginal(level, code.num_timesteps))}
    for t in range(code.num_timesteps, 1, -1):
        k[t - 1] = coder.pop(code.posterior(k[t], level, t))
    coder.push_choice(level, code.pixels(k[1]))
    for t in range(2, code.num_timesteps + 1):
        coder.push(k[t - 1], code.reverse(k[t], t))
    coder.push(k[code.num_timesteps], code.prior(level.shape))


def _pop_bb_ans(coder: Coder, code: Code, shape: tuple[int, ...]) -> Int[np.ndarray, "b *d"]:
    k = {code.num_timesteps: coder.pop(code.prior(shape))}
    for t in range(code.num_timesteps, 1, -1):
        k[t - 1] = coder.pop(code.reverse(k[t], t))
    level = coder.pop_choice(code.pixels(k[1]))
    for t in range(2, code.num_timesteps + 1):
        coder.push(k[t - 1], code.posterior(k[t], level, t))
    coder.push(k[code.num_timesteps], code.marginal(level, code.num_timesteps))
    return level


class Order(NamedTuple):
    """An order of the operations.

    Attributes:
      push: (coder, code, grey levels [b *d]) puts a batch of images on the stack.
      pop: (coder, code, shape) -> grey levels takes it off the stack again.
      q_std: levels -> standard deviation of the q that x_t is popped with, t = 1 … T.
      lends_all: whether all latents are popped before the first one is pushed.
    """

    push: Callable[[Coder, Code, np.ndarray], None]
    pop: Callable[[Coder, Code, tuple[int, ...]], np.ndarray]
    q_std: Callable[[Levels], np.ndarray]
    lends_all: bool


def _posterior_std(levels: Levels) -> Float[np.ndarray, "n"]:
    """√β̃_{t+1} for t = 1 … T − 1: that of q(x_t | x_{t+1}, x_0), and the least one of p."""
    return np.sqrt(levels.posterior_variance[2:])


ORDERS: dict[str, Order] = {
    # β_1 = 1 − ᾱ_1 is the variance of q(x_1 | x_0).
    "bit_swap": Order(
        _push_bit_swap, _pop_bit_swap, lambda levels: np.sqrt(levels.beta[1:]), lends_all=False
    ),
    "bb_ans": Order(
        _push_bb_ans,
        _pop_bb_ans,
        lambda levels: np.append(_posterior_std(levels), np.sqrt(levels.sigma2[-1])),
        lends_all=True,
    ),
}


def grid_spacing(levels: Levels, order: Order, bins_per_std: float) -> Float[np.ndarray, "levels"]:
    """The spacing of each level's grid: the least std that codes on it, divided by `bins_per_std`.

    Args:
      levels: the T levels.
      order: an entry of ORDERS.
      bins_per_std: how fine the grids are.

    Returns:
      The spacing for t = 0 … T in data units; NaN at t = 0, which has no grid.

    Raises:
      ValueError: if a spacing is too fine for x_t in float32.
    """
    p_std = np.append(_posterior_std(levels), 1.0)
    spacing = np.minimum(order.q_std(levels), p_std) / bins_per_std
    if spacing.min() < _FINEST:
        t = int(spacing.argmin()) + 1
        raise ValueError(
            f"the grid of level {t} has a spacing of {spacing[t - 1]:.2g}, and x_t in float32 "
            f"needs at least {_FINEST:.2g}; use fewer levels or fewer bins"
        )
    return np.append(np.nan, spacing)


def peak_debt(levels: Levels, order: Order, spacing: Float[np.ndarray, "levels"]) -> float:
    """The most bits that the stack lends to one image, in bits/dim: its initial bits.

    The entropies of the popped latents, less those of the latents pushed before; p is taken to be
    as narrow as the posterior, and p(x_0 | x_1) to be certain.
    """

    def entropy(std, spacing):
        return np.log2(std * np.sqrt(2 * np.pi * np.e) / spacing)

    popped = np.cumsum(entropy(order.q_std(levels), spacing[1:]))
    if order.lends_all:
        return float(popped[-1])
    pushed = np.cumsum(entropy(_posterior_std(levels), spacing[1:-1]))
    # x_{t−2} has been pushed when x_t is popped.
    return float((popped - np.concatenate([[0.0, 0.0], pushed])[: len(popped)]).max())
