"""From measurements to results: pairing, effects, what is missing, and the files for readers."""

import csv
import io
import itertools
import json
import re

import matplotlib.image
import numpy as np
import pytest

from diffusion.statistics.crossed import crossed_mean
from experiments.harness.study import exports, results, tables
from experiments.harness.study.results import Measured

AXES = {"parameterization": ("eps", "x_0", "v"), "objective": ("vlb", "simple")}
BASELINE = ("eps", "vlb")
NUM_DIMS = 3
BITS = NUM_DIMS * np.log(2.0)  # nats of one bit/dim
FACTS = {"split": "test", "num_steps": 600}


def measured(totals, seeds=(0, 1, 2), figures=None, curves=None):
    """A measurement whose totals are given in bits/dim."""
    return Measured(seeds, np.asarray(totals, np.float64) * BITS, figures or {}, curves or {})


def common(shape=(3, 20, 2), seed=0):
    """What all cells share: it is far larger than their differences."""
    return np.random.default_rng(seed).integers(8, 40, shape) / 8


def noisy(shift, scale=0.1, seed=1, shape=(3, 20, 2)):
    """`common`, shifted, with deviations of its own."""
    return common(shape) + shift + scale * np.random.default_rng(seed).normal(size=shape)


def additive():
    """A grid without interactions: x_0 adds 1, v adds 2, and simple takes 1/2 away."""
    first, second = {"eps": 0.0, "x_0": 1.0, "v": 2.0}, {"vlb": 0.0, "simple": -0.5}
    return {
        key: measured(noisy(first[key[0]] + second[key[1]], seed=place))
        for place, key in enumerate(itertools.product(*AXES.values()))
    }


def summarize(cells, skipped=None, seeds=(0, 1, 2), baseline=BASELINE, axes=None):
    return results.summarize(cells, baseline, axes or AXES, NUM_DIMS, skipped or {}, seeds)


def by_key(summary):
    return {cell.key: cell for cell in summary.cells}


def test_differences_are_paired_and_in_bits_per_dim():
    cells = additive()
    summary = summarize(cells)
    for key, cell in by_key(summary).items():
        np.testing.assert_allclose(cell.bound, crossed_mean(cells[key].totals / BITS), rtol=1e-9)
        if key == BASELINE:
            assert cell.difference is None
            continue
        paired = crossed_mean((cells[key].totals - cells[BASELINE].totals) / BITS)
        np.testing.assert_allclose(cell.difference.mean, paired, rtol=1e-9)
        assert cell.difference.mean.se < 0.2 * cell.bound.se  # what they share has gone


def test_the_baseline_comes_first_and_the_lowest_difference_next():
    order = [cell.key for cell in summarize(additive()).cells]
    assert order == [
        BASELINE,
        ("eps", "simple"),
        ("x_0", "simple"),
        ("x_0", "vlb"),
        ("v", "simple"),
        ("v", "vlb"),
    ]


def test_training_seeds_are_paired_by_their_number():
    cells, other = additive(), noisy(1.0, 0.0)
    expected = by_key(summarize(cells | {("v", "vlb"): measured(other)}))["v", "vlb"].difference
    mixed = measured(other[[2, 0, 1]], seeds=(2, 0, 1))
    found = by_key(summarize(cells | {("v", "vlb"): mixed}))["v", "vlb"].difference
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-9)
    # With one of the seeds there is an error over examples only.
    one = measured(other[[2]], seeds=(2,))
    summary = summarize(cells | {("v", "vlb"): one})
    found = by_key(summary)["v", "vlb"].difference
    assert found.seeds == (2,)
    assert found.mean.df == 19
    assert not summary.is_complete
    text = tables.to_markdown(summary, FACTS)
    assert "**Not finished: 16 of 18 measurements are done.**" in text
    assert "**higher** for this network | 2; missing: 0, 1 |" in text
    assert "not measured yet: parameterization = v, objective = vlb, training seeds 0, 1" in text


def test_effects_of_an_additive_grid():
    effects = {tuple(e.values.items()): e for e in summarize(additive()).effects}
    expected = {"x_0": 1.0, "v": 2.0, "simple": -0.5}
    assert len(effects) == 5
    for values, effect in effects.items():
        (_, name), is_main = values[0], len(values) == 1
        assert effect.num_pairs == effect.num_possible
        truth = expected[name] if is_main else 0.0
        assert abs(effect.difference.mean.mean - truth) < 4 * effect.difference.mean.se
        # Of 120 deviations in each cell; a main effect is the mean over 2 or 3 pairs.
        pairs = (3 if name == "simple" else 2) if is_main else 0.5
        assert effect.difference.mean.se == pytest.approx(0.1 * np.sqrt(2 / pairs / 120), rel=0.5)


