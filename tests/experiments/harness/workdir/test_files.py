"""Files of a work directory that a crash or a hand has damaged."""

import json

import numpy as np
import pytest

from experiments.harness.data import splits
from experiments.harness.errors import ConfigError
from experiments.harness.sampling import quality
from experiments.harness.setup import trained
from experiments.harness.setup.definition import define_model
from experiments.harness.setup.optimal_steps import optimal_levels
from experiments.harness.workdir import dependences, files, provenance, record
from tests.experiments import tiny

DAMAGES = {
    "empty": lambda content: b"",
    "truncated": lambda content: content[: len(content) // 2],
    "a list": lambda content: b"[]",
    "an empty object": lambda content: b"{}",
    "no text": lambda content: b"\xff\xfe\x00\x01",
}

ANEW = [9.0]


@pytest.fixture(params=DAMAGES)
def damage(request):
    def apply(path):
        path.write_bytes(DAMAGES[request.param](path.read_bytes()))

    return apply


@pytest.fixture
def workdir(tmp_path):
    tiny.untrained(tmp_path, tiny.config())
    return tmp_path


def test_damaged_statistics_of_the_data_are_made_anew(workdir, damage, capsys):
    config = tiny.config(**{"quality.features": "pixels"})
    first = quality.reference(config, workdir)
    (path,) = (workdir / "quality").iterdir()
    intact = path.read_bytes()
    damage(path)
    again = quality.reference(config, workdir)
    assert f"{path} is damaged" in capsys.readouterr().out
    np.testing.assert_array_equal(again.moments.mean, first.moments.mean)
    assert path.read_bytes() == intact


def errors(workdir, **changes):
    config = tiny.config()
    step = trained.load(config, workdir).step
    data = splits.fingerprints(config)
    identity = json.dumps(provenance.identity(dependences.MEASURED_ERRORS, config, step, data=data))
    arrays = {"log_snr": np.array([1.0, 0.0]), "error": np.ones((2, 8, 8, 1))}
    files.write_npz(workdir / dependences.MEASURED_ERRORS, **arrays | changes, identity=identity)


def measured(workdir, monkeypatch):
    """The noise levels that a run reads; ANEW where it measures."""
    made = (np.array(ANEW), np.zeros((1, 8, 8, 1)))
    monkeypatch.setattr(trained.analytic, "measure_errors", lambda *_: made)
    return trained.load(tiny.config(), workdir, writes=False).measured_errors()[0].tolist()


def test_damaged_errors_are_measured_anew(workdir, damage, monkeypatch):
    errors(workdir)
    assert measured(workdir, monkeypatch) == [1.0, 0.0]
    damage(workdir / dependences.MEASURED_ERRORS)
    assert measured(workdir, monkeypatch) == ANEW


@pytest.mark.parametrize(
    "changes",
    [
        {"error": np.ones((3, 8, 8, 1))},
        {"error": np.ones((2, 4, 4, 1))},
        {"error": np.full((2, 8, 8, 1), np.nan)},
        {"log_snr": np.ones((2, 1))},
        {"log_snr": np.array(["a", "b"])},
    ],
)
def test_errors_of_a_wrong_shape_are_measured_anew(changes, workdir, monkeypatch):
    errors(workdir, **changes)
    assert measured(workdir, monkeypatch) == ANEW


def test_damaged_levels_are_a_line_that_says_how_to_find_them(workdir, damage):
    path = workdir / dependences.OPTIMAL_LEVELS
    schedule = define_model(tiny.config()).schedule
    files.write_json(path, {"step": 0, "log_snr": {"3": [1.0, 0.0, -1.0]}})
    damage(path)
    with tiny.refused(match=r"spacing.json.*--experiment=spacing"):
        optimal_levels(workdir, 3, 0, schedule)
    assert provenance._FINGERPRINTS[dependences.OPTIMAL_LEVELS](path) is None


def test_damaged_records_are_a_line(workdir, damage):
    config, data = tiny.config(), record.DataSummary(1000, (8, 8, 1))
    record.record(config, workdir)
    record.record_data(workdir, data)
    for name, check in (
        ("data.json", lambda: record.check_data(config, workdir, data)),
        ("config.json", lambda: record.check(config, workdir)),
    ):
        check()
        damage(workdir / name)
        with tiny.refused(match=rf"{name} is damaged.*restore it"):
            check()


def test_a_directory_in_place_of_a_file_is_a_line(tmp_path):
    (tmp_path / "data.json").mkdir()
    with pytest.raises(ConfigError, match=r"data.json cannot be read"):
        files.read(tmp_path / "data.json", dict)
