"""Draws samples in batches. A sampler is compiled once, for any levels and recorded frames."""

import functools
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion.forward import Noise, example_noise
from diffusion.samplers import base
from diffusion.samplers.base import Sampler, Samples, State
from diffusion.samplers.guidance import evaluations_at
from diffusion.schedules import Levels, Step
from experiments.harness import devices, seeds
from experiments.harness.data.order import padded_batches
from experiments.harness.errors import RunError
from experiments.harness.pictures.images import grid, save_png, strip
from experiments.harness.pictures.plots import plot_points
from experiments.harness.processes import cores, distributed
from experiments.harness.processes.progress import progress
from experiments.harness.processes.shared_programs import share
from experiments.harness.sampling.sampler import Inputs, build_sampler, guidance_interval
from experiments.harness.setup.definition import ModelDefinition

START = 2**31 - 1  # the number of the noise that is x_T, the same at any T
FAR = 3.0  # samples beyond this many times the largest data value are remarked on
STRETCH = 16  # largest number of levels between two updates of the progress bar


class Stretch(NamedTuple):
    """Successive levels of the reverse process, padded with repeats of the last.

    Attributes:
      t: the levels, falling.
      log_snr: λ_t.
      gap: λ_{t−1} − λ_t.
    """

    t: Int[Array, "n"]
    log_snr: Float[Array, "n"]
    gap: Float[Array, "n"]


class Fixed(NamedTuple):
    """The inputs that all batches have in common.

    Attributes:
      params: the networks' parameters.
      root: the key of the seed.
    """

    params: Any
    root: seeds.Root


