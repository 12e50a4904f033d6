"""Plots of measurements, as PNG files."""

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Float

from experiments.harness.pictures.images import write_image

BLUE, ORANGE = "#3465a4", "#ce5c00"
# Of lines that a legend tells apart: colours that differ in lightness too, then dashes.
COLORS = (BLUE, ORANGE, "#4e9a06", "#75507b", "#c4a000", "#06989a", "#a40000", "#555753")
LINE_STYLES = tuple((color, dashes) for dashes in ("-", "--", ":", "-.") for color in COLORS)
GRID = "#dddddd"
_LOG_RANGE = 30.0  # a curve with a larger ratio of its extremes has a logarithmic axis
_POINTS_SHOWN = 30  # a curve with at most this number of points shows each of them


def plot_kl_per_timestep(
    path: epath.PathLike,
    *,
    kl: np.ndarray,
    log_snr: np.ndarray,
    prior: float,
    reconstruction: float,
    kl_se: np.ndarray | None = None,
) -> None:
    """Draws the bound's KLs by timestep, and as a density over log-SNR.

    In the second panel the area under the curve is the diffusion term for any T and schedule, so
    that runs with different ones can be compared.

    Args:
      path: PNG file to write.
      kl: [T − 1], mean over examples of KL(q(x_{t−1} | x_t, x_0) ‖ p(x_{t−1} | x_t)) for t = 2..T,
        in bits/dim.
      log_snr: [T], log-SNR at t = 1..T, in nats, falling; in float64 where T is large.
      prior: bits/dim.
      reconstruction: bits/dim.
      kl_se: [T − 1], standard error of each mean, drawn as a band of ± 2.

    Raises:
      ValueError: if the lengths do not fit each other, or `log_snr` rises.
    """
    kl, log_snr = np.asarray(kl, np.float64), np.asarray(log_snr, np.float64)
    _require_length("log_snr", log_snr, len(kl) + 1)
    if kl_se is not None:
        _require_length("kl_se", kl_se, len(kl))
    if (np.diff(log_snr) > 0).any():
        raise ValueError("log_snr rises with t somewhere: it must fall")
    figure, (by_step, by_noise) = _figure(2)
    draw_kl(by_step, np.arange(2, len(kl) + 2), kl, kl_se, len(log_snr))
    draw_kl_density(by_noise, kl, log_snr)
    total = prior + kl.sum() + reconstruction
    figure.suptitle(
        f"{total:.4f} bits/dim  =  prior {prior:.4f}  +  diffusion {kl.sum():.4f}"
        f"  +  reconstruction {reconstruction:.4f}"
    )
    save_figure(path, figure)


def plot_rate_distortion(
    path: epath.PathLike, *, kl: np.ndarray, prior: float, rmse: np.ndarray, max_value: int | None
) -> None:
    """Draws rate and distortion of progressive coding, as in Ho et al. (2020), Figure 5.

    The rate at t is the prior plus the KLs at T, T − 1, …, t + 1: the cost of transmitting x_t. The
    distortion is the error of x̂_0(x_t).

    Args:
      path: PNG file to write.
      kl: [T − 1], KL for t = 2..T, in bits/dim.
      prior: bits/dim.
      rmse: [T], root mean square error of x̂_0(x_t) for t = 1..T, in grey levels; of continuous
        data, in data units.
      max_value: the largest grey level: 255 for bytes, 16 for digits; None for continuous data.

    Raises:
      ValueError: if the lengths do not fit each other.
    """
    kl, rmse = np.asarray(kl, np.float64), np.asarray(rmse, np.float64)
    _require_length("rmse", rmse, len(kl) + 1)
    rate = rates(kl, prior)
    t = np.arange(1, len(rmse) + 1)
    figure, (rate_axes, distortion_axes, both) = _figure(3)
    draw_rate(rate_axes, t, rate)
    draw_distortion(distortion_axes, t, rmse, max_value)
    draw_rate_distortion(both, rate, rmse, max_value)
    save_figure(path, figure)


