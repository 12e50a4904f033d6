"""Convolutions against the direct form in float64: values, gradients, platforms and shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models import convolutions
from models.convolutions import (
    convolution_3x3,
    product_1x1,
    suits_winograd,
    trained_3x3,
    transforms,
    winograd,
    winograd_weight_gradient,
)

TOLERANCE = 1e-5  # of the norm; what is measured here is 0.5 to 3 · 10⁻⁶


def direct(x, kernel):
    """Nine shifted products, in NumPy's float64."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    _, height, width, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(
        padded[:, i : i + height, j : j + width] @ kernel[i, j] for i in range(3) for j in range(3)
    )


def direct_weight_gradient(x, gradient):
    x, gradient = np.asarray(x, np.float64), np.asarray(gradient, np.float64)
    _, height, width, _ = x.shape
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [[padded[:, i : i + height, j : j + width] for j in range(3)] for i in range(3)]
    return np.array(
        [[np.tensordot(y, gradient, axes=[(0, 1, 2)] * 2) for y in row] for row in shifted]
    )


def relative_error(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def scaled_inputs(scaling):
    """An input [2, 16, 32, 64], a kernel to 80 channels and a gradient of the output."""
    rng = np.random.default_rng(0)
    x, gradient = rng.normal(size=(2, 16, 32, 64)), rng.normal(size=(2, 16, 32, 80))
    kernel = rng.normal(size=(3, 3, 64, 80))
    if scaling == "activations":  # of swish, with a small gradient
        x, gradient = x / (1 + np.exp(-x)), 1e-6 * gradient
    if scaling == "large mean":
        x = x + 100
    if scaling == "channels":  # of sizes 10⁻³ to 10³
        x, gradient = (10 ** rng.uniform(-3, 3, a.shape[-1]) * a for a in (x, gradient))
    if scaling == "pixels":
        x, gradient = (10 ** rng.uniform(-3, 3, (*a.shape[:3], 1)) * a for a in (x, gradient))
    if scaling == "outliers":
        x, gradient = x**5, gradient**5
    return (jnp.asarray(a, jnp.float32) for a in (x, kernel, gradient))


def test_the_transforms_give_a_convolution_in_one_dimension():
    of_input, of_output, of_kernel = transforms()
    d, g, k = (np.random.default_rng(n).normal(size=n) for n in (6, 4, 3))
    expected = sum(g[i] * d[i + j] * k[j] for i in range(4) for j in range(3))
    actual = np.sum((of_input @ d) * (of_output @ g) * (of_kernel @ k))
    np.testing.assert_allclose(actual, expected, rtol=1e-13)


@pytest.mark.parametrize("shape", [(1, 4, 4, 1), (2, 8, 12, 3), (3, 4, 20, 5)])
def test_winograds_form_is_the_convolution_for_any_shape(shape, float64):
    rng = np.random.default_rng(0)
    x, kernel, gradient = (
        rng.normal(size=s) for s in (shape, (3, 3, shape[-1], 7), (*shape[:3], 7))
    )
    np.testing.assert_allclose(winograd(x, kernel), direct(x, kernel), atol=1e-12)
    actual = winograd_weight_gradient(x, gradient)
    np.testing.assert_allclose(actual, direct_weight_gradient(x, gradient), atol=1e-12)


@pytest.mark.parametrize(
    "scaling", ["normal", "activations", "large mean", "channels", "pixels", "outliers"]
)
def test_values_and_gradients_are_accurate_for_inputs_of_any_scale(scaling):
    """The layer as training uses it: in float32, where Winograd's form is chosen on a CPU."""
    x, kernel, gradient = scaled_inputs(scaling)
    assert suits_winograd(jnp.tile(x, (4, 1, 1, 1)), 80)
    assert relative_error(winograd(x, kernel), direct(x, kernel)) < TOLERANCE
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    assert relative_error(winograd(gradient, turned), direct(gradient, turned)) < TOLERANCE
    actual = winograd_weight_gradient(x, gradient)
    assert relative_error(actual, direct_weight_gradient(x, gradient)) < TOLERANCE


@pytest.mark.parametrize(("batch", "channels"), [(8, 64), (1, 3)], ids=["winograd", "direct"])
def test_the_layer_of_training_has_the_derivatives_of_the_direct_one(batch, channels):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(batch, 16, 16, channels)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, channels, 64)), jnp.float32)
    gradient = rng.normal(size=(batch, 16, 16, 64)).astype(np.float32)
    assert suits_winograd(x, 64) == (channels == 64)
    y, pullback = jax.vjp(jax.jit(trained_3x3), x, kernel)
    x_gradient, kernel_gradient = pullback(gradient)
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    assert relative_error(y, direct(x, kernel)) < TOLERANCE
    assert relative_error(x_gradient, direct(gradient, turned)) < TOLERANCE
    assert relative_error(kernel_gradient, direct_weight_gradient(x, gradient)) < TOLERANCE
    with pytest.raises(TypeError, match="jvp"):
        jax.jvp(trained_3x3, (x, kernel), (x, kernel))


def test_the_layer_of_evaluation_is_differentiable_in_both_modes_and_twice():
    """f(x) = ½ |conv(x)|² has the derivative convᵀ conv x, and the Hessian convᵀ conv."""
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(8, 16, 16, 64)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 64, 64)) / 24, jnp.float32)
    tangent = jnp.asarray(rng.normal(size=x.shape), jnp.float32)
    assert suits_winograd(x, 64)
    gradient = jax.grad(lambda x: 0.5 * jnp.sum(jnp.square(convolution_3x3(x, kernel))))
    value, derivative = jax.jit(lambda: jax.jvp(gradient, (x,), (tangent,)))()
    turned = np.asarray(kernel)[::-1, ::-1].swapaxes(2, 3)
    for actual, argument in ((value, x), (derivative, tangent)):
        assert relative_error(actual, direct(direct(argument, kernel), turned)) < TOLERANCE


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((8, 16, 16, 63), "float32"), ((8, 16, 18, 64), "float32"), ((7, 16, 16, 64), "float32"),
     ((8, 16, 16, 64), "bfloat16")],
)  # fmt: skip
def test_small_shapes_and_other_precisions_have_the_direct_form(shape, dtype):
    assert not suits_winograd(jnp.zeros(shape, dtype), 64)


def test_an_accelerators_program_has_the_direct_form_only():
    """The choice is made when the program is lowered for its platform."""
    x, kernel = jnp.zeros((8, 16, 16, 64)), jnp.zeros((3, 3, 64, 64))
    loss = jax.jit(jax.grad(lambda x, kernel: trained_3x3(x, kernel).sum(), argnums=(0, 1)))
    traced = loss.trace(x, kernel)
    texts = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda")}
    assert texts["cpu"].count("stablehlo.convolution") == 0
    assert texts["cuda"].count("stablehlo.convolution") == 2
    assert "dot_general" not in texts["cuda"]


def test_a_product_is_the_1x1_convolution():
    rng = np.random.default_rng(3)
    x, kernel = rng.normal(size=(2, 5, 3, 4)), rng.normal(size=(1, 1, 4, 6))
    expected = jax.lax.conv_general_dilated(
        *map(jnp.float32, (x, kernel)), (1, 1), "SAME", dimension_numbers=convolutions.DIMENSIONS
    )
    np.testing.assert_allclose(product_1x1(x, kernel), expected, atol=1e-5)
