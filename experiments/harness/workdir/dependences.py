"""What each kept result depends on: the one table from results to settings and files.

`GROUPS` puts every setting into one group, and `RESULTS` says which groups determine a result. So
every setting is classified for every result.

A setting that is in no group, such as an option of a network that a notebook registers, counts for
every result: this can cost a recomputation, but never keeps a stale result.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from diffusion.variances import VARIANCES

WEIGHTINGS = ("simple", "min_snr", "truncated", "p2", "sigmoid")  # of ‖ε − ε̂‖² alone
Settings = Mapping[str, Any]  # flat: {"train.batch_size": 128, …}

# The results. Those that are files have the file's path in the work directory.
RUN = "training run"  # all that a checkpoint holds
WEIGHTS = "trained weights"  # the parameters of a step, whatever is measured of them
NETWORK = "trained network"  # what a checkpoint's parameters mean
MEASURED_ERRORS = "eps_errors.npz"
OPTIMAL_LEVELS = "spacing.json"
EVALUATION = "evaluation.json"
SAMPLES = "samples/samples.npz"  # with all pictures in samples/
SWEEP = "samples/sweep.json"  # what its entries have in common
MEASUREMENT = "measurements"  # of a study: a directory with a file for each of its cells
CLASSIFIER = "quality/classifier"
REFERENCE = "quality/reference"  # the statistics of the data that samples are compared with

# A name that ends in a dot stands for a whole section: the options of one choice.
_GROUPS = {
    "seed": "seed",
    "data set": "data.name",
    "images": """data.splits. data.image_size data.channels data.skip_corrupt data.held_out
        data.split_seed""",
    "augmentation": "data.flip",
    "num_timesteps": "schedule.num_timesteps",
    "schedule": """schedule.name schedule.linear_beta. schedule.cosine. schedule.sigmoid.
        schedule.linear_log_snr. schedule.betas. schedule.learned.""",
    "prediction": """model.name model.parameterization model.class_conditional model.unet.
        decoder.scaling""",
    "variance": "model.variance",
    "training precision": "model.dtype model.remat",
    "decoder": "decoder.name decoder.discretized_gaussian.",
    "training": """train.objective train.hybrid. train.min_snr. train.p2. train.sigmoid. train.time
        train.timesteps train.label_dropout train.batch_size train.accumulate train.num_steps
        train.optimizer train.learning_rate train.schedule_learning_rate train.beta2
        train.weight_decay train.warmup_steps train.decay train.gradient_clip train.ema_decay
        train.init_from""",
    "error measurement": "analytic.levels analytic.examples",
    "evaluation labels": "evaluate.labels",
    "bound's variance": "evaluate.variance",
    "evaluation": """evaluate.split evaluate.checkpoint evaluate.replicates evaluate.target
        evaluate.also""",
    "allocation": "evaluate.max_evaluations evaluate.pilot",
    "k_sample": "evaluate.k_sample.",
    "ode": "evaluate.ode.",
    "sampling": """sample.checkpoint sample.spacing sample.x_0_treatment
        sample.corrector.num_steps""",
    "sampler": "sample.sampler sample.num_timesteps",
    "karras": "sample.karras.",
    "ancestral": "sample.variance",
    "ddim": "sample.ddim.",
    "euler": "sample.euler.",
    "heun": "sample.heun.",
    "unipc": "sample.unipc.",
    "adaptive": "sample.adaptive.",
    "langevin": "sample.langevin.",
    "corrector": "sample.corrector.snr",
    "guidance": """sample.labels sample.guidance.scale sample.guidance.min_log_snr
        sample.guidance.max_log_snr sample.guidance.rescale""",
    "pictures": "sample.num_samples sample.strip_rows sample.strip_columns sample.also",
    "inpaint": "sample.inpaint.",
    "interpolate": "sample.interpolate.",
    "encode": "sample.encode.",
    "guidance scales": "sample.guidance.scales",
    "sweep": "sample.sweep.",
    "reference": "quality.features quality.split quality.max_pairs",
    "classifier": "quality.classifier.",
    "quality": "quality.num_samples quality.neighbors",
    "level search": "spacing.candidates spacing.variance spacing.checkpoint",
    "measurement": """ablate.split ablate.checkpoint ablate.num_timesteps ablate.draws
        ablate.measures""",
    "loss variance": "ablate.repeats",
    # No kept result depends on the rest. Each run of the experiments sigma, spacing,
    # variance and compress writes its table anew, and nothing reads it.
    "speed": """data.stream data.memory_limit_mb data.workers data.prefetch devices.fsdp
        profile.first_step profile.num_steps train.steps_per_dispatch evaluate.batch_size
        evaluate.chunk_size sample.batch_size""",
    # The fingerprints of the data's files count: see `DataFiles`.
    "place": "data.data_dir diffusers.source diffusers.target report.file",
    "monitoring": """train.log_every train.checkpoint_every train.sample_every
        train.sample_timesteps train.keep_checkpoints train.validation_timesteps
        train.skip_nonfinite train.allow_changes""",
    "tables": """sigma.num_timesteps sigma.split sigma.checkpoint sigma.draws spacing.num_timesteps
        spacing.split spacing.draws variance.split variance.checkpoint variance.examples
        variance.draws variance.num_samples variance.num_timesteps diffusers.checkpoint
        compress.split compress.images compress.num_images compress.decompress compress.checkpoint
        compress.order compress.num_timesteps compress.spacing compress.variance
        compress.bins_per_std compress.batch_size compress.verify ablate.axes ablate.baseline
        ablate.seeds ablate.cell""",
}
GROUPS: dict[str, tuple[str, ...]] = {key: tuple(text.split()) for key, text in _GROUPS.items()}


class When(NamedTuple):
    """Dependences that exist under a condition on the settings."""

    condition: Callable[[Settings], bool]
    dependences: tuple["Dependence", ...]


class File(NamedTuple):
    """A dependence on the content of a file of the work directory."""

    name: str


class DataFiles(NamedTuple):
    """A dependence on the files of a split: a split's name, or the setting that has it."""

    split: str


