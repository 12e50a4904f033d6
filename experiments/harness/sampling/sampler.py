"""What the settings of `sample` mean: a sampler, its levels, and which of them cannot work."""

from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from diffusion.samplers.base import Sampler
from diffusion.samplers.guidance import classifier_free
from diffusion.samplers.inpainting import inpainted
from diffusion.samplers.langevin import corrected
from diffusion.samplers.registry import SAMPLERS
from diffusion.samplers.treatments import treated
from experiments.harness.errors import ConfigError
from experiments.harness.setup.definition import ModelDefinition
from experiments.harness.setup.trained import make_levels


class Given(NamedTuple):
    """What a batch of samples is made from, row by row.

    Attributes:
      index: which sample each row is; its noise is a function of (seed, index).
      labels: their classes; None without.
      known: images in data units, of which a part is kept; None without.
      mask: the part that is kept.
    """

    index: Int[Array, "b"]
    labels: Int[Array, "b"] | None = None
    known: Float[Array, "b *d"] | None = None
    mask: Bool[Array, "b *d"] | None = None


def build_sampler(
    config: ConfigDict, definition: ModelDefinition, params: Any, given: Given
) -> Sampler:
    """The config's sampler: guided where it is asked for, corrected, and held to what is known."""
    of, model = config.sample, definition.model(params, given.labels)
    if definition.num_classes:
        scale, rescale = of.guidance.scale, of.guidance.rescale
        model = classifier_free(model, scale, guidance_interval(config), rescale)
    model = treated(model, of.x_0_treatment)
    sampler = SAMPLERS[of.sampler](model, **of.get(of.sampler, {}))
    if of.corrector.num_steps:
        sampler = corrected(sampler, model, **of.corrector)
    if given.known is not None:
        sampler = inpainted(sampler, given.known, given.mask, of.inpaint.num_resamplings)
    return sampler


def guidance_interval(config: ConfigDict) -> tuple[float, float]:
    """The lowest and the highest log-SNR at which the sampler is guided."""
    return config.sample.guidance.min_log_snr, config.sample.guidance.max_log_snr


def needed_levels(config: ConfigDict, definition: ModelDefinition) -> list[int]:
    """The numbers of levels that samples and what `sample.also` names step through."""
    of = config.sample
    needed = [of.num_timesteps]
    needed += [
        of[name].num_timesteps for name in ("inpaint", "interpolate", "encode") if name in of.also
    ]
    if "sweep" in of.also:
        needed += of.sweep.num_timesteps
    return sorted({int(n) or definition.levels.num_timesteps for n in needed})


def check(config: ConfigDict, definition: ModelDefinition) -> None:
    """Raises ConfigError for levels that the schedule does not have, or labels that are none."""
    if config.sample.spacing != "bound_optimal":
        for num_timesteps in needed_levels(config, definition):
            make_levels(config, definition, num_timesteps, "", 0)
    labels, classes = config.sample.labels, definition.num_classes
    if any(label >= classes for label in labels):
        remedy = f"classes are numbered 0 … {classes - 1}"
        raise ConfigError(f"config.sample.labels = {labels}; {remedy}")