class Drawer:
    """Draws samples with a config's sampler.

    Compiled once, on first use: the number of levels, their spacing, the recorded levels and the
    seed are arguments. Memory does not grow with the number of steps.
    """

    def __init__(self, config: ConfigDict, definition: ModelDefinition):
        self.config, self.definition = config, definition
        mesh = devices.mesh()
        whole, split = devices.replicated(mesh), devices.split_batch(mesh)
        self._whole, self._split = whole, split
        self._begin = share(
            jax.jit(self._first_state, in_shardings=(whole, split), out_shardings=split)
        )
        self._advance = share(
            jax.jit(
                self._run_stretch,
                in_shardings=(whole, split, whole, whole, whole, split),
                out_shardings=split,
                donate_argnums=1,
            )
        )
        self._evaluations = share(jax.jit(self._count_evaluations))

    def __call__(
        self,
        params: Any,
        levels: Levels,
        n: int,
        record: Sequence[int] = (),
        rows: int = 0,
        make_inputs: Callable[[np.ndarray], Inputs] | None = None,
    ) -> Samples:
        """Draws samples 0 … n − 1 in batches of `sample.batch_size`.

        Args:
          params: the networks' parameters.
          levels: the levels to step through.
          n: the number of samples.
          record: levels whose x_t and x̂_0 are returned, in this order.
          rows: the number of samples of which they are returned, the first ones.
          make_inputs: sample numbers [b] -> the inputs of a batch; None for `inputs`.

        Returns:
          Host arrays.

        Raises:
          RunError: if a sample is not finite.
          ValueError: if a level to record is not in 1 … T, or is repeated.
        """
        make_inputs = make_inputs or self.inputs
        fixed = devices.place(Fixed(params, seeds.root(self.config.seed)), self._whole)
        x_0, evaluations, x_t, x_0_hat = [], [], [], []
        with progress(n, "sample", "img", delay=2, leave=False, unit_scale=True) as bar:
            for index, mask in padded_batches(n, self.config.sample.batch_size):
                recorded, count = int((mask & (index < rows)).sum()), int(mask.sum())
                batch = self._batch(
                    fixed,
                    levels,
                    make_inputs(index),
                    record if recorded else (),
                    recorded,
                    lambda share, count=count: bar.update(count * share),
                )
                self._require_finite(batch.x_0[mask])
                x_0.append(batch.x_0[mask])
                evaluations.append(batch.evaluations[mask])
                if recorded:
                    x_t.append(batch.x_t)
                    x_0_hat.append(batch.x_0_hat)
        x_0 = np.concatenate(x_0)
        self._say_if_far(x_0, levels.num_timesteps)
        nothing = np.zeros((len(record), 0, *x_0.shape[1:]), x_0.dtype)
        frames = (np.concatenate([nothing, *parts], axis=1) for parts in (x_t, x_0_hat))
        return Samples(x_0, *frames, self._with_guidance(levels, np.concatenate(evaluations)))

    def inputs(self, index: np.ndarray) -> Inputs:
        """Noise, and for a class-conditional model the classes of `sample.labels` in turn."""
        if not self.definition.num_classes:
            return Inputs(index)
        labels = np.array(self.config.sample.labels or range(self.definition.num_classes), np.int32)
        return Inputs(index, labels[index % len(labels)])

    def _batch(
        self,
        fixed: Fixed,
        levels: Levels,
        inputs: Inputs,
        record: Sequence[int],
        rows: int,
        report: Callable[[float], Any],
    ) -> Samples:
        """One batch. After each stretch `report` is called with its share of the levels."""
        last = levels.num_timesteps
        parts = [
            devices.place(jax.tree.map(lambda a, part=part: a[part], inputs), self._split)
            for part in cores.batch_parts(len(inputs.index))
        ]

        def advance(stretch: Stretch, count: int, state: State, inputs: Inputs) -> State:
            state = self._advance(fixed, state, stretch, np.int32(count), np.int32(last), inputs)
            return jax.block_until_ready(state)

        states = [self._begin(fixed, part) for part in parts]
        x_t, x_0_hat = {}, {}
        for top, bottom in stretches(last, record):
            if top in record:
                x_t[top] = _joined(state.x[:rows] for state in states)[:rows]
            step = functools.partial(advance, _cut(levels, top, bottom), top - bottom)
            states = cores.at_once(step, states, parts)
            if top in record:
                x_0_hat[top] = _joined(state.x_0_hat[:rows] for state in states)[:rows]
            report((top - bottom) / last)
        x_0 = _joined(state.x for state in states)
        nothing = np.zeros((0, rows, *x_0.shape[1:]), x_0.dtype)
        evaluations = cores.at_once(
            lambda *part: self._evaluations(fixed, part[0], np.int32(last), part[1]), states, parts
        )
        return Samples(
            x_0,
            np.stack([x_t[t] for t in record]) if record else nothing,
            np.stack([x_0_hat[t] for t in record]) if record else nothing,
            _joined(evaluations),
        )

    def _require_finite(self, x_0: np.ndarray) -> None:
        bad = int((~np.isfinite(x_0.reshape(len(x_0), -1)).all(axis=1)).sum())
        if bad:
            settings, name = self.config.sample, self.config.sample.sampler
            options = f" with {settings[name].to_dict()}" if name in settings else ""
            raise RunError(
                f"{bad} of {len(x_0)} samples are not finite: config.sample.sampler = {name!r}"
                f"{options} did not converge; allow it more steps, or make each smaller"
            )

    def _say_if_far(self, x_0: np.ndarray, num_timesteps: int) -> None:
        settings, predicted = self.config.sample, self.definition.parameterization
        if not (distributed.is_first() and (excess := far_from_data(self.definition, x_0))):
            return
        remedies = ["take more levels"]
        if settings.x_0_treatment == "none":
            remedies.append("set config.sample.x_0_treatment to 'clip' or 'dynamic'")
        if predicted not in ("v", "x_0"):
            remedies.append(
                f"train with config.model.parameterization = 'v' (it is {predicted!r} now)"
            )
        tqdm.write(
            f"warning: samples by {settings.sampler} at {num_timesteps} levels {excess}; "
            f"{', or '.join(remedies)}"
        )

    def _noise(self, fixed: Fixed, inputs: Inputs) -> Noise:
        """The noise of samples, a function of (seed, index, number)."""
        root = seeds.stream(fixed.root, "sample")
        return example_noise(root, inputs.index, self.definition.image_shape)

    def _sampler(self, fixed: Fixed, inputs: Inputs) -> Sampler:
        return build_sampler(self.config, self.definition, fixed.params, inputs)

    def _first_state(self, fixed: Fixed, inputs: Inputs) -> State:
        noise, sampler = self._noise(fixed, inputs), self._sampler(fixed, inputs)
        return base.start(sampler, noise(jnp.full(inputs.index.shape, START)))

    def _run_stretch(
        self,
        fixed: Fixed,
        state: State,
        stretch: Stretch,
        count: Int[Array, ""],
        last: Int[Array, ""],
        inputs: Inputs,
    ) -> State:
        noise, sampler = self._noise(fixed, inputs), self._sampler(fixed, inputs)

        def one(i, state):
            t, *step = (jnp.full(inputs.index.shape, values[i]) for values in stretch)
            return base.advance(sampler, state, t, Step(*step), noise, last)

        return jax.lax.fori_loop(0, count, one, state)

    def _count_evaluations(
        self, fixed: Fixed, state: State, last: Int[Array, ""], inputs: Inputs
    ) -> Int[Array, "b"]:
        sampler = self._sampler(fixed, inputs)
        evaluations = jnp.asarray(sampler.evaluations(state.history, last), jnp.int32)
        return jnp.broadcast_to(evaluations, inputs.index.shape)

    def _with_guidance(self, levels: Levels, evaluations: np.ndarray) -> np.ndarray:
        """Counts the evaluations of a guided level twice.

        If only some levels are guided, this assumes the same number of evaluations for each level.
        """
        if not self.definition.num_classes:
            return evaluations
        scale, interval = self.config.sample.guidance.scale, guidance_interval(self.config)
        each = np.asarray(evaluations_at(np.float32(levels.log_snr[1:]), scale, interval))
        return np.round(evaluations * each.mean()).astype(np.int32)


