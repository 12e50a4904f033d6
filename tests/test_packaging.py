"""What `pip install -e .` installs: the dependencies of requirements.txt, and every package."""

import pathlib
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_dependencies_and_extras_are_those_of_requirements_txt():
    extras = PROJECT["project"]["optional-dependencies"]
    listed = [*extras["flow"], *extras["datasets"], *extras["compression"]]
    installed = [*PROJECT["project"]["dependencies"], *listed]
    assert sorted(installed) == sorted((ROOT / "requirements.txt").read_text().split())


@pytest.mark.parametrize("package", ["diffusion", "models", "experiments", "configs"])
def test_every_folder_of_a_package_is_found(package):
    assert f"{package}*" in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    assert all((folder / "__init__.py").is_file() for folder in folders)


def test_every_file_that_the_packages_read_is_installed():
    """Templates are no modules, so they are installed only where package-data names them."""
    named = PROJECT["tool"]["setuptools"]["package-data"]
    installed = {
        path
        for package, patterns in named.items()
        for pattern in patterns
        for path in (ROOT / package.replace(".", "/")).glob(pattern)
    }
    files = {
        path
        for package in ("diffusion", "models", "experiments", "configs")
        for path in (ROOT / package).rglob("*.*")
        if path.suffix not in (".py", ".pyc")
    }
    assert len(files) >= 5
    assert files == installed
