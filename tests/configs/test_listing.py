"""The page of settings, made from the declarations."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_the_page_of_settings_is_current():
    """In a process of its own, whose registries hold what the repository registers."""
    command = [sys.executable, "-m", "configs.settings.listing"]
    page = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    written = (ROOT / "docs" / "settings.md").read_text()
    assert written == page, f"run {' '.join(command[1:])} > docs/settings.md"
