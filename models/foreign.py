"""Other people's networks as denoisers: PyTorch, ONNX, any NumPy function, or any JAX function.

A foreign function takes (x, noise, condition) and returns a prediction of x's shape. Its noise
level is not a log-SNR but, for example, a timestep that counts from 0. `denoiser` makes a function
of NumPy arrays, which is called on the host, a `Denoiser`; `jax_denoiser` one that JAX traces.
Bounds and samplers take both within compiled programs:

    predict = torch_function(unet)  # an ε̂ that receives the index of the level
    p = Reverse(denoiser(predict, timestep(levels.log_snr[1:])), "eps", "beta")

What is predicted is `Reverse.parameterization`, for x_t = α x_0 + σ ε.
"""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jaxtyping import Float, PyTree

from diffusion.gaussian import expand
from diffusion.schedules import Array, alpha

Function = Callable[[np.ndarray, np.ndarray, Any], np.ndarray]
"""(x [b, …], noise level [b], condition or None) -> the prediction [b, …], on the host."""

NoiseInput = Callable[[Array], Array]
"""Log-SNRs [b] -> what a network receives as its noise level [b]; of NumPy or JAX arrays."""


def log_snr(log_snr: Array) -> Array:
    """λ itself."""
    return log_snr.astype(np.float32)


def sigma(log_snr: Array) -> Array:
    """The noise of x_0 + σ̃ ε: σ̃ = σ/α = e^(−λ/2)."""
    return _numpy_of(log_snr).exp(-0.5 * log_snr.astype(float)).astype(np.float32)


def c_noise(log_snr: Array) -> Array:
    """¼ log σ̃, the noise input of EDM's networks. Karras et al. (2022), table 1."""
    return (-0.125 * log_snr.astype(float)).astype(np.float32)


def timestep(level_log_snrs: Float[Array, "levels"], nearest: bool = False) -> NoiseInput:
    """The index of a level, counted from 0, as DDPM's networks expect it.

    At level t it is t − 1 exactly, if the log-SNR is the table's entry in float32. Between levels
    it is linear in log-SNR, as the probability flow needs it, and outside of them it is clamped.

    Args:
      level_log_snrs: log-SNRs of the levels t = 1 … T that the network was trained on.
      nearest: whether the index is rounded to an integer, for networks with a table.

    Raises:
      ValueError: if the table is empty, or not finite and strictly falling in float32.
    """
    noise = -np.asarray(level_log_snrs, np.float32)
    if not (noise.size and np.isfinite(noise).all() and (np.diff(noise) > 0).all()):
        raise ValueError(
            f"level_log_snrs, of length {noise.size}, must be finite, strictly falling in float32 "
            "and not empty"
        )
    timesteps = np.arange(noise.size, dtype=np.float32)

    def index(log_snr: Array) -> Array:
        xp = _numpy_of(log_snr)
        place = xp.interp(-log_snr.astype(np.float32), noise, timesteps)
        return xp.rint(place).astype(int) if nearest else place.astype(np.float32)

    return index


def _numpy_of(array: Array) -> ModuleType:
    """NumPy on the host, `jax.numpy` within a program."""
    return np if isinstance(array, np.ndarray) else jnp


def jax_denoiser(
    function: Callable[..., Array], noise_input: NoiseInput, *, exploding: bool = False
) -> Callable[..., Array]:
    """A JAX function (x, noise level[, condition]) as a denoiser.

    Args:
      function: it gets the condition only if the model has one.
      noise_input, exploding: as for `denoiser`.
    """

    def denoise(
        x_t: Float[Array, "b *d"], log_snr: Float[Array, "b"], condition: PyTree | None = None
    ) -> Float[Array, "b ..."]:
        x = x_t / expand(alpha(log_snr), x_t) if exploding else x_t
        return function(x, noise_input(log_snr), *([] if condition is None else [condition]))

    return denoise