Dependence = (
    str | File | DataFiles | When
)  # a string is a group, or a result with all of its dependences


def when(condition: Callable[[Settings], bool], *dependences: Dependence) -> When:
    return When(condition, dependences)


def _is(name: str, *values: Any) -> Callable[[Settings], bool]:
    return lambda settings: settings[name] in values


def _lists(name: str, *values: str) -> Callable[[Settings], bool]:
    return lambda settings: not set(values).isdisjoint(settings[name])


def _is_measured(name: str) -> Callable[[Settings], bool]:
    """Whether this Σ_θ is computed from the network's measured errors."""
    return lambda settings: settings[name] not in ("", *VARIANCES)


def _is_learned(settings: Settings) -> bool:
    variance = settings["model.variance"]
    return variance in VARIANCES and VARIANCES[variance]().is_learned


def _trains_whole_model(settings: Settings) -> bool:
    """Whether the loss contains Σ_θ and the decoder, as the bound does; so may one not built in.

    So does every loss that trains a learned Σ_θ.
    """
    return settings["train.objective"] not in WEIGHTINGS


def _trains_levels(settings: Settings) -> bool:
    """Whether the loss depends on T, the number of levels."""
    return settings["train.time"] != "continuous" or _trains_whole_model(settings)


def _is_adaptive(settings: Settings) -> bool:
    """Whether an evaluation draws its timesteps where the noise is."""
    return settings["evaluate.target"] != 0 or "continuous" in settings["evaluate.also"]


_SAMPLERS_WITH_OPTIONS = ("ddim", "euler", "heun", "unipc", "adaptive", "langevin")
_ANCESTRAL = ("ancestral", when(_is_measured("sample.variance"), MEASURED_ERRORS))
_ANY_SAMPLER = (
    "seed",
    "data set",
    "num_timesteps",
    "schedule",
    "prediction",
    "variance",
    "sampling",
    when(_is("sample.spacing", "karras"), "karras"),
    when(_is("sample.spacing", "bound_optimal"), File(OPTIMAL_LEVELS)),
    when(lambda settings: settings["sample.corrector.num_steps"] > 0, "corrector"),
    when(_is("model.class_conditional", True), "guidance"),
)
_DRAWS = (
    *_ANY_SAMPLER,
    "sampler",
    when(_is("sample.sampler", "ancestral"), *_ANCESTRAL),
    *(when(_is("sample.sampler", name), name) for name in _SAMPLERS_WITH_OPTIONS),
)

_WEIGHTS = (
    "seed",
    "data set",
    "images",
    "augmentation",
    "schedule",
    "prediction",
    "training precision",
    "training",
    when(_trains_levels, "num_timesteps"),
    when(_trains_whole_model, "variance", "decoder"),
)

