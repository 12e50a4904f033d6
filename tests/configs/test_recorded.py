"""The config that a work directory was trained with."""

import json

import pytest

from configs import base, recorded


def test_a_group_that_a_notebook_added_is_read_back_and_the_config_stays_locked(tmp_path):
    config = base.get_config()
    with config.unlocked():
        config.model.mlp = {"widths": (64, 64)}
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    read = recorded.get_config(str(tmp_path))
    assert read.to_dict() == config.to_dict()
    assert read.is_locked
    assert read.model.is_locked


def test_a_value_of_a_wrong_type_is_named_with_its_file(tmp_path):
    settings = base.get_config().to_dict() | {"seed": "zero"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"config\.json is damaged .*seed"):
        recorded.get_config(str(tmp_path))
