"""Images as a file at the rate of the bound, and back: lossless compression with a trained run."""

from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float
from ml_collections import ConfigDict

from diffusion.coding import ORDERS, peak_debt
from diffusion.statistics.standard_errors import bits_per_dim
from experiments.harness import checks, devices, memory
from experiments.harness.compression import codec as coding
from experiments.harness.compression import container, general
from experiments.harness.compression.codec import Codec, Encoded
from experiments.harness.compression.stack import constriction
from experiments.harness.data import splits
from experiments.harness.data.sources.folder import pictures
from experiments.harness.data.splits import Dataset
from experiments.harness.errors import ConfigError
from experiments.harness.evaluation.full_bound import full_bound
from experiments.harness.evaluation.subject import subject_of
from experiments.harness.setup import trained
from experiments.harness.setup.definition import check_levels, define_model, require_grey_levels
from experiments.harness.setup.trained import Run
from experiments.harness.workdir.files import replace, write_json, write_npz

DIRECTORY = "compressed"  # of the work directory
ENDING = ".dlvm"
WORD = 32  # bits


def run(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Compresses a split or a folder and prints a report; or decompresses a file."""
    if config.compress.decompress:
        path, images = decompress(config, workdir)
        print(
            f"{path}: {len(images)} images of shape {images.shape[1:]}, with the checksum of "
            "those that were compressed"
        )
    else:
        print(to_markdown(compress(config, workdir)))


def decompress(config: ConfigDict, workdir: epath.PathLike) -> tuple[epath.Path, np.ndarray]:
    """Decodes the file `compress.decompress` to a .npz file beside it.

    Returns:
      The path of that file, and its array `images`.

    Raises:
      ConfigError: if the file is damaged, or of another run or machine; nothing is written.
    """
    check(config)
    path = epath.Path(config.compress.decompress)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"config.compress.decompress = {str(path)!r} cannot be read ({error.strerror})"
        ) from error
    container.unpack(content, str(path))  # raises before the checkpoint is read
    loaded = trained.load(config, workdir, config.compress.checkpoint, writes=False)
    images = coding.decompress(loaded, content, str(path))
    target = path.with_suffix(".npz")
    write_npz(target, images=images)
    return target, images


def compress(config: ConfigDict, workdir: epath.PathLike) -> dict[str, Any]:
    """Compresses images to compressed/NAME.dlvm, with a report in NAME.json and NAME.md beside it.

    The file is decoded and compared before it gets its name, unless `compress.verify` is False.

    Args:
      config: `compress` says what and how.
      workdir: holds the checkpoints.

    Returns:
      The report: lengths in bits/dim, and times.

    Raises:
      ConfigError: for settings, images or a checkpoint that do not fit.
      RunError: if the decoded file differs.
    """
    check(config)
    loaded = trained.load(config, workdir, config.compress.checkpoint)
    dataset = _dataset(config, loaded)
    coding.check_images(loaded, dataset.images, dataset.labels)
    codec = Codec(loaded, dataset.labels is not None)
    encoded = codec.encode(dataset.images, dataset.labels, has_ledger=True)
    seconds = {"encoding": codec.seconds}
    content = coding.to_bytes(codec, encoded, dataset.images)
    if config.compress.verify:
        coding.verify(codec, encoded, dataset.images)
        seconds["decoding"] = codec.seconds
    directory = epath.Path(workdir) / DIRECTORY
    directory.mkdir(exist_ok=True)
    stem = directory / (epath.Path(config.compress.images).name or config.compress.split)
    replace(stem.with_suffix(ENDING), content)
    report = {
        "file": str(stem.with_suffix(ENDING)),
        "is_verified": config.compress.verify,
        "num_images": len(dataset.images),
        "image_shape": dataset.images.shape[1:],
        "step": loaded.step,
        **{name: config.compress[name] for name in coding.CHOICES},
        "variance": config.compress.variance or config.model.variance,
        **_lengths(codec, encoded, content, dataset),
        "general": {name: size._asdict() for name, size in general.sizes(dataset.images).items()},
        "seconds": seconds,
    }
    write_json(stem.with_suffix(".json"), report)
    replace(stem.with_suffix(".md"), (to_markdown(report) + "\n").encode())
    return report


def check(config: ConfigDict) -> None:
    """Raises ConfigError for settings or data that `compress` can't use; compiles nothing."""
    constriction()
    checks.check(config, "compress")
    definition = define_model(config)
    require_grey_levels(definition, "data.name", config.data.name, "it has no lossless code")
    memory.check_memory(config, definition.image_shape, "compress")
    for setting in ("compress.batch_size", "evaluate.batch_size"):
        section, name = setting.split(".")
        devices.check_batch(f"config.{setting}", config[section][name])
    check_levels(config, definition, "compress.num_timesteps")
    if not config.compress.images:
        splits.check_split(config, config.compress.split)


def _dataset(config: ConfigDict, loaded: Run) -> Dataset:
    """The images to compress."""
    settings, definition = config.compress, loaded.definition
    if settings.images:
        images = pictures(settings.images, definition.image_shape, settings.num_images)
        num_levels = definition.quantization.num_levels
        return Dataset(images, None, num_levels, "folder", settings.images)
    choose = splits.first(settings.num_images) if settings.num_images else None
    return splits.load_measured(config, settings.split, choose)


def _lengths(codec: Codec, encoded: Encoded, content: bytes, dataset: Dataset) -> dict[str, Any]:
    """What the file takes, by cause, and the bound on the same examples, in bits/dim.

    Net is the stream without initial bits and labels. It is the sum of the trajectories' log-ratios
    and of what the grids and the coder add.
    """
    images, spacing = dataset.images, codec.code.spacing
    num_dims = int(np.prod(images.shape[1:]))
    stream, initial = len(encoded.words), encoded.num_initial
    num_classes = codec.run.definition.num_classes if codec.is_labelled else 1
    labels = np.log2(num_classes) / num_dims

    def per_dim(bits):
        return bits / images.size

    trajectories = bits_per_dim(encoded.ledger.density, num_dims)
    grids = bits_per_dim(encoded.ledger.bins, num_dims)
    net = per_dim(WORD * (stream - initial)) - labels
    bound = bits_per_dim(_bound(codec, dataset), num_dims)
    excess = trajectories - bound
    return {
        "total": per_dim(8 * len(content)),
        "header": per_dim(8 * container.header_size(content)),
        "initial": per_dim(WORD * initial),
        "labels": labels,
        "net": net,
        "trajectories": trajectories.mean(),
        "grid": (grids - trajectories).mean(),
        "coder": net - grids.mean(),
        "bound": bound.mean(),
        "bound_se": _se(bound),
        "net_minus_bound": net - bound.mean(),
        "net_minus_bound_se": _se(excess),
        "initial_per_image": WORD * initial / (num_dims * min(len(images), codec.batch_size)),
        "peak_debt": peak_debt(codec.levels, ORDERS[codec.run.config.compress.order], spacing),
    }


def _se(values: Float[np.ndarray, "n"]) -> float | None:
    """The standard error of a mean; None of a single value."""
    return values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else None


def _bound(codec: Codec, dataset: Dataset) -> Float[np.ndarray, "n"]:
    """The bound of each image at the levels and the Σ_θ of the code, in nats."""
    config = codec.run.config
    definition = codec.run.definition._replace(levels=codec.levels)
    subject = subject_of(config, definition, codec.run.params, dataset)
    return full_bound(subject, config.evaluate.replicates)[0].total


def to_markdown(report: dict[str, Any]) -> str:
    """The report as text with three tables: lengths, general coders, times."""
    shape = "×".join(map(str, report["image_shape"]))
    verified = "decoded and compared" if report["is_verified"] else "not decoded"
    head = (
        f"{report['file']}: {report['num_images']} images of {shape}, {report['order']}, "
        f"T = {report['num_timesteps']}, {report['spacing']} levels, Σ_θ {report['variance']}; "
        f"{verified}"
    )
    se = "" if report["bound_se"] is None else f" ± {report['bound_se']:.4f}"
    excess_se = report["net_minus_bound_se"]
    paired = "" if excess_se is None else f" ± {excess_se:.4f}"
    lengths = [
        ("the file", f"{report['total']:.4f}"),
        ("header and checksum", f"{report['header']:.4f}"),
        ("initial bits", f"{report['initial']:.4f}"),
        *([("labels", f"{report['labels']:.4f}")] if report["labels"] else []),
        ("**net**", f"**{report['net']:.4f}**"),
        ("log-ratios of the trajectories drawn", f"{report['trajectories']:.4f}"),
        ("grids add", f"{report['grid']:+.4f}"),
        ("the coder adds", f"{report['coder']:+.4f}"),
        ("the bound on the same images", f"{report['bound']:.4f}{se}"),
        ("net − bound (paired error)", f"{report['net_minus_bound']:+.4f}{paired}"),
        ("initial bits of an image", f"{report['initial_per_image']:.2f}"),
        ("peak debt of the grids", f"{report['peak_debt']:.2f}"),
    ]
    general = [
        (name, f"{size['apart']:.4f}", f"{size['together']:.4f}")
        for name, size in report["general"].items()
    ]
    parts = ("network", "q", "coder", "transfers", "total")
    times = [
        (
            name,
            *(f"{seconds[part]:.2f}" for part in parts),
            f"{seconds['total'] / seconds['network']:.2f}",
        )
        for name, seconds in report["seconds"].items()
    ]
    return "\n\n".join(
        [
            head,
            _table(("", "bits/dim"), lengths),
            _table(("general coder", "image by image", "all together"), general),
            _table(("seconds", *parts, "total / network"), times),
        ]
    )


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
