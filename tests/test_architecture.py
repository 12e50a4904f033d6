"""Imports point one way: diffusion ← models ← experiments/harness ← experiments ← main.py."""

import ast
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
LAYERS = ("diffusion", "models", "experiments.harness", "experiments", "main")
MATHEMATICS = {"jax", "numpy", "jaxtyping", "diffrax"}


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
        for name in ("diffusion", "models", "experiments")
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
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


MODULES = modules()


def test_there_is_something_to_look_at():
    names = {name for name, _ in MODULES}
    assert {"diffusion.bound", "diffusion.schedules", "models", "experiments"} <= names


@pytest.mark.parametrize(("name", "path"), MODULES, ids=[name for name, _ in MODULES])
def test_imports_point_one_way(name, path):
    rank = LAYERS.index(layer(name))
    for imported in imports(path):
        if layer(imported):
            assert LAYERS.index(layer(imported)) <= rank, f"{name} imports {imported}"
        top = imported.split(".")[0]
        assert top != "tests", f"{name} imports {imported}"
        if rank <= LAYERS.index("models"):
            assert top not in ("configs", "main"), f"{name} imports {imported}"


@pytest.mark.parametrize(
    ("name", "path"),
    [module for module in MODULES if layer(module[0]) == "diffusion"],
    ids=[name for name, _ in MODULES if layer(name) == "diffusion"],
)
def test_the_mathematics_needs_arrays_and_nothing_else(name, path):
    tops = {imported.split(".")[0] for imported in imports(path)}
    assert tops <= MATHEMATICS | {"diffusion"} | set(sys.stdlib_module_names), name
