"""The U-Net: its architecture, its noise input, and what it refuses."""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.layers import (
    Downsample,
    GroupNorm,
    SelfAttention,
    Upsample,
    fourier_features,
    sinusoidal_embedding,
)
from models.unet import UNet, log_snr_to_timestep

pytestmark = pytest.mark.usefixtures("quick_compiles")

SMALL = {
    "channels": 6,
    "channel_multipliers": (1, 2),
    "num_res_blocks": 1,
    "attention_resolutions": (2,),
    "num_groups": 3,
    "dropout": 0.5,
}
IMAGE_SHAPE = (4, 6, 5)
LOG_SNR = np.array([3.0, -2.0], np.float32)


def shapes(network: UNet, image_shape, batch: int = 1):
    """The shapes of a network's variables and output; nothing is computed."""
    inputs = (
        jax.ShapeDtypeStruct((batch, *image_shape), jnp.float32),
        jax.ShapeDtypeStruct((batch,), jnp.float32),
    )
    output, variables = jax.eval_shape(network.init_with_output, jax.random.key(0), *inputs)
    return variables, output.shape


@pytest.fixture(scope="module")
def small():
    """A small network, its initial parameters, others without zeros, and a batch of two."""
    network = UNet(**SMALL)
    rng = np.random.default_rng(0)
    x_t = rng.normal(size=(2, *IMAGE_SHAPE)).astype(np.float32)
    # The generator that compiles fastest.
    key = jax.random.key(0, impl="rbg")
    variables = jax.jit(network.init)(key, x_t, LOG_SNR)
    moved = jax.tree.map(lambda p: p + 0.3 * rng.normal(size=p.shape).astype(np.float32), variables)
    return network, jax.jit(network.apply, static_argnames="train"), variables, moved, x_t


def linear_log_snrs() -> np.ndarray:
    """λ_1 … λ_T of DDPM's schedule, from β_t equally spaced from 1e-4 to 0.02."""
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    return np.log(alpha_bar) - np.log1p(-alpha_bar)


@pytest.mark.parametrize(
    ("image_shape", "multipliers"),
    [((4, 6, 5), (1, 2)), ((10, 2, 1), (3, 1)), ((3, 7, 4), (1,)), ((8, 16, 2), (1, 2, 1, 3))],
)
def test_any_size_that_halves_and_any_number_of_channels(image_shape, multipliers):
    settings = SMALL | {"channel_multipliers": multipliers, "attention_resolutions": ()}
    for out_channels in (None, 7):
        network = UNet(**settings, out_channels=out_channels)
        network.validate(image_shape)
        _, output = shapes(network, image_shape, batch=2)
        assert output == (2, *image_shape[:2], out_channels or image_shape[2])


def test_fourier_features_have_the_period_of_the_grey_levels():
    """2¹⁻ⁿ is a period of every feature of exponent n or more; the image itself comes first."""
    rng = np.random.default_rng(0)
    # Multiples of 1/64, so that the shift is exact; half a period changes the sign.
    x = (rng.integers(-64, 64, size=(2, 3, 4, 5)) / 64).astype(np.float32)
    features = fourier_features(x, (3, 4))
    assert features.shape == (2, 3, 4, 25)
    np.testing.assert_array_equal(features[..., :5], x)
    waves, shifted = features[..., 5:], fourier_features(x + np.float32(0.25), (3, 4))[..., 5:]
    # An angle of up to 63 radians is rounded by 4e-6 in float32.
    np.testing.assert_allclose(shifted, waves, rtol=0, atol=2e-5)
    half_turn = fourier_features(x + np.float32(0.125), (3,))[..., 5:]
    np.testing.assert_allclose(half_turn, -waves[..., :10], rtol=0, atol=2e-5)
    _, output = shapes(UNet(**SMALL, fourier_exponents=(3, 4)), IMAGE_SHAPE)
    assert output == (1, *IMAGE_SHAPE), "the features are no channels of the prediction"


