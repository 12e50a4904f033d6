"""The parts of a run that are not built in, and the modules that registered them.

A notebook or a package of the user can add to a registry (docs/extending.md). A run that uses such
a part records the part's module in parts.json, and whoever opens the run imports that module.
"""

import functools
import importlib
import importlib.util
import pathlib
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from configs.base import SETTINGS
from configs.settings.declaration import Choice, Tuple, registry, value_of
from experiments.harness.errors import ConfigError, in_short
from experiments.harness.workdir.files import read, write_json

PARTS_FILE = "parts.json"
_BUILT_IN = ("diffusion", "models", "experiments")
# The setting data.name is free text, since tensorflow-datasets has names of its own.
_DATA_SETS = Choice(
    *(f"experiments.harness.data.splits:{name}" for name in ("DATASETS", "FORMATS"))
)


def record(config: ConfigDict, workdir: epath.PathLike) -> None:
    """Writes parts.json: for each setting the chosen parts that are not built in, with modules."""
    modules = {}
    for setting, kind in _choices().items():
        value, parts = value_of(config, setting), _registered(kind)
        names = value if isinstance(value, tuple) else (value,)
        chosen = {name: _module(parts[name]) for name in names if name in parts}
        chosen = {n: m for n, m in chosen.items() if m.partition(".")[0] not in _BUILT_IN}
        if chosen:
            modules[setting] = chosen
    path = epath.Path(workdir) / PARTS_FILE
    if modules:
        write_json(path, modules)
    else:
        path.unlink(missing_ok=True)


def register(workdir: epath.PathLike) -> None:
    """Imports the modules of a run's parts that are not registered yet.

    Raises:
      ConfigError: if a part is still missing then.
    """

    def parse(recorded):
        return [
            (setting, _choices()[setting], name, str(module))
            for setting, modules in recorded.items()
            for name, module in modules.items()
        ]

    for setting, kind, name, module in read(epath.Path(workdir) / PARTS_FILE, parse) or ():
        if name in _registered(kind):
            continue
        reason = _import(module, workdir)
        if name not in _registered(kind):
            raise ConfigError(
                f"workdir={workdir} needs config.{setting} = {name!r}, which is not built in: "
                f"{reason}; register it (docs/extending.md) before this run is opened"
            )


def _import(module: str, workdir: epath.PathLike) -> str:
    """Imports a module, but none of the work directory; says why its part may be missing."""
    if module == "__main__":
        return "a notebook or a script registered it, and these cannot be imported"
    directory = pathlib.Path(workdir).resolve()
    try:
        spec = importlib.util.find_spec(module.partition(".")[0])
        places = [spec.origin, *(spec.submodule_search_locations or ())] if spec else []
        if any(
            pathlib.Path(place).resolve().is_relative_to(directory) for place in places if place
        ):
            return f"its module {module} lies in the work directory, and nothing there is imported"
        importlib.import_module(module)
    except (Exception, SystemExit) as error:
        return f"its module {module} cannot be imported ({in_short(error)})"
    return f"its module {module} does not register it when it is imported"


@functools.cache
def _choices() -> dict[str, Choice]:
    """The settings that choose a part by name, with what they choose from."""
    kinds = {
        name: setting.kind.element if isinstance(setting.kind, Tuple) else setting.kind
        for name, setting in SETTINGS.flat()
    }
    choices = {name: kind for name, kind in kinds.items() if isinstance(kind, Choice)}
    return choices | {"data.name": _DATA_SETS}


def _registered(kind: Choice) -> dict[str, Any]:
    """The parts of a choice by name."""
    registries = [registry(entry) for entry in kind.entries]
    return {
        name: part
        for parts in registries
        if isinstance(parts, Mapping)
        for name, part in parts.items()
    }


def _module(part: Any) -> str:
    """The module that defines a part; of a tuple, the module of its function."""
    if isinstance(part, functools.partial):
        return _module(part.func)
    if isinstance(part, tuple):
        return _module(next(filter(callable, part), type(part)))
    return getattr(part, "__module__", None) or type(part).__module__
