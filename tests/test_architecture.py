"""Imports point one way: diffusion ← models ← experiments/harness ← experiments ← main.py.

Within the harness they point down from room to room, and configs import nothing else of ours.
"""

import ast
import pathlib
import sys

import pytest

from tests import conftest

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = ("diffusion", "models", "experiments.harness", "experiments", "main")
MATHEMATICS = {"jax", "numpy", "jaxtyping", "diffrax"}
CONFIGS = {"ml_collections", "etils"}  # etils: a recorded config may lie in a bucket

# The rooms of the harness. A room may import those on the levels above it in this list, and none on
# its own level, so there are no circles.
LEVELS = (
    ("errors", "seeds"),
    ("checks", "paths", "memory", "processes", "devices"),
    ("data", "pictures", "pipelines", "workdir"),
    ("setup",),
    ("training", "evaluation", "sampling", "compression", "reports", "command_line", "arguments"),
    ("study",),
)
LEVEL_OF = {room: number for number, rooms in enumerate(LEVELS, 1) for room in rooms}


def layer(module: str) -> str | None:
    """The layer of ours that a module belongs to; None for other people's."""
    for name in ("experiments.harness", *LAYERS):
        if module == name or module.startswith(name + "."):
            return name
    return None


def modules() -> list[tuple[str, pathlib.Path]]:
    """Our modules by dotted name; a package has the name of its directory."""
    paths = [
        path
        for name in ("diffusion", "models", "experiments", "configs")
        for path in (ROOT / name).rglob("*.py")
    ]
    paths += [path for path in [ROOT / "main.py"] if path.exists()]
    dotted = [path.relative_to(ROOT).with_suffix("").parts for path in paths]
    return [
        (".".join(parts[:-1] if parts[-1] == "__init__" else parts), path)
        for parts, path in zip(dotted, paths, strict=True)
    ]


def imports(path: pathlib.Path) -> set[str]:
    """Every module that a file imports, inside functions too."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            imported.update(f"{node.module}.{alias.name}" for alias in node.names)
    return imported


def room(module: str) -> str | None:
    """The room of the harness that a module is in; None outside of the harness."""
    prefix = "experiments.harness."
    return module[len(prefix) :].split(".")[0] if module.startswith(prefix) else None


def tops(path: pathlib.Path) -> set[str]:
    """The packages that a file imports, without the standard library."""
    return {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names)


def each(name: str):
    """Parametrises a test by the modules of a layer."""
    chosen = [module for module in MODULES if module[0].split(".")[0] == name]
    return pytest.mark.parametrize(("name", "path"), chosen, ids=[name for name, _ in chosen])


MODULES = modules()
LAYERED = [module for module in MODULES if layer(module[0])]
HARNESS = [module for module in MODULES if room(module[0])]


def test_there_is_something_to_look_at():
    names = {name for name, _ in MODULES}
    assert {"diffusion.bound", "diffusion.schedules", "models", "experiments"} <= names


@pytest.mark.parametrize(("name", "path"), LAYERED, ids=[name for name, _ in LAYERED])
def test_imports_point_one_way(name, path):
    rank = LAYERS.index(layer(name))
    for imported in imports(path):
        if layer(imported):
            assert LAYERS.index(layer(imported)) <= rank, f"{name} imports {imported}"
        top = imported.split(".")[0]
        assert top != "tests", f"{name} imports {imported}"
        if rank <= LAYERS.index("models"):
            assert top not in ("configs", "main"), f"{name} imports {imported}"


@pytest.mark.parametrize(("name", "path"), HARNESS, ids=[name for name, _ in HARNESS])
def test_rooms_of_the_harness_import_lower_rooms_only(name, path):
    here = room(name)
    assert here in LEVEL_OF, f"{here} is a new room: give it a level in LEVELS"
    others = {room(imported) for imported in imports(path)} - {None, here}
    unknown = others - LEVEL_OF.keys()
    assert not unknown, f"{name} imports {unknown}; import the module, not what it defines"
    upward = {other for other in others if LEVEL_OF[other] >= LEVEL_OF[here]}
    assert not upward, f"{name} imports {upward}"


@each("diffusion")
def test_the_mathematics_needs_arrays_and_nothing_else(name, path):
    assert tops(path) <= MATHEMATICS | {"diffusion"}, name


@each("configs")
def test_configs_need_no_code_of_ours(name, path):
    assert tops(path) <= CONFIGS | {"configs"}, name


@pytest.mark.parametrize("name", conftest.LONGEST)
def test_the_files_that_are_tested_first_exist(name):
    assert (ROOT / name).is_file()