def test_attention_follows_every_block_at_its_resolutions():
    """2 blocks down and 3 up at each of two heights, and one in the middle."""
    variables, _ = shapes(UNet(attention_resolutions=(16, 4)), (32, 64, 3))
    names = sorted(name for name in variables["params"] if "attention" in name)
    expected = [f"down_{level}_attention_{i}" for level in (1, 3) for i in range(2)]
    expected += [f"up_{level}_attention_{i}" for level in (1, 3) for i in range(3)]
    assert names == sorted([*expected, "middle_attention_0"])


def test_the_output_at_initialisation_is_zero(small):
    _, apply, variables, _, x_t = small
    assert not np.any(apply(variables, x_t, LOG_SNR))


def test_an_example_does_not_depend_on_its_batch(small):
    """Up to float32 rounding: another batch size may sum in another order."""
    _, apply, _, moved, x_t = small
    together = apply(moved, x_t, LOG_SNR)
    alone = apply(moved, x_t[1:], LOG_SNR[1:])
    np.testing.assert_allclose(together[1:], alone, rtol=0, atol=1e-5 * np.abs(together).max())
    swapped = apply(moved, x_t, LOG_SNR[::-1])
    assert np.abs(together - swapped).max() > 1e-2, "the noise level has no effect"


def test_dropout_acts_in_training_only(small):
    _, apply, _, moved, x_t = small
    evaluated = apply(moved, x_t, LOG_SNR)
    first, again, second = (
        apply(moved, x_t, LOG_SNR, train=True, rngs={"dropout": jax.random.key(seed)})
        for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - second).max() > 1e-2
    assert np.abs(first - evaluated).max() > 1e-2
    with pytest.raises(Exception, match="dropout"):
        jax.eval_shape(lambda: apply(moved, x_t, LOG_SNR, train=True))


def test_forward_and_reverse_derivatives_agree(small):
    """u·(J v) = (Jᵀ u)·v over image and parameters together: an ODE likelihood needs the first."""
    network, _, _, moved, x_t = small
    rng = np.random.default_rng(1)

    def predict(variables, x_t):
        return network.apply(variables, x_t, LOG_SNR)

    def normal_like(leaf):
        return rng.normal(size=leaf.shape).astype(np.float32)

    @jax.jit
    def derivatives(primals, v, u):
        return jax.jvp(predict, primals, v)[1], jax.vjp(predict, *primals)[1](u)

    primals = (moved, x_t)
    v, u = jax.tree.map(normal_like, primals), normal_like(x_t)
    forward, gradient = derivatives(primals, v, u)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    products = jax.tree.leaves(jax.tree.map(np.vdot, gradient, v))
    # Against the length of the vectors, which rounding follows; the sums themselves may cancel.
    scale = np.linalg.norm(u) * np.linalg.norm(forward)
    assert abs(sum(products) - np.vdot(u, forward)) < 1e-4 * scale


@pytest.fixture(scope="module")
def labelled():
    """A network of three classes: initial parameters, others without zeros, and its `apply`.

    The batch is one image at one noise level, repeated for four labels.
    """
    network, rng = UNet(**SMALL, num_classes=3), np.random.default_rng(0)
    x_t = np.tile(rng.normal(size=IMAGE_SHAPE).astype(np.float32), (4, 1, 1, 1))
    log_snr = np.full(4, 1.0, np.float32)
    variables = jax.jit(network.init)(jax.random.key(0, impl="rbg"), x_t[:1], log_snr[:1])
    moved = jax.tree.map(lambda p: p + 0.3 * rng.normal(size=p.shape).astype(np.float32), variables)
    apply = jax.jit(network.apply)
    return variables, moved, lambda params, condition: apply(params, x_t, log_snr, condition)


def test_an_unconditional_network_refuses_a_condition():
    with pytest.raises(ValueError, match="condition must be None"):
        UNet(**SMALL).init(jax.random.key(0), np.zeros((1, 4, 6, 5)), LOG_SNR[:1], np.zeros(1))