def rates(kl: np.ndarray, prior: float) -> np.ndarray:
    """The cost of x_t at t = 1..T: the prior plus the KLs at T, …, t + 1, in their unit."""
    return prior + np.concatenate([np.cumsum(kl[::-1])[::-1], [0.0]])


def draw_kl(
    axes: Any, t: np.ndarray, kl: np.ndarray, kl_se: np.ndarray | None, num_timesteps: int
) -> None:
    """The KL in bits/dim at timesteps t out of 1 … T, with a band of ± 2 standard errors."""
    _curve(axes, t, kl, kl_se)
    if not log_if_wide(axes, kl):
        axes.set_ylim(bottom=0)
    _count_timesteps(axes, num_timesteps)
    axes.set(ylabel="KL at t (bits/dim)", title="KL per timestep")


def draw_kl_density(axes: Any, kl: np.ndarray, log_snr: np.ndarray) -> None:
    """KLs of steps over the log-SNRs at their ends, one more than steps.

    Each KL is spread evenly over the log-SNRs of its step.
    """
    gaps = log_snr[:-1] - log_snr[1:]
    # A step without a gap adds no noise and has no KL.
    density = np.divide(kl, gaps, out=np.zeros_like(kl), where=gaps > 0)
    axes.stairs(density[::-1], log_snr[::-1], color=BLUE, fill=True, alpha=0.25)
    axes.stairs(density[::-1], log_snr[::-1], color=BLUE, linewidth=1.0, baseline=None)
    axes.set_ylim(bottom=0)
    axes.set(
        xlabel="log-SNR (nats); noise to the left",
        ylabel="bits/dim per nat of log-SNR",
        title="Density: its area is the diffusion term",
    )


def draw_rate(axes: Any, t: np.ndarray, rate: np.ndarray) -> None:
    """The rate in bits/dim at t = 1 … T, from T on the left."""
    _curve(axes, t, rate)
    _count_timesteps(axes, int(t[-1]))
    axes.invert_xaxis()
    axes.set_ylim(bottom=0)
    axes.set(ylabel="bits/dim to know xₜ", title="Rate")


def draw_distortion(axes: Any, t: np.ndarray, rmse: np.ndarray, max_value: int | None) -> None:
    """The error of x̂_0(x_t) at t = 1 … T, from T on the left."""
    _curve(axes, t, rmse)
    _count_timesteps(axes, int(t[-1]))
    axes.invert_xaxis()
    axes.set_ylim(bottom=0)
    axes.set(ylabel=_rmse_label(max_value), title="Distortion")


def draw_rate_distortion(
    axes: Any, rate: np.ndarray, rmse: np.ndarray, max_value: int | None
) -> None:
    """The error of x̂_0(x_t) over the rate of x_t in bits/dim."""
    _curve(axes, rate, rmse)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.set(xlabel="rate (bits/dim)", ylabel=_rmse_label(max_value), title="Rate–distortion")


def _rmse_label(max_value: int | None) -> str:
    unit = "in data units" if max_value is None else f"on [0, {max_value}]"
    return f"RMSE of x̂₀(xₜ) {unit}"


def draw_lines(
    axes: Any, lines: Sequence[tuple[np.ndarray, np.ndarray]], xlabel: str, ylabel: str
) -> None:
    """Lines of (x, y), in the styles `LINE_STYLES` in turn; a legend is the caller's."""
    styles = itertools.cycle(LINE_STYLES)
    for (x, y), (color, dashes) in zip(lines, styles, strict=False):
        marker = "o" if len(x) <= _POINTS_SHOWN else None
        style = {"marker": marker, "markersize": 3, "linewidth": 1.4}
        axes.plot(x, y, color=color, linestyle=dashes, **style)
    axes.set(xlabel=xlabel, ylabel=ylabel)


