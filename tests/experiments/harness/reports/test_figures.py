"""What the plots of a report are drawn from."""

import numpy as np
import pytest

from experiments.harness.pictures import plots
from experiments.harness.reports import figures
from experiments.harness.reports.contents import read_contents
from tests.experiments.harness.reports.composed import compose


@pytest.mark.parametrize("length", [1, 7, 30, 31, 1000, 1001])
def test_a_thinned_curve_has_the_same_mean_and_at_most_the_limit_of_points(length):
    steps, values = np.arange(length) * 10, np.random.default_rng(0).normal(size=length)
    thin_steps, thin_values = figures.thin((steps, values), 30)
    assert len(thin_steps) == len(thin_values) <= 30
    counts = np.full(len(thin_steps), -(-length // 30))
    counts[-1] = length - counts[:-1].sum()
    assert (counts * thin_values).sum() == pytest.approx(values.sum())
    assert (counts * thin_steps).sum() == pytest.approx(steps.sum())
    assert (np.diff(thin_steps) > 0).all()


@pytest.mark.parametrize("num_timesteps", [1, 2, 300, 5000])
def test_the_bound_is_drawn_from_all_timesteps(num_timesteps, tmp_path, monkeypatch):
    """With many timesteps neighbours share a point, and the sum of the KLs stays the same."""
    run = read_contents(compose(tmp_path / "run"))
    rng = np.random.default_rng(0)
    kl, log_snr = rng.random(num_timesteps - 1), np.linspace(9, -9, num_timesteps)
    arrays = run.arrays._replace(
        kl=kl, log_snr=log_snr, kl_se=kl / 9, rmse=np.linspace(1, 5, num_timesteps)
    )
    drawn = {}
    for name in ("draw_kl", "draw_kl_density", "draw_rate", "draw_distortion"):
        monkeypatch.setattr(plots, name, lambda axes, *a, name=name: drawn.update({name: a}))
    titles = [figure.title for figure in figures.bound(run.evaluation, arrays)]
    assert titles[-3:] == ["Rate", "Distortion", "Rate–distortion"]
    t, rate = drawn["draw_rate"]
    np.testing.assert_allclose(rate, 0.25 + np.append(kl, 0)[::-1].cumsum()[::-1][t - 1])
    assert (t[0], t[-1]) == (1, num_timesteps)
    assert rate[0] == pytest.approx(0.25 + kl.sum())
    assert drawn["draw_distortion"][2] == 16  # of 17 grey levels
    if num_timesteps > 1:
        sums, edges = drawn["draw_kl_density"]
        assert sums.sum() == pytest.approx(kl.sum())
        assert (len(edges), edges[0], edges[-1]) == (len(sums) + 1, 9, -9)
        middle, means, errors, last = drawn["draw_kl"]
        np.testing.assert_allclose(errors, means / 9)
        assert 2 <= middle[0] <= middle[-1] <= last == num_timesteps
        if num_timesteps == 300:
            np.testing.assert_array_equal(middle, np.arange(2, 301))
            np.testing.assert_array_equal(means, kl)


def test_runs_are_overlaid_in_their_own_colours(tmp_path, monkeypatch):
    """A run without a curve keeps its place, so that the colours of the others stay the same."""
    runs = [read_contents(compose(tmp_path / name)) for name in "abc"]
    runs[1].curves.clear()
    drawn = {}
    monkeypatch.setattr(
        plots, "draw_lines", lambda axes, lines, xlabel, ylabel: drawn.setdefault(ylabel, lines)
    )
    found = {figure.title: figure for figure in figures.overlaid(runs, ("a", "b", "c"))}
    assert found.keys() == {"Loss", "Validation", "Gradient norm", "Learning rate", "Speed"}
    assert [len(steps) for steps, _ in drawn["loss"]] == [10, 0, 10]
    assert found["Loss"].legend == ("a", "b", "c")
