"""The result of a study for programs: nested for JSON, and as CSV with a row for each cell."""

import csv
import io
from collections.abc import Mapping
from typing import Any

from diffusion.statistics.crossed import CrossedMean
from experiments.harness.study.summary import Cell, Difference, Effect, Key, Summary

FORMAT = 1  # changes when a key of ablation.json changes its meaning or goes

_FIGURE = ("mean", "se", "low", "high", "ratio")


def to_json(summary: Summary, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The whole result. docs/ablations.md explains the keys."""
    return {
        "format": FORMAT,
        "facts": facts,
        "axes": summary.axes,
        "baseline": _named(summary, summary.baseline),
        "seeds": summary.seeds,
        "num_examples": summary.num_examples,
        "is_complete": summary.is_complete,
        "cells": [_cell(summary, cell) for cell in summary.cells]
        + [
            {"cell": _named(summary, key), "status": status, "reason": reason}
            for key, status, reason in _unmeasured(summary)
        ],
        "effects": [_effect(effect) for effect in summary.effects],
    }


def to_csv(summary: Summary) -> str:
    """A row for each cell of the grid, in the order of the table; empty where there is no value."""
    names = list(dict.fromkeys(name for cell in summary.cells for name in cell.figures))
    numbers = [_numbers(cell) for cell in summary.cells]
    columns = list(dict.fromkeys(column for row in numbers for column in row))
    head = [*summary.axes, "status", "reason", "seeds", *columns]
    rows = [head + [f"{name} {part}" for name in names for part in _FIGURE]]
    for cell, row in zip(summary.cells, numbers, strict=True):
        values = [row.get(column, "") for column in columns]
        for name in names:
            figure = cell.figures.get(name)
            values += [getattr(figure, part, "") for part in _FIGURE]
        values = ["" if value != value else value for value in values]  # NaN is no value
        seeds = " ".join(map(str, cell.seeds))
        failures = summary.failed.get(cell.key, {})
        rows.append([*cell.key, _status(cell), _reason(failures), seeds, *values])
    rows += [[*key, status, reason] for key, status, reason in _unmeasured(summary)]
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerows(row + [""] * (len(rows[0]) - len(row)) for row in rows)
    return buffer.getvalue()


def _named(summary: Summary, key: Key) -> dict[str, str]:
    return dict(zip(summary.axes, key, strict=True))


def _status(cell: Cell) -> str:
    return "not finite" if cell.not_finite else "measured"


def _unmeasured(summary: Summary) -> list[tuple[Key, str, str]]:
    """(cell, status, reason)."""
    measured = {cell.key for cell in summary.cells}
    failed = {key: s for key, s in summary.failed.items() if key not in measured}
    missing = [key for key in summary.missing if key not in measured and key not in failed]
    return [
        *((key, "skipped", reason) for key, reason in summary.skipped.items()),
        *((key, "failed", _reason(failures)) for key, failures in failed.items()),
        *((key, "missing", "") for key in missing),
    ]


def _reason(failures: Mapping[int, str]) -> str:
    return "; ".join(f"training seed {seed}: {reason}" for seed, reason in failures.items())


def _cell(summary: Summary, cell: Cell) -> dict[str, Any]:
    return {
        "cell": _named(summary, cell.key),
        "status": _status(cell),
        "seeds": cell.seeds,
        "failed": summary.failed.get(cell.key, {}),
        "missing": summary.missing.get(cell.key, ()),
        "not_finite": cell.not_finite,
        **_numbers(cell),
        "figures": {
            name: {"values": figure.values} | {part: getattr(figure, part) for part in _FIGURE}
            for name, figure in cell.figures.items()
        },
        "curves": {
            name: [{"steps": steps, "values": values} for steps, values in curves]
            for name, curves in cell.curves.items()
        },
    }


def _numbers(cell: Cell) -> dict[str, Any]:
    """The bound and the difference, flat."""
    numbers = {} if cell.bound is None else _mean("bits_per_dim", cell.bound)
    return numbers | ({} if cell.difference is None else _difference(cell.difference))


def _difference(difference: Difference) -> dict[str, Any]:
    return _mean("difference", difference.mean) | {
        "difference_low": difference.low,
        "difference_high": difference.high,
        "p": difference.p,
        "p_holm": difference.p_holm,
        "verdict": difference.verdict,
    }


def _mean(name: str, mean: CrossedMean) -> dict[str, float]:
    return {name: mean.mean} | {f"{name}_{part}": getattr(mean, part) for part in mean._fields[1:]}


def _effect(effect: Effect) -> dict[str, Any]:
    numbers = _difference(effect.difference)
    del numbers["p_holm"], numbers["verdict"]  # of differences to the baseline only
    return {
        "values": effect.values,
        "seeds": effect.difference.seeds,
        **numbers,
        "num_pairs": effect.num_pairs,
        "num_possible": effect.num_possible,
    }
