"""The identity of a kept result: the settings and files that it is a function of.

Caches compare the `identity` that they stored with the wanted one (`is_current`); a resumed run
and a loaded network compare configs (`differences`). `dependences.py` has the table of what counts.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from experiments.harness.workdir.dependences import (
    OPTIMAL_LEVELS,
    RESULTS,
    DataFiles,
    File,
    active,
    depends,
)
from experiments.harness.workdir.files import read, write_json, write_npz

_DATA_OF = "data of "  # begins the name of a split's fingerprint


def identity(
    result: str,
    config: ConfigDict,
    step: int,
    workdir: epath.PathLike | None = None,
    *,
    data: Callable[[str], str | None],
) -> dict[str, Any]:
    """What a result is a function of. It is stored with the result.

    Args:
      result: a key of `RESULTS`.
      config: the config.
      step: the step of the checkpoint that is measured or sampled.
      workdir: holds the files that the result depends on; None: their fingerprints are left out.
      data: from a split's name to the fingerprint of its files, as `splits.fingerprints`
        makes it. A split without one (None) is left out, and does not count.

    Returns:
      The step; the settings, flat; the fingerprints of files by name.
    """
    settings = flatten(config.to_dict())
    names, entries = depends(result, settings), set(active(RESULTS[result], settings))
    splits = {entry.split for entry in entries if isinstance(entry, DataFiles)}
    splits = {settings.get(split, split) for split in splits}
    contents = {f"{_DATA_OF}{split}": data(split) for split in sorted(splits)}
    files = {name: content for name, content in contents.items() if content is not None}
    if workdir is not None:
        files |= {
            entry.name: _FINGERPRINTS[entry.name](epath.Path(workdir) / entry.name)
            for entry in entries
            if isinstance(entry, File)
        }
    return {
        "step": step,
        "settings": {name: settings[name] for name in sorted(names)},
        "files": files,
    }


def is_same(recorded: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Whether a stored result is the wanted one.

    Args:
      recorded: the identity that was stored, perhaps by an earlier version, perhaps among other
        entries. A setting that only one of the two has is unknown to the other's version, and does
        not count.
      wanted: the identity of what would be computed now.
    """
    recorded = _translate(recorded)
    return recorded.get("step") == wanted["step"] and not any(
        _differing(recorded[part], wanted[part]) for part in ("settings", "files")
    )


def is_current(
    path: epath.PathLike, content: Mapping[str, Any], wanted: Mapping[str, Any], writes: bool = True
) -> bool:
    """Whether a file holds the wanted result; adds fingerprints of data that its identity lacks.

    An earlier version recorded none. A line reports that they are those of the present files.

    Args:
      path: a .json file, whose object has the identity's entries, or an .npz file, whose array
        `identity` has them as JSON.
      content: the object, or the arrays by name.
      wanted: the identity of what would be computed now.
      writes: whether the file may be changed; if not, the result is used unchecked.
    """
    path = epath.Path(path)
    in_array = path.suffix == ".npz"
    recorded = json.loads(str(content["identity"])) if in_array else content
    if not is_same(recorded, wanted):
        return False
    former = _translate(recorded)
    missing = {
        name: text
        for name, text in wanted["files"].items()
        if name.startswith(_DATA_OF) and text and name not in former["files"]
    }
    if missing and writes:
        tqdm.write(
            f"{path} has no fingerprint of the {', the '.join(missing)}, since an earlier version "
            "wrote it; that of the present files is recorded now, unchecked"
        )
        completed = former | {"files": former["files"] | missing}
        if in_array:
            write_npz(path, **dict(content) | {"identity": json.dumps(completed)})
        else:
            write_json(path, dict(content) | completed)
    return True


def differences(result: str, recorded: Mapping[str, Any], config: ConfigDict) -> dict[str, str]:
    """The settings that differ from a recorded config, of those that a result depends on.

    Args:
      result: a key of `RESULTS`.
      recorded: nested, as in config.json. A setting that only one of the two has does not count.
      config: the present config.

    Returns:
      For each name "NAME was OLD, now NEW", sorted by name.
    """
    now, then = flatten(config.to_dict()), flatten(recorded)
    relevant = depends(result, now) | depends(result, now | then)
    return {
        name: f"{name} was {then[name]!r}, now {now[name]!r}"
        for name in _differing(then, now)
        if name in relevant
    }


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as {"train.batch_size": 128, …}; tuples as JSON's lists."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def fingerprint(*parts: Any) -> str:
    """Twelve hexadecimal digits that change with arrays, their shapes, or JSON values."""
    digest = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            digest.update(f"{part.dtype} {part.shape}".encode())
            digest.update(np.ascontiguousarray(part).tobytes())
        else:
            digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()[:12]


# Of the bound-optimal levels, not of what was measured at them; None if there are none.
_FINGERPRINTS = {
    OPTIMAL_LEVELS: lambda path: read(path, lambda recorded: fingerprint(recorded["log_snr"]))
}


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [name for name in sorted(one.keys() & other.keys()) if one[name] != other[name]]


# How identities were written before this table existed: some flat, with names of their own.
_FORMER_NAMES = {
    "data": "data.name",
    "data.train": "data.splits.train",
    "scaling": "decoder.scaling",
    "labels": "evaluate.labels",
}


def _translate(recorded: Mapping[str, Any]) -> dict[str, Any]:
    """A stored identity in today's form."""
    if "files" in recorded:
        return dict(recorded)
    settings, files = {}, {}
    for name, value in recorded.get("settings", recorded).items():
        name = name.removeprefix("samples.")
        name = _FORMER_NAMES.get(name, name)
        if name == "levels":
            files[OPTIMAL_LEVELS] = value
        else:
            name = name.replace("of.quality.", "quality.", 1)
            settings[re.sub(r"^of\.", "sample.", name)] = value
    if "sample.sampler" in settings:  # the corrector was left out where it had no steps
        settings.setdefault("sample.corrector.num_steps", 0)
    return {"step": recorded.get("step"), "settings": settings, "files": files}
