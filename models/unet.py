"""DDPM's U-Net: (x_t, log-SNR, condition) -> prediction, of the shape of an image."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.linen.initializers import normal, zeros_init
from jax.typing import DTypeLike
from jaxtyping import Float, Shaped

from diffusion.schedules import Array
from models.layers import (
    GROUP_NORM_EPSILON,
    Downsample,
    GroupNorm,
    ResBlock,
    SelfAttention,
    Upsample,
    at_least_float32,
    conv3x3,
    dense,
    fourier_features,
    sinusoidal_embedding,
)


def log_snr_to_timestep(log_snr: Float[Array, "b"]) -> Float[Array, "b"]:
    """Log-SNRs mapped linearly to the range of DDPM's timesteps: +20 to 0 and −20 to 1000."""
    return 25.0 * (20.0 - jnp.asarray(log_snr))


ATTENTION_RESOLUTIONS = (
    "attention_resolutions",
    "down_attention_resolutions",
    "up_attention_resolutions",
)


class UNet(nn.Module):
    """The network of Ho et al. 2020 (appendix B), for images of any shape that `validate` accepts.

    The defaults are DDPM's for CIFAR-10: 35,746,307 parameters.

    Attributes:
      channels: number of channels at full resolution.
      channel_multipliers: a factor for each resolution, which halves from one to the next. Its
        product with `channels` is a whole number, to rounding.
      num_res_blocks: number of residual blocks at each resolution of the encoder; the decoder has
        one more.
      attention_resolutions: heights of the feature maps with self-attention after each residual
        block, on the way down and up.
      down_attention_resolutions: heights of those with self-attention on the way down only.
      up_attention_resolutions: heights of those with self-attention on the way up only.
      dropout: probability of dropping an activation in a residual block.
      num_groups: number of groups of the group norms.
      fourier_exponents: exponents for `fourier_features` of the input; DDPM has none.
      center_input: whether the network receives 2 x_t − 1.
      head_channels: channels of an attention head; 0 for a single head. A rest of channels that
        fills no head is left out.
      middle_attention: "normalized", "unnormalized" (without a group norm) or "none".
      middle_divisor: divisor of the sums that the blocks in the middle return.
      norm_epsilon: of the group norms.
      scale_shift: whether the embedding scales and shifts in a residual block, and is not added.
      residual_resampling: whether residual blocks change the resolution, and not convolutions.
      symmetric_downsampling: whether strided convolutions are padded on all sides.
      frequency_shift: of the sinusoidal embedding.
      cosines_first: whether the embedding's cosines come before its sines.
      out_channels: number of channels of the prediction; None for the image's own.
      num_classes: number of classes of the condition; 0 for an unconditional network.
      timestep_of: maps log-SNRs to the input of the sinusoidal embedding, of the order of 0 … 1000.
      dtype: precision of convolutions and attention, such as bfloat16; None for that of their
        input. Parameters, norms, softmax, embeddings and the output are in float32 at least.
      remat: whether residual and attention blocks store only their input for the gradient and are
        computed again there, which takes less memory and a third more arithmetic.
    """

    channels: int = 128
    channel_multipliers: Sequence[float | int] = (1, 2, 2, 2)
    num_res_blocks: int = 2
    attention_resolutions: Sequence[int] = (16,)
    down_attention_resolutions: Sequence[int] = ()
    up_attention_resolutions: Sequence[int] = ()
    dropout: float = 0.1
    num_groups: int = 32
    fourier_exponents: Sequence[int] = ()
    center_input: bool = False
    head_channels: int = 0
    middle_attention: str = "normalized"
    middle_divisor: float = 1.0
    norm_epsilon: float = GROUP_NORM_EPSILON
    scale_shift: bool = False
    residual_resampling: bool = False
    symmetric_downsampling: bool = False
    frequency_shift: float = 1.0
    cosines_first: bool = False
    out_channels: int | None = None
    num_classes: int = 0
    timestep_of: Callable[[Float[Array, "b"]], Float[Array, "b"]] = log_snr_to_timestep
    dtype: DTypeLike | None = None
    remat: bool = False

    def validate(self, image_shape: Sequence[int]) -> None:
        """Checks the settings against the shape (height, width, channels) of the images.

        Raises:
          ValueError: with one line that names the setting, its value and the permitted values.
        """
        if len(image_shape) != 3:
            raise ValueError(
                f"model.name = 'unet'; it is for images, and the data have the shape {image_shape}"
            )
        height, width, _ = image_shape
        halvings = len(self.channel_multipliers) - 1
        heights = [height // 2**level for level in range(halvings + 1)]
        features = [self.channels, *self.features]

        def check(right: bool, name: str, remedy: str) -> None:
            if not right:
                raise ValueError(f"model.unet.{name} = {getattr(self, name)}; {remedy}")

        check(self.channels >= 4, "channels", "it must be at least 4")
        check(self.num_groups >= 1, "num_groups", "it must be at least 1")
        check(self.num_res_blocks >= 1, "num_res_blocks", "it must be at least 1")
        check(0 <= self.dropout < 1, "dropout", "it must be in [0, 1)")
        check(self.num_classes >= 0, "num_classes", "it must not be negative")
        check(
            halvings >= 0 and min(self.channel_multipliers) >= 1,
            "channel_multipliers",
            "it must list at least one number, each at least 1",
        )
        exact = np.multiply(self.channels, self.channel_multipliers)
        check(
            np.allclose(exact, self.features, rtol=1e-6, atol=0),
            "channel_multipliers",
            f"{self.channels} channels times each must be a whole number",
        )
        check(
            height % 2**halvings == 0 and width % 2**halvings == 0,
            "channel_multipliers",
            f"an image of {height}×{width} cannot be halved {halvings} times: use at most "
            f"{_halvings(height, width) + 1} multipliers",
        )
        check(
            all(count % self.num_groups == 0 for count in features),
            "num_groups",
            f"it must divide the channel counts {sorted(set(features))}: "
            f"use a divisor of {np.gcd.reduce(features)}",
        )
        with_attention = [
            count
            for level, count in enumerate(self.features)
            if any(self.has_attention(heights[level], way) for way in ("down", "up"))
            or (level == halvings and self.middle_attention != "none")
        ]
        check(
            self.head_channels <= min(with_attention, default=self.head_channels),
            "head_channels",
            f"it must not be above the channel counts {sorted(set(with_attention))} of the blocks "
            "with attention; 0 is a single head",
        )
        for name in ATTENTION_RESOLUTIONS:
            unknown = ", ".join(map(str, sorted(set(getattr(self, name)) - set(heights))))
            check(not unknown, name, f"no feature map has height {unknown}: choose from {heights}")

    @property
    def features(self) -> tuple[int, ...]:
        """The number of channels at each resolution."""
        return tuple(round(self.channels * m) for m in self.channel_multipliers)

    @nn.nowrap
    def has_attention(self, height: int, direction: str) -> bool:
        """Whether residual blocks on the way "down" or "up" are followed by self-attention."""
        one_way = getattr(self, f"{direction}_attention_resolutions")
        return height in (*self.attention_resolutions, *one_way)

    @nn.compact
    def __call__(
        self,
        x_t: Float[Array, "b h w c"],
        log_snr: Float[Array, "b"],
        condition: Shaped[Array, "b"] | None = None,
        *,
        train: bool = False,
    ) -> Float[Array, "b h w out"]:
        """The prediction at x_t.

        Args:
          x_t: noisy images, in the units of the training data.
          log_snr: their log-SNRs.
          condition: labels 0 … num_classes − 1 for a network with classes; num_classes means no
            label, and so does None for the whole batch. Any other label gives NaN, since a compiled
            program cannot raise an error.
          train: whether to apply dropout, with the random key of the collection `dropout`. It also
            chooses convolutions with faster gradients on a CPU, which `jax.jvp` cannot take.

        Returns:
          ε, x_0, v or the score, whichever the parameterisation is. Zero at initialisation.

        Raises:
          ValueError: if the condition is not of integers, or the network is unconditional and has
            one; and as `validate`.
        """
        self.validate(x_t.shape[1:])
        x_t = jnp.asarray(x_t)
        embedding = self._embedding(log_snr, condition)

        def res_block(x, features, name, resampling="", divisor=1.0):
            # Argument 3, counted from `self`, is `train`: a constant of the compiled program.
            block = nn.remat(ResBlock, static_argnums=3) if self.remat else ResBlock
            options = self.dtype, self.norm_epsilon, self.scale_shift, resampling, divisor
            block = block(features, self.num_groups, self.dropout, *options, name=name)
            return block(x, embedding, train)

        last = len(self.channel_multipliers) - 1
        x = fourier_features(2 * x_t - 1 if self.center_input else x_t, self.fourier_exponents)
        x = conv3x3(self.channels, "conv_in", dtype=self.dtype)(x)
        skips = [x]
        for level in range(last + 1):
            for index in range(self.num_res_blocks):
                x = self._stage(x, res_block, "down", level, index)
                skips.append(x)
            if level < last:
                name = f"down_{level}_downsample"
                if self.residual_resampling:
                    x = res_block(x, x.shape[-1], name, "down")
                else:
                    x = Downsample(self.dtype, self.symmetric_downsampling, name=name)(x)
                skips.append(x)

        middle = {"features": x.shape[-1], "divisor": self.middle_divisor}
        x = res_block(x, name="middle_block_0", **middle)
        if self.middle_attention != "none":
            num_groups = self.num_groups * (self.middle_attention == "normalized")
            x = self._attention("middle_attention_0", num_groups, self.middle_divisor)(x)
        x = res_block(x, name="middle_block_1", **middle)

        for level in reversed(range(last + 1)):
            for index in range(self.num_res_blocks + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = self._stage(x, res_block, "up", level, index)
            if level > 0 and self.residual_resampling:
                x = res_block(x, x.shape[-1], f"up_{level}_upsample", "up")
            elif level > 0:
                x = Upsample(self.dtype, name=f"up_{level}_upsample")(x, train)

        norm = GroupNorm(self.num_groups, self.norm_epsilon, name="norm_out")
        x = nn.swish(norm(at_least_float32(x)))
        return conv3x3(self.out_channels or x_t.shape[-1], "conv_out", zeros_init())(x)

    # Parts of `__call__`: their layers have its scope.

    @nn.nowrap
    def _stage(
        self,
        x: Float[Array, "b h w c"],
        res_block: Callable,
        direction: str,
        level: int,
        index: int,
    ) -> Float[Array, "b h w features"]:
        """A residual block, followed by self-attention at the resolutions that have it."""
        x = res_block(x, self.features[level], f"{direction}_{level}_block_{index}")
        if self.has_attention(x.shape[1], direction):
            x = self._attention(f"{direction}_{level}_attention_{index}", self.num_groups)(x)
        return x

    @nn.nowrap
    def _attention(self, name: str, num_groups: int, divisor: float = 1.0) -> nn.Module:
        block = nn.remat(SelfAttention) if self.remat else SelfAttention
        options = self.dtype, self.norm_epsilon, self.head_channels, divisor
        return block(num_groups, *options, name=name)

    @nn.nowrap
    def _embedding(
        self, log_snr: Float[Array, "b"], condition: Shaped[Array, "b"] | None
    ) -> Float[Array, "b e"]:
        """The embedding of the noise level, plus that of the label if the network has classes."""
        embedding = sinusoidal_embedding(
            self.timestep_of(log_snr), self.channels, self.frequency_shift, self.cosines_first
        )
        embedding = dense(4 * self.channels, "embedding_1")(embedding)
        embedding = dense(4 * self.channels, "embedding_2")(nn.swish(embedding))
        if not self.num_classes:
            if condition is not None:
                raise ValueError("the U-Net is unconditional: condition must be None")
            return embedding
        shape = (self.num_classes + 1, 4 * self.channels)
        table = self.param("label_embedding", normal(0.02), shape)
        if condition is None:
            return embedding + table[self.num_classes]
        label = jnp.asarray(condition)
        if not jnp.issubdtype(label.dtype, jnp.integer):
            raise ValueError(f"condition is of type {label.dtype}; labels must be integers")
        # A negative index would count from the end of the table.
        label = jnp.where(label < 0, self.num_classes + 1, label)
        return embedding + jnp.take(table, label, axis=0, mode="fill")


def _halvings(height: int, width: int) -> int:
    """The number of times that both sides of an image can be halved."""
    side = int(np.gcd(height, width))
    return (side & -side).bit_length() - 1