def denoiser(
    function: Function,
    noise_input: NoiseInput,
    *,
    exploding: bool = False,
    learned_variance: bool = False,
    difference_step: float | None = None,
) -> Callable[..., Array]:
    """A function of NumPy arrays as a denoiser, called on the host.

    Args:
      function: the foreign function; it must be a function of its arguments alone.
      noise_input: what it receives as its noise level: `log_snr`, `sigma`, `c_noise`,
        `timestep(…)`, or a function of your own.
      exploding: whether it receives x_t/α = x_0 + σ̃ ε, as EDM's networks do, and not x_t.
      learned_variance: whether the last axis of its output is twice as long as x's.
      difference_step: the step of central differences that stand for derivatives by x_t, which
        the likelihood of the probability flow needs, relative to the direction's size. Their error
        is about 1e-7/step + step², so 1e-2 suits float32. None: such derivatives are refused.

    Returns:
      A denoiser. A wrong shape of the output raises an error when it is called.

    Raises:
      TypeError: if the function is a PyTorch module, or does not take three arguments.
    """
    _check_arguments(function)

    def call(x, level, condition):
        # Within vmap there are further axes in front.
        x, level = np.asarray(x), np.asarray(level)
        shape = (*x.shape[:-1], x.shape[-1] * (2 if learned_variance else 1))
        flat_level = level.reshape(-1)
        flat_condition = jax.tree.map(
            lambda leaf: np.asarray(leaf).reshape(-1, *leaf.shape[level.ndim :]), condition
        )
        flat_x = x.reshape(-1, *x.shape[level.ndim :])
        output = np.asarray(function(flat_x, noise_input(flat_level), flat_condition))
        expected = (flat_x.shape[0], *shape[level.ndim :])
        if output.shape != expected:
            raise ValueError(
                f"the foreign denoiser returns an array of shape {output.shape}; it must be "
                f"{expected}"
            )
        return output.astype(x.dtype).reshape(shape)

    @jax.custom_jvp
    def evaluate(x_t, log_snr, condition):
        last = x_t.shape[-1] * (2 if learned_variance else 1)
        result = jax.ShapeDtypeStruct((*x_t.shape[:-1], last), x_t.dtype)
        x = x_t / expand(alpha(log_snr), x_t) if exploding else x_t
        return jax.pure_callback(call, result, x, log_snr, condition, vmap_method="broadcast_all")

    def evaluate_jvp(primals, tangents):
        x_t, log_snr, condition = primals
        direction, others = tangents[0], jax.tree.leaves(tangents[1:], is_leaf=_is_zero)
        if difference_step is None:
            raise TypeError(
                "a foreign denoiser has no derivative; give denoiser(…, difference_step=1e-2) for "
                "central differences, or use an estimate without the probability flow"
            )
        if isinstance(direction, SymbolicZero) or not all(map(_is_zero, others)):
            raise TypeError("a foreign denoiser can be differentiated by x_t only")
        axes = tuple(range(1, x_t.ndim))
        size = jnp.sqrt(jnp.mean(direction**2, axes, keepdims=True))
        step = difference_step / jnp.where(size > 0, size, 1.0)
        ahead, behind = (
            evaluate(x_t + sign * step * direction, log_snr, condition) for sign in (1, -1)
        )
        return evaluate(x_t, log_snr, condition), (ahead - behind) / (2 * step)

    evaluate.defjvp(evaluate_jvp, symbolic_zeros=True)

    def denoise(
        x_t: Float[Array, "b *d"], log_snr: Float[Array, "b"], condition: PyTree | None = None
    ) -> Float[Array, "b ..."]:
        return evaluate(jnp.asarray(x_t), jnp.asarray(log_snr), condition)

    return denoise


def _check_arguments(function: Function) -> None:
    remedy = "torch_function(module) and onnx_function(session) make one"
    if hasattr(function, "forward"):
        raise TypeError(f"a PyTorch module is no foreign function; {remedy}")
    try:
        inspect.signature(function).bind(None, None, None)
    except ValueError:
        return  # a function that has no signature
    except TypeError as error:
        raise TypeError(
            f"a foreign function takes (x, noise, condition), but {error}; {remedy}"
        ) from error


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def torch_function(module: Any) -> Function:
    """A PyTorch module (x [b, c, h, w], noise level, labels if there are any) -> prediction.

    Its output may be an object with the attribute `sample`, as diffusers' models have it. It is
    evaluated without dropout, on the device of its parameters, and receives x in their precision.

    Raises:
      ImportError: without PyTorch.
    """
    import torch

    module.eval()
    weights = next(module.parameters(), torch.zeros(0))

    def function(x, noise, condition):
        arguments = [_channels_first(x), noise, *jax.tree.leaves(condition)]
        x, *others = (torch.from_numpy(np.array(a)).to(weights.device) for a in arguments)
        with torch.no_grad():
            output = module(x.to(weights.dtype), *others)
        return _channels_last(getattr(output, "sample", output).float().cpu().numpy())

    return function


def onnx_function(session: Any) -> Function:
    """An ONNX session whose inputs are (x [b, c, h, w], noise level, labels if there are any).

    Where its noise level is a scalar or of length one, as an export for samplers leaves it, the
    session is run once for each level of a batch.

    Args:
      session: an onnxruntime.InferenceSession; its first output is the prediction.
    """
    inputs = session.get_inputs()
    types = {"tensor(int64)": np.int64, "tensor(double)": np.float64, "tensor(int32)": np.int32}

    def function(x, noise, condition):
        arguments = [_channels_first(x), noise, *jax.tree.leaves(condition)]
        feed = {
            entry.name: np.asarray(argument, types.get(entry.type, np.float32))
            for entry, argument in zip(inputs, arguments, strict=True)
        }
        return _channels_last(session.run(None, feed)[0])

    shape = inputs[1].shape
    if list(shape) in ([], [1]):
        return one_level(lambda x, noise, condition: function(x, noise.reshape(shape), condition))
    return function


def one_level(function: Function) -> Function:
    """A function of examples that have the same noise level, [1], for examples of any levels."""

    def of_any_levels(x, noise, condition):
        levels, index = np.unique(noise, return_inverse=True)
        rows = [np.flatnonzero(index == n) for n in range(levels.size)]
        outputs = [
            function(x[r], noise[r[:1]], jax.tree.map(lambda leaf, r=r: leaf[r], condition))
            for r in rows
        ]
        return np.concatenate(outputs)[np.argsort(np.concatenate(rows))]

    return of_any_levels


def _channels_first(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(x, -1, 1))


def _channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)
