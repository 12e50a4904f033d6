"""The result of a study as Markdown: tables with captions, what is skipped, what is missing."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion.statistics.crossed import CrossedMean
from experiments.harness.study.summary import Cell, Difference, Summary

_FEW_SEEDS = {2: (87, 98), 3: (92, 98)}  # what share of 95 % intervals covers, by number of seeds


def to_markdown(summary: Summary, facts: Mapping[str, Any]) -> str:
    """The tables of a study, with captions that say what ± and the verdicts mean.

    Args:
      summary: the result; names may have any characters.
      facts: what all cells have in common, for the first line.
    """
    parts = [
        _facts(summary, facts),
        _progress(summary),
        _differences(summary),
        _caption(summary),
        _unmeasured(summary),
        _effects(summary),
        _figures(summary),
    ]
    return "\n\n".join(part for part in parts if part)


def _facts(summary: Summary, facts: Mapping[str, Any]) -> str:
    seeds = _listed(summary.seeds)
    common = {**facts, "examples": summary.num_examples, "training seeds": seeds}
    return "; ".join(f"{escape(str(name))} {escape(str(value))}" for name, value in common.items())


def _progress(summary: Summary) -> str:
    if summary.is_complete:
        return ""
    done = sum(len(cell.seeds) for cell in summary.cells)
    num_failed, num_missing = (
        sum(map(len, seeds.values())) for seeds in (summary.failed, summary.missing)
    )
    failed = f", {num_failed} failed" if num_failed else ""
    todo = done + num_failed + num_missing
    return f"**Not finished: {done} of {todo} measurements are done{failed}.**"


def _differences(summary: Summary) -> str:
    if not summary.cells:
        return ""
    head = [*summary.axes, "bits/dim", "difference", "p (Holm)", "the bound is"]
    partial = any(len(cell.seeds) < len(summary.seeds) for cell in summary.cells)
    if partial:
        head.append("seeds")
    rows = []
    for cell in summary.cells:
        row = [*map(escape, cell.key), _bound(summary, cell), *_comparison(summary, cell)]
        rows.append(row + ([_seeds(summary, cell)] if partial else []))
    return _table(head, rows)


def _seeds(summary: Summary, cell: Cell) -> str:
    """The training seeds of a cell, and those that it lacks."""
    parts = [_listed(cell.seeds)]
    if cell.key in summary.failed:
        parts.append(f"failed: {_listed(summary.failed[cell.key])}")
    if cell.key in summary.missing:
        parts.append(f"missing: {_listed(summary.missing[cell.key])}")
    return "; ".join(parts)


def _listed(seeds: Iterable[int]) -> str:
    return ", ".join(map(str, seeds))


def _bound(summary: Summary, cell: Cell) -> str:
    if cell.bound is not None:
        return plus_minus(cell.bound)
    counts = (
        f"{count} of {summary.num_examples} examples (seed {seed})"
        for seed, count in cell.not_finite.items()
    )
    return f"not finite: {', '.join(counts)}"


def _comparison(summary: Summary, cell: Cell) -> tuple[str, str, str]:
    """Difference, p-value and verdict."""
    if cell.key == summary.baseline:
        return "", "", "the baseline"
    if cell.difference is None:
        return "", "", ""
    difference = cell.difference
    number, verdict = difference_text(difference), difference.verdict
    if difference.is_significant:
        number, verdict = f"**{number}**", f"**{verdict}**"
    if len(difference.seeds) == 1 < len(summary.seeds):
        verdict += " for this network"
    return number, _p_value(difference.p_holm), verdict


def _caption(summary: Summary) -> str:
    """What the table's numbers mean."""
    differences = [cell.difference for cell in summary.cells if cell.difference is not None]
    sentences = [_meaning_of_error(summary, differences)]
    if differences:
        sentences.append(
            "Differences are to the baseline, on the same examples, noise and training seeds. "
            f"*Lower* and *higher* bounds differ by Holm's tests at 5 % over all "
            f"{len(differences)} differences (Student's t with Satterthwaite's degrees of "
            "freedom); *within its error* means that no difference has been shown."
        )
        few = min(len(difference.seeds) for difference in differences)
        if few in _FEW_SEEDS:
            low, high = _FEW_SEEDS[few]
            sentences.append(
                f"With {few} training seeds the error is itself uncertain: in simulations {low} to "
                f"{high} % of intervals that claim 95 % cover the truth."
            )
    elif summary.cells and summary.cells[0].key != summary.baseline:
        sentences.append("The baseline has not been measured yet, so there are no differences.")
    elif summary.cells and summary.cells[0].bound is None:
        sentences.append("The baseline's bound is not finite, so there are no differences.")
    return " ".join(sentence for sentence in sentences if sentence)


def _meaning_of_error(summary: Summary, differences: Sequence[Difference]) -> str:
    if not summary.cells:
        return ""
    noise = [difference.mean.mc_se for difference in differences]
    part = f" (in a difference at most {max(noise):.1g} bits/dim)" if noise else ""
    contains = f"It contains the noise of the bound{part}."
    if len(summary.seeds) == 1:
        return (
            "± is one standard error over examples only: with one training seed the table "
            f"speaks of these trained networks, not of their settings. {contains}"
        )
    text = (
        "± is one standard error over training seeds and examples, both as draws from their "
        f"populations. {contains}"
    )
    if any(len(cell.seeds) == 1 for cell in summary.cells):
        text += (
            " A row with one seed has an error over examples only, and speaks of that trained "
            "network."
        )
    return text


