"""A work directory says what made it."""

import json

import jax
import numpy as np
import pytest

from experiments.harness.workdir import sessions

PARAMS = {"w": np.zeros((3, 4)), "b": np.zeros(4)}


def lines(workdir):
    return [json.loads(line) for line in (workdir / "sessions.jsonl").read_text().splitlines()]


def test_a_session_records_what_made_it_and_how_it_ended(tmp_path):
    with sessions.recorded(tmp_path, 0, PARAMS):
        (start,) = lines(tmp_path)  # a kill leaves this
    assert start["jax"] == jax.__version__
    assert start["num_parameters"] == 16
    assert {"jaxlib", "flax", "numpy", "python", "commit", "is_changed"} < start.keys()
    assert {"time", "device", "num_devices", "num_processes"} < start.keys()
    with pytest.raises(KeyError), sessions.recorded(tmp_path, 7, PARAMS):
        raise KeyError
    first, second = (line for line in lines(tmp_path) if line["event"] == "end")
    assert (first["outcome"], second["outcome"]) == ("finished", "KeyError")
    assert [line["step"] for line in lines(tmp_path) if line["event"] == "start"] == [0, 7]
    assert first["seconds"] >= 0
    with sessions.recorded(tmp_path, 0, PARAMS):  # another run
        assert len(lines(tmp_path)) == 1


def test_code_without_git_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(sessions, "_ROOT", tmp_path)
    sessions._commit.cache_clear()
    assert sessions._commit() == {"commit": None, "is_changed": None}
    sessions._commit.cache_clear()
