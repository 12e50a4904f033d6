"""Samples in batches: one compiled program a sampler, whatever the levels and what is recorded."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion.forward import Noise, example_noise
from diffusion.samplers import base
from diffusion.samplers.base import Samples, State
from diffusion.samplers.guidance import evaluations_at
from diffusion.schedules import Levels, Step
from experiments.harness import devices
from experiments.harness.data import order
from experiments.harness.errors import RunError
from experiments.harness.processes.progress import progress
from experiments.harness.sampling.sampler import Given, build_sampler, guidance_interval
from experiments.harness.seeds import stream
from experiments.harness.setup.definition import ModelDefinition

START = 2**31 - 1  # the number of the noise that is x_T: one and the same at any T
STRETCH = 16  # levels that are stepped through between two looks at the progress bar


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


def make_noise(config: ConfigDict, definition: ModelDefinition, index: Int[Array, "b"]) -> Noise:
    """The noise of samples, a function of (seed, index, number)."""
    return example_noise(stream(config.seed, "sample"), index, definition.image_shape)


class Drawer:
    """Draws samples with a config's sampler.

    Compiled on first use, once: the number of levels, their spacing and what is recorded are
    arguments. Memory does not grow with the number of steps.
    """

    def __init__(self, config: ConfigDict, definition: ModelDefinition):
        self.config, self.definition = config, definition
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
            for index, mask in order.padded_batches(n, self.config.sample.batch_size):
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
        if not self.definition.num_classes:
            return Given(index)
        labels = np.array(self.config.sample.labels or range(self.definition.num_classes), np.int32)
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
                x_t[top] = devices.gather(state.x[:rows])
            stretch, count = _cut(levels, top, bottom), np.int32(top - bottom)
            state = self._advance(params, state, stretch, count, np.int32(last), given)
            if top in record:
                x_0_hat[top] = devices.gather(state.x_0_hat[:rows])
            jax.block_until_ready(state.x)
            tell((top - bottom) / last)
        x_0 = devices.gather(state.x)
        none = np.zeros((0, *x_0.shape), x_0.dtype)
        return Samples(
            x_0,
            np.stack([x_t[t] for t in record]) if record else none,
            np.stack([x_0_hat[t] for t in record]) if record else none,
            devices.gather(self._evaluations(params, state, np.int32(last), given)),
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
        noise = make_noise(self.config, self.definition, given.index)
        sampler = build_sampler(self.config, self.definition, params, given)
        return base.start(sampler, noise(jnp.full(given.index.shape, START)))

    def _advance_of(
        self,
        params: Any,
        state: State,
        stretch: Stretch,
        count: Int[Array, ""],
        last: Int[Array, ""],
        given: Given,
    ) -> State:
        noise = make_noise(self.config, self.definition, given.index)
        sampler = build_sampler(self.config, self.definition, params, given)

        def one(i, state):
            t, *step = (jnp.full(given.index.shape, of[i]) for of in stretch)
            return base.advance(sampler, state, t, Step(*step), noise, last)

        return jax.lax.fori_loop(0, count, one, state)

    def _evaluations_of(
        self, params: Any, state: State, last: Int[Array, ""], given: Given
    ) -> Int[Array, "b"]:
        sampler = build_sampler(self.config, self.definition, params, given)
        found = jnp.asarray(sampler.evaluations(state.history, last), jnp.int32)
        return jnp.broadcast_to(found, given.index.shape)

    def _guided(self, levels: Levels, evaluations: np.ndarray) -> np.ndarray:
        """Evaluations where those of a guided level count twice.

        With an interval that cuts the levels they are those of a sampler that spends as many on
        each level.
        """
        if not self.definition.num_classes:
            return evaluations
        scale, interval = self.config.sample.guidance.scale, guidance_interval(self.config)
        each = np.asarray(evaluations_at(np.float32(levels.log_snr[1:]), scale, interval))
        return np.round(evaluations * each.mean()).astype(np.int32)


def stretches(last: int, record: Sequence[int]) -> list[tuple[int, int]]:
    """(top, bottom) of runs of levels from T to 0, cut where a level is recorded.

    The step from a recorded level is a run of its own, so that its x̂_0 can be seen.

    Raises:
      ValueError: if a level to record is not one of 1 … T, or named twice.
    """
    base.check_record(record, last)
    cuts = {0, last, *record, *(t - 1 for t in record), *range(last, 0, -STRETCH)}
    return list(itertools.pairwise(sorted(cuts, reverse=True)))


def _tell(bar: tqdm, count: int, share: float) -> None:
    """So much of the way of so many samples."""
    bar.update(count * share)


def _cut(levels: Levels, top: int, bottom: int) -> Stretch:
    """The levels top … bottom + 1, in a stretch of the length that all have."""
    t = np.maximum(top - np.arange(STRETCH), bottom + 1)
    return Stretch(np.int32(t), np.float32(levels.log_snr[t]), np.float32(levels.gap[t]))


def to_bytes(definition: ModelDefinition, x: np.ndarray) -> np.ndarray:
    """Data values as bytes for a picture: [−1, 1] to [0, 255], clipped; one channel or three."""
    x = x if x.shape[-1] in (1, 3) else x[..., :1]
    ends = definition.quantization.values[-1]
    return np.clip(np.round((np.asarray(x) / ends + 1) * 127.5), 0, 255).astype(np.uint8)
