"""Fingerprints of a data set's files: names, sizes and content."""

import functools
import hashlib
import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from experiments.harness.errors import ConfigError

WHOLE = 2**26  # bytes that are hashed completely
_BLOCK, _NUM_BLOCKS = 2**16, 256  # of more bytes, this sample


def fingerprint(root: Path, names: Sequence[str]) -> str:
    """Twelve hexadecimal digits that change with the names, sizes or content of some files.

    The content is hashed completely where the files have at most `WHOLE` bytes together. Else 256
    blocks of 64 KiB are hashed, at fixed random places. Modification times do not count, so that a
    copy has the same fingerprint; they only say whether a process must compute it again.

    Args:
      root: the folder.
      names: the files' names in it.

    Raises:
      ConfigError: if a file cannot be read.
    """
    try:
        with ThreadPoolExecutor(32) as pool:
            stats = list(pool.map(lambda name: os.stat(root / name), names))
        for name, status in zip(names, stats, strict=True):
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{root / name} is no regular file; remove it")
        return _fingerprint(
            root,
            tuple(names),
            tuple(status.st_size for status in stats),
            tuple(status.st_mtime_ns for status in stats),
        )
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read ({error.strerror})") from error


@functools.lru_cache(maxsize=16)
def _fingerprint(
    root: Path, names: tuple[str, ...], sizes: tuple[int, ...], times: tuple[int, ...]
) -> str:
    del times  # a part of the key of the cache
    digest = hashlib.sha256(repr(sizes).encode())
    digest.update("\0".join(names).encode(errors="surrogateescape"))
    ends = np.cumsum(sizes, dtype=np.int64)
    total = int(ends[-1]) if sizes else 0
    if total <= WHOLE:
        pieces = [(index, 0, size) for index, size in enumerate(sizes)]
    else:
        words = np.random.Philox(key=np.zeros(2, np.uint64)).random_raw(_NUM_BLOCKS)
        places = np.sort((words % np.uint64(total)).astype(np.int64))
        indices = np.searchsorted(ends, places, side="right")
        starts = [
            min(int(place - ends[i]) + sizes[i], max(sizes[i] - _BLOCK, 0))
            for i, place in zip(indices, places, strict=True)
        ]
        pieces = [(i, start, _BLOCK) for i, start in zip(indices, starts, strict=True)]
    for index, start, size in pieces:
        with open(root / names[index], "rb") as file:
            file.seek(start)
            digest.update(file.read(size))
    return digest.hexdigest()[:12]