def log_if_wide(axes: Any, y: np.ndarray) -> bool:
    """Makes the y axis logarithmic for positive values of very different sizes."""
    is_wide = len(y) > 0 and y.max() > _LOG_RANGE * y.min() > 0
    if is_wide:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    return bool(is_wide)


def plot_costs(path: epath.PathLike, costs: dict[str, dict[str, float]], goal: float) -> None:
    """Draws the costs of estimators as bars on a logarithmic axis, a panel for each model.

    Args:
      path: PNG file to write.
      costs: network evaluations by model and estimator; zero is not drawn.
      goal: the error in bits/dim that is reached with these evaluations.
    """
    from matplotlib.figure import Figure

    height = 1.0 + 0.3 * max(map(len, costs.values()))
    figure = Figure(figsize=(6.4 * len(costs), height), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(costs)))
    for panel, (title, by_estimator) in zip(axes, costs.items(), strict=True):
        names = [name for name, cost in by_estimator.items() if cost > 0][::-1]
        values = [by_estimator[name] for name in names]
        panel.barh(names, values, color=BLUE, alpha=0.7, height=0.65)
        panel.set_xscale("log")
        panel.set_xlim(min(values) / 3, max(values) * 8)
        panel.tick_params(labelsize=9)
        for place, value in enumerate(values):
            panel.text(value * 1.15, place, f"{value:.1e}", va="center", fontsize=8)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel(f"evaluations for ± {goal} bits/dim", fontsize=9)
        panel.spines[["top", "right"]].set_visible(False)
    save_figure(path, figure)


def plot_bits_over_timesteps(
    path: epath.PathLike, bits: dict[str, dict[int, float]], reference: str
) -> None:
    """Draws bits/dim over T with a line for each name, and the differences from a reference.

    Args:
      path: PNG file to write.
      bits: by name and T, in bits/dim.
      reference: the name with which the others are compared.
    """
    figure, (absolute, relative) = _figure(2)
    for (name, by_timesteps), marker in zip(bits.items(), itertools.cycle("os^Dv"), strict=False):
        num_timesteps = sorted(by_timesteps)
        value = np.array([by_timesteps[T] for T in num_timesteps])
        base = np.array([bits[reference][T] for T in num_timesteps])
        style = {"label": name, "marker": marker, "markersize": 4, "linewidth": 1.2}
        absolute.plot(num_timesteps, value, **style)
        relative.plot(num_timesteps, value - base, **style)
    ticks = sorted(set().union(*bits.values()))
    for axes in (absolute, relative):
        axes.set_xscale("log")
        axes.set_xticks(ticks, labels=[str(T) for T in ticks])
        axes.minorticks_off()
        axes.set_xlabel("T")
    absolute.set(ylabel="bits/dim", title="Bound")
    absolute.legend(frameon=False, fontsize=8)
    relative.set(ylabel="bits/dim", title=f"Difference to {reference}")
    save_figure(path, figure)


def plot_points(
    path: epath.PathLike, frames: Float[np.ndarray, "k n d"], captions: Sequence[str]
) -> None:
    """Draws vectors as points of their first two coordinates, or numbers as a histogram.

    Args:
      path: PNG file to write.
      frames: k sets of n vectors, a panel for each; all panels have the same axes.
      captions: k short texts above the panels.
    """
    figure, panels = _figure(len(frames), size=2.4)
    for axes, points, caption in zip(np.atleast_1d(panels), frames, captions, strict=True):
        if points.shape[1] == 1:
            axes.hist(points[:, 0], bins=50, density=True, color=BLUE, alpha=0.7)
        else:
            size = min(20.0, 4000 / len(points))
            axes.scatter(*points[:, :2].T, s=size, color=BLUE, alpha=0.5, linewidths=0)
            axes.set_aspect("equal")
            axes.set(xlim=_range(frames[..., 0]), ylim=_range(frames[..., 1]))
        axes.set_title(caption, fontsize=9)
        axes.tick_params(labelsize=7)
    save_figure(path, figure)


