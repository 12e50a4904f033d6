"""What the settings of `sample` mean: a sampler, its levels, and which of them cannot work."""

from typing import Any, NamedTuple

from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

from diffusion.flow.ode import METHODS
from diffusion.samplers.base import Sampler
from diffusion.samplers.guidance import classifier_free
from diffusion.samplers.inpainting import inpainted
from diffusion.samplers.langevin import corrected
from diffusion.samplers.registry import SAMPLERS
from diffusion.samplers.unipc import ORDERS, VARIANTS
from diffusion.spacing import SPACINGS
from experiments.harness import checks
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
    of, reverse = config.sample, definition.reverse(params)
    if definition.num_classes:
        scale, rescale = of.guidance.scale, of.guidance.rescale
        reverse = classifier_free(reverse, scale, guidance_interval(config), rescale)
    arguments = {"x_0_treatment": of.x_0_treatment, "condition": given.labels}
    sampler = SAMPLERS[of.sampler](reverse, **arguments, **of.get(of.sampler, {}))
    if of.corrector.num_steps:
        sampler = corrected(sampler, reverse, **arguments, **of.corrector)
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
    """Raises ConfigError for settings of `sample` that no sampler can use; compiles nothing."""
    of = config.sample
    checks.pick(SAMPLERS, of.sampler, "config.sample.sampler")
    checks.pick((*SPACINGS, "bound_optimal"), of.spacing, "config.sample.spacing")
    remedy = "give a number of levels, or 0 for all of the schedule's"
    checks.check_setting(config, "sample.num_timesteps", lambda n: n >= 0, remedy)
    for name, is_right, remedy in (
        ("karras.rho", lambda x: x > 0, "it must be positive"),
        ("ddim.eta", lambda x: 0 <= x <= 1, "it must be in [0, 1]"),
        ("langevin.num_steps", lambda n: n >= 1, "it must be at least 1"),
        ("langevin.snr", lambda x: 0 < x < 1, "it must be in (0, 1)"),
        ("corrector.num_steps", lambda n: n >= 0, "0 for none, or how many"),
        ("corrector.snr", lambda x: 0 < x < 1, "it must be in (0, 1)"),
        *((f"{name}.churn", _is_churn, "it must be in [0, √2 − 1]") for name in ("euler", "heun")),
        ("unipc.order", lambda n: n in ORDERS, f"it must be one of {ORDERS}"),
        ("adaptive.tolerance", lambda x: x > 0, "it must be positive"),
        ("adaptive.max_steps", lambda n: n >= 1, "it must be at least 1"),
        ("guidance.rescale", lambda x: 0 <= x <= 1, "it must be in [0, 1]"),
        ("inpaint.num_resamplings", lambda n: n >= 1, "it must be at least 1"),
    ):
        checks.check_setting(config, f"sample.{name}", is_right, remedy)
    checks.pick(VARIANTS, of.unipc.variant, "config.sample.unipc.variant")
    checks.pick(METHODS, of.adaptive.method, "config.sample.adaptive.method")
    if of.spacing != "bound_optimal":
        for num_timesteps in needed_levels(config, definition):
            make_levels(config, definition, num_timesteps, "", 0)
    _check_classes(config, definition)


def _is_churn(share: float) -> bool:
    return 0 <= share <= 2**0.5 - 1


def _check_classes(config: ConfigDict, definition: ModelDefinition) -> None:
    """Labels and guidance are of a class-conditional model."""
    of, classes = config.sample, definition.num_classes
    wrong = [
        label
        for label in of.labels
        if not isinstance(label, int) or not 0 <= label < max(classes, 1)
    ]
    if of.labels and not classes:
        raise ConfigError(
            f"config.sample.labels = {of.labels}, but the model knows no classes; leave them out, "
            "or train with config.model.class_conditional"
        )
    if wrong:
        raise ConfigError(
            f"config.sample.labels = {of.labels}; classes are numbered 0 … {classes - 1}"
        )
    low, high = guidance_interval(config)
    if not low <= high:
        raise ConfigError(
            f"config.sample.guidance.min_log_snr = {low} is above max_log_snr = {high}"
        )
    check_unconditional(config, definition, of.guidance.scale != 1, "sample.guidance.scale")
    if of.guidance.scale != 1 and not classes:
        raise ConfigError(
            f"config.sample.guidance.scale = {of.guidance.scale}, but the model knows no classes; "
            "use 1, or train with config.model.class_conditional"
        )


def check_unconditional(
    config: ConfigDict, definition: ModelDefinition, is_used: bool, what: str
) -> None:
    """Raises ConfigError if predictions without a label are used that were never trained."""
    if is_used and definition.num_classes and config.train.label_dropout == 0:
        raise ConfigError(
            f"config.{what} = {checks.value_of(config, what)} needs predictions without a label, "
            "of which a network with config.train.label_dropout = 0 has learned nothing"
        )
