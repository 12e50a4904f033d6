"""A small image classifier. Its features measure sample quality on sets that have no others."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Float

from diffusion.schedules import Array


class Classifier(nn.Module):
    """Two convolutions and two dense layers, for small images.

    Attributes:
      num_classes: number of classes.
      num_features: length of the last hidden layer.
    """

    num_classes: int
    num_features: int = 32

    @nn.compact
    def __call__(
        self, x: Float[Array, "b h w c"]
    ) -> tuple[Float[Array, "b {self.num_classes}"], Float[Array, "b {self.num_features}"]]:
        """The logits of the classes, and the last hidden layer, from which they are computed."""
        x = nn.swish(nn.Conv(32, (3, 3), name="conv_1")(x))
        x = nn.swish(nn.Conv(64, (3, 3), strides=2, name="conv_2")(x))
        x = x.reshape(len(x), -1)
        # Bounded, so that distances between features are not dominated by outliers.
        features = jnp.tanh(nn.Dense(self.num_features, name="features")(x))
        return nn.Dense(self.num_classes, name="logits")(features), features