def _range(values: np.ndarray) -> tuple[float, float]:
    """From the smallest to the largest value, with a margin."""
    low, high = float(values.min()), float(values.max())
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def plot_quality(path: epath.PathLike, entries: Sequence[Mapping[str, Any]]) -> None:
    """Draws distances of samples from data over network evaluations, with a line for each sampler.

    Args:
      path: PNG file to write.
      entries: each with sampler, evaluations, frechet, kernel and their mc_se; the first is the
        reference, drawn across with a band of ± 2 standard errors.
    """
    from matplotlib import color_sequences, cycler

    figure, panels = _figure(2)
    styles = cycler(linestyle=("-", "--")) * cycler(color=color_sequences["tab10"])
    titles = {"frechet": "Fréchet distance", "kernel": "Kernel distance"}
    by_sampler = {}
    for entry in entries[1:]:
        by_sampler.setdefault(entry["sampler"], []).append(entry)
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        value, error = entries[0][name], 2 * entries[0][f"{name}_mc_se"]
        label = f"{entries[0]['sampler']}, {entries[0]['evaluations']:.0f} evaluations"
        axes.axhspan(value - error, value + error, color=ORANGE, alpha=0.25, linewidth=0)
        axes.axhline(value, color=ORANGE, linewidth=1.2, label=label)
        axes.set_prop_cycle(styles)
        markers = itertools.cycle("os^Dv<>pXP*h")
        for (sampler, points), marker in zip(by_sampler.items(), markers, strict=False):
            points = sorted(points, key=lambda entry: entry["evaluations"])
            axes.errorbar(
                [entry["evaluations"] for entry in points],
                [entry[name] for entry in points],
                [2 * entry[f"{name}_mc_se"] for entry in points],
                label=sampler,
                marker=marker,
                markersize=4,
                linewidth=1.0,
            )
        axes.set_xscale("log")
        if name == "frechet":
            axes.set_yscale("log")
        else:  # unbiased, and so sometimes negative
            axes.set_yscale("symlog", linthresh=max(value, error))
        axes.set(xlabel="network evaluations a sample", ylabel=title)
    panels[1].legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    save_figure(path, figure)


def panel() -> tuple[Any, Any]:
    """A figure of one panel: (figure, axes)."""
    return _figure(1)


def _figure(panels: int, size: float = 0.0) -> tuple[Any, Any]:
    # Without pyplot, whose state belongs to a notebook that may call this.
    from matplotlib.figure import Figure

    width, height = (size, size) if size else (4.6, 3.6)
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    axes = figure.subplots(1, panels)
    for panel in np.atleast_1d(axes):
        panel.grid(color=GRID, linewidth=0.6)
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _curve(axes: Any, x: np.ndarray, y: np.ndarray, se: np.ndarray | None = None) -> None:
    if se is not None:
        band = 2 * np.asarray(se)
        axes.fill_between(x, y - band, y + band, color=ORANGE, alpha=0.4, linewidth=0)
    marker = "o" if len(x) <= _POINTS_SHOWN else None
    axes.plot(x, y, color=BLUE, linewidth=1.5, marker=marker, markersize=4, clip_on=False)


def _count_timesteps(axes: Any, num_timesteps: int) -> None:
    margin = max(0.5, 0.03 * num_timesteps)
    axes.set_xlim(1 - margin, num_timesteps + margin)
    axes.set_xlabel("timestep t")
    axes.xaxis.get_major_locator().set_params(integer=True)


def _require_length(name: str, array: np.ndarray, length: int) -> None:
    if np.shape(array) != (length,):
        raise ValueError(f"{name} is {np.shape(array)}: it must be ({length},), to go with kl")


def save_figure(path: epath.PathLike, figure: Any) -> None:
    """Writes a figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_image(path, buffer)
