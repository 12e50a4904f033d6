"""Plots in a page: text that stays text, colours of the page, nothing from outside."""

import re
import xml.etree.ElementTree

import numpy as np

from experiments.harness.pictures import plots
from experiments.harness.pictures.vector import to_svg


def svg(*lines, label="a plot"):
    figure, axes = plots.panel()
    plots.draw_lines(axes, lines, "step", "loss <nats>")
    return to_svg(figure, label)


def test_a_plot_is_one_element_without_references_to_the_outside():
    steps = np.arange(5)
    text = svg((steps, steps / 7), (steps, steps / 900))
    root = xml.etree.ElementTree.fromstring(text)
    assert root.tag == "svg"
    assert root.get("aria-label") == "a plot"
    assert "http" not in text
    texts = ["".join(element.itertext()).strip() for element in root.iter("text")]
    assert "loss <nats>" in texts
    assert "step" in texts


def test_numbers_on_the_axes_keep_their_digits():
    """Coordinates are rounded to two digits, but texts are not."""
    text = svg((np.arange(2), np.array([0.001, 0.004])))
    assert ">0.0010<" in text
    assert not re.search(r' d="[^"]*\.\d{3}', text)


def test_colours_are_variables_of_the_page():
    steps = np.arange(3)
    text = svg(*[(steps, steps + i) for i in range(len(plots.COLORS))])
    for i in range(len(plots.COLORS)):
        assert f"stroke: var(--line-{i})" in text
    assert not re.search(r"#[0-9a-f]{6}\b(?!\w)", re.sub(r'href="#\w+"|url\(#\w+\)', "", text))


def test_styles_tell_apart_more_lines_than_there_are_colours():
    assert len(set(plots.LINE_STYLES)) == len(plots.LINE_STYLES) == 4 * len(plots.COLORS)


def test_an_axis_is_logarithmic_for_positive_values_of_different_sizes():
    for values, scale in (([1.0, 20.0], "linear"), ([1.0, 40.0], "log"), ([0.0, 40.0], "linear")):
        _, axes = plots.panel()
        assert plots.log_if_wide(axes, np.array(values)) == (scale == "log")
        assert axes.get_yscale() == scale
    assert not plots.log_if_wide(axes, np.zeros(0))
