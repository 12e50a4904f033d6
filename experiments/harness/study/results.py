"""The result of a study from its measurements, and the files that hold it."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from diffusion.statistics.crossed import crossed_mean, holm
from experiments.harness.pictures import comparisons
from experiments.harness.study import contrasts, exports, tables
from experiments.harness.study.contrasts import Bounds
from experiments.harness.study.summary import Cell, Curve, Figure, Key, Measured, Summary
from experiments.harness.workdir.files import replace, write_json

VALIDATION = "validation bits/dim"  # the learning curve that is drawn where it is there


def summarize(
    cells: Mapping[Key, Measured],
    baseline: Key,
    axes: Mapping[str, tuple[str, ...]],
    num_dims: int,
    skipped: Mapping[Key, str],
    seeds: Sequence[int],
    failures: Mapping[Key, Mapping[int, str]] | None = None,
) -> Summary:
    """The summary of what has been measured so far.

    Args:
      cells: the measured cells; a cell of which nothing has been measured is left out.
      baseline: the cell with which the others are compared.
      axes: the names of the values of each axis. The grid is their product.
      num_dims: dimensions of an example.
      skipped: the cells of the grid that can't be trained, with the reason.
      seeds: all training seeds of the study.
      failures: of a cell, why trainings failed, by their seed. What was measured counts all the
        same.

    Raises:
      ValueError: for a cell outside the grid, or totals of another number of seeds, examples or
        draws.
    """
    grid = list(itertools.product(*axes.values()))
    _check(cells, baseline, grid, skipped)
    absent = {
        key: tuple(seed for seed in seeds if key not in cells or seed not in cells[key].seeds)
        for key in grid
        if key not in skipped
    }
    failed = {
        key: {seed: reasons[seed] for seed in absent[key] if seed in reasons}
        for key, reasons in (failures or {}).items()
    }
    missing = {
        key: tuple(seed for seed in numbers if seed not in failed.get(key, ()))
        for key, numbers in absent.items()
    }
    bounds = contrasts.finite_bounds(cells, num_dims)
    results = [_cell(key, cells, baseline, bounds) for key in grid if key in cells]
    return Summary(
        axes=axes,
        baseline=baseline,
        seeds=tuple(seeds),
        num_examples=next((m.totals.shape[1] for m in cells.values()), 0),
        cells=_sorted(_corrected(results), baseline),
        effects=contrasts.effects(bounds, axes, baseline),
        skipped=skipped,
        failed={key: reasons for key, reasons in failed.items() if reasons},
        missing={key: numbers for key, numbers in missing.items() if numbers},
    )


def _check(
    cells: Mapping[Key, Measured], baseline: Key, grid: list[Key], skipped: Mapping[Key, str]
) -> None:
    outside = [key for key in (baseline, *cells, *skipped) if key not in grid]
    if outside:
        raise ValueError(f"{outside[0]} is no cell of the grid")
    shapes = {measured.totals.shape[1:] for measured in cells.values()}
    if len(shapes) > 1:
        raise ValueError(f"totals differ in examples and draws: {sorted(shapes)}")
    for key, measured in cells.items():
        if len(measured.totals) != len(measured.seeds):
            raise ValueError(f"{key} has totals of {len(measured.totals)} of {measured.seeds}")


def _cell(key: Key, cells: Mapping[Key, Measured], baseline: Key, bounds: Bounds) -> Cell:
    measured, pair = cells[key], [(key, baseline)]
    counts = (~np.isfinite(measured.totals)).any(axis=2).sum(axis=1)
    return Cell(
        key=key,
        seeds=measured.seeds,
        not_finite={s: int(n) for s, n in zip(measured.seeds, counts, strict=True) if n},
        bound=crossed_mean(np.stack(list(bounds[key].values()))) if key in bounds else None,
        difference=None if key == baseline else contrasts.mean_difference(bounds, pair),
        figures=_figures(measured, cells.get(baseline)),
        curves=measured.curves,
    )


def _figures(measured: Measured, baseline: Measured | None) -> dict[str, Figure]:
    figures = {}
    for name, values in measured.figures.items():
        if name.removesuffix("_se") in measured.figures.keys() - {name}:
            continue
        reference = {} if baseline is None else _by_seed(baseline, name)
        own = _by_seed(measured, name)
        ratios = [own[seed] / reference[seed] for seed in own if reference.get(seed, 0) > 0]
        # An unbiased estimate that can be negative, such as a kernel distance, has no ratio.
        has_ratio = ratios and min(ratios) > 0 and min(reference.values()) > 0
        ratio = float(np.exp(np.mean(np.log(ratios)))) if has_ratio else np.nan
        errors = measured.figures.get(f"{name}_se")
        se = np.nan if errors is None else float(np.mean(errors))
        figures[name] = Figure(tuple(map(float, values)), se, ratio)
    return figures


def _by_seed(measured: Measured, name: str) -> dict[int, float]:
    values = measured.figures.get(name)
    return {} if values is None else dict(zip(measured.seeds, values, strict=True))


def _corrected(cells: list[Cell]) -> list[Cell]:
    """The cells with Holm's p-values, over all differences with an error."""
    tested = [
        place
        for place, cell in enumerate(cells)
        if cell.difference is not None and not np.isnan(cell.difference.p)
    ]
    corrected = list(cells)
    p_values = holm(np.array([cells[place].difference.p for place in tested]))
    for place, p_holm in zip(tested, p_values, strict=True):
        difference = cells[place].difference._replace(p_holm=float(p_holm))
        corrected[place] = cells[place]._replace(difference=difference)
    return corrected


