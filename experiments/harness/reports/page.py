"""The page of a report: one HTML file with everything inside, made from what directories hold."""

import datetime
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from experiments.harness.pictures.plots import COLORS, LINE_STYLES
from experiments.harness.reports import comparison, figures, tables
from experiments.harness.reports.contents import Contents
from experiments.harness.reports.figures import Figure
from experiments.harness.reports.markdown import blocks
from experiments.harness.reports.reading import Picture

_BYTES = 2_400_000  # of plots and pictures, and of the tables of many runs
_TABLES = 25_000  # bytes of a run's tables, about
_MOST_DRAWN = 4  # runs whose own curves are drawn; those of more take too long

_SAMPLES = {
    "samples": "Samples of the evaluated weights.",
    "reverse": "The reverse process: for each sample a row of x_t, and below it a row of the x̂_0 "
    "predicted from x_t.",
    "forward": "The forward process: test images and their x_t.",
    "inpaint": "Inpainting: the unknown part of test images, sampled given the rest.",
    "interpolate": "Test images interpolated through their noise.",
    "encode": "Test images encoded to noise and decoded again.",
}
_DOCUMENTS = {
    "variance": "What an estimator of the bound costs",
    "sigma": "The bound by T and Σ_θ",
    "spacing": "The bound by number of levels and their spacing",
    "samples/sweep": "Sample quality by sampler and number of steps",
    "samples/guidance": "Samples by guidance scale",
    "ablation": "Differences to the baseline",
    "learning_curves": "Learning curves of the study",
}
_DRAWN = ("kl_per_timestep", "rate_distortion")  # drawn anew from the evaluation's arrays


class Shown(NamedTuple):
    """A plot or a picture with its words.

    Attributes:
      title: what it is.
      caption: what it shows.
      figure: a plot; None if it is a picture.
      picture: a picture; None if it is a plot.
    """

    title: str
    caption: str
    figure: Figure | None
    picture: Picture | None

    @property
    def size(self) -> int:
        """Its bytes in the page."""
        return len(self.figure.svg) if self.figure else len(self.picture.source)


class Budget:
    """Room for plots and pictures; those that do not fit are named.

    Args:
      size: bytes.

    Attributes:
      left_out: the titles of those that did not fit.
    """

    def __init__(self, size: float):
        self._left, self.left_out = size, []

    def fitting(self, shown: Iterable[Shown]) -> list[Shown]:
        """Those that fit, of some that are wanted in this order."""
        fit = []
        for each in shown:
            if each.size <= self._left:
                self._left -= each.size
                fit.append(each)
            else:
                self.left_out.append(each.title)
        return fit


def render(runs: Sequence[Contents], studies: Sequence[Contents] = (), skipped=()) -> str:
    """The page.

    Args:
      runs: the runs; several are compared.
      studies: the directories of studies, whose cells are among the runs.
      skipped: a line for each directory that holds nothing.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("experiments.harness.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"bits": tables.bits, "value": tables.value, "svg": Markup}
    several = _compared(runs) if len(runs) > 1 else None
    overlaid = sum(shown.size for shown in several["figures"]) if several else 0
    room = _BYTES - overlaid - _TABLES * (len(runs) + len(studies))
    for_studies = room / 2 if studies else 0.0
    size = (room - for_studies) / max(len(runs), 1)
    return environment.get_template("page.html").render(
        created=f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC",
        title=", ".join(each.name for each in (studies or runs)[:3])
        + (f" and {len(runs) - 3} more" if not studies and len(runs) > 3 else ""),
        lines=[_line_style(i) for i in range(len(LINE_STYLES))],
        num_directories=len(runs) + len(studies),
        studies=[_view(study, for_studies / len(studies)) for study in studies],
        several=several,
        runs=[_view(run, size, len(runs) <= _MOST_DRAWN) for run in runs],
        problems=[*skipped, *(line for each in (*studies, *runs) for line in each.problems)],
    )


def _line_style(index: int) -> tuple[str, str]:
    """The colour and the dashes of a line in a legend."""
    color, dashes = LINE_STYLES[index]
    return f"var(--line-{COLORS.index(color)})", {"-": "", "--": "6 3", ":": "1.5 2"}.get(
        dashes, "6 2 1.5 2"
    )


def _view(contents: Contents, size: float, is_drawn: bool = True) -> dict[str, Any]:
    """All that the page shows of a directory."""
    budget = Budget(size)
    evaluation, arrays = contents.evaluation, contents.arrays
    has_bound = evaluation is not None and arrays is not None
    if not is_drawn:
        budget.left_out += ["its own curves"] * bool(contents.curves)
        budget.left_out += ["the bound by timestep"] * has_bound
    training = figures.training(contents) if is_drawn else []
    bound = figures.bound(evaluation, arrays) if is_drawn and has_bound else []
    return {
        "name": contents.name,
        "contents": contents,
        "status": tables.status(contents),
        "result": tables.result(evaluation) if evaluation else None,
        "training": budget.fitting(map(_plot, training)),
        "bound": budget.fitting(map(_plot, bound)),
        "samples": budget.fitting(_samples(contents)),
        "progress": budget.fitting(
            Shown(f"step {step}", "", None, picture) for step, picture in contents.progress.items()
        ),
        "documents": [
            {
                "title": _DOCUMENTS.get(document.name, document.name),
                "blocks": blocks(document.text or ""),
                "shown": budget.fitting(_document_plot(document)),
            }
            for document in contents.documents
            if not (has_bound and document.name in _DRAWN)
        ],
        "evaluations": tables.evaluations(contents),
        "settings": tables.settings(contents),
        "sessions": tables.sessions(contents),
        "facts": tables.facts(contents),
        "left_out": budget.left_out,
    }


def _plot(figure: Figure) -> Shown:
    return Shown(figure.title, figure.caption, figure, None)


def _samples(contents: Contents) -> Iterable[Shown]:
    names = [name for name in _SAMPLES if name in contents.samples]
    names += [name for name in contents.samples if name not in _SAMPLES]
    for name in names:
        yield Shown(name, _SAMPLES.get(name, ""), None, contents.samples[name])


def _document_plot(document) -> Iterable[Shown]:
    if document.plot is not None:
        title = _DOCUMENTS.get(document.name, document.name)
        yield Shown(title, "", None, document.plot)


def _compared(runs: Sequence[Contents]) -> dict[str, Any]:
    """What the page shows of several runs together."""
    names = tuple(run.name for run in runs)
    reference, differences = comparison.differences(runs)
    return {
        "names": names,
        "table": tables.side_by_side(runs),
        "figures": [_plot(figure) for figure in figures.overlaid(list(runs), names)],
        "reference": reference,
        "differences": differences,
        "settings": comparison.differing_settings(runs),
    }
