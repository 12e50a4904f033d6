"""Checksums of a checkpoint's files, which are part of it and tell whether it is as it was written.

orbax restores an array file with a flipped bit without a word.
"""

import hashlib
import json

from etils import epath

_FILE = "checksums.json"
_ITEM = "default"  # where the state lies within a checkpoint
_CHUNK = 1 << 22
# What orbax writes later than the state, and restores nothing from.
_UNCHECKED = {_FILE, "_CHECKPOINT_METADATA", "commit_success.txt"}


def write(item: epath.Path) -> None:
    """Writes the checksums of a checkpoint of which all but its completion has been written.

    Args:
      item: the directory of its state, which gets the file.
    """
    sums = {name: _checksum(path) for name, path in _files(item.parent).items()}
    (item / _FILE).write_text(json.dumps(sums, indent=2) + "\n")


def damage(checkpoint: epath.Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if every file is as it was written.

    One without checksums, of a version that wrote none, is taken as it is.
    """
    sums = _read(checkpoint)
    if isinstance(sums, str):
        return sums
    files = _files(checkpoint)
    for name in sums:
        if name not in files:
            return f"{name} is missing"
        if _checksum(files[name]) != sums[name]:
            return f"{name} is not as it was written"
    return None


def damage_of(checkpoint: epath.Path, name: str) -> str | None:
    """As `damage`, of a single file."""
    sums = _read(checkpoint)
    if isinstance(sums, str):
        return sums
    if name in sums and not (checkpoint / name).exists():
        return f"{name} is missing"
    if name in sums and _checksum(checkpoint / name) != sums[name]:
        return f"{name} is not as it was written"
    return None


def are_written(checkpoint: epath.Path) -> bool:
    """Whether a checkpoint has any."""
    return (checkpoint / _ITEM / _FILE).exists()


def _read(checkpoint: epath.Path) -> dict[str, str] | str:
    """The checksums by file, or what is wrong with them."""
    if not are_written(checkpoint):
        return {}
    try:
        sums = json.loads((checkpoint / _ITEM / _FILE).read_bytes())
        if isinstance(sums, dict):
            return sums
    except ValueError:
        pass
    return f"{_ITEM}/{_FILE} is not as it was written"


def _files(checkpoint: epath.Path) -> dict[str, epath.Path]:
    """The files that are checked, by what their path will be once the checkpoint is complete."""
    from orbax.checkpoint.utils import TMP_DIR_SUFFIX

    found = {}
    for path in sorted(_walk(checkpoint)):
        if path.name not in _UNCHECKED:
            parts = path.relative_to(checkpoint).parts
            found["/".join(part.split(TMP_DIR_SUFFIX)[0] for part in parts)] = path
    return found


def _walk(directory: epath.Path) -> list[epath.Path]:
    paths = list(directory.iterdir())
    return [q for p in paths for q in (_walk(p) if p.is_dir() else [p])]


def _checksum(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