def stretches(last: int, record: Sequence[int]) -> list[tuple[int, int]]:
    """(top, bottom) of stretches of levels from T down to 0, at most STRETCH long.

    The step from a recorded level is a stretch of its own, so that its x̂_0 can be read.

    Raises:
      ValueError: if a level to record is not in 1 … T, or is repeated.
    """
    base.check_record(record, last)
    cuts = {0, last, *record, *(t - 1 for t in record), *range(last, 0, -STRETCH)}
    return list(itertools.pairwise(sorted(cuts, reverse=True)))


def _joined(parts: Iterable[jax.Array]) -> np.ndarray:
    """The parts of a batch as one array of the host."""
    return np.concatenate([devices.gather(part) for part in parts])


def _cut(levels: Levels, top: int, bottom: int) -> Stretch:
    """The levels top … bottom + 1, padded to STRETCH."""
    t = np.maximum(top - np.arange(STRETCH), bottom + 1)
    return Stretch(np.int32(t), np.float32(levels.log_snr[t]), np.float32(levels.gap[t]))


def far_from_data(definition: ModelDefinition, x: np.ndarray) -> str:
    """How far values lie outside the data's range, in words; empty if at most FAR times as far."""
    if definition.quantization is None:  # continuous data have no ends
        return ""
    largest, end = float(np.abs(x).max(initial=0.0)), definition.quantization.values[-1]
    if largest <= FAR * end:
        return ""
    return f"reach {largest:,.4g} where data end at ±{end:.4g} ({np.mean(abs(x) > end):.1%} beyond)"


def to_grey_levels(definition: ModelDefinition, x_0: Float[np.ndarray, "*b"]) -> np.ndarray:
    """Samples in data units as uint8 grey levels, each value rounded to the nearest.

    Samples of continuous data are returned as they are.
    """
    if definition.quantization is None:
        return np.asarray(x_0)
    return np.asarray(definition.quantization.to_level(x_0), np.uint8)


def to_bytes(definition: ModelDefinition, x: np.ndarray) -> np.ndarray:
    """Data in [−1, 1] as bytes for a picture, clipped; one channel or three."""
    x = x if x.shape[-1] in (1, 3) else x[..., :1]
    ends = 1.0 if definition.quantization is None else definition.quantization.values[-1]
    return np.clip(np.round((np.asarray(x) / ends + 1) * 127.5), 0, 255).astype(np.uint8)


def save_strip(
    path: epath.Path,
    definition: ModelDefinition,
    frames: Float[np.ndarray, "k n *d"],
    captions: Sequence[str],
) -> None:
    """Writes a PNG file with a row for each of n examples and a column for each of k frames.

    Examples that are no images are drawn as points, those of a frame together.
    """
    if definition.are_images:
        save_png(path, strip(to_bytes(definition, frames), captions))
    else:
        plot_points(path, frames.reshape(*frames.shape[:2], -1), captions)


def save_grid(
    path: epath.Path, definition: ModelDefinition, x_0: Float[np.ndarray, "n *d"]
) -> None:
    """Writes a PNG file of samples, as a table of images or as points."""
    if definition.are_images:
        save_png(path, grid(to_bytes(definition, x_0)))
    else:
        save_strip(path, definition, x_0[None], [f"{len(x_0)} samples"])


def strip_rows(config: ConfigDict, definition: ModelDefinition) -> int:
    """The number of samples in a picture of x_t on its way; as points, all of them."""
    return config.sample.strip_rows if definition.are_images else config.sample.num_samples