def test_an_interaction_is_what_the_effects_do_not_explain():
    cells = additive()
    cells["v", "simple"] = measured(cells["v", "simple"].totals / BITS + 0.25)
    found = [e for e in summarize(cells).effects if len(e.values) == 2]
    mean = {e.values["parameterization"]: e.difference.mean for e in found}
    assert abs(mean["v"].mean - 0.25) < 4 * mean["v"].se
    assert abs(mean["x_0"].mean) < 4 * mean["x_0"].se


def test_each_failed_training_is_listed_with_its_seed_and_reason(tmp_path):
    """One cell lacks a seed, another has none; a failure of what was measured does not count."""
    cells = additive()
    del cells["v", "simple"]
    cells["v", "vlb"] = measured(noisy(1.0)[:2], seeds=(0, 2))
    failures = {
        ("v", "vlb"): {1: "the loss is nan"},
        ("v", "simple"): {0: "no space", 1: "no space"},
        ("x_0", "vlb"): {0: "an old failure"},
    }
    summary = results.summarize(cells, BASELINE, AXES, NUM_DIMS, {}, (0, 1, 2), failures)
    assert not summary.is_complete
    assert summary.missing == {("v", "simple"): (2,)}
    results.write(tmp_path, summary, FACTS)
    text = (tmp_path / "ablation.md").read_text()
    assert "**Not finished: 14 of 18 measurements are done, 3 failed.**" in text
    assert "| 0, 2; failed: 1 |" in text
    assert "- failed: parameterization = v, objective = vlb, training seed 1: the loss is" in text
    assert text.count("no space") == 2
    assert "an old failure" not in text
    assert "not measured yet: parameterization = v, objective = simple, training seed 2" in text
    entries = json.loads((tmp_path / "ablation.json").read_text())["cells"]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "ablation.csv").read_text())))
    for entry, row in zip(entries, rows, strict=True):
        key = tuple(entry["cell"].values())
        expected = {("v", "simple"): "failed"}.get(key, "measured")
        assert entry["status"] == row["status"] == expected
        if key == ("v", "vlb"):
            assert entry["failed"] == {"1": "the loss is nan"}
            assert row["seeds"] == "0 2"
            assert row["reason"] == "training seed 1: the loss is nan"


def test_effects_use_the_pairs_that_are_there():
    cells = additive()
    del cells["v", "simple"]
    summary = summarize(cells, {("v", "simple"): "it does not fit"})
    counts = {tuple(e.values.values()): (e.num_pairs, e.num_possible) for e in summary.effects}
    assert counts == {
        ("x_0",): (2, 2),
        ("v",): (1, 2),
        ("simple",): (2, 3),
        ("x_0", "simple"): (1, 1),
    }
    assert summary.is_complete
    assert summary.missing == {}


def test_one_axis_has_no_effects_beside_its_differences():
    cells = {key[:1]: cell for key, cell in additive().items() if key[1] == "vlb"}
    summary = summarize(
        cells, baseline=("eps",), axes={"parameterization": AXES["parameterization"]}
    )
    assert [cell.key for cell in summary.cells] == [("eps",), ("x_0",), ("v",)]
    assert summary.effects == []


def test_identical_settings_differ_by_exactly_zero():
    cells = additive()
    for key in (("x_0", "vlb"), ("x_0", "simple")):
        cells[key] = cells["eps", key[1]]
    summary = summarize(cells)
    difference = by_key(summary)["x_0", "vlb"].difference
    assert (difference.mean.mean, difference.mean.se, difference.p_holm) == (0, 0, 1)
    assert difference.verdict == "identical"
    zero = [e.difference.mean.mean for e in summary.effects if "x_0" in e.values.values()]
    assert zero == [0, 0]


