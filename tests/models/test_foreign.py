"""Functions on the host as denoisers. tests/parity/test_foreign.py has a PyTorch module."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import bound, decoders, forward, schedules
from diffusion.model import DiffusionModel
from diffusion.reverse import Reverse
from diffusion.samplers.base import sample
from diffusion.samplers.ddpm import ancestral
from models import foreign

LEVELS = schedules.linear_beta(20, 1e-3, 0.3).levels(20)
LOG_SNR = LEVELS.log_snr[1:].astype(np.float32)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 4, 4, 2)).astype(np.float32)


def optimum(x_t, log_snr, condition=None):
    """ε̂ of normal data of mean 0.3 · label and variance ¼: σ (x − α m)/(α²/4 + σ²)."""
    mean = 0.3 if condition is None else 0.3 * jnp.reshape(condition, (-1, 1, 1, 1))
    alpha_bar = jnp.reshape(jax.nn.sigmoid(log_snr), (-1, 1, 1, 1))
    variance = 0.25 * alpha_bar + 1 - alpha_bar
    return jnp.sqrt(1 - alpha_bar) * (x_t - jnp.sqrt(alpha_bar) * mean) / variance


def on_host(x, noise, condition):
    """The same of an x that explodes, x/α, and σ̃, in NumPy."""
    mean = 0.3 if condition is None else 0.3 * condition.reshape(-1, 1, 1, 1)
    noise = noise.reshape(-1, 1, 1, 1)
    return noise * (x - mean) / (0.25 + noise**2)


DENOISER = foreign.denoiser(on_host, foreign.sigma, exploding=True, difference_step=1e-2)


def model_of(denoiser):
    quantization = decoders.Quantization(17)
    decoder = decoders.categorical(quantization)
    return DiffusionModel(Reverse(denoiser, "eps", "beta"), decoder, LEVELS)


@pytest.mark.parametrize("chunk_size", [1, 4])
@pytest.mark.parametrize("labels", [None, np.array([0, 1, 2], np.int32)])
def test_the_bound_is_that_of_the_same_function_in_jax(chunk_size, labels):
    """The function gets all examples and timesteps of a chunk in one call."""
    grey = decoders.Quantization(17).to_data(RNG.integers(0, 17, X.shape))
    noise = forward.example_noise(jax.random.key(0), np.arange(3), X.shape[1:])
    ours, theirs = (
        jax.jit(lambda x, d=d: bound.bound(model_of(d).given(labels), x, noise, chunk_size))(grey)
        for d in (DENOISER, optimum)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), ours, theirs)


def test_samples_are_those_of_the_same_function_in_jax():
    noise = forward.example_noise(jax.random.key(0), np.arange(3), X.shape[1:])
    ours, theirs = (
        jax.jit(lambda d=d: sample(ancestral(model_of(d)), LEVELS, noise, 3).x_0)()
        for d in (DENOISER, optimum)
    )
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


def test_what_a_network_receives_as_its_noise_level():
    received = {
        "timestep": foreign.timestep(LOG_SNR),
        "nearest": foreign.timestep(LOG_SNR, nearest=True),
        "sigma": foreign.sigma,
        "c_noise": foreign.c_noise,
        "log_snr": foreign.log_snr,
    }
    received = {name: function(LOG_SNR) for name, function in received.items()}
    np.testing.assert_array_equal(received["timestep"], np.arange(20))
    np.testing.assert_array_equal(received["nearest"], np.arange(20))
    assert received["nearest"].dtype == np.int64
    alpha_bar = LEVELS.alpha_bar[1:]
    np.testing.assert_allclose(received["sigma"], np.sqrt(1 / alpha_bar - 1), rtol=1e-6)
    np.testing.assert_allclose(received["c_noise"], np.log(received["sigma"]) / 4, atol=1e-6)
    np.testing.assert_array_equal(received["log_snr"], LOG_SNR)


TABLE = schedules.linear_beta().levels(1000).log_snr[1:]


@pytest.mark.parametrize("compile_it", [False, True])
def test_timesteps_are_exact_at_their_levels(compile_it):
    """Level t feeds t − 1."""
    timestep = foreign.timestep(TABLE)
    timestep = jax.jit(timestep) if compile_it else timestep
    np.testing.assert_array_equal(timestep(TABLE.astype(np.float32)), np.arange(1000))


@pytest.mark.parametrize("place", [np.asarray, jnp.asarray])
def test_timesteps_between_and_beyond_their_levels(place):
    timestep = foreign.timestep(TABLE)
    beyond = place(np.array([np.inf, TABLE[0] + 1, TABLE[-1] - 1, -np.inf], np.float32))
    np.testing.assert_array_equal(timestep(beyond), [0, 0, 999, 999])
    # Gaps are at least 0.01, and float32 rounds a log-SNR near 10 by up to 5e-7.
    quarters = place((0.75 * TABLE[:-1] + 0.25 * TABLE[1:]).astype(np.float32))
    np.testing.assert_allclose(timestep(quarters), np.arange(999) + 0.25, rtol=0, atol=2e-4)
    np.testing.assert_array_equal(foreign.timestep(TABLE[:1])(beyond), np.zeros(4))


@pytest.mark.parametrize("table", [[], [1.0, 1.0], [1.0, 2.0], [np.inf, 0.0], [1.0, 1.0 - 1e-9]])
def test_a_table_without_an_inverse_is_refused(table):
    with pytest.raises(ValueError, match="strictly falling"):
        foreign.timestep(np.array(table))


def test_a_jax_function_that_counts_timesteps_from_zero():
    """On the host and in JAX the same function is the same denoiser, with labels and without."""

    def predict(x, t, labels=0.0):
        return x * (1 + 0.1 * t + labels)[:, None, None, None]

    timestep = foreign.timestep(LOG_SNR)
    in_jax = foreign.jax_denoiser(predict, timestep, exploding=True)
    on_host = foreign.denoiser(
        lambda x, t, labels: predict(x, t, 0.0 if labels is None else labels),
        timestep,
        exploding=True,
    )
    level = jnp.asarray(LOG_SNR[[0, 7, 19]])
    np.testing.assert_allclose(
        in_jax(X, level) * np.sqrt(LEVELS.alpha_bar[[1, 8, 20]]).reshape(-1, 1, 1, 1),
        X * np.array([1.0, 1.7, 2.9]).reshape(-1, 1, 1, 1),
        rtol=1e-5,
    )
    for labels in (None, np.array([1.0, 2.0, 3.0], np.float32)):
        np.testing.assert_allclose(
            jax.jit(in_jax)(X, level, labels), on_host(X, level, labels), rtol=1e-6
        )


def test_derivatives_are_central_differences():
    """Of an affine function they are exact but for rounding, in every direction at once."""
    log_snr, directions = LOG_SNR[[2, 9, 15]], RNG.normal(size=(5, *X.shape)).astype(np.float32)
    ours, theirs = (
        jax.vmap(lambda v, d=d: jax.jvp(lambda x: d(x, log_snr), (X,), (v,))[1])(directions)
        for d in (DENOISER, optimum)
    )
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


def test_derivatives_are_refused_with_a_reason():
    plain = foreign.denoiser(on_host, foreign.sigma, exploding=True)
    with pytest.raises(TypeError, match="difference_step=1e-2"):
        jax.jvp(lambda x: plain(x, LOG_SNR[:3]), (X,), (X,))
    with pytest.raises(TypeError, match="by x_t only"):
        jax.jvp(lambda level: DENOISER(X, level), (LOG_SNR[:3],), (LOG_SNR[:3],))


def test_a_function_of_other_arguments_is_refused():
    """Here, and not from within a compiled bound."""
    with pytest.raises(TypeError, match=r"takes \(x, noise, condition\).*torch_function"):
        foreign.denoiser(lambda x, noise: x, foreign.sigma)


def test_an_output_of_another_shape_is_refused():
    wrong = foreign.denoiser(on_host, foreign.sigma, learned_variance=True)
    with pytest.raises(Exception, match=r"shape \(3, 4, 4, 2\); it must be \(3, 4, 4, 4\)"):
        jax.block_until_ready(wrong(X, LOG_SNR[:3]))


class Entry(NamedTuple):
    """An input of a session."""

    name: str
    type: str
    shape: list


class Session:
    """The interface of onnxruntime.InferenceSession, for a function (x, index of the level)."""

    def __init__(self, shape):
        self.shape = shape

    def get_inputs(self):
        image = Entry("sample", "tensor(float)", ["b", 2, 4, 4])
        return [image, Entry("timestep", "tensor(int64)", self.shape)]

    def run(self, names, feed):
        assert names is None
        assert feed["timestep"].dtype == np.int64
        if self.shape != ["b"]:
            assert list(feed["timestep"].shape) == self.shape
        x = feed["sample"]
        assert x.shape[1:] == (2, 4, 4)
        return [x * feed["timestep"].reshape(-1, 1, 1, 1)]


@pytest.mark.parametrize("shape", [["b"], [1], []])
def test_an_onnx_session_is_fed_by_the_names_types_and_shapes_of_its_inputs(shape):
    denoiser = foreign.denoiser(foreign.onnx_function(Session(shape)), foreign.timestep(LOG_SNR))
    index = np.array([19, 5, 19])
    actual = denoiser(X, LOG_SNR[index])
    np.testing.assert_allclose(actual, X * index.reshape(-1, 1, 1, 1), rtol=1e-6)
