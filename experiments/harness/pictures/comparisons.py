"""Plots of a study: differences to a baseline, and learning curves, as PNG files."""

import itertools
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Float, Real

from experiments.harness.pictures.plots import BLUE, ORANGE, save_figure

_GREY = "#777777"
_FAR = 8.0  # a value that is this many times the median distance from zero is drawn at the edge
_NAME_WIDTH = 34  # characters of a line of a name

Curve = tuple[Real[np.ndarray, "_"], Float[np.ndarray, "_"]]
"""Training steps and the values at these steps."""


class Bar(NamedTuple):
    """A difference to the baseline.

    Attributes:
      name: of the compared setting; any characters.
      value: the difference.
      half_width: half the width of its confidence interval; NaN if unknown.
      is_significant: whether the difference is marked as different from zero.
      text: the number as it is printed beside the bar.
    """

    name: str
    value: float
    half_width: float
    is_significant: bool
    text: str


class Grid(NamedTuple):
    """Differences by the values of two axes.

    Attributes:
      axes: the names of the axis of the rows and of that of the columns.
      names: the names of the rows, and those of the columns.
      values: the differences, which determine the colours: zero where one is not significant, and
        NaN where there is none.
      texts: what is printed in each place.
    """

    axes: tuple[str, str]
    names: tuple[Sequence[str], Sequence[str]]
    values: Float[np.ndarray, "rows columns"]
    texts: Sequence[Sequence[str]]


def plot_differences(
    path: epath.PathLike, bars: Sequence[Bar], reference: str, unit: str, grid: Grid | None = None
) -> None:
    """Draws differences with their confidence intervals, from the top in the order given.

    Significant differences are filled, blue below zero and orange above; others are grey rings. A
    value far from all others is drawn as an arrow at the edge, and a wide interval ends there.

    Args:
      path: PNG file to write.
      bars: the differences.
      reference: the baseline, at zero.
      unit: of the differences.
      grid: the same differences as a second panel, by the values of two axes.
    """
    from matplotlib.figure import Figure

    names = [wrapped(bar.name) for bar in bars]
    row = 0.13 + 0.17 * max(name.count("\n") + 1 for name in names)
    widths, height = [7.6], 1.5 + row * max(len(bars), 3)
    if grid is not None:
        widths.append(1.2 + 1.25 * len(grid.names[1]))
        height = max(height, 1.7 + 0.55 * len(grid.names[0]))
    figure = Figure(figsize=(sum(widths), height), layout="constrained")
    panels = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
    _draw_bars(panels[0], bars, names)
    panels[0].set_xlabel(
        f"difference in {unit}, with its 95 % interval\nfilled: significant by Holm's tests at 5 %",
        fontsize=8,
    )
    _set_title(panels[0], f"Baseline (zero): {reference}", 64)
    if grid is not None:
        _draw_grid(panels[1], grid)
    save_figure(path, figure)


def _draw_bars(axes: Any, bars: Sequence[Bar], names: Sequence[str]) -> None:
    low, high = _limits(bars)
    axes.axvline(0.0, color="black", linewidth=1.0, zorder=1)
    for place, bar in enumerate(bars):
        colour = _GREY if not bar.is_significant else BLUE if bar.value < 0 else ORANGE
        if not low <= bar.value <= high:
            x, marker = (low, "<") if bar.value < 0 else (high, ">")
            axes.plot([x], [place], marker, color=colour, markersize=8, clip_on=False)
        else:
            axes.errorbar(
                [bar.value],
                [place],
                xerr=None if np.isnan(bar.half_width) else [bar.half_width],
                fmt="o",
                color=colour,
                markersize=6,
                markerfacecolor=colour if bar.is_significant else "white",
                elinewidth=1.6,
                capsize=3,
            )
        axes.annotate(
            bar.text,
            (1.03, place),
            xycoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=8,
            color=colour,
            weight="bold" if bar.is_significant else "normal",
        )
    axes.set_xlim(low, high)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.set_yticks(range(len(bars)), labels=names, fontsize=9)
    _as_it_is(axes.get_yticklabels())
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _limits(bars: Sequence[Bar]) -> tuple[float, float]:
    """The ends of the axis: zero and all usual values and intervals lie between them."""
    largest = _largest_usual([bar.value for bar in bars])
    ends = [0.0]
    for bar in bars:
        if abs(bar.value) <= largest:
            # An interval that is far wider than the values is cut.
            width = min(np.nan_to_num(bar.half_width), 3 * largest)
            ends += [bar.value - width, bar.value + width]
        else:
            ends.append(np.sign(bar.value) * 0.5 * largest)
    low, high = min(ends), max(ends)
    margin = 0.06 * (high - low) or 1.0
    return low - margin, high + margin