RESULTS: dict[str, tuple[Dependence, ...]] = {
    RUN: (
        "seed",
        "data set",
        "images",
        "augmentation",
        "num_timesteps",
        "schedule",
        "prediction",
        "variance",
        "training precision",
        "decoder",
        "training",
    ),
    # Less than a run, whose best checkpoint is chosen by the bound of the whole model.
    WEIGHTS: _WEIGHTS,
    NETWORK: (
        "data set",
        "prediction",
        # A learned Σ_θ is an output of the network; any other can be exchanged.
        when(_is_learned, "variance"),
        when(_is("model.unet.noise_input", "ddpm_timestep"), "schedule"),
    ),
    # Neither T nor Σ_θ: the errors serve any.
    MEASURED_ERRORS: (
        "seed",
        "data set",
        "images",
        DataFiles("train"),
        "schedule",
        "prediction",
        "error measurement",
        when(_is("model.class_conditional", True), "evaluation labels"),
    ),
    OPTIMAL_LEVELS: (MEASURED_ERRORS, "variance", "level search"),
    EVALUATION: (
        "seed",
        "data set",
        "images",
        DataFiles("evaluate.split"),
        "num_timesteps",
        "schedule",
        "prediction",
        "variance",
        "decoder",
        "evaluation",
        "bound's variance",
        when(_is("model.class_conditional", True), "evaluation labels"),
        when(_is_measured("evaluate.variance"), MEASURED_ERRORS),
        when(_is_adaptive, "allocation", DataFiles("train")),
        when(_lists("evaluate.also", "k_sample"), "k_sample"),
        when(_lists("evaluate.also", "ode"), "ode"),
        when(_lists("evaluate.also", "quality"), *_DRAWS, REFERENCE, "quality"),
    ),
    SAMPLES: (
        *_DRAWS,
        "images",  # the strip of the forward process shows some
        DataFiles("test"),
        "pictures",
        *(when(_lists("sample.also", name), name) for name in ("inpaint", "interpolate", "encode")),
        when(_lists("sample.also", "guidance"), "guidance scales", REFERENCE, "quality"),
        when(_lists("sample.also", "sweep"), "sweep", SWEEP),
    ),
    SWEEP: (*_ANY_SAMPLER, *_ANCESTRAL, *_SAMPLERS_WITH_OPTIONS, REFERENCE, "quality"),
    MEASUREMENT: (
        *_WEIGHTS,
        "num_timesteps",
        "variance",
        "decoder",
        "measurement",
        DataFiles("ablate.split"),
        when(_is("model.class_conditional", True), "evaluation labels"),
        "bound's variance",
        when(_is_measured("evaluate.variance"), MEASURED_ERRORS),
        when(_lists("ablate.measures", "loss_variance"), "loss variance"),
        when(_lists("ablate.measures", "quality"), *_DRAWS, REFERENCE, "quality"),
    ),
    # These two have a fingerprint of the images in their file names too.
    CLASSIFIER: ("data set", "images", DataFiles("train"), "classifier"),
    REFERENCE: (
        "data set",
        "images",
        DataFiles("quality.split"),
        "reference",
        when(_is("quality.features", "", "classifier"), CLASSIFIER),
    ),
}

# A new training run removes these. The results in quality/ depend on the data alone.
FILES_OF_A_RUN = (EVALUATION, MEASURED_ERRORS, OPTIMAL_LEVELS, SAMPLES, SWEEP)


def depends(result: str, settings: Settings) -> set[str]:
    """The names of the settings that determine a result, given their values."""
    groups = set(active(RESULTS[result], settings))
    return {name for name in settings if group(name) is None or group(name) in groups}


def active(
    dependences: tuple[Dependence, ...], settings: Settings
) -> Iterator[str | File | DataFiles]:
    """The groups and files that count for these settings."""
    for dependence in dependences:
        if isinstance(dependence, When):
            if dependence.condition(settings):
                yield from active(dependence.dependences, settings)
        elif dependence in RESULTS:
            yield from active(RESULTS[dependence], settings)
        else:
            yield dependence


@functools.cache
def group(name: str) -> str | None:
    """The group of a setting; None if it is in none."""
    for key, names in GROUPS.items():
        if is_named(name, names):
            return key
    return None


def is_named(name: str, names: tuple[str, ...]) -> bool:
    """Whether a setting is one of these, or in one of these sections, which end in a dot."""
    return name in names or name.startswith(tuple(n for n in names if n.endswith(".")))
