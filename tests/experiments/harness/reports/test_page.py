"""The page: what it says, that it holds everything inside, and that no name becomes markup."""

import json
import re
import shutil

import numpy as np
import pytest

from experiments.harness.pictures.images import save_png
from experiments.harness.reports import figures, page
from experiments.harness.reports.contents import read_contents
from tests.experiments.harness.reports.composed import SCRIPT, Page, compose, write_lines


@pytest.fixture(autouse=True)
def draw_once(monkeypatch):
    """Each kind of plot is drawn once for all pages; `test_figures` looks at the plots."""
    draw, drawn = figures._svg, DRAWN

    def remembered(title, axes_function):
        if title not in drawn:
            drawn[title] = draw(title, axes_function)
        return drawn[title]

    monkeypatch.setattr(figures, "_svg", remembered)


DRAWN = {}


def rendered(*paths, **arguments):
    return page.render([read_contents(path) for path in paths], **arguments)


def headings(text):
    return re.findall(r"<h[1234][^>]*>(.*?)</h", text)


def test_a_finished_run_has_all_sections(tmp_path):
    text = rendered(compose(tmp_path / "run"))
    words = Page(text).text
    assert "2.0000 bits/dim on test, 2 examples, T = 3, step 20" in words
    assert "± 1.0000 over examples" in words
    assert "± 0.0125 over noise" in words
    assert "Uniformly distributed pixels have 4.0875" in words
    assert "prior 0.2500" in words
    assert "step 20 of 20" in words
    for heading in ("Loss", "Validation", "Loss by quarter of t", "Gradient norm"):
        assert heading in headings(text)
    for heading in ("Learning rate", "Speed", "KL per timestep", "Rate–distortion", "samples"):
        assert heading in headings(text)
    assert "train.num_steps 20 1000" in words
    assert "2026-01-02 03:04 0 61 s finished 1 × cpu python 3.11, jax 0.10.2" in words
    assert "digits: 1000 images of 8 × 8 × 1" in words


def test_what_a_run_lacks_is_left_out(tmp_path):
    path = compose(tmp_path / "run")
    for name in ("evaluation.json", "evaluation.npz", "samples/samples.png"):
        (path / name).unlink()
    write_lines(path / "metrics.jsonl", [{"step": 2, "loss": 1.0}])
    write_lines(path / "sessions.jsonl", [{"event": "start", "step": 0}])
    text = rendered(path)
    found = headings(text)
    assert "Loss" in found
    for heading in ("Result", "Validation", "Speed", "The bound by timestep", "Samples"):
        assert heading not in found
    words = Page(text).text
    assert "step 2 of 20; the last session has no recorded end" in words
    assert "Left out" not in words


def test_the_page_holds_everything_inside_and_runs_no_script(tmp_path):
    path = compose(tmp_path / "run")
    (path / "sigma.md").write_text(f"![x](http://example.org/x.png) {SCRIPT}\n")
    parsed = Page(rendered(path, compose(tmp_path / "other")))
    tags = {tag for tag, _ in parsed.tags}
    assert not tags & {"script", "iframe", "object", "embed", "base", "form"}
    for tag, attributes in parsed.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "srcset"):
                assert value.startswith("data:image/"), (tag, value)
            if name in ("href", "xlink:href"):
                assert value.startswith("#") or value == "data:,", (tag, value)
            assert "url(" not in (value or "").replace("url(#", ""), (tag, value)
    policy = next(m["content"] for m in parsed.all("meta") if "http-equiv" in m)
    assert "default-src 'none'" in policy


def test_links_within_the_page_lead_somewhere_once(tmp_path):
    parsed = Page(rendered(compose(tmp_path / "a"), compose(tmp_path / "b")))
    targets = [a["id"] for _, a in parsed.tags if "id" in a]
    links = {a["href"][1:] for a in parsed.all("a")}
    assert len(links) == 3
    assert links <= set(targets)
    assert all(targets.count(link) == 1 for link in links)


def test_light_dark_and_print_have_their_styles(tmp_path):
    text = rendered(compose(tmp_path / "run"))
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    used = set(re.findall(r"var\((--[\w-]+)\)", text))
    light, dark = text.partition("@media screen and (prefers-color-scheme: dark)")[::2]
    for variable in used:
        assert f"{variable}: " in light
        assert f"{variable}: " in dark.partition("img.plot")[0]