def test_a_difference_that_is_significant_only_alone_is_within_its_error():
    """Of five differences one has p = 0.03 or so, and the others are zero."""
    n, base = 50, common((1, 50, 2))
    deviation = np.random.default_rng(3).normal(size=(1, n, 1))
    deviation = deviation - deviation.mean()
    deviation += 2.2 * deviation.std(ddof=1) / np.sqrt(n)
    cells = {key: measured(base, (0,)) for key in itertools.product(*AXES.values())}
    cells["v", "simple"] = measured(base + deviation, (0,))
    cells["v", "vlb"] = measured(base + 2 * deviation.mean() + deviation, (0,))
    found = by_key(summarize(cells, seeds=(0,)))
    alone = found["v", "simple"].difference
    assert alone.p < 0.05 < alone.p_holm
    assert alone.verdict == "within its error"
    assert found["v", "vlb"].difference.verdict == "higher"
    text = tables.to_markdown(summarize(cells, seeds=(0,)), FACTS)
    assert "over examples only: with one training seed the table speaks of these trained" in text
    assert "| within its error |" in text


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bound_that_is_not_finite_is_said_and_not_averaged(bad):
    cells = additive()
    totals = cells["v", "vlb"].totals.copy()
    totals[1, [3, 7], 0] = bad
    summary = summarize(cells | {("v", "vlb"): cells["v", "vlb"]._replace(totals=totals)})
    cell = by_key(summary)["v", "vlb"]
    assert (cell.bound, cell.difference, cell.not_finite) == (None, None, {1: 2})
    assert summary.cells[-1] is cell
    assert "not finite: 2 of 20 examples (seed 1)" in tables.to_markdown(summary, FACTS)
    without = {key: value for key, value in cells.items() if key != ("v", "vlb")}
    others = by_key(summarize(without))
    for key, other in by_key(summary).items():
        assert key == ("v", "vlb") or other == others[key]


def test_without_a_finite_baseline_there_are_bounds_but_no_differences():
    cells = additive()
    bad = cells | {BASELINE: measured(np.full((3, 20, 2), np.nan))}
    without = {key: cell for key, cell in cells.items() if key != BASELINE}
    sentences = "baseline's bound is not finite", "baseline has not been measured yet"
    for chosen, sentence in zip((bad, without), sentences, strict=True):
        summary = summarize(chosen)
        assert all(cell.difference is None for cell in summary.cells)
        assert by_key(summary)["v", "vlb"].bound is not None
        assert sentence in tables.to_markdown(summary, FACTS)
        assert json.loads(json.dumps(exports.to_json(summary, FACTS), default=str))


def test_cells_outside_the_grid_and_totals_that_do_not_fit_are_refused():
    cells = additive()
    with pytest.raises(ValueError, match="is no cell of the grid"):
        summarize(cells | {("eps", "hybrid"): cells[BASELINE]})
    with pytest.raises(ValueError, match="totals differ in examples and draws"):
        summarize(cells | {("v", "vlb"): measured(common((3, 19, 2)))})
    with pytest.raises(ValueError, match="has totals of 3"):
        summarize(cells | {("v", "vlb"): measured(common(), seeds=(0, 1))})


def test_errors_of_a_figure_do_not_average_out_over_seeds_with_the_same_draws():
    figures = {"loss_variance": [1.0, 2.0, 6.0], "loss_variance_se": [0.3, 0.6, 0.6]}
    summary = summarize({BASELINE: measured(common(), figures=figures)})
    assert summary.cells[0].figures.keys() == {"loss_variance"}
    assert summary.cells[0].figures["loss_variance"].se == pytest.approx(0.5)
    assert "| 3 ± 0.5 (1 … 6) |" in tables.to_markdown(summary, FACTS)


def test_figures_have_the_geometric_mean_of_the_ratios_of_seeds():
    cells = {
        BASELINE: measured(
            common(), figures={"speed": [1.0, 2.0, 4.0], "kernel": [0.1, -0.1, 0.1]}
        ),
        ("v", "vlb"): measured(
            common()[:2], (2, 0), figures={"speed": [2.0, 8.0], "kernel": [0.1, 0.2]}
        ),
    }
    figures = by_key(summarize(cells))["v", "vlb"].figures
    assert figures["speed"].ratio == pytest.approx(2.0)  # 2/4 and 8/1
    assert (figures["speed"].mean, figures["speed"].low, figures["speed"].high) == (5, 2, 8)
    assert np.isnan(figures["kernel"].ratio)
    assert "| v | vlb | 5 (2 … 8), × 2 | 0.15 (0.1 … 0.2) |" in tables.to_markdown(
        summarize(cells), FACTS
    )


