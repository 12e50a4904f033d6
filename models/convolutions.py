"""Convolutions whose arithmetic suits a CPU, for `conv_general_dilated` of `flax.linen.Conv`.

On a CPU a 3×3 convolution is Winograd's minimal filtering F(4×4, 3×3) where that is faster (Lavin
and Gray 2016). The convolution of a 6×6 tile d of the input with a kernel k is a 4×4 tile y of the
output. For any g of y's shape, with matrices A, B and G,

    Σ g y  =  Σ (B d Bᵀ) (G k Gᵀ) (A g Aᵀ),

a sum over 36 places, where the direct form has 144 products. Its derivative by g is y, and its
derivative by k, with g the gradient of y, is the gradient of k. In float32 the rounding error is
1 to 2 · 10⁻⁶ of the result, four times that of the direct form. Other platforms, other precisions
and small shapes have the direct form.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from diffusion.schedules import Array

DIMENSIONS = ("NHWC", "HWIO", "NHWC")
TILE, INPUT_TILE = 4, 6
# Near 1, since their powers multiply rounding errors: half the error of the usual 0, ±1, ±2.
POINTS = (0.0, 0.625, -0.625, 1.5, -1.5)
MIN_CHANNELS, MIN_TILES = 64, 128


def product_1x1(
    x: Float[Array, "b h w i"], kernel: Float[Array, "1 1 i o"], *_: Any, **__: Any
) -> Float[Array, "b h w o"]:
    """A convolution of single pixels, as a product of matrices.

    On a CPU it is three times as fast as XLA's convolution, and its weight gradient nine times.

    Args:
      x: images.
      kernel: the weights. Further arguments, of strides and padding, are Flax's and have no effect.
    """
    return jnp.einsum("bhwi,io->bhwo", x, kernel[0, 0])


def convolution_3x3(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"], *_: Any, **__: Any
) -> Float[Array, "b h w o"]:
    """A convolution that keeps height and width. Its derivatives have the direct form.

    Args:
      x: images.
      kernel: the weights. Further arguments, of strides and padding, are Flax's and have no effect.
    """
    return _evaluated(x, kernel)


def trained_3x3(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"], *_: Any, **__: Any
) -> Float[Array, "b h w o"]:
    """`convolution_3x3` for training: its gradients have the faster form too.

    It is differentiable in reverse mode only: `jax.jvp` raises a TypeError.
    """
    return _trained(x, kernel)


@jax.custom_jvp
def _evaluated(x, kernel):
    return _by_shape(winograd, _direct, x, kernel)


@_evaluated.defjvp
def _evaluated_jvp(primals, tangents):
    (x, kernel), (x_tangent, kernel_tangent) = primals, tangents
    return _evaluated(x, kernel), _direct(x_tangent, kernel) + _direct(x, kernel_tangent)


@jax.custom_vjp
def _trained(x, kernel):
    return _evaluated(x, kernel)


def _forward(x, kernel):
    return _evaluated(x, kernel), (x, kernel)


def _backward(residuals, gradient):
    x, kernel = residuals
    # The transpose of a convolution is one with the kernel turned by 180° and its channels swapped.
    x_gradient = _evaluated(gradient, kernel[::-1, ::-1].swapaxes(2, 3))
    return x_gradient, _by_shape(winograd_weight_gradient, _direct_weight_gradient, x, gradient)


_trained.defvjp(_forward, _backward)


def _by_shape(fast, direct, x, other):
    """The faster form for these shapes, on the platform that the program is compiled for."""
    if not suits_winograd(x, other.shape[-1]):
        return direct(x, other)
    return jax.lax.platform_dependent(x, other, cpu=fast, default=direct)


def suits_winograd(x: Float[Array, "b h w i"], features: int) -> bool:
    """Whether Winograd's form is the faster one on a CPU for this input and number of outputs."""
    batch, height, width, channels = x.shape
    return (
        x.dtype == jnp.float32
        and height % TILE == width % TILE == 0
        and batch * height * width >= MIN_TILES * TILE**2
        and min(channels, features) >= MIN_CHANNELS
    )


