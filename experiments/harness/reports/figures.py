"""The plots of a report, as SVG elements."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from experiments.harness.pictures import plots
from experiments.harness.pictures.vector import to_svg
from experiments.harness.reports.contents import Arrays, Contents, Curve, Evaluation

_POINTS = 400  # of a line, at most
_ALL_POINTS = 3000  # of all lines in a plot, about


class Figure(NamedTuple):
    """A plot.

    Attributes:
      title: its title, in text.
      svg: the plot.
      caption: what it shows.
      legend: the names of its lines, in the order of `plots.LINE_STYLES`; empty for one line.
    """

    title: str
    svg: str
    caption: str
    legend: tuple[str, ...] = ()


class Chart(NamedTuple):
    """Curves of metrics.jsonl that share a plot.

    Attributes:
      title: its title.
      ylabel: the unit.
      caption: what it shows.
      names: the curves' names in metrics.jsonl, with those in the legend.
      is_linear: whether its axis is never logarithmic.
    """

    title: str
    ylabel: str
    caption: str
    names: Mapping[str, str]
    is_linear: bool = False


_QUARTERS = ("(0, T/4]", "(T/4, T/2]", "(T/2, 3T/4]", "(3T/4, T]")
CHARTS = (
    Chart("Loss", "loss", "The training loss: the mean since the last line.", {"loss": ""}),
    Chart(
        "Validation",
        "bits/dim",
        "A quick estimate of the bound on validation, with the averaged weights.",
        {"validation_bits_per_dim": ""},
    ),
    Chart(
        "Loss by quarter of t",
        "loss",
        "The mean loss of the examples whose t is in each quarter of 1 … T.",
        {f"loss_quartile_{i}": quarter for i, quarter in enumerate(_QUARTERS, 1)},
    ),
    Chart("Gradient norm", "norm", "The global norm before clipping.", {"grad_norm": ""}),
    Chart("Learning rate", "learning rate", "At the last step.", {"learning_rate": ""}, True),
    Chart("Speed", "images/s", "Training images a second.", {"images_per_second": ""}, True),
)


def training(contents: Contents) -> list[Figure]:
    """The curves of a training run; those that its log lacks are left out."""
    figures = []
    for chart in CHARTS:
        lines = {label: contents.curves.get(name) for name, label in chart.names.items()}
        lines = {label: curve for label, curve in lines.items() if curve is not None}
        if lines:
            legend = tuple(lines) if len(chart.names) > 1 else ()
            figures.append(_lines(chart, list(lines.values()), legend))
    return figures


def overlaid(contents: list[Contents], names: tuple[str, ...]) -> list[Figure]:
    """The loss, validation and speed of several runs, each with a line for each run."""
    figures = []
    for chart in CHARTS:
        (name, *more), nothing = chart.names, (np.zeros(0), np.zeros(0))
        lines = [each.curves.get(name, nothing) for each in contents]
        if not more and any(len(steps) for steps, _ in lines):
            figures.append(_lines(chart, lines, names))
    return figures


def _lines(chart: Chart, curves: list[Curve], legend: tuple[str, ...]) -> Figure:
    limit = min(_POINTS, max(_ALL_POINTS // len(curves), 30))
    thinned = [thin(curve, limit) for curve in curves]
    most = max(len(steps) for steps, _ in curves)
    caption = chart.caption
    if most > limit:
        caption += f" Each point is the mean of up to {-(-most // limit)} lines of the log."

    def draw(axes: Any) -> None:
        plots.draw_lines(axes, thinned, "step", chart.ylabel)
        if not chart.is_linear:
            plots.log_if_wide(axes, np.concatenate([values for _, values in thinned]))

    svg = _svg(chart.title, draw)
    return Figure(chart.title, svg, caption, legend)


def thin(curve: Curve, limit: int) -> Curve:
    """A curve with at most so many points: means of neighbours."""
    steps, values = curve
    size = -(-len(steps) // limit)
    if size < 2:
        return curve
    starts = np.arange(0, len(steps), size)
    counts = np.diff([*starts, len(steps)])
    return np.add.reduceat(steps, starts) / counts, np.add.reduceat(values, starts) / counts


def bound(evaluation: Evaluation, arrays: Arrays) -> list[Figure]:
    """Where the bits of the bound are, and rate and distortion."""
    prior, num_timesteps = evaluation.parts["prior"], len(arrays.log_snr)
    ends = np.unique(np.linspace(0, num_timesteps - 1, _POINTS + 1).astype(int))
    t, rate, rmse = ends + 1, plots.rates(arrays.kl, prior)[ends], arrays.rmse[ends]
    figures = []
    if len(ends) > 1:
        starts, widths = ends[:-1], np.diff(ends)
        kl = np.add.reduceat(arrays.kl, starts)
        kl_se = None if arrays.kl_se is None else np.add.reduceat(arrays.kl_se, starts) / widths
        middle = (t[:-1] + t[1:] + 1) / 2
        several = "" if len(ends) == num_timesteps else "; neighbouring t are drawn together"
        figures += [
            Figure(
                "KL per timestep",
                _svg(
                    "KL per timestep",
                    lambda axes: plots.draw_kl(axes, middle, kl / widths, kl_se, num_timesteps),
                ),
                "The mean over examples of the KL at t = 2 … T, with a band of two standard errors "
                f"over examples{several}.",
            ),
            Figure(
                "Density over log-SNR",
                _svg("Density", lambda axes: plots.draw_kl_density(axes, kl, arrays.log_snr[ends])),
                "The same KLs over the noise level. The area is the diffusion term, for any T and "
                "schedule.",
            ),
        ]
    uniform = evaluation.record.get("uniform_bits_per_dim")
    has_levels = isinstance(uniform, float | int) and 0 < uniform < 32
    top = round(2**uniform) - 1 if has_levels else None
    unit = "grey levels" if has_levels else "data units"
    figures += [
        Figure(
            "Rate",
            _svg("Rate", lambda axes: plots.draw_rate(axes, t, rate)),
            "Bits to know x_t: the prior and the KLs at T … t + 1.",
        ),
        Figure(
            "Distortion",
            _svg("Distortion", lambda axes: plots.draw_distortion(axes, t, rmse, top)),
            f"The root mean square error of x̂_0(x_t), in {unit}.",
        ),
        Figure(
            "Rate–distortion",
            _svg(
                "Rate-distortion",
                lambda axes: plots.draw_rate_distortion(axes, rate, rmse, top),
            ),
            "Progressive coding: the error of x̂_0 over the bits received so far.",
        ),
    ]
    return figures


def _svg(title: str, draw: Callable[[Any], None]) -> str:
    figure, axes = plots.panel()
    draw(axes)
    axes.set_title("")  # the page has it
    return to_svg(figure, title)
