"""Progress in a log file: whole lines at intervals, and no remaining time from a compilation."""

import pytest
from tqdm import std, tqdm

from experiments.harness.processes import progress as module
from experiments.harness.processes.progress import progress, start_after


@pytest.fixture
def clock(monkeypatch):
    """Seconds that a test sets, for the lines and for tqdm."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.time, "time", lambda: now[0])
    monkeypatch.setattr(std, "time", lambda: now[0])
    return now


def test_a_log_file_gets_whole_lines_at_intervals(clock, capsys):
    with progress(90, "train", "step") as bar:
        for _ in range(90):
            clock[0] += 1
            bar.update(1)
            tqdm.write("a message")
    error = capsys.readouterr().err
    assert "\r" not in error
    lines = error.splitlines()
    done = [line.split("/")[0].split()[-1] for line in lines]
    assert done == ["20", "40", "60", "80", "90"]
    assert "00:20<01:10" in lines[0]


@pytest.mark.parametrize("total", [None, 5])
def test_a_bar_that_is_not_left_prints_nothing_when_it_is_short(total, clock, capsys):
    with progress(total, "evaluate", "eval", leave=False) as bar:
        bar.update(5)
    assert capsys.readouterr().err == ""


def test_the_remaining_time_leaves_out_the_compilation(clock, capsys):
    with progress(1002, "train", "step", initial=1) as bar:
        clock[0] += 3600
        start_after(bar, 1)
        assert "<?" in str(bar)
        clock[0] += 100
        bar.update(500)
        assert "[01:40<01:40,  5.00step/s]" in str(bar)
        assert "502/1002" in str(bar)