def _direct(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=DIMENSIONS)


def _direct_weight_gradient(x, gradient):
    kernel = jax.ShapeDtypeStruct((3, 3, x.shape[-1], gradient.shape[-1]), x.dtype)
    return jax.linear_transpose(lambda kernel: _direct(x, kernel), kernel)(gradient)[0]


def winograd(
    x: Float[Array, "b h w i"], kernel: Float[Array, "3 3 i o"]
) -> Float[Array, "b h w o"]:
    """A 3×3 convolution that keeps height and width, which are multiples of 4."""
    of_input, of_output, of_kernel = transforms()
    batch, height, width, _ = x.shape
    products = jnp.einsum(
        "pti,pio->pto",
        _transform(of_input, _input_tiles(x)),
        _transform(of_kernel, kernel.reshape(9, *kernel.shape[2:])),
        precision="highest",
    )
    pixels = _transform(of_output.T, products)
    pixels = pixels.reshape(TILE, TILE, batch, height // TILE, width // TILE, -1)
    return pixels.transpose(2, 3, 0, 4, 1, 5).reshape(batch, height, width, -1)


def winograd_weight_gradient(
    x: Float[Array, "b h w i"], gradient: Float[Array, "b h w o"]
) -> Float[Array, "3 3 i o"]:
    """The gradient of a 3×3 convolution's kernel.

    Args:
      x: the convolution's input; height and width are multiples of 4.
      gradient: the gradient of its output.
    """
    of_input, of_output, of_kernel = transforms()
    products = jnp.einsum(
        "pti,pto->pio",
        _transform(of_input, _input_tiles(x)),
        _transform(of_output, _tiles(gradient, TILE, x.shape)),
        precision="highest",
    )
    return _transform(of_kernel.T, products).reshape(3, 3, x.shape[-1], -1)


def _input_tiles(x):
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return _tiles(padded, INPUT_TILE, x.shape)


def _tiles(x, side, image_shape):
    """Square tiles, one every 4 pixels, as [side², tiles, channels]; place in the tile first."""
    height, width = image_shape[1:3]
    places = [
        x[:, row : row + height - TILE + 1 : TILE, column : column + width - TILE + 1 : TILE]
        for row in range(side)
        for column in range(side)
    ]
    return jnp.stack(places).reshape(side**2, -1, x.shape[-1])


def _transform(matrix: np.ndarray, tiles: Float[Array, "p n c"]) -> Float[Array, "q n c"]:
    """A matrix applied to the rows and columns of square tiles."""
    both = jnp.asarray(np.kron(matrix, matrix), tiles.dtype)
    return jnp.tensordot(both, tiles, axes=1, precision="highest")


def transforms() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """B [6, 6], A [6, 4] and G [6, 3], by the Cook–Toom algorithm.

    In one dimension Σ_i g_i Σ_j d_{i+j} k_j = Σ_n (B d)_n (A g)_n (G k)_n. Read g and k as
    coefficients of polynomials. Their product has degree 5, and is determined by its values at five
    `POINTS` and its leading coefficient: A and G evaluate, the transpose of B interpolates.
    """
    points = np.array(POINTS)
    others = [np.delete(points, n) for n in range(points.size)]
    scale = [np.prod(point - roots) for point, roots in zip(points, others, strict=True)]
    last = np.eye(TILE)[-1:], np.eye(3)[-1:]
    of_output = np.concatenate([np.vander(points, TILE, increasing=True), last[0]])
    of_kernel = np.concatenate(
        [np.vander(points, 3, increasing=True) / np.array(scale)[:, None], last[1]]
    )
    # Coefficients of Π_{q ≠ p} (z − q), and of Π_q (z − q) for the leading coefficient.
    rows = [np.append(np.poly(roots)[::-1], 0.0) for roots in others]
    return np.stack([*rows, np.poly(points)[::-1]]), of_output, of_kernel
