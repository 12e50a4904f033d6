"""The generative model p: x_T ~ N(0, I), p_θ(x_s | x_t) from level to level, and p(x_0 | x_1).

A model is a value. Whatever changes it returns a new one: a condition, another Σ_θ, other levels
(`model._replace(levels=…)`), guidance (`samplers.guidance`), a clipped x̂_0 (`samplers.treatments`).
"""

from typing import NamedTuple

from jaxtyping import PyTree

from diffusion.decoders import Decoder
from diffusion.reverse import Reverse
from diffusion.schedules import Levels
from diffusion.variances import Variance


class DiffusionModel(NamedTuple):
    """p(x_0 … x_T) = p(x_T) p_θ(x_{T−1} | x_T) … p_θ(x_1 | x_2) p(x_0 | x_1). Lecture 13, (13.5).

    Attributes:
      reverse: p_θ(x_s | x_t), for steps to s ≥ 1.
      decoder: p(x_0 | x_1).
      levels: the T noise levels.
    """

    reverse: Reverse
    decoder: Decoder
    levels: Levels

    def given(self, condition: PyTree | None) -> "DiffusionModel":
        """p(· | condition): the denoiser receives the condition in each call. None removes it."""
        return self._replace(reverse=self.reverse.given(condition))

    def with_variance(self, variance: str | Variance) -> "DiffusionModel":
        """The same model with another Σ_θ: a `Variance` or a name in VARIANCES."""
        return self._replace(reverse=self.reverse._replace(variance=variance))
