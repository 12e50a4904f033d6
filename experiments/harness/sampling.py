"""Samples in batches: one compiled program a sampler, whatever the levels and what is recorded."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion import sampling
from diffusion.forward import Noise, example_noise
from diffusion.guidance import classifier_free, evaluations_at
from diffusion.inpainting import inpainted
from diffusion.langevin import corrected
from diffusion.likelihood import METHODS
from diffusion.samplers import SAMPLERS
from diffusion.sampling import Sampler, Samples, State
from diffusion.schedules import Levels, Step
from diffusion.spacing import SPACINGS
from diffusion.unipc import ORDERS, VARIANTS
from experiments.harness import analytic, data, devices, settings
from experiments.harness import workdir as workdirs
from experiments.harness.errors import ConfigError, RunError
from experiments.harness.optimal_steps import digest_of_optimal_levels, optimal_levels
from experiments.harness.progress import progress
from experiments.harness.seeds import stream
from experiments.harness.settings import Problem

START = 2**31 - 1  # the number of the noise that is x_T: one and the same at any T
STRETCH = 16  # levels that are stepped through between two looks at the progress bar


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


class Trained(NamedTuple):
    """A trained model, as `sample` and its extras use it.

    Attributes:
      config: the config.
      workdir: where it was trained, and where results go.
      problem: its mathematics, with the learned schedule and the chosen Σ_θ.
      params: the EMA weights.
      step: the step that they are of.
    """

    config: ConfigDict
    workdir: epath.Path
    problem: Problem
    params: Any
    step: int

    def levels(self, num_timesteps: int) -> Levels:
        """The levels that samples step through, 0 for as many as the schedule has."""
        return make_levels(self.config, self.problem, num_timesteps, self.workdir, self.step)


class Stretch(NamedTuple):
    """Some levels on the way down, filled up with repeats of the last.

    Attributes:
      t: the levels.
      log_snr: λ_t.
      gap: λ_{t−1} − λ_t.
    """

    t: Int[Array, "n"]
    log_snr: Float[Array, "n"]
    gap: Float[Array, "n"]


def build_sampler(config: ConfigDict, problem: Problem, params: Any, given: Given) -> Sampler:
    """The config's sampler: guided where it is asked for, corrected, and held to what is known."""
    of, reverse = config.sample, problem.reverse(params)
    if problem.num_classes:
        guidance = of.guidance
        reverse = classifier_free(reverse, guidance.scale, _interval(config), guidance.rescale)
    arguments = {"x_0_treatment": of.x_0_treatment, "condition": given.labels}
    sampler = SAMPLERS[of.sampler](reverse, **arguments, **of.get(of.sampler, {}))
    if of.corrector.num_steps:
        sampler = corrected(sampler, reverse, **arguments, **of.corrector)
    if given.known is not None:
        sampler = inpainted(sampler, given.known, given.mask, of.inpaint.num_resamplings)
    return sampler


def _interval(config: ConfigDict) -> tuple[float, float]:
    return config.sample.guidance.min_log_snr, config.sample.guidance.max_log_snr


