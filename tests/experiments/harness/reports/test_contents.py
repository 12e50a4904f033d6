"""What is read of a work directory, whatever state its files are in."""

import json

import numpy as np
import pytest
from etils import epath

from experiments.harness.pictures.images import save_png
from experiments.harness.reports.contents import curves, read_contents
from experiments.harness.reports.reading import _LARGEST, Reader
from tests.experiments.harness.reports.composed import compose, write_lines


def test_a_finished_run_is_read_in_full(tmp_path):
    run = read_contents(compose(tmp_path / "run"))
    assert run.problems == []
    assert run.step == 20
    assert run.evaluation.bits_per_dim == 2.0
    np.testing.assert_array_equal(run.arrays.kl, [0.5, 0.25])
    steps, values = run.curves["validation_bits_per_dim"]
    np.testing.assert_array_equal(steps, [10, 20])
    np.testing.assert_array_equal(values, [3.5, 3.0])
    assert run.samples.keys() == {"samples"}
    assert run.progress.keys() == {10}
    (session,) = run.sessions
    assert (session["outcome"], session["seconds"]) == ("finished", 61.0)


def test_the_settings_that_differ_from_the_defaults_are_those_that_differ(tmp_path):
    run = read_contents(compose(tmp_path / "run"))
    changed = {name: (value, default) for name, value, default in run.changed}
    assert changed["train.num_steps"] == (20, 1000)
    assert changed["model.unet.channel_multipliers"] == ([1, 2], [1, 2, 2, 2])
    assert "seed" not in changed
    assert all(value != default for value, default in changed.values())


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "data.json",
        "metrics.jsonl",
        "sessions.jsonl",
        "evaluation.json",
        "evaluation.npz",
        "samples/samples.png",
        "samples/step_00000010.png",
    ],
)
@pytest.mark.parametrize("content", [None, b"", b"\x00\xff{]\n", b"[1, 2]\n", b"PK\x03\x04"])
def test_a_file_that_is_missing_or_damaged_costs_no_more_than_itself(name, content, tmp_path):
    path = compose(tmp_path / "run")
    (path / name).unlink()
    if content is not None:
        (path / name).write_bytes(content)
    run = read_contents(path)
    whole = read_contents(compose(tmp_path / "whole"))
    differing = {
        field
        for field in ("settings", "sessions", "data", "evaluation", "samples", "progress")
        if bool(getattr(run, field)) != bool(getattr(whole, field))
    }
    differing |= {"arrays"} if run.arrays is None else set()
    differing |= {"curves"} if not run.curves else set()
    lost = {
        "config.json": {"settings"},
        "metrics.jsonl": {"curves"},
        "evaluation.json": {"evaluation", "arrays"},  # the arrays of an unknown evaluation
        "evaluation.npz": {"arrays"},
        "samples/samples.png": {"samples"},
        "samples/step_00000010.png": {"progress"},
    }.get(name, {name.partition(".")[0]})
    assert differing == lost
    # A file of lines may be empty, and its last line without an end is being written.
    is_named = content is not None and (".jsonl" not in name or content.endswith(b"\n"))
    assert [name in problem for problem in run.problems] == [True] * is_named


@pytest.mark.parametrize("seconds", ["many", None, True, 1e999])
def test_a_line_of_other_types_is_no_obstacle(seconds, tmp_path):
    path = compose(tmp_path / "run")
    write_lines(
        path / "sessions.jsonl",
        [{"event": "end"}, {"event": "start", "step": "?"}, {"event": "end", "seconds": seconds}],
    )
    write_lines(path / "metrics.jsonl", [{"step": "x"}, {"loss": 1}, {"step": 1, "loss": seconds}])
    write_lines(path / "config_changes.jsonl", [{"step": 3, "changes": 4}, {"step": 4}])
    run = read_contents(path)
    assert run.problems == []
    assert run.curves == {}
    assert [session["seconds"] for session in run.sessions] == [None]
    assert run.config_changes == []


def test_damaged_lines_are_counted_and_a_line_that_is_being_written_is_not(tmp_path):
    path = compose(tmp_path / "run")
    complete = (path / "metrics.jsonl").read_bytes()
    (path / "metrics.jsonl").write_bytes(b"\x00\x01\n" + complete + b'{"step": 22, "lo')
    run = read_contents(path)
    assert len(run.curves["loss"][0]) == 10
    (problem,) = run.problems
    assert "1 of 13 lines are damaged, the first is line 1" in problem


def test_a_repeated_step_counts_once_with_its_last_value():
    lines = [{"step": 2, "loss": 1.0}, {"step": 4, "loss": 2.0}, {"step": 2, "loss": 3.0}]
    steps, values = curves([*lines, {"step": 6, "loss": None}])["loss"]
    np.testing.assert_array_equal(steps, [2, 4])
    np.testing.assert_array_equal(values, [3.0, 2.0])


def test_arrays_of_another_evaluation_are_not_used(tmp_path):
    path = compose(tmp_path / "run")
    saved = json.loads((path / "evaluation.json").read_text())
    (path / "evaluation.json").write_text(json.dumps(saved | {"bits_per_dim": 1.9}))
    run = read_contents(path)
    assert run.arrays is None
    assert "of another evaluation" in run.problems[0]


def test_tables_and_plots_of_experiments_are_found(tmp_path):
    path = compose(tmp_path / "run")
    (path / "sigma.md").write_text("| a |\n| --- |\n")
    save_png(path / "sigma.png", np.zeros((4, 4, 1), np.uint8))
    (path / "samples" / "sweep.md").write_text("text")
    save_png(path / "samples" / "sweep.png", np.zeros((4, 4, 1), np.uint8))
    (path / "compressed").mkdir()
    (path / "compressed" / "test.md").write_text("report")
    run = read_contents(path)
    documents = {document.name: document for document in run.documents}
    assert documents.keys() == {"sigma", "samples/sweep", "compressed/test"}
    assert documents["sigma"].plot.width == 4
    assert documents["compressed/test"].plot is None
    assert "sweep" not in run.samples


def test_an_empty_directory_and_none_hold_nothing(tmp_path):
    assert read_contents(tmp_path).is_empty
    assert read_contents(tmp_path / "none").is_empty
    assert not read_contents(compose(tmp_path / "run")).is_empty


def test_a_large_picture_is_reduced_and_says_so(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (600, 2000, 3), np.uint8)
    save_png(tmp_path / "large.png", noise)
    save_png(tmp_path / "small.png", noise[:8, :8])
    reader = Reader(epath.Path(tmp_path))
    large, small = reader.picture("large.png"), reader.picture("small.png")
    assert large.is_reduced
    assert not small.is_reduced
    assert (large.width, large.height) == (2000, 600)
    assert len(large.source) < (tmp_path / "large.png").stat().st_size / 3
    assert (tmp_path / "large.png").stat().st_size > _LARGEST