def test_labels_add_a_table_and_change_no_other_parameter(small, labelled):
    """A row of 4 · channels for each class and for no label."""
    _, _, of_small, _, _ = small
    params = dict(labelled[0]["params"])
    table = params.pop("label_embedding")
    assert table.shape == (4, 4 * SMALL["channels"])
    assert 0 < np.std(table) < 0.1
    assert jax.tree.structure(params) == jax.tree.structure(of_small["params"])
    jax.tree.map(np.testing.assert_array_equal, params, of_small["params"])


def test_each_label_has_its_own_prediction_and_none_is_the_last(labelled):
    _, moved, apply = labelled
    alike, different = apply(moved, np.array([1, 1, 1, 1])), apply(moved, np.array([0, 1, 2, 3]))
    np.testing.assert_allclose(different[1], alike[0], rtol=1e-5, atol=1e-5)
    for i, j in itertools.combinations(range(4), 2):
        assert np.abs(different[i] - different[j]).max() > 1e-2
    unlabelled = apply(moved, None)
    np.testing.assert_allclose(unlabelled, apply(moved, np.full(4, 3)), rtol=1e-5, atol=1e-5)


def test_an_invalid_label_gives_nan(labelled):
    """Beyond the table, and below zero, where an index would count from the end."""
    _, moved, apply = labelled
    prediction = np.asarray(apply(moved, np.array([4, -1, 2, -4])))
    assert np.isnan(prediction[[0, 1, 3]]).all()
    assert np.isfinite(prediction[2]).all()
    with pytest.raises(ValueError, match="float32; labels must be integers"):
        apply(moved, np.zeros(4, np.float32))


def test_only_the_labels_of_the_batch_have_gradients(labelled):
    _, moved, apply = labelled
    gradient = jax.grad(lambda v: jnp.sum(apply(v, np.array([0, 3, 3, 0])) ** 2))(moved)
    rows = np.abs(gradient["params"]["label_embedding"]).max(axis=1)
    assert (rows > 0).tolist() == [True, False, False, True]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(
    ("settings", "image_shape", "message"),
    [
        ({}, (32, 36, 3), r"channel_multipliers = \(1, 2, 2, 2\); .*32×36 .* at most 3 "),
        ({"channel_multipliers": ()}, (32, 32, 3), r"channel_multipliers = \(\); .*at least one"),
        ({"channel_multipliers": (1, 0)}, (32, 32, 3), r"channel_multipliers = \(1, 0\)"),
        ({"channels": 40}, (32, 32, 3), r"num_groups = 32; .*\[40, 80\].* divisor of 40"),
        ({"num_groups": 0}, (32, 32, 3), "num_groups = 0; .*at least 1"),
        ({"num_classes": -1}, (32, 32, 3), "num_classes = -1; .*not be negative"),
        (
            {"attention_resolutions": (16, 7)},
            (32, 32, 3),
            r"attention_resolutions = \(16, 7\); .*7.*\[32, 16, 8, 4\]",
        ),
        (
            {"up_attention_resolutions": (7,)},
            (32, 32, 3),
            r"up_attention_resolutions = \(7,\); .*\[32, 16, 8, 4\]",
        ),
        (
            {"channel_multipliers": (1, 1.26)},
            (32, 32, 3),
            r"channel_multipliers = .* 128 channels times each",
        ),
        ({"head_channels": 257}, (32, 32, 3), r"head_channels = 257; .* above .*\[256\]"),
        ({"num_res_blocks": 0}, (32, 32, 3), "num_res_blocks = 0"),
        ({"channels": 2}, (32, 32, 3), "channels = 2"),
        ({"dropout": 1.0}, (32, 32, 3), "dropout = 1.0"),
    ],
)
def test_a_setting_that_does_not_fit_is_named_in_one_line(settings, image_shape, message):
    network = UNet(**settings)
    with pytest.raises(ValueError, match=r"^model\.unet\." + message) as raised:
        network.validate(image_shape)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=message):
        shapes(network, image_shape)