ODD = ("a | b", "_x_ *y* `z`\nnew line", "<b> & $x_0$ \\ " + "long " * 30, 'ε̂, "quoted"')


def odd_names():
    """A study whose names have characters that Markdown, CSV and matplotlib read as their own."""
    cells = {
        (name,): measured(noisy(0.1 * place, seed=place), curves={"loss": [LOSS] * 3})
        for place, name in enumerate(ODD[:3])
    }
    return summarize(
        cells, {(ODD[3],): "a reason | with a bar"}, baseline=(ODD[0],), axes={"$a|": ODD}
    )


LOSS = (np.arange(1, 31), np.exp(-np.arange(30) / 9))


def test_names_may_have_any_characters_in_markdown():
    text = tables.to_markdown(odd_names(), FACTS)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {6}
    assert len(rows) == 5  # head, rule and three cells
    assert r"a \| b" in text
    assert '- skipped: \\$a\\| = ε̂, "quoted": a reason \\| with a bar' in text


def test_the_csv_has_a_row_for_each_cell():
    summary = odd_names()
    rows = list(csv.DictReader(io.StringIO(exports.to_csv(summary))))
    assert {row["$a|"] for row in rows} == set(ODD)
    for row, cell in zip(rows, summary.cells, strict=False):
        assert float(row["bits_per_dim"]) == cell.bound.mean
        assert row["difference"] == (
            "" if cell.difference is None else str(cell.difference.mean.mean)
        )
    assert [row["status"] for row in rows] == ["measured"] * 3 + ["skipped"]
    assert rows[3]["reason"] == "a reason | with a bar"


def test_all_files_are_written_and_the_json_is_strict(tmp_path):
    summary = odd_names()
    results.write(tmp_path, summary, FACTS)
    names = {"ablation.json", "ablation.csv", "ablation.md", "ablation.png", "learning_curves.png"}
    assert {path.name for path in tmp_path.iterdir()} == names

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    content = json.loads((tmp_path / "ablation.json").read_text(), parse_constant=refuse)
    assert content["facts"] == FACTS
    for entry, cell in zip(content["cells"], summary.cells, strict=False):
        assert entry["cell"] == {"$a|": cell.key[0]}
        assert entry["bits_per_dim"] == cell.bound.mean
        assert entry["curves"]["loss"][2]["values"] == LOSS[1].tolist()
    assert content["cells"][3]["status"] == "skipped"
    for name in ("ablation.png", "learning_curves.png"):
        assert matplotlib.image.imread(tmp_path / name)[..., :3].std() > 0.03


def test_a_study_without_a_measurement_has_a_table_of_what_is_missing(tmp_path):
    summary = summarize({})
    results.write(tmp_path, summary, FACTS)
    assert {path.name for path in tmp_path.iterdir()} == {
        "ablation.json",
        "ablation.csv",
        "ablation.md",
    }
    text = (tmp_path / "ablation.md").read_text()
    assert text.count("not measured yet") == 6
    assert "0 of 18" in text


@pytest.mark.parametrize(("scale", "has_colour"), [(2.0, False), (0.01, True)])
def test_only_significant_differences_have_a_colour(tmp_path, scale, has_colour):
    key = ("v", "simple")
    cells = {BASELINE: measured(common()), key: measured(noisy(0.1, scale))}
    summary = summarize(cells)
    assert by_key(summary)[key].difference.is_significant == has_colour
    results.write(tmp_path, summary, FACTS)
    image = matplotlib.image.imread(tmp_path / "ablation.png")[..., :3]
    assert (np.ptp(image, axis=-1).max() > 0.2) == has_colour


def test_plots_bear_any_numbers(tmp_path):
    """Differences that are huge, zero, or without an error, and cells that are missing."""
    n = (3, 20, 2)
    cells = {
        BASELINE: measured(common()),
        ("eps", "simple"): measured(common()),
        ("x_0", "vlb"): measured(noisy(1e6)),
        ("x_0", "simple"): measured(np.full(n, np.nan)),
    }
    results.write(tmp_path, summarize(cells, {("v", "vlb"): "no"}), FACTS)
    one = {key: measured(cell.totals[:, :1] / BITS) for key, cell in cells.items()}
    (tmp_path / "one_example").mkdir()
    results.write(tmp_path / "one_example", summarize(one), FACTS)
    for directory in (tmp_path, tmp_path / "one_example"):
        assert matplotlib.image.imread(directory / "ablation.png")[..., :3].std() > 0.03