def decides(
    config: ConfigDict,
    workdir: epath.PathLike | None = None,
    samplers: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The settings that samples depend on, flat: where they are equal, so are the samples.

    Args:
      config: the config.
      workdir: holds the bound-optimal levels, where these are asked for.
      samplers: those that are used, by default `sample.sampler` alone.
    """
    told, used = config.to_dict(), samplers or (config.sample.sampler,)
    of = told["sample"]
    names = ["sampler", "num_timesteps", "spacing", "checkpoint", "x_0_treatment"]
    names += [name for name in (*used, of["spacing"]) if name in of]
    if of["corrector"]["num_steps"]:
        names.append("corrector")
    kept = {name: told[name] for name in ("seed", "model", "schedule")}
    kept["data"], kept["scaling"] = told["data"]["name"], told["decoder"]["scaling"]
    if "ancestral" in used:
        names.append("variance")
        if of["variance"] in analytic.ANALYTIC:
            kept["analytic"], kept["labels"] = told["analytic"], told["evaluate"]["labels"]
    if told["model"]["class_conditional"]:
        names += ["labels", "guidance"]
        del of["guidance"]["scales"]
    if of["spacing"] == "bound_optimal" and workdir is not None:
        kept["levels"] = digest_of_optimal_levels(workdir)
    return workdirs.flatten(kept | {"sample": {name: of[name] for name in names}})


def make_noise(config: ConfigDict, problem: Problem, index: Int[Array, "b"]) -> Noise:
    """The noise of samples, a function of (seed, index, number)."""
    return example_noise(stream(config.seed, "sample"), index, problem.image_shape)


def make_levels(
    config: ConfigDict,
    problem: Problem,
    num_timesteps: int,
    workdir: epath.PathLike,
    step: int,
) -> Levels:
    """The levels that samples step through, by the config's spacing.

    Args:
      config: `sample.spacing` and its options.
      problem: its schedule, if learned, the learned one.
      num_timesteps: how many; 0 for all of the schedule's.
      workdir: holds the bound-optimal levels, if these are asked for.
      step: the step that the parameters are of.

    Raises:
      ConfigError: if there are no such levels.
    """
    name, num_timesteps = config.sample.spacing, num_timesteps or problem.levels.num_timesteps
    if name == "bound_optimal":
        return optimal_levels(workdir, num_timesteps, step, problem.schedule)
    try:
        return SPACINGS[name](problem.schedule, num_timesteps, **config.sample.get(name, {}))
    except ValueError as error:
        raise ConfigError(f"config.sample.spacing = {name!r}: {error}") from error


class Drawer:
    """Draws samples with a config's sampler.

    Compiled on first use, once: the number of levels, their spacing and what is recorded are
    arguments. Memory does not grow with the number of steps.
    """

    def __init__(self, config: ConfigDict, problem: Problem):
        self.config, self.problem = config, problem
        mesh = devices.mesh()
        self._everywhere, self._split = devices.replicated(mesh), devices.split_batch(mesh)
        whole, split = self._everywhere, self._split
        self._begin = jax.jit(self._begin_of, in_shardings=(whole, split), out_shardings=split)
        self._advance = jax.jit(
            self._advance_of,
            in_shardings=(whole, split, whole, whole, whole, split),
            out_shardings=split,
            donate_argnums=1,
        )
        self._evaluations = jax.jit(self._evaluations_of)

    def __call__(
        self,
        params: Any,
        levels: Levels,
        n: int,
        record: Sequence[int] = (),
        rows: int = 0,
        give: Callable[[np.ndarray], Given] | None = None,
    ) -> Samples:
        """Samples 0 … n − 1, in batches of `sample.batch_size`, as host arrays.

        Args:
          params: the networks' parameters.
          levels: what to step through.
          n: how many samples.
          record: levels whose x_t and x̂_0 are kept, in the order asked for.
          rows: of so many samples, the first ones.
          give: what a batch is made from, by index; by default noise, and `given`'s labels.

        Raises:
          RunError: if a sample is not finite.
          ValueError: if a level to record is not one of 1 … T, or named twice.
        """
        give = give or self.given
        params = devices.place(params, self._everywhere)
        rows = min(rows, n)
        parts, ways, seen = [], [], 0
        with progress(n, "sample", "img", delay=2, leave=False, unit_scale=True) as bar:
            for index, mask in data.padded_batches(n, self.config.sample.batch_size):
                count = int(mask.sum())
                shown = max(0, min(count, rows - seen))
                tell, seen = functools.partial(_tell, bar, count), seen + count
                kept = record if shown or seen == count else ()  # the first says the shape
                made = self._batch(params, levels, give(index), kept, shown, tell)
                self._require_finite(made.x_0[mask])
                parts.append((made.x_0[mask], made.evaluations[mask]))
                if kept:
                    ways.append((made.x_t, made.x_0_hat))
        x_0, evaluations = (np.concatenate(of) for of in zip(*parts, strict=True))
        none = np.zeros((0, rows, *x_0.shape[1:]), x_0.dtype)
        way = [np.concatenate(of, axis=1) for of in zip(*ways, strict=True)] or [none, none]
        return Samples(x_0, *way, self._guided(levels, evaluations))

    def given(self, index: np.ndarray) -> Given:
        """Noise, and the labels of `sample.labels` in turn, by default every class."""
        if not self.problem.num_classes:
            return Given(index)
        labels = np.array(self.config.sample.labels or range(self.problem.num_classes), np.int32)
        return Given(index, labels[index % len(labels)])

    def _batch(
        self,
        params: Any,
        levels: Levels,
        given: Given,
        record: Sequence[int],
        rows: int,
        tell: Callable[[float], Any],
    ) -> Samples:
        """One batch, the way of its first rows; tells the share of it that each stretch was."""
        last = levels.num_timesteps
        given = devices.place(given, self._split)
        state = self._begin(params, given)
        x_t, x_0_hat = {}, {}
        for top, bottom in stretches(last, record):
            if top in record:
                x_t[top] = np.asarray(state.x[:rows])
            stretch, count = _cut(levels, top, bottom), np.int32(top - bottom)
            state = self._advance(params, state, stretch, count, np.int32(last), given)
            if top in record:
                x_0_hat[top] = np.asarray(state.x_0_hat[:rows])
            jax.block_until_ready(state.x)
            tell((top - bottom) / last)
        x_0 = np.asarray(state.x)
        none = np.zeros((0, *x_0.shape), x_0.dtype)
        return Samples(
            x_0,
            np.stack([x_t[t] for t in record]) if record else none,
            np.stack([x_0_hat[t] for t in record]) if record else none,
            np.asarray(self._evaluations(params, state, np.int32(last), given)),
        )

    def _require_finite(self, x_0: np.ndarray) -> None:
        bad = int((~np.isfinite(x_0.reshape(len(x_0), -1)).all(axis=1)).sum())
        if bad:
            of, name = self.config.sample, self.config.sample.sampler
            options = f" with {of[name].to_dict()}" if name in of else ""
            raise RunError(
                f"{bad} of {len(x_0)} samples are not finite: config.sample.sampler = {name!r}"
                f"{options} did not converge; allow it more steps, or make each smaller"
            )

    def _begin_of(self, params: Any, given: Given) -> State:
        noise = make_noise(self.config, self.problem, given.index)
        sampler = build_sampler(self.config, self.problem, params, given)
        return sampling.start(sampler, noise(jnp.full(given.index.shape, START)))

    def _advance_of(
        self,
        params: Any,
        state: State,
        stretch: Stretch,
        count: Int[Array, ""],
        last: Int[Array, ""],
        given: Given,
    ) -> State:
        noise = make_noise(self.config, self.problem, given.index)
        sampler = build_sampler(self.config, self.problem, params, given)

        def one(i, state):
            t, *step = (jnp.full(given.index.shape, of[i]) for of in stretch)
            return sampling.advance(sampler, state, t, Step(*step), noise, last)

        return jax.lax.fori_loop(0, count, one, state)

    def _evaluations_of(
        self, params: Any, state: State, last: Int[Array, ""], given: Given
    ) -> Int[Array, "b"]:
        sampler = build_sampler(self.config, self.problem, params, given)
        found = jnp.asarray(sampler.evaluations(state.history, last), jnp.int32)
        return jnp.broadcast_to(found, given.index.shape)

    def _guided(self, levels: Levels, evaluations: np.ndarray) -> np.ndarray:
        """Evaluations where those of a guided level count twice.

        With an interval that cuts the levels they are those of a sampler that spends as many on
        each level.
        """
        if not self.problem.num_classes:
            return evaluations
        scale, interval = self.config.sample.guidance.scale, _interval(self.config)
        each = np.asarray(evaluations_at(np.float32(levels.log_snr[1:]), scale, interval))
        return np.round(evaluations * each.mean()).astype(np.int32)


def stretches(last: int, record: Sequence[int]) -> list[tuple[int, int]]:
    """(top, bottom) of runs of levels from T to 0, cut where a level is recorded.

    The step from a recorded level is a run of its own, so that its x̂_0 can be seen.

    Raises:
      ValueError: if a level to record is not one of 1 … T, or named twice.
    """
    sampling.check_record(record, last)
    cuts = {0, last, *record, *(t - 1 for t in record), *range(last, 0, -STRETCH)}
    return list(itertools.pairwise(sorted(cuts, reverse=True)))


def _tell(bar: tqdm, count: int, share: float) -> None:
    """So much of the way of so many samples."""
    bar.update(count * share)


def _cut(levels: Levels, top: int, bottom: int) -> Stretch:
    """The levels top … bottom + 1, in a stretch of the length that all have."""
    t = np.maximum(top - np.arange(STRETCH), bottom + 1)
    return Stretch(np.int32(t), np.float32(levels.log_snr[t]), np.float32(levels.gap[t]))


def to_bytes(problem: Problem, x: np.ndarray) -> np.ndarray:
    """Data values as bytes for a picture: [−1, 1] to [0, 255], clipped; one channel or three."""
    x = x if x.shape[-1] in (1, 3) else x[..., :1]
    ends = problem.quantization.values[-1]
    return np.clip(np.round((np.asarray(x) / ends + 1) * 127.5), 0, 255).astype(np.uint8)


def check(config: ConfigDict, problem: Problem) -> None:
    """Raises ConfigError for settings of `sample` that no sampler can use; compiles nothing."""
    of = config.sample
    settings.pick(SAMPLERS, of.sampler, "config.sample.sampler")
    settings.pick((*SPACINGS, "bound_optimal"), of.spacing, "config.sample.spacing")
    remedy = "give a number of levels, or 0 for all of the schedule's"
    settings.check_setting(config, "sample.num_timesteps", lambda n: n >= 0, remedy)
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
        settings.check_setting(config, f"sample.{name}", is_right, remedy)
    settings.pick(VARIANTS, of.unipc.variant, "config.sample.unipc.variant")
    settings.pick(METHODS, of.adaptive.method, "config.sample.adaptive.method")
    if of.spacing != "bound_optimal":
        for num_timesteps in needed_levels(config, problem):
            make_levels(config, problem, num_timesteps, "", 0)
    _check_classes(config, problem)


def needed_levels(config: ConfigDict, problem: Problem) -> list[int]:
    """The numbers of levels that samples and what `sample.also` names step through."""
    of = config.sample
    needed = [of.num_timesteps]
    needed += [
        of[name].num_timesteps for name in ("inpaint", "interpolate", "encode") if name in of.also
    ]
    if "sweep" in of.also:
        needed += of.sweep.num_timesteps
    return sorted({int(n) or problem.levels.num_timesteps for n in needed})


def _is_churn(share: float) -> bool:
    return 0 <= share <= 2**0.5 - 1


def _check_classes(config: ConfigDict, problem: Problem) -> None:
    """Labels and guidance are of a class-conditional model."""
    of, classes = config.sample, problem.num_classes
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
    low, high = _interval(config)
    if not low <= high:
        raise ConfigError(
            f"config.sample.guidance.min_log_snr = {low} is above max_log_snr = {high}"
        )
    check_unconditional(config, problem, of.guidance.scale != 1, "sample.guidance.scale")
    if of.guidance.scale != 1 and not classes:
        raise ConfigError(
            f"config.sample.guidance.scale = {of.guidance.scale}, but the model knows no classes; "
            "use 1, or train with config.model.class_conditional"
        )


def check_unconditional(config: ConfigDict, problem: Problem, is_used: bool, what: str) -> None:
    """Raises ConfigError if predictions without a label are used that were never trained."""
    if is_used and problem.num_classes and config.train.label_dropout == 0:
        raise ConfigError(
            f"config.{what} = {_setting(config, what)} needs predictions without a label, of which "
            "a network with config.train.label_dropout = 0 has learned nothing"
        )


def _setting(config: ConfigDict, name: str) -> Any:
    for part in name.split("."):
        config = config[part]
    return config
