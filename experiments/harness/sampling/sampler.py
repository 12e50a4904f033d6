"""From the settings of `sample` to a sampler and the levels that it needs."""

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


class Inputs(NamedTuple):
    """The inputs of a batch of samples, row by row.

    Attributes:
      index: the number of each sample; its noise is a function of (seed, index).
      labels: classes; None without.
      image: images in data units, of which a part is kept; None without.
      mask: True where the image is kept.
    """

    index: Int[Array, "b"]
    labels: Int[Array, "b"] | None = None
    image: Float[Array, "b *d"] | None = None
    mask: Bool[Array, "b *d"] | None = None


def build_sampler(
    config: ConfigDict, definition: ModelDefinition, params: Any, inputs: Inputs
) -> Sampler:
    """The config's sampler, with its guidance, treatment of x̂_0, corrector and inpainting."""
    settings, model = config.sample, definition.model(params, inputs.labels)
    if definition.num_classes:
        scale, rescale = settings.guidance.scale, settings.guidance.rescale
        model = classifier_free(model, scale, guidance_interval(config), rescale)
    model = treated(model, settings.x_0_treatment)
    sampler = SAMPLERS[settings.sampler](model, **settings.get(settings.sampler, {}))
    if settings.corrector.num_steps:
        sampler = corrected(sampler, model, **settings.corrector)
    if inputs.image is not None:
        num_resamplings = settings.inpaint.num_resamplings
        sampler = inpainted(sampler, inputs.image, inputs.mask, num_resamplings)
    return sampler


def guidance_interval(config: ConfigDict) -> tuple[float, float]:
    """The lowest and the highest log-SNR at which the sampler is guided."""
    return config.sample.guidance.min_log_snr, config.sample.guidance.max_log_snr


def needed_levels(config: ConfigDict, definition: ModelDefinition) -> list[int]:
    """The numbers of levels that samples, and the extras in `sample.also`, step through."""
    settings, edits = config.sample, ("inpaint", "interpolate", "encode")
    needed = [settings.num_timesteps]
    needed += [settings[name].num_timesteps for name in edits if name in settings.also]
    if "sweep" in settings.also:
        needed += settings.sweep.num_timesteps
    return sorted({int(n) or definition.levels.num_timesteps for n in needed})


def check(config: ConfigDict, definition: ModelDefinition) -> None:
    """Raises ConfigError if the schedule has no such levels, or the data no such classes."""
    if config.sample.spacing != "bound_optimal":
        for num_timesteps in needed_levels(config, definition):
            make_levels(config, definition, num_timesteps, "", 0)
    labels, classes = config.sample.labels, definition.num_classes
    if any(label >= classes for label in labels):
        remedy = f"classes are numbered 0 … {classes - 1}"
        raise ConfigError(f"config.sample.labels = {labels}; {remedy}")