def _unmeasured(summary: Summary) -> str:
    lines = [
        f"- skipped: {_named(summary, key)}: {escape(reason)}"
        for key, reason in summary.skipped.items()
    ]
    lines += [
        f"- failed: {_named(summary, key)}, training seed {seed}: {escape(reason)}"
        for key, reasons in summary.failed.items()
        for seed, reason in reasons.items()
    ]
    lines += [
        f"- not measured yet: {_named(summary, key)}, training seed"
        f"{'s' if len(seeds) > 1 else ''} {_listed(seeds)}"
        for key, seeds in summary.missing.items()
    ]
    return "\n".join(lines)


def _named(summary: Summary, key: Iterable[str]) -> str:
    return ", ".join(
        f"{escape(axis)} = {escape(value)}" for axis, value in zip(summary.axes, key, strict=True)
    )


def _effects(summary: Summary) -> str:
    if not summary.effects:
        return ""
    base = dict(zip(summary.axes, summary.baseline, strict=True))
    rows = []
    for effect in summary.effects:
        names = " and ".join(
            f"{escape(axis)}: {escape(base[axis])} → {escape(value)}"
            for axis, value in effect.values.items()
        )
        kind = "interaction" if len(effect.values) == 2 else "main effect"
        if effect.num_pairs < effect.num_possible:
            kind += f" over {effect.num_pairs} of {effect.num_possible} pairs of cells"
        difference = effect.difference
        interval = f"{_signed(difference.low)} … {_signed(difference.high)}"
        rows.append([names, kind, difference_text(difference), interval])
    caption = (
        "A main effect is the mean difference to the baseline's value over the values of the other "
        "axes"
    )
    if any(len(effect.values) == 2 for effect in summary.effects):
        caption += (
            "; an interaction is how much the effect of one value changes when the other is set too"
        )
    caption += ". These intervals are not corrected for their number."
    return _table(["effect", "", "bits/dim", "95 % interval"], rows) + "\n\n" + caption


def _figures(summary: Summary) -> str:
    names = list(dict.fromkeys(name for cell in summary.cells for name in cell.figures))
    if not names:
        return ""
    rows = [
        [*map(escape, cell.key), *(_figure(summary, cell, name) for name in names)]
        for cell in summary.cells
    ]
    caption = "Means over training seeds"
    if any(len(cell.seeds) > 1 for cell in summary.cells):
        caption += ", with their least and largest value"
    caption += "; × is the ratio to the baseline, the geometric mean over seeds."
    if any(not np.isnan(f.se) for cell in summary.cells for f in cell.figures.values()):
        caption += " ± is over the draws of the measurement, with the networks fixed."
    if "loss_variance" in names:
        caption += (
            " The variance of the loss compares only cells whose losses estimate the same number, "
            "such as the bound with different distributions of t."
        )
    if "images_per_second" in names:
        caption += (
            " Images per second compare only trainings on equal machines that had no other work."
        )
    if "gradient_noise" in names:
        caption += (
            " The noise of the gradient g is tr Cov(g)/‖E g‖² for one example: the size of a batch "
            "in which noise and gradient are of equal size. It compares all cells."
        )
    return _table([*summary.axes, *names], rows) + "\n\n" + caption


def _figure(summary: Summary, cell: Cell, name: str) -> str:
    figure = cell.figures.get(name)
    if figure is None or np.isnan(figure.mean):
        return ""
    text = f"{figure.mean:.4g}"
    if not np.isnan(figure.se):
        text += f" ± {figure.se:.2g}"
    if figure.low < figure.high:
        text += f" ({figure.low:.4g} … {figure.high:.4g})"
    has_ratio = cell.key != summary.baseline and not np.isnan(figure.ratio)
    return text.replace("-", "−") + (f", × {figure.ratio:.3g}" if has_ratio else "")


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = [escape(name) for name in head]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape(text: str) -> str:
    """Text that stays as it is in a cell of a Markdown table."""
    text = re.sub(r"([\\`*{}\[\]|~#$]|\b_|_\b)", r"\\\1", " ".join(text.split()))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def plus_minus(value: CrossedMean, signed: bool = False) -> str:
    """A mean ± its standard error, to two digits of the error but at least four decimals."""
    digits = 4
    if value.se > 0:
        digits = int(np.clip(1 - np.floor(np.log10(value.se)), 4, 9))
    mean = f"{value.mean:{'+' if signed and value.mean else ''}.{digits}f}".replace("-", "−")
    return mean if np.isnan(value.se) else f"{mean} ± {value.se:.{digits}f}"


def difference_text(difference: Difference) -> str:
    """A difference ± its standard error, or that there is none."""
    if difference.verdict == "identical":
        return "0"
    return plus_minus(difference.mean, signed=True)


def _signed(value: float) -> str:
    return f"{value:+.4f}".replace("-", "−")


def _p_value(p: float) -> str:
    if np.isnan(p):
        return ""
    return "< 0.0001" if p < 1e-4 else f"{p:.2g}"