def test_the_linear_noise_input():
    log_snr = np.array([20.0, 0.0, -20.0], np.float32)
    np.testing.assert_array_equal(log_snr_to_timestep(log_snr), [0, 500, 1000])


@pytest.mark.parametrize("dim", [4, 9, 128])
def test_the_embedding_in_float64(dim):
    """Sines before cosines; wavelengths a geometric series from 2π to 2π·10000 timesteps.

    The tolerance is the rounding of an angle of up to 1000 radians in float32, 3e-5, and as much
    again for the rounding of its frequency.
    """
    timesteps = np.array([0.0, 1.0, 17.25, 500.0, 999.0])
    half = dim // 2
    expected = np.zeros((len(timesteps), dim))
    for k in range(half):
        wavelength = 2 * np.pi * 10_000 ** (k / (half - 1))
        expected[:, k] = np.sin(2 * np.pi * timesteps / wavelength)
        expected[:, half + k] = np.cos(2 * np.pi * timesteps / wavelength)
    actual = sinusoidal_embedding(timesteps.astype(np.float32), dim)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=6e-5)


@pytest.mark.parametrize("mean", [0.0, 300.0])
def test_the_group_norm_is_flaxs(mean):
    """With its gradient. At a mean of 300 standard deviations float32 keeps 3e-5 of an input."""
    rng = np.random.default_rng(0)
    x, u = rng.normal(size=(2, 2, 3, 4, 6)).astype(np.float32)
    x += mean
    parameters = {"scale": rng.normal(size=6), "bias": rng.normal(size=6)}
    ours, flaxs = GroupNorm(3), nn.GroupNorm(3, epsilon=1e-6, use_fast_variance=False)
    variables = ours.init(jax.random.key(0), x)
    assert jax.tree.map(jnp.shape, variables) == {"params": {"scale": (6,), "bias": (6,)}}
    variables = {"params": jax.tree.map(np.float32, parameters)}
    (actual, pull), (expected, pull_flaxs) = (
        jax.vjp(layer.apply, variables, x) for layer in (ours, flaxs)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-3 if mean else 1e-5),
        (actual, pull(u)),
        (expected, pull_flaxs(u)),
    )


def test_attention_knows_no_positions():
    """Pixels permuted before or after: the same, up to the order of float32 sums."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4, 6)).astype(np.float32)
    layer = SelfAttention(num_groups=2)
    variables = layer.init(jax.random.key(0), x)
    assert np.array_equal(layer.apply(variables, x), x), "the identity at initialisation"
    variables = jax.tree.map(lambda p: p + rng.normal(size=p.shape).astype(np.float32), variables)
    order = rng.permutation(12)

    def permute(image):
        return np.asarray(image).reshape(2, 12, 6)[:, order].reshape(image.shape)

    np.testing.assert_allclose(
        layer.apply(variables, permute(x)), permute(layer.apply(variables, x)), rtol=1e-4, atol=1e-4
    )


def only_tap(layer, x, row: int, column: int, **options):
    """The layer's output when its kernel copies the pixel under one tap and has no bias."""
    kernel = np.zeros((3, 3, x.shape[-1], x.shape[-1]), np.float32)
    kernel[row, column] = np.eye(x.shape[-1])
    bias = np.zeros(x.shape[-1], np.float32)
    return layer.apply({"params": {"conv": {"kernel": kernel, "bias": bias}}}, x, **options)


def test_downsampling_pads_below_and_on_the_right():
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
    np.testing.assert_array_equal(only_tap(Downsample(), x, 0, 0), x[:, ::2, ::2])
    last = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))[:, 2::2, 2::2]
    np.testing.assert_array_equal(only_tap(Downsample(), x, 2, 2), last)


def test_upsampling_repeats_pixels():
    x = np.random.default_rng(0).normal(size=(2, 2, 3, 3)).astype(np.float32)
    upsampled = only_tap(Upsample(), x, 1, 1, train=False)
    np.testing.assert_array_equal(upsampled, np.kron(x, np.ones((1, 2, 2, 1))))
