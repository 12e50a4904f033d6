"""Checksums of a checkpoint's files, stored with it, to detect damage.

orbax itself restores an array file with a flipped bit without an error.
"""

import hashlib
import json

from etils import epath

_FILE = "checksums.json"
_ITEM = "default"  # the directory of the state within a checkpoint
_CHUNK = 1 << 22
# orbax writes these after the state, and restores nothing from them.
_UNCHECKED = {_FILE, "_CHECKPOINT_METADATA", "commit_success.txt"}


def write(item: epath.Path) -> None:
    """Writes the checksums of a checkpoint that is about to be completed.

    Args:
      item: the directory of its state; the checksums are written there.
    """
    sums = {name: _checksum(path) for name, path in _files(item.parent).items()}
    (item / _FILE).write_text(json.dumps(sums, indent=2) + "\n")


def damage(checkpoint: epath.Path, name: str | None = None) -> str | None:
    """The damage to a checkpoint in a few words; None if every file agrees with its checksum.

    A checkpoint without checksums, of an early version, is taken as good.

    Args:
      checkpoint: its directory.
      name: the only file to check, as "metrics/metrics"; None: all of them.
    """
    sums = _read(checkpoint)
    if sums is None:
        return changed(f"{_ITEM}/{_FILE}")
    files = _files(checkpoint) if name is None else {name: checkpoint / name}
    for file in sums if name is None else sums.keys() & {name}:
        if file not in files or not files[file].exists():
            return f"{file} is missing"
        if _checksum(files[file]) != sums[file]:
            return changed(file)
    return None


def changed(name: str) -> str:
    """The words for a file whose content was changed."""
    return f"{name} is not as it was written"


def are_written(checkpoint: epath.Path) -> bool:
    """Whether a checkpoint has checksums."""
    return (checkpoint / _ITEM / _FILE).exists()


def _read(checkpoint: epath.Path) -> dict[str, str] | None:
    """The checksums by file; None if their own file is damaged."""
    if not are_written(checkpoint):
        return {}
    try:
        sums = json.loads((checkpoint / _ITEM / _FILE).read_bytes())
    except ValueError:
        return None
    return sums if isinstance(sums, dict) else None


def _files(checkpoint: epath.Path) -> dict[str, epath.Path]:
    """The files to check, by their paths once the checkpoint is complete."""
    from orbax.checkpoint.utils import TMP_DIR_SUFFIX

    files = {}
    for path in sorted(_walk(checkpoint)):
        if path.name not in _UNCHECKED:
            parts = path.relative_to(checkpoint).parts
            files["/".join(part.split(TMP_DIR_SUFFIX)[0] for part in parts)] = path
    return files


def _walk(directory: epath.Path) -> list[epath.Path]:
    paths = list(directory.iterdir())
    return [q for p in paths for q in (_walk(p) if p.is_dir() else [p])]


def _checksum(path: epath.Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
