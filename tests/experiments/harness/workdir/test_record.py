"""A run of another version is opened where that is safe, and named in one line where it is not."""

import json

import pytest

from experiments.harness import command_line
from experiments.harness.errors import ConfigError
from experiments.harness.workdir import record
from tests.experiments import tiny


@pytest.fixture
def change(tmp_path):
    """Changes the config.json of a work directory by a function of its settings."""

    def run(function):
        config = tiny.config()
        record.record(config, tmp_path)
        settings = config.to_dict()
        function(settings)
        (tmp_path / "config.json").write_text(json.dumps(settings))

    return run


def test_a_setting_that_this_version_lacks_is_an_error(change, tmp_path, capsys):
    def rename(settings):
        settings["train"]["lr"] = settings["train"].pop("learning_rate")
        settings["weather"] = {"wind": 3}

    change(rename)
    line = (
        rf"^{tmp_path}/config\.json is of another version: it has train\.lr = 0\.02, weather, "
        r"unknown to this one, and lacks train\.learning_rate; rename or remove .* sessions\.jsonl"
    )
    with pytest.raises(ConfigError, match=line):
        record.open_run(tmp_path)
    assert command_line.run("all", tiny.config(), str(tmp_path)) == 2
    assert "is of another version" in capsys.readouterr().err


def test_a_value_in_the_place_of_a_group_is_damage(change, tmp_path):
    change(lambda settings: settings.update(sigma="x", quality=[1]))
    with pytest.raises(ConfigError, match=r"config\.json is damaged: quality, sigma must hold"):
        record.open_run(tmp_path)


def test_a_setting_that_an_earlier_version_lacked_has_its_default(change, tmp_path, capsys):
    change(lambda settings: [settings[name].clear() for name in ("sigma", "variance")])
    record.open_run(tmp_path)
    (line,) = capsys.readouterr().out.splitlines()
    assert "earlier version: it lacks variance.split, " in line
    assert ", 6 more; defaults are used" in line


def test_a_run_of_this_version_is_opened_without_a_word(change, tmp_path, capsys):
    """Also one with the options of a registered network, here those of tiny."""
    record.open_run(tmp_path / "none")
    change(lambda settings: settings["model"]["convolution"].update(width=3))
    record.open_run(tmp_path)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["checkpoints", "samples", "metrics.jsonl", "evaluation.json"])
def test_a_directory_in_the_place_of_a_file_is_an_error_and_the_reverse(name, tmp_path):
    wrong = "directory" if "." in name else "file"
    (tmp_path / name).mkdir() if "." in name else (tmp_path / name).write_text("")
    with pytest.raises(ConfigError, match=rf"{name} is a {wrong}, and a run has a .*move it away"):
        record.open_run(tmp_path)
