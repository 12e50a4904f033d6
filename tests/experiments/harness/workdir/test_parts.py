"""A run remembers who defined its parts, and whoever opens it gets them or one clear line."""

import importlib
import json
import sys

import pytest

from diffusion.schedules import SCHEDULES
from experiments.harness.data.splits import DATASETS
from experiments.harness.errors import ConfigError
from experiments.harness.workdir import parts
from tests.experiments import tiny

REGISTERS = """
import functools
from diffusion.schedules import SCHEDULES, linear_log_snr
from experiments.harness.data.splits import DATASETS, digits
def steep(factor=1.0):
    return linear_log_snr(20 * factor, -20 * factor)
SCHEDULES["steep"] = functools.partial(steep, factor=0.5)
DATASETS["mine"] = lambda split: digits(split)
"""


@pytest.fixture
def forget():
    """Returns to the built-in parts, as a new process has them."""

    def run():
        sys.modules.pop("my_parts", None)
        SCHEDULES.pop("steep", None)
        DATASETS.pop("mine", None)
        importlib.invalidate_caches()

    yield run
    run()


@pytest.fixture
def recorded(tmp_path, monkeypatch, forget):
    """A work directory whose parts the module my_parts in lib/ registered, in a new process."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "my_parts.py").write_text(REGISTERS)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    importlib.import_module("my_parts")
    workdir = tmp_path / "run"
    workdir.mkdir()
    parts.record(tiny.config("unet", schedule__name="steep", data__name="mine"), workdir)
    forget()
    return workdir


def test_opening_a_run_imports_the_modules_of_its_parts(recorded):
    assert json.loads((recorded / "parts.json").read_text()) == {
        "schedule.name": {"steep": "my_parts"},
        "data.name": {"mine": "my_parts"},
    }
    parts.register(recorded)
    assert "steep" in SCHEDULES
    assert "mine" in DATASETS


def test_a_run_of_built_in_parts_records_none(recorded):
    parts.record(tiny.config("unet"), recorded)
    assert not (recorded / "parts.json").exists()
    parts.register(recorded)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("__main__", "a notebook or a script registered it, and these cannot be imported"),
        ("not_there.at_all", r"its module not_there\.at_all cannot be imported \(ModuleNotFound"),
        ("json", "its module json does not register it when it is imported"),
        ("my_parts", "its module my_parts lies in the work directory, and nothing there is"),
    ],
)
def test_a_part_that_cannot_be_registered_is_named(recorded, monkeypatch, module, line):
    (recorded.parent / "lib").rename(recorded / "lib")
    monkeypatch.syspath_prepend(recorded / "lib")
    (recorded / "parts.json").write_text(json.dumps({"schedule.name": {"steep": module}}))
    start = r"^workdir=\S+/run needs config\.schedule\.name = 'steep', which is not built in: "
    with pytest.raises(ConfigError, match=f"{start}{line}.*; register it"):
        parts.register(recorded)
    assert "my_parts" not in sys.modules