def _sorted(cells: list[Cell], baseline: Key) -> list[Cell]:
    """The baseline, then by rising difference; without one by bound, and then in grid order."""

    def rank(cell):
        if cell.difference is not None:
            return cell.key != baseline, 0, cell.difference.mean.mean
        return cell.key != baseline, 1, np.inf if cell.bound is None else cell.bound.mean

    return sorted(cells, key=rank)


def write(workdir: epath.PathLike, summary: Summary, facts: Mapping[str, Any]) -> None:
    """Writes ablation.json, .csv, .md and .png and learning_curves.png; each replaces an old one.

    Args:
      workdir: the study's directory.
      summary: the result.
      facts: what all cells have in common, such as the split and the number of training steps.
    """
    workdir = epath.Path(workdir)
    write_json(workdir / "ablation.json", exports.to_json(summary, facts))
    replace(workdir / "ablation.csv", exports.to_csv(summary).encode())
    replace(workdir / "ablation.md", (tables.to_markdown(summary, facts) + "\n").encode())
    _draw(workdir, summary)


def _draw(workdir: epath.Path, summary: Summary) -> None:
    """The plots, as far as there is something to be drawn."""
    compared = [cell for cell in summary.cells if cell.difference is not None]
    if compared:
        bound = tables.plus_minus(summary.cells[0].bound)
        comparisons.plot_differences(
            workdir / "ablation.png",
            [_bar(cell) for cell in compared],
            reference=f"{', '.join(summary.baseline)}: {bound} bits/dim",
            unit="bits/dim",
            grid=_grid(summary) if len(summary.axes) == 2 else None,
        )
    names = {name: None for cell in summary.cells for name in cell.curves}
    if not names:
        return
    name = VALIDATION if VALIDATION in names else next(iter(names))
    curves: dict[str, Sequence[Curve]] = {
        ", ".join(cell.key): cell.curves[name] for cell in summary.cells if name in cell.curves
    }
    # The loss of a log line is noisy, the bound on validation is not.
    longest = max(len(values) for by_seed in curves.values() for _, values in by_seed)
    window = 1 if name == VALIDATION else max(1, longest // 25)
    comparisons.plot_learning_curves(workdir / "learning_curves.png", curves, name, window)


def _bar(cell: Cell) -> comparisons.Bar:
    return comparisons.Bar(
        name=", ".join(cell.key),
        value=cell.difference.mean.mean,
        half_width=cell.difference.interval,
        is_significant=cell.difference.is_significant,
        text=tables.difference_text(cell.difference),
    )


def _grid(summary: Summary) -> comparisons.Grid:
    """The differences by the values of two axes; only significant ones have a colour."""
    rows, columns = summary.axes.values()
    values = np.full((len(rows), len(columns)), np.nan)
    texts = np.full(values.shape, "missing", object)
    for text, keys in (("skipped", summary.skipped), ("failed", summary.failed)):
        for key in keys:
            texts[rows.index(key[0]), columns.index(key[1])] = text
    for cell in summary.cells:
        place = rows.index(cell.key[0]), columns.index(cell.key[1])
        if cell.key == summary.baseline:
            values[place], texts[place] = 0.0, "baseline"
        elif cell.difference is None:
            texts[place] = "not finite" if cell.not_finite else "no difference"
        else:
            mean = cell.difference.mean.mean
            values[place] = mean if cell.difference.is_significant else 0.0
            number = f"{mean:+.4f}".replace("-", "−")
            verdict = "" if cell.difference.is_significant else f"\n{cell.difference.verdict}"
            texts[place] = number + verdict
    return comparisons.Grid(tuple(summary.axes), (rows, columns), values, texts.tolist())