def test_names_settings_and_errors_are_text(tmp_path):
    """Wherever a name can come from: none may become an element."""
    evil = f"a{SCRIPT}'\"&$x$"
    path = compose(tmp_path / "runs" / evil.replace("/", "∕"))
    saved = json.loads((path / "config.json").read_text())
    saved["data"] |= {"data_dir": f"/sets/{SCRIPT}", "splits": {SCRIPT: SCRIPT}}
    (path / "config.json").write_text(json.dumps(saved))
    write_lines(path / "config_changes.jsonl", [{"step": 3, "changes": [SCRIPT]}])
    start = {"event": "start", "step": SCRIPT, "device": SCRIPT, "commit": SCRIPT, "time": SCRIPT}
    write_lines(path / "sessions.jsonl", [start, {"event": "end", "outcome": SCRIPT}])
    (path / "import.json").write_text(json.dumps({SCRIPT: SCRIPT}))
    (path / "parts.json").write_text(json.dumps({SCRIPT: {SCRIPT: SCRIPT}}))
    result = json.loads((path / "evaluation.json").read_text())
    result |= {"split": SCRIPT, "quality": {"sampler": SCRIPT, "features": SCRIPT}}
    (path / "evaluation.json").write_text(json.dumps(result))
    (path / "evaluations").mkdir()
    (path / "evaluations" / "x.json").write_text(json.dumps(result))
    (path / "evaluations" / "<b>.json").write_text("{")
    (path / "<i>.md").write_text(f"# {SCRIPT}\n\n**{SCRIPT}** `{SCRIPT}`\n\n| {SCRIPT} |\n| - |\n")
    save_png(path / "samples" / "<u>.png", np.zeros((4, 4, 1), np.uint8))
    plain = Page(rendered(compose(tmp_path / "a"), compose(tmp_path / "b")))
    parsed = Page(rendered(path, compose(tmp_path / "c"), skipped=[f"{SCRIPT} holds nothing"]))
    tags = {tag for tag, _ in parsed.tags}
    # Only those of a page with plain names, and those of its Markdown and its remarks.
    assert tags - {tag for tag, _ in plain.tags} <= {"strong", "h4", "code", "ul", "li", "p"}
    assert parsed.text.count(SCRIPT) >= 15
    assert evil.replace("/", "∕") in parsed.text


def test_damaged_files_are_named(tmp_path):
    path = compose(tmp_path / "run")
    (path / "evaluation.npz").write_bytes(b"PK\x03\x04")
    words = Page(rendered(path)).text
    assert re.search(r"Left out: \S+evaluation\.npz is damaged", words)
    assert "2.0000 bits/dim" in words


def test_runs_are_compared_with_their_paired_differences(tmp_path):
    first = compose(tmp_path / "first", (1.0, 2.0, 4.0))
    other = compose(tmp_path / "other", (2.0, 2.0, 7.0))
    unpaired = compose(tmp_path / "unpaired", (1.0, 2.0))
    text = rendered(first, other, unpaired)
    words = Page(text).text
    assert "other +1.3333 0.8819" in words
    assert "unpaired – – not paired: another number of examples: 3 and 2" in words
    assert "first 2.3333" in words
    for legend in ("first", "other", "unpaired"):
        assert legend in re.findall(r"</svg>(.*?)</li>", text)


def test_a_study_comes_before_its_cells(tmp_path):
    study = tmp_path / "study"
    study.mkdir()
    (study / "ablation.json").write_text("{}")
    (study / "ablation.md").write_text("| cell | bits/dim |\n| --- | --- |\n| v | 2.5 |\n")
    contents = read_contents(study)
    assert contents.is_study
    cells = [read_contents(compose(study / "cells" / name)) for name in ("eps", "v")]
    text = page.render(cells, [contents])
    words = Page(text).text
    assert words.index("cell bits/dim v 2.5") < words.index("Differences, paired")
    assert re.findall(r"<summary[^>]*>(.*?)</", text) == ["eps", "v"]


def test_a_study_of_many_runs_shows_its_plots_and_no_empty_column(tmp_path):
    study = tmp_path / "study"
    study.mkdir()
    (study / "ablation.json").write_text("{}")
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)
    for name in ("ablation", "learning_curves"):
        save_png(study / f"{name}.png", noise)
    run = read_contents(compose(tmp_path / "run"))._replace(evaluation=None, arrays=None)
    runs = [run._replace(name=f"run {i}") for i in range(20)]
    text = page.render(runs, [read_contents(study)])
    assert {f'alt="{page._DOCUMENTS[n]}"' in text for n in ("ablation", "learning_curves")} == {
        True
    }
    words = Page(text).text
    assert "trained to" in words
    assert "± over noise" not in words


def test_a_plot_that_finds_no_room_is_named_and_leaves_no_heading(tmp_path, monkeypatch):
    monkeypatch.setattr(page, "_BYTES", 150_000)
    study = tmp_path / "study"
    study.mkdir()
    (study / "ablation.json").write_text("{}")
    noise = np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8)  # 120 kB
    save_png(study / "learning_curves.png", noise)
    text = page.render([read_contents(compose(tmp_path / "run"))], [read_contents(study)])
    assert "Learning curves of the study" not in headings(text)
    assert "stays small: Learning curves of the study" in Page(text).text


@pytest.mark.parametrize("count", [1, 30])
def test_the_page_stays_below_three_megabytes(count, tmp_path, monkeypatch):
    """However large the pictures are, and with a long log."""
    monkeypatch.undo()  # draws its own plots
    noise = np.random.default_rng(0).integers(0, 256, (600, 500, 3), np.uint8)
    path = compose(tmp_path / "run")
    lines = [{"step": i, "loss": 1 + i % 7, "images_per_second": i % 5} for i in range(5000)]
    write_lines(path / "metrics.jsonl", lines)
    save_png(path / "samples" / "picture.png", noise)
    for i in range(20):
        shutil.copy(path / "samples" / "picture.png", path / "samples" / f"picture_{i}.png")
    contents = read_contents(path)
    text = page.render([contents._replace(name=f"run {i}") for i in range(count)])
    assert len(text.encode()) < 3e6
    assert "Left out, so that the page stays small: " in text


def test_a_page_of_a_small_run_leaves_nothing_out(tmp_path):
    assert "so that the page stays small" not in rendered(compose(tmp_path / "run"))
