"""Data sets and work directories that no run can use, for `tests.stress.inputs`."""

import gzip
import os
import pathlib
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

Make = Callable[[pathlib.Path], Any]
_SPLITS = ("train", "validation", "test")


def images(*shape: int) -> np.ndarray:
    """Random grey levels."""
    return np.random.default_rng(0).integers(0, 256, shape, np.uint8)


def arrays(*, only: str | None = None, **changed: Any) -> Make:
    """Three .npz files of 24 images; `changed` arrays in all of them, or in `only` one.

    None leaves an array out.
    """

    def make(here: pathlib.Path) -> None:
        here.mkdir(exist_ok=True)
        for split in _SPLITS:
            content = {"images": images(24, 8, 8, 1), "labels": np.arange(24) % 3}
            content |= changed if only in (None, split) else {}
            np.savez(here / f"{split}.npz", **{k: v for k, v in content.items() if v is not None})

    return make


def idx_files(name: str | None = None, content: bytes | None = None, **shapes: Any) -> Make:
    """MNIST's four files of 24 images; one of them with other bytes, or with none (None)."""

    def make(here: pathlib.Path) -> None:
        here.mkdir(exist_ok=True)
        for stem in ("train", "t10k"):
            files = {
                f"{stem}-images-idx3-ubyte": idx_bytes(images(24, 8, 8)),
                f"{stem}-labels-idx1-ubyte": idx_bytes(np.uint8(np.arange(24) % 3)),
            }
            for file, written in files.items():
                (here / file).write_bytes(written)
        if name:
            (here / name.removesuffix(".gz")).unlink()
        if name and content is not None:
            (here / name).write_bytes(content)

    return make


def idx_bytes(array: np.ndarray, shape: tuple[int, ...] | None = None, kind: int = 8) -> bytes:
    """An array in MNIST's format; its header may tell another shape or type."""
    shape = array.shape if shape is None else shape
    return struct.pack(f">4B{len(shape)}I", 0, 0, kind, len(shape), *shape) + array.tobytes()


def pictures(*, without: str = "", **files: Any) -> Make:
    """Folders train, validation and test of 12 images each.

    Args:
      without: a split that is left out.
      files: what is written besides, as train/bad.png, by names with __ for /, and with _ for the
        last dot: bytes, or a function of the path.
    """

    def make(here: pathlib.Path) -> None:
        for split in set(_SPLITS) - {without}:
            (here / split).mkdir(parents=True)
            for number in range(12):
                (here / split / f"{number}.png").write_bytes(png(images(8, 8, 3)))
        for name, content in files.items():
            path = here / ".".join(name.replace("__", "/").rsplit("_", 1))
            path.parent.mkdir(parents=True, exist_ok=True)
            content(path) if callable(content) else path.write_bytes(content)

    return make


def png(
    pixels: np.ndarray, size: tuple[int, int] | None = None, depth: int = 8, colour: int = 2
) -> bytes:
    """A PNG of these pixels, whose header may tell another size, depth or kind of colour."""
    width, height = size or pixels.shape[1::-1]
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">2I5B", width, height, depth, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def header(shape: tuple[int, ...], dtype: str = "|u1") -> bytes:
    """The beginning of a .npy file."""
    text = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}"
    text = text.ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