def _largest_usual(values: Iterable[float]) -> float:
    """The largest magnitude that is no more than `_FAR` times the median magnitude."""
    sizes = np.abs(np.asarray(list(values)))
    sizes = sizes[np.isfinite(sizes) & (sizes > 0)]
    return float(sizes[sizes <= _FAR * np.median(sizes)].max()) if sizes.size else 0.0


def _draw_grid(axes: Any, grid: Grid) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    colours = LinearSegmentedColormap.from_list("differences", [BLUE, "white", ORANGE])
    colours = colours.with_extremes(bad="#eeeeee")
    scale = _largest_usual(grid.values.ravel()) or 1.0
    values = np.ma.masked_invalid(grid.values)
    axes.imshow(values, cmap=colours, vmin=-scale, vmax=scale, aspect="auto")
    for row, column in np.ndindex(grid.values.shape):
        shade = abs(np.nan_to_num(grid.values[row, column])) / scale
        axes.text(
            column,
            row,
            grid.texts[row][column],
            ha="center",
            va="center",
            fontsize=8,
            color="white" if shade > 0.6 else "black",
            parse_math=False,
        )
    rows = [wrapped(name, 20) for name in grid.names[0]]
    columns = [wrapped(name, 16) for name in grid.names[1]]
    axes.set_yticks(range(len(rows)), labels=rows, fontsize=8)
    axes.set_xticks(range(len(columns)), labels=columns, fontsize=8)
    _as_it_is([*axes.get_yticklabels(), *axes.get_xticklabels()])
    axes.set_ylabel(wrapped(grid.axes[0], 30), fontsize=9, parse_math=False)
    axes.set_xlabel(wrapped(grid.axes[1], 40), fontsize=9, parse_math=False)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    _set_title(axes, "Differences by both settings", 40)


def plot_learning_curves(
    path: epath.PathLike, curves: Mapping[str, Sequence[Curve]], title: str, window: int = 1
) -> None:
    """Draws learning curves, each name in one colour with a thin line for each training seed.

    The vertical axis shows the range of the second half of the steps.

    Args:
      path: PNG file to write.
      curves: (steps, values) of each training seed, by name; the first is the baseline, in black.
      title: what the values are.
      window: the number of neighbouring values that are averaged.
    """
    from matplotlib import color_sequences, lines
    from matplotlib.figure import Figure

    height = max(4.0, 0.7 + 0.2 * sum(wrapped(name).count("\n") + 1 for name in curves))
    figure = Figure(figsize=(8.4, height), layout="constrained")
    axes = figure.subplots()
    styles = itertools.product(("-", "--", ":", "-."), color_sequences["tab10"])
    styles = itertools.chain([("-", "black")], itertools.cycle(styles))
    handles = []
    for (line, colour), by_seed in zip(styles, curves.values(), strict=False):
        for curve in by_seed:
            axes.plot(*smoothed(curve, window), line, color=colour, linewidth=1.1, alpha=0.8)
        handles.append(lines.Line2D([], [], linestyle=line, color=colour))
    _show_second_half(axes, [curve for by_seed in curves.values() for curve in by_seed])
    axes.set_xlabel("training step")
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    # A label that begins with an underscore would be left out.
    labels = [" " + wrapped(name) for name in curves]
    legend = figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside right upper")
    _as_it_is(legend.get_texts())
    save_figure(path, figure)


def smoothed(curve: Curve, window: int) -> Curve:
    """Means of `window` neighbouring values, at the means of their steps."""
    window = max(1, min(window, len(curve[1])))
    kernel = np.full(window, 1 / window)
    steps, values = (np.convolve(np.asarray(x, np.float64), kernel, "valid") for x in curve)
    return steps, values


def _show_second_half(axes: Any, curves: Sequence[Curve]) -> None:
    last = max((steps[-1] for steps, _ in curves if len(steps)), default=0)
    late = [np.asarray(values)[np.asarray(steps) >= last / 2] for steps, values in curves]
    late = np.concatenate([*late, []])
    late = late[np.isfinite(late)]
    if late.size and late.max() > late.min():
        low, high = late.min(), np.quantile(late, 0.99)
        axes.set_ylim(low - 0.1 * (high - low), high + 0.5 * (high - low))


def wrapped(text: str, width: int = _NAME_WIDTH) -> str:
    """Text in lines of at most `width` characters, and three lines at most."""
    lines = textwrap.wrap(" ".join(text.split()), width) or [""]
    return "\n".join(lines[:3]) + (" …" if len(lines) > 3 else "")


def _set_title(axes: Any, text: str, width: int) -> None:
    axes.set_title(wrapped(text, width), fontsize=9, loc="left", parse_math=False)


def _as_it_is(texts: Iterable[Any]) -> None:
    """Shows dollar signs instead of reading what is between them as a formula."""
    for text in texts:
        text.set_parse_math(False)
