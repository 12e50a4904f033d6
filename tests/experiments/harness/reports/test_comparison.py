"""Paired differences against a computation by hand, and what keeps runs from being paired."""

import numpy as np
import pytest
from etils import epath

from experiments.harness.reports import comparison
from experiments.harness.reports.contents import read_contents
from tests.experiments.harness.reports.composed import DATA, compose

FIRST, OTHER = (1.0, 2.0, 4.0), (2.0, 2.0, 7.0)


def compared(tmp_path, other=OTHER, **changes):
    first = read_contents(compose(tmp_path / "first", FIRST))
    return comparison.difference(
        first, read_contents(compose(tmp_path / "other", other, **changes))
    )


def test_a_paired_difference_is_that_of_the_examples(tmp_path):
    """Differences 1, 0 and 3: mean 4/3, sample variance 7/3, so the error is √(7/9)."""
    found = compared(tmp_path)
    assert found.name == "other"
    assert found.value == pytest.approx(4 / 3)
    assert found.se == pytest.approx(np.sqrt(7 / 9))
    assert found.remark == ""


def test_runs_are_compared_with_the_first_that_has_an_evaluation(tmp_path):
    runs = [read_contents(compose(tmp_path / name)) for name in "abc"]
    runs[0] = runs[0]._replace(evaluation=None)
    reference, differences = comparison.differences(runs)
    assert reference == "b"
    assert [(d.name, d.value) for d in differences] == [("a", None), ("c", 0.0)]
    assert comparison.differences(runs[:2]) == ("", [])


def test_equal_runs_differ_by_nothing(tmp_path):
    found = compared(tmp_path, FIRST)
    assert (found.value, found.se, found.remark) == (0.0, 0.0, "")


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        ({"split": "validation"}, "another split: test and validation"),
        ({"settings": DATA | {"data.name": "photos"}}, "data.name digits and photos"),
        ({"settings": DATA | {"data.splits.test": "t10k"}}, "data.splits.test test and t10k"),
        ({"files": {"data of test": "abc"}}, "data of test None and abc"),
        ({"settings": DATA | {"evaluate.labels": True}}, "given the labels"),
    ],
)
def test_other_examples_are_not_paired(changes, remark, tmp_path):
    found = compared(tmp_path, **changes)
    assert (found.value, found.se) == (None, None)
    assert remark in found.remark


def test_another_number_of_examples_is_not_paired(tmp_path):
    found = compared(tmp_path, (1.0, 2.0))
    assert found.value is None
    assert found.remark == "another number of examples: 3 and 2"


@pytest.mark.parametrize(
    ("changes", "remark"),
    [
        ({"seed": 1}, "seed 0 and 1"),
        ({"num_timesteps": 5}, "T 3 and 5"),
        ({"settings": DATA | {"evaluate.target": 0.002}}, "evaluate.target None and 0.002"),
    ],
)
def test_other_noise_is_said(changes, remark, tmp_path):
    found = compared(tmp_path, **changes)
    assert found.value == pytest.approx(4 / 3)
    assert found.remark == f"the noise is not the same: {remark}"


def test_a_run_without_an_evaluation_says_so(tmp_path):
    first = read_contents(compose(tmp_path / "first"))
    path = compose(tmp_path / "other")
    (path / "evaluation.npz").unlink()
    assert "other has no evaluation" in comparison.difference(first, read_contents(path)).remark


def test_settings_that_differ_have_a_value_for_each_run(tmp_path):
    runs = [read_contents(compose(tmp_path / name)) for name in "abc"]
    assert comparison.differing_settings(runs) == []
    runs[1].settings["seed"] = 5
    runs[2].settings["train.batch_size"] = 64
    runs[2].settings.pop("seed")
    assert comparison.differing_settings(runs) == [
        ("seed", [0, 5, None]),
        ("train.batch_size", [runs[0].settings["train.batch_size"]] * 2 + [64]),
    ]


def test_runs_without_settings_differ_from_none(tmp_path):
    (tmp_path / "empty").mkdir()
    runs = [read_contents(compose(tmp_path / "a")), read_contents(tmp_path / "empty")]
    assert comparison.differing_settings(runs) == []


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["runs/a", "runs/b/"], ["a", "b"]),
        (["x/a/run", "x/b/run"], ["a/run", "b/run"]),
        (["a"], ["a"]),
        (["a", "x/a"], ["a", "x/a"]),
    ],
)
def test_names_are_as_short_as_tells_them_apart(paths, names):
    assert comparison.distinct_names([epath.Path(path) for path in paths]) == names
