"""Images to bytes and back with a trained run: `compress`, `decompress`."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Integer, UInt8, UInt32
from ml_collections import ConfigDict

from configs.settings.declaration import value_of
from diffusion.coding import ORDERS, Code, grid_spacing
from experiments.harness import checks
from experiments.harness.compression import container
from experiments.harness.compression.container import Header
from experiments.harness.compression.ledger import Ledger
from experiments.harness.compression.programs import Programs, environment
from experiments.harness.compression.stack import Stack, constriction
from experiments.harness.errors import ConfigError, RunError, in_short
from experiments.harness.processes.progress import progress
from experiments.harness.setup import analytic
from experiments.harness.setup.trained import Run
from experiments.harness.workdir.provenance import fingerprint

# The settings that a file records, so that a decoder needs none of them.
CHOICES = ("order", "num_timesteps", "spacing", "variance", "bins_per_std", "batch_size")
_RECORDED = (
    *(f"compress.{name}" for name in CHOICES),
    "analytic.levels",  # an analytic Σ_θ is a function of these three too
    "analytic.examples",
    "evaluate.labels",
)
_WRONG = (
    "the decoded images are not those that were compressed; this machine does not compute what "
    "the encoder computed"
)


class Encoded(NamedTuple):
    """Images as a stream.

    Attributes:
      words: the stream.
      num_initial: words of it that were borrowed.
      ledger: what the images take with an ideal coder; None if that was not counted.
    """

    words: UInt32[np.ndarray, "words"]
    num_initial: int
    ledger: Ledger | None


class Codec:
    """The code of a trained run: both directions, with the same compiled programs.

    Images are coded in batches, one after another on one stack of bits. The first batch borrows
    initial bits for each of its images; the next one takes them from what is on the stack.

    Attributes:
      run: the run with the Σ_θ of the code.
      levels: its levels.
      batch_size: images that are coded side by side.
      is_labelled: whether the model is given labels.
      code: its grids and conditionals.
      fingerprint: of everything that the code depends on.
      seconds: the time of the last `encode` or `decode` by part, and in total.
    """

    def __init__(self, run: Run, is_labelled: bool):
        """Traces the programs; compiles nothing.

        Args:
          run: its config says in `compress` how to code.
          is_labelled: whether the model is given labels.

        Raises:
          ConfigError: if these settings do not fit the run.
        """
        settings = run.config.compress
        self.run = run.with_variance(settings.variance)
        self.levels = run.levels(settings.num_timesteps, "compress")
        self._order, self.batch_size = ORDERS[settings.order], settings.batch_size
        self.is_labelled = is_labelled
        try:
            spacing = grid_spacing(self.levels, self._order, float(settings.bins_per_std))
        except ValueError as error:
            raise ConfigError(
                f"config.compress.num_timesteps = {settings.num_timesteps}: {error}"
            ) from error
        definition = self.run.definition
        self._programs = Programs(definition, run.params, self.levels, self.batch_size)
        if is_labelled:
            self._programs.labels = np.zeros(self.batch_size, np.int32)
        values = definition.quantization.values
        self.code = Code(self._programs.conditionals, spacing, values)
        self.fingerprint = environment(run) | {
            "levels": fingerprint(self.levels.log_snr),
            "variance": _variance_fingerprint(self.run, settings.variance),
            "program": self._programs.text_fingerprint(),
        }
        self.seconds: dict[str, float] = {}

    def encode(
        self,
        images: UInt8[np.ndarray, "n h w c"],
        labels: Int[np.ndarray, "n"] | None = None,
        has_ledger: bool = False,
    ) -> Encoded:
        """The stream of some images and of their labels, if the model is given labels."""
        stack = Stack(self.run.config.seed)
        ledger = Ledger(stack) if has_ledger else None
        with self._timed("compress", len(images), stack, ledger):
            for rows in self._batches(len(images)):
                level = images[rows].astype(np.int64)
                if ledger is not None:
                    ledger.start(len(level))
                if labels is not None:
                    self._programs.labels = labels[rows]
                self._order.push(stack if ledger is None else ledger, self.code, level)
                if labels is not None:
                    stack.push_choice(labels[rows], self._label_probs(len(level)))
            words = stack.words()
        return Encoded(words, stack.num_initial, ledger)

    def decode(
        self, words: UInt32[np.ndarray, "words"], count: int, num_initial: int, seed: int
    ) -> UInt8[np.ndarray, "n h w c"]:
        """The images of a stream.

        Args:
          words: the stream.
          count: how many images it holds.
          num_initial: words of it that were borrowed.
          seed: determines these.

        Raises:
          RunError: if the decoder does not end where the encoder began.
        """
        stack = Stack(seed, words, num_initial)
        shape = self.run.definition.image_shape
        images = np.zeros((count, *shape), np.uint8)
        with self._timed("decompress", count, stack):
            for rows in reversed(list(self._batches(count))):
                size = len(images[rows])
                if self.is_labelled:
                    self._programs.labels = stack.pop_choice(self._label_probs(size))
                images[rows] = self._order.pop(stack, self.code, (size, *shape))
        if not stack.holds_initial():
            raise RunError(_WRONG)
        return images

    def _batches(self, count: int) -> Iterator[slice]:
        for start in range(0, count, self.batch_size):
            yield slice(start, min(start + self.batch_size, count))

    def _label_probs(self, size: int) -> Float[np.ndarray, "b C"]:
        num_classes = self.run.definition.num_classes
        return np.full((size, num_classes), 1 / num_classes, np.float32)

    @contextmanager
    def _timed(
        self, description: str, count: int, stack: Stack, ledger: Ledger | None = None
    ) -> Iterator[None]:
        """In the body a bar counts network evaluations; after it `seconds` has the times."""
        parts, start = self._programs.seconds, time.perf_counter()
        parts.update(dict.fromkeys(parts, 0.0))
        total = count * self.levels.num_timesteps
        with progress(total, description, "eval", unit_scale=True) as self._programs.bar:
            yield
        counted = 0.0 if ledger is None else ledger.seconds
        spent = time.perf_counter() - start - parts["compilation"] - counted
        self.seconds = {**parts, "coder": stack.seconds, "total": spent}


def compress(
    run: Run,
    images: Integer[np.ndarray, "n h w c"],
    labels: Int[np.ndarray, "n"] | None = None,
) -> bytes:
    """Compresses images without loss, by the settings `compress` of the run's config.

    Args:
      run: a trained run.
      images: grey levels, in the shape that the run was trained on.
      labels: of a class-conditional model; None: none, and the model gets none.

    Returns:
      The content of a file, which `decompress` needs the same run for.

    Raises:
      ConfigError: if the images or the settings do not fit the run.
      RunError: if the decoded file differs, which is tested unless `compress.verify` is False.
    """
    check_images(run, images, labels)
    codec = Codec(run, labels is not None)
    encoded = codec.encode(images, labels)
    content = to_bytes(codec, encoded, images)
    if run.config.compress.verify:
        verify(codec, encoded, images)
    return content


def to_bytes(codec: Codec, encoded: Encoded, images: UInt8[np.ndarray, "n h w c"]) -> bytes:
    """The content of a file."""
    config = codec.run.config
    return container.pack(
        Header(
            count=len(images),
            shape=images.shape[1:],
            num_levels=codec.run.definition.quantization.num_levels,
            pixels=container.pixel_checksum(images),
            seed=config.seed,
            num_initial=encoded.num_initial,
            is_labelled=codec.is_labelled,
            settings={name: value_of(config, name) for name in _RECORDED},
            fingerprint=codec.fingerprint,
        ),
        encoded.words,
    )


def verify(codec: Codec, encoded: Encoded, images: UInt8[np.ndarray, "n h w c"]) -> None:
    """Decodes a stream; raises RunError unless it holds these images."""
    seed = codec.run.config.seed
    decoded = codec.decode(encoded.words, len(images), encoded.num_initial, seed)
    if not np.array_equal(decoded, images):
        raise RunError(_WRONG)


def decompress(
    run: Run, content: bytes, name: str = "the compressed file"
) -> UInt8[np.ndarray, "n h w c"]:
    """The images of a compressed file.

    Args:
      run: the run that compressed it. The file says by which settings.
      content: of the file.
      name: of the file, for error messages.

    Raises:
      ConfigError: if the file is damaged, or of another run, machine or version of a package.
      RunError: if the images are not those that were compressed.
    """
    header, words = container.unpack(content, name)
    definition = run.definition
    here = definition.image_shape, definition.quantization.num_levels
    if (header.shape, header.num_levels) != here:
        raise ConfigError(
            f"{name} holds images of shape {header.shape} with {header.num_levels} grey levels; "
            f"this run has {here[0]} with {here[1]}"
        )
    constriction()
    _compare(header.fingerprint, environment(run), name)
    run = run._replace(config=_settings_of(header, run.config, name))
    codec = Codec(run, header.is_labelled)
    _compare(header.fingerprint, codec.fingerprint, name)
    images = codec.decode(words, header.count, header.num_initial, header.seed)
    if container.pixel_checksum(images) != header.pixels:
        raise RunError(f"{name}: {_WRONG}")
    return images


def check_images(
    run: Run, images: Integer[np.ndarray, "n h w c"], labels: Int[np.ndarray, "n"] | None
) -> None:
    """Raises ConfigError unless a run can compress these images."""
    shape, num_levels = run.definition.image_shape, run.definition.quantization.num_levels
    if images.dtype != np.uint8 or images.shape[1:] != shape or not len(images):
        raise ConfigError(
            f"the images are {images.dtype} of shape {images.shape}; this run compresses uint8 of "
            f"shape (n, {', '.join(map(str, shape))}) with n ≥ 1"
        )
    if images.max() >= num_levels:
        raise ConfigError(
            f"the images have the grey level {images.max()}; this run has the levels 0 to "
            f"{num_levels - 1}"
        )
    if labels is not None and not run.definition.num_classes:
        raise ConfigError("the images have labels, and this run's model takes none")


def _settings_of(header: Header, config: ConfigDict, name: str) -> ConfigDict:
    """The config with the settings that a file records."""
    config = config.copy_and_resolve_references().unlock()
    config.seed = header.seed
    try:
        config.update_from_flattened_dict({key: header.settings[key] for key in _RECORDED})
        checks.check(config, "compress")
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{name} has settings of another version: {in_short(error)}") from error
    return config.lock()


def _compare(recorded: dict[str, str], here: dict[str, str], name: str) -> None:
    """Raises ConfigError where a fingerprint differs from the one here."""
    for key, value in here.items():
        if recorded.get(key) != value:
            raise ConfigError(
                f"{name} was compressed with {key} {recorded.get(key)!r}, and here it is {value!r};"
                " a decoder must compute exactly what the encoder computed"
            )


def _variance_fingerprint(run: Run, name: str) -> str:
    """Σ_θ by name, with the fingerprint of the errors if it was computed from these."""
    name = name or run.config.model.variance
    is_measured = name in analytic.ANALYTIC
    return f"{name} {fingerprint(*run.measured_errors())}" if is_measured else name