def archive(images_npy: bytes, num_zeros: int = 0, name: str = "images.npy") -> Make:
    """One file of arrays with these bytes for the images, and zeros after them, compressed."""

    def make(here: pathlib.Path) -> None:
        with (
            zipfile.ZipFile(here, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
            file.open(name, "w", force_zip64=True) as member,
        ):
            member.write(images_npy)
            for _ in range(num_zeros // 2**20):
                member.write(bytes(2**20))

    return make


def zeros_gz(header: bytes, num_zeros: int) -> bytes:
    """Zeros after a header, gzipped."""
    packed = zlib.compressobj(1, zlib.DEFLATED, 31)
    content = packed.compress(header)
    for _ in range(num_zeros // 2**20):
        content += packed.compress(bytes(2**20))
    return content + packed.flush()


def one_file(content: bytes) -> Make:
    return lambda here: here.write_bytes(content)


def each(make: Make, *changes: Make) -> Make:
    """Several changes one after another."""

    def make_all(here: pathlib.Path) -> None:
        for one in (make, *changes):
            one(here)

    return make_all


def replaced(name: str, content: bytes | str | None) -> Make:
    """A file of a directory with other bytes; as a named pipe ("pipe") or a directory (None)."""

    def make(here: pathlib.Path) -> None:
        path = here / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        if content == "pipe":
            os.mkfifo(path)
        elif content is None:
            path.mkdir()
        else:
            path.write_bytes(content)

    return make


def truncated(name: str, share: float = 0.5) -> Make:
    """A file of a directory without its end."""

    def make(here: pathlib.Path) -> None:
        content = (here / name).read_bytes()
        (here / name).write_bytes(content[: int(share * len(content))])

    return make


def _two_spellings(ending: str) -> Make:
    """Validation as `val` and as `valid`."""

    def make(here: pathlib.Path) -> None:
        (here / f"validation{ending}").rename(here / f"val{ending}")
        (here / f"valid{ending}").symlink_to(here / f"val{ending}")

    return make


def gzipped(content: bytes) -> bytes:
    return gzip.compress(content)


NPZ: dict[str, tuple[Make, str]] = {
    "no zip": (one_file(b"text"), "data.npz cannot be read"),
    "nothing in it": (one_file(b""), "data.npz cannot be read"),
    "zip of another file": (archive(b"x", name="a.txt"), "images"),
    "no numpy array": (archive(b"text"), "data.npz cannot be read"),
    "numpy 9.0": (archive(b"\x93NUMPY\x09\x00" + bytes(200)), "data.npz cannot be read"),
    "header cut": (archive(header((24, 8, 8))[:50]), "data.npz cannot be read"),
    "header that is code": (
        archive(b"\x93NUMPY\x01\x00\x20\x00" + b"__import__('os').getcwd()".ljust(31) + b"\n"),
        "data.npz cannot be read",
    ),
    **{
        f"header of 10^{power} images": (
            archive(header((10**power, 8, 8))),
            f"header says {10**power * 64 + 128:,}",
        )
        for power in (7, 10, 15, 30)
    },
    "header of -1 images": (archive(header((-1, 8, 8))), "data.npz"),
    "1.5 GiB of zeros": (
        archive(header((24 * 2**20, 8, 8)), 24 * 2**20 * 64),
        "would unpack to",
    ),
    "a directory": (lambda here: here.mkdir(), "data.npz"),
    "a pipe": (os.mkfifo, "data.npz"),
    "a loop of links": (lambda here: here.symlink_to(here), "data.npz"),
    "a link to nothing": (lambda here: here.symlink_to("nothing"), "data.npz"),
}
NPZ_FOLDER: dict[str, tuple[Make, str]] = {
    "empty": (lambda here: here.mkdir(), "config.data.data_dir"),
    "no test": (each(arrays(), lambda here: (here / "test.npz").unlink()), "splits.test"),
    "channels first": (arrays(images=images(24, 3, 8, 8)), "transpose(0, 2, 3, 1)"),
    "channels first in test": (arrays(only="test", images=images(24, 3, 8, 8)), "test.npz"),
    "numbers last": (arrays(images=images(8, 8, 3, 24)), "transpose(3, 0, 1, 2)"),
    "alpha": (arrays(images=images(24, 8, 8, 4)), "alpha"),
    "one image": (arrays(images=images(8, 8)), "shape (8, 8)"),
    "five dimensions": (arrays(images=images(24, 1, 8, 8, 1)), "must be uint8 of shape"),
    "no images": (arrays(images=None), "images"),
    "0 images": (arrays(images=images(0, 8, 8), labels=None), "shape (0, 8, 8)"),
    "0 rows": (arrays(images=images(24, 0, 8)), "shape (24, 0, 8)"),
    "floats": (arrays(images=images(24, 8, 8) / 255), "float64"),
    "objects": (arrays(images=np.array([{}] * 24, object)), "object"),
    "strings": (arrays(images=np.full((24, 8, 8), "x")), "must be uint8"),
    "structured": (arrays(images=np.zeros((24, 8, 8), "u1,u1")), "must be uint8"),
    "labels from 1": (arrays(labels=1 + np.arange(24) % 3), "labels - 1"),
    "labels of floats": (arrays(labels=np.arange(24) / 3), "labels"),
    "labels of objects": (arrays(labels=np.array([{}] * 24, object)), "train.npz"),
    "labels one too few": (arrays(labels=np.arange(23) % 3), "labels"),
    "labels in a column": (arrays(labels=np.arange(24)[:, None] % 3), "labels"),
    "labels of one number": (arrays(labels=np.array(3)), "labels"),
    "label 2^40": (arrays(labels=np.r_[np.arange(23) % 3, 2**40]), str(2**40)),
    "label 3 in test alone": (arrays(only="test", labels=np.arange(24) % 4), "label 3"),
    "no labels, with classes": (arrays(labels=None), "label"),
    "label -1, with classes": (arrays(labels=np.arange(24) % 3 - 1), "label"),
    "other size in test": (arrays(only="test", images=images(24, 4, 4, 1)), "test has images"),
    "colour in validation": (arrays(only="validation", images=images(24, 8, 8, 3)), "validation"),
    "test truncated": (each(arrays(), truncated("test.npz")), "test.npz cannot be read"),
    "train truncated": (each(arrays(), truncated("train.npz", 0.9)), "train.npz cannot be read"),
    "train a directory": (each(arrays(), replaced("train.npz", None)), "train"),
    "train a pipe": (each(arrays(), replaced("train.npz", "pipe")), "train"),
    "two spellings": (each(arrays(), _two_spellings(".npz")), "val"),
    "3 images": (arrays(images=images(3, 8, 8, 1), labels=None), "train.batch_size"),
}
_TRAIN, _TEST = "train-images-idx3-ubyte", "t10k-images-idx3-ubyte"
_LABELS = "train-labels-idx1-ubyte"
IDX: dict[str, tuple[Make, str]] = {
    "empty": (lambda here: here.mkdir(), "config.data.data_dir"),
    "a file": (one_file(b""), "config.data.data_dir"),
    "no test": (idx_files(_TEST), _TEST),
    "no labels": (idx_files(_LABELS), _LABELS),
    "nothing in it": (idx_files(_TRAIN, b""), _TRAIN),
    "text": (idx_files(_TRAIN, b"text" * 99), _TRAIN),
    "of floats": (idx_files(_TRAIN, idx_bytes(images(24, 8, 8), kind=13)), _TRAIN),
    "of two dimensions": (idx_files(_TRAIN, idx_bytes(images(24, 64))), _TRAIN),
    "truncated": (idx_files(_TRAIN, idx_bytes(images(24, 8, 8))[:-9]), _TRAIN),
    "too long": (idx_files(_TRAIN, idx_bytes(images(24, 8, 8)) + b"x"), _TRAIN),
    "0 images": (idx_files(_TRAIN, idx_bytes(images(0, 8, 8))), "train"),
    "0 rows": (idx_files(_TRAIN, idx_bytes(images(24, 0, 8))), _TRAIN),
    "header of 10^9 images": (
        idx_files(_TRAIN, idx_bytes(images(24, 8, 8), (10**9, 8, 8))),
        "64000000000",
    ),
    "header of 2^96 bytes": (
        idx_files(_TRAIN, idx_bytes(images(24, 8, 8), (2**32 - 1,) * 3)),
        _TRAIN,
    ),
    "no gzip": (idx_files(f"{_TRAIN}.gz", b"text" * 99), f"{_TRAIN}.gz"),
    "gzip of nothing": (idx_files(f"{_TRAIN}.gz", b""), f"{_TRAIN}.gz"),
    "gzip truncated": (
        idx_files(f"{_TRAIN}.gz", gzipped(idx_bytes(images(24, 8, 8)))[:-20]),
        f"{_TRAIN}.gz",
    ),
    "1.5 GiB of zeros gzipped": (
        lambda here: idx_files(
            f"{_TRAIN}.gz",
            zeros_gz(idx_bytes(images(0), (24 * 2**20, 8, 8)), 24 * 2**20 * 64),
        )(here),
        "would unpack to",
    ),
    "1.5 GiB of zeros gzipped behind 24 images": (
        lambda here: idx_files(
            f"{_TRAIN}.gz", zeros_gz(idx_bytes(images(0), (24, 8, 8)), 24 * 2**26)
        )(here),
        f"{_TRAIN}.gz",
    ),
    "labels from 1": (idx_files(_LABELS, idx_bytes(np.uint8(1 + np.arange(24) % 3))), "start at 1"),
    "one label too many": (idx_files(_LABELS, idx_bytes(np.uint8(np.arange(25) % 3))), _LABELS),
    "a pipe": (each(idx_files(), replaced(_TRAIN, "pipe")), _TRAIN),
    "a directory": (each(idx_files(), replaced(_TRAIN, None)), _TRAIN),
}
_PIXELS = images(8, 8, 3)
_NOT_UTF_8 = os.fsdecode(b"!\xe9.png")
FOLDER: dict[str, tuple[Make, str]] = {
    "empty": (lambda here: here.mkdir(), "config.data.data_dir"),
    "a file": (one_file(b""), "config.data.data_dir"),
    "no test": (pictures(without="test"), "splits.test"),
    "a folder test without images": (pictures(without="test", test__a_txt=b""), "no image"),
    "two spellings": (each(pictures(), _two_spellings("")), "val"),
    "only hidden images": (
        lambda here: (here.mkdir(), (here / ".a.png").write_bytes(png(_PIXELS))),
        "no image",
    ),
    "one image": (
        lambda here: (here.mkdir(), (here / "a.png").write_bytes(png(_PIXELS))),
        "config.data.held_out",
    ),
    **{
        name: (pictures(train__0_png=content), "0.png")
        for name, content in {
            "nothing in it": b"",
            "text": b"text",
            "truncated": png(_PIXELS)[:60],
            "header alone": png(_PIXELS)[:40],
            "60,000 × 60,000 pixels": png(_PIXELS, (60_000, 60_000)),
            "10,000 × 10,000 pixels": png(_PIXELS, (10_000, 10_000)),
            "0 × 0 pixels": png(_PIXELS, (0, 0)),
            "16 bits": png(images(8, 8, 6), (8, 8), 16),
            "transparent": png(images(8, 8, 4), (8, 8), 8, 6),
            "JPEG header": b"\xff\xd8\xff\xe0\x00\x10JFIF",
            "TIFF header": b"II*\x00\xff\xff\xff\xff",
            "GIF header": b"GIF89a\xff\xff\xff\xff",
            "BMP header": b"BM" + b"\xff" * 60,
            "PPM of 10^10 pixels": b"P6 100000 100000 255\n",
            "a zip": b"PK\x03\x04" + bytes(99),
            "a pipe": lambda path: (path.unlink(), os.mkfifo(path)),
            "a link to nothing": lambda path: (path.unlink(), path.symlink_to("nothing")),
            "a loop of links": lambda path: (path.unlink(), path.symlink_to(path)),
        }.items()
    },
    "named in no UTF-8": (
        each(pictures(), lambda here: (here / "train" / _NOT_UTF_8).write_bytes(b"text")),
        "udce9.png cannot be read",
    ),
    "all damaged": (
        lambda here: [
            (here / split).mkdir(parents=True) or (here / split / "a.png").write_bytes(b"text")
            for split in _SPLITS
        ],
        "a.png cannot be read",
    ),
}
