"""The report as a user makes it: of a run, of several, of a study, of nothing."""

import os
import subprocess
import sys

import jax
import pytest

from experiments import report
from experiments.harness import command_line
from tests.experiments import tiny
from tests.experiments.harness.reports.composed import Page, compose

pytest_plugins = ["tests.experiments.tiny"]


def words(workdir):
    return Page((workdir / "report.html").read_text()).text


def test_the_main_job_leaves_a_report(finished):
    text = (finished.workdir / "report.html").read_text()
    parsed = Page(text)
    assert "step 12 of 12" in parsed.text
    assert "447 examples, T = 8" in parsed.text
    assert len(text) < 1e6
    # samples, reverse, forward, and the pictures of two steps.
    assert len(parsed.all("img")) == 5


def test_a_report_reads_only_and_compiles_nothing(finished, tmp_path):
    workdir = tiny.copy(finished.workdir, tmp_path)
    before = tiny.files(workdir)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        listen := lambda event, duration, **_: compiled.append("compile" in event)
    )
    report.run(finished.config, workdir)
    jax.monitoring.unregister_event_duration_listener(listen)
    after = tiny.files(workdir)
    assert not any(compiled)
    assert {path for path in after if after[path] != before.get(path)} <= {
        workdir,
        workdir / "report.html",
    }


def test_a_run_in_training_is_reported_though_it_holds_the_lock(tmp_path):
    workdir = compose(tmp_path / "run")
    (workdir / "evaluation.json").unlink()
    (workdir / "training.lock").write_text("another process")
    report.run(tiny.config(), workdir)
    assert "step 20 of 20" in words(workdir)


def test_several_directories_are_one_page(tmp_path, capsys):
    first, other = compose(tmp_path / "first"), compose(tmp_path / "other", (2.0, 3.0))
    (tmp_path / "run.log").write_text("")
    (tmp_path / "empty").mkdir()
    # As of a glob: the first again, a file and an empty directory among them.
    others = [str(path) for path in sorted(tmp_path.iterdir())]
    assert command_line.run("report", tiny.config(), str(first), others) == 0
    assert capsys.readouterr().out.strip() == f"the report is in {first / 'report.html'}"
    text = words(first)
    assert "other +0.5000" in text
    assert f"{tmp_path / 'run.log'} is a file" in text
    assert f"{tmp_path / 'empty'} holds nothing" in text
    assert not (other / "report.html").exists()


def test_a_study_is_reported_with_its_cells(tmp_path):
    study = tmp_path / "study"
    for cell in ("a,seed=0", "b,seed=0"):
        compose(study / "cells" / cell)
    (study / "cells" / "c,seed=0").mkdir()
    (study / "ablation.json").write_text("{}")
    (study / "ablation.md").write_text("the table of the study")
    report.run(tiny.config(), study)
    text = words(study)
    assert "the table of the study" in text
    assert "b,seed=0 +0.0000 0.0000" in text
    assert "c,seed=0" not in text


def test_the_page_is_written_where_a_setting_says(tmp_path):
    workdir, target = compose(tmp_path / "run"), tmp_path / "page.html"
    report.run(tiny.config(report__file=str(target)), workdir)
    assert target.read_text().startswith("<!DOCTYPE html>")
    assert not (workdir / "report.html").exists()


@pytest.mark.parametrize("make", [lambda path: None, os.mkdir, lambda path: path.write_text("")])
def test_nothing_to_report_is_one_line_and_no_page(make, tmp_path, capsys):
    make(tmp_path / "run")
    assert command_line.run("report", tiny.config(), str(tmp_path / "run")) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: workdir={tmp_path / 'run'} holds nothing to report")
    assert line.count("\n") == 1
    assert not list(tmp_path.rglob("report.html"))


def test_a_page_that_cannot_be_written_is_one_line(tmp_path):
    workdir = compose(tmp_path / "run")
    with tiny.refused("report.file", "is a directory"):
        report.run(tiny.config(report__file=str(tmp_path)), workdir)
    with tiny.refused("cannot be written", "--config.report.file=PATH"):
        report.run(tiny.config(report__file=str(tmp_path / "none" / "page.html")), workdir)


@pytest.mark.parametrize("name", ["config.json", "parts.json"])
def test_a_run_that_cannot_be_opened_is_reported(name, tmp_path, capsys):
    workdir = compose(tmp_path / "run")
    (workdir / name).write_text("{")
    assert command_line.run("report", tiny.config(), str(workdir)) == 0
    assert f"{name} is damaged" in words(workdir)


@pytest.mark.parametrize("experiment", ["all", "train", "evaluate", "sample"])
def test_only_a_report_takes_further_directories(experiment, tmp_path, capsys):
    status = command_line.run(experiment, tiny.config(), str(tmp_path / "a"), [str(tmp_path)])
    assert status == 2
    line = capsys.readouterr().err
    assert f"{str(tmp_path)!r} is no flag" in line
    assert "only --experiment=report takes further directories" in line
    assert not (tmp_path / "a").exists()


def test_flags_may_follow_the_directories_and_no_device_is_opened(tmp_path):
    """On a machine whose devices a training has taken, a report can still be made."""
    first, other = compose(tmp_path / "first"), compose(tmp_path / "other")
    script = (
        "import runpy, sys, jax\n"
        "try: runpy.run_path('main.py', run_name='__main__')\n"
        "except SystemExit as end: print(end.code, jax._src.xla_bridge.backends_are_initialized())"
    )
    arguments = [f"--workdir={first}", str(other), "--experiment=report", "--config.seed=1"]
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=command_line.__file__.partition("/experiments/")[0],
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
    assert "other +0.0000" in words(first)
