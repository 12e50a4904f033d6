"""Plots as SVG elements that take their colours from the page they are in."""

import io
import re
from typing import Any

from experiments.harness.pictures.plots import COLORS, GRID

# The page's style sheet defines these variables, for a light and for a dark page.
_VARIABLES = {
    "#000000": "currentColor",
    GRID: "var(--grid)",
    **{color: f"var(--line-{i})" for i, color in enumerate(COLORS)},
}
_SHORTER = (
    (r"<metadata>.*?</metadata>", ""),
    (r' id="[\w.]+_\d+"', ""),  # repeated in other plots
    (r'font-family: [^;"]*;?', ""),
    (r' transform="rotate\(-0 [^"]*"', ""),
    (r"\s*\n\s*", " "),
)


def to_svg(figure: Any, label: str) -> str:
    """A figure as an `svg` element without a background, as wide as its place allows.

    Its text stays text, in the page's font. It refers to nothing outside of itself.

    Args:
      figure: matplotlib's.
      label: its name for those who cannot see it; letters, digits, spaces and dashes.
    """
    from matplotlib import rc_context

    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    buffer = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": label, "path.simplify_threshold": 0.25}
    with rc_context(settings):
        figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    view = re.search(r'viewBox="[^"]*"', text)[0]
    content = text[text.index(">", text.index("<svg")) + 1 :]
    for pattern, replacement in _SHORTER:
        content = re.sub(pattern, replacement, content, flags=re.DOTALL)
    # Coordinates to a hundredth of a point.
    content = re.sub(r' (d|x|y)="[^"]*"', _rounded, content).replace("xlink:href", "href")
    for color, variable in _VARIABLES.items():
        content = content.replace(color, variable)
    return f'<svg role="img" aria-label="{label}" {view}>{content.strip()}'


def _rounded(attribute: re.Match) -> str:
    return re.sub(r"(\.\d\d)\d+", r"\1", attribute[0])
