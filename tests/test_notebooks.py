"""The notebooks run, with short settings here; what is stored of them is whole and small."""

import ast
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import nbformat
import pytest

from notebooks import execute
from tests.test_docs import ROOT

SHORT = {
    "a_trained_run": {
        "num_steps": 15,
        "unet": {
            "channels": 4,
            "num_groups": 4,
            "channel_multipliers": (1,),
            "attention_resolutions": (),
        },
        "num_examples": 32,
        "num_measured": 64,
        "few_timesteps": (3, 5),
        "num_timesteps": 20,
        "samplers": {"ancestral": 2, "ddim": 2},
    },
    "ablation": {"num_steps": 20, "num_test": 32, "num_timesteps": 4, "seeds": (0,)},
    "lecture": {"num_examples": 50},
    "somebody_elses_model": {
        "num_steps": 2,
        "num_examples": 4,
        "num_timesteps": (5, 3),
        "samplers": {"ancestral": 2, "ddim": 2},
    },
    "your_own_denoiser": {"num_steps": 80, "num_test": 32, "num_timesteps": 8, "grid_size": 8},
}
NEEDS = {"somebody_elses_model": "torch"}
MAX_BYTES = 300_000
OTHERS = {"IPython", "flax", "jax", "matplotlib", "numpy", "optax", "sklearn", "torch"}
each = pytest.mark.parametrize("name", execute.NAMES)


def code(name: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in execute.read(name).cells if cell.cell_type == "code"]


def stable() -> list[str]:
    """The modules that docs/extending.md promises not to change."""
    text = (ROOT / "docs" / "extending.md").read_text()
    text = text[text.index("## What is stable") :]
    names = re.findall(r"`((?:diffusion|models|experiments|configs)(?:\.\w+)*)`", text)
    assert names
    return names


@each
def test_it_runs(name, tmp_path):
    """With programs that are compiled in a hurry: most of the time goes into compilation."""
    if name in NEEDS and importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"needs {NEEDS[name]}")
    environment = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    executed = execute.execute(execute.read(name), tmp_path, SHORT[name], environment)
    assert all(cell.execution_count for cell in executed.cells if cell.cell_type == "code")


@each
def test_what_is_stored_is_whole_and_small(name):
    """All cells were run in order, none failed, and nothing tells of the machine."""
    cells = code(name)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    kinds = {(output.output_type, output.get("name")) for output in outputs}
    assert kinds <= {("stream", "stdout"), ("display_data", None), ("execute_result", None)}
    text = (execute.FOLDER / f"{name}.ipynb").read_text()
    paths = [str(pathlib.Path.home()), str(ROOT), "/tmp/", "/home/", "site-packages"]
    assert [path for path in paths if path in text] == []
    assert "widget-view" not in text
    assert len(text.encode()) < MAX_BYTES


@each
def test_it_uses_what_is_stable(name):
    for cell in code(name):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for imported in names:
                own = any(f"{imported}.".startswith(f"{module}.") for module in stable())
                assert own or imported.partition(".")[0] in OTHERS, imported


def test_settings_are_replaced_by_name_only():
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell(
                "steps = 10  # of training\nwidth = 3", metadata={"tags": ["parameters"]}
            ),
            nbformat.v4.new_code_cell("print(steps, width)"),
        ]
    )
    with pytest.raises(ValueError, match="does not set step"):
        execute.execute(notebook, ROOT, {"step": 2})
    with pytest.raises(ValueError, match="0 cells have the tag"):
        execute.execute(nbformat.v4.new_notebook(), ROOT)
    executed = execute.execute(notebook, ROOT, {"steps": 2})
    assert executed.cells[1].outputs[0].text == "2 3\n"
    assert notebook.cells[0].source.startswith("steps = 10")


def test_a_bar_in_a_notebook_without_widgets_warns_of_nothing(tmp_path):
    """Its lines go to standard error, which is not stored."""
    source = (
        "from experiments.harness.processes.progress import progress\n"
        "with progress(3, 'count', 'step') as bar:\n    bar.update(3)\n"
        "print('done')"
    )
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    executed = execute.execute(nbformat.v4.new_notebook(cells=[cell]), tmp_path)
    assert "Warning" not in str(executed.cells[0].outputs)
    (output,) = execute.cleaned(executed).cells[0].outputs
    assert output.text == "done\n"


def test_one_command_executes_and_stores(tmp_path):
    """In a copy of the folder, on a notebook that takes a second."""
    copy = tmp_path / "notebooks"
    copy.mkdir()
    (copy / "execute.py").write_text((ROOT / "notebooks" / "execute.py").read_text())
    cell = nbformat.v4.new_code_cell("x = 2\nx + 1", metadata={"tags": ["parameters"]})
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), copy / "sum.ipynb")
    command = [sys.executable, "-m", "notebooks.execute", "sum"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=os.environ)
    assert re.fullmatch(r"sum: \d+\.\d minutes, \d+\.\d of a processor\n", done.stdout), done.stderr
    stored = nbformat.read(copy / "sum.ipynb", as_version=4)
    assert stored.cells[0].outputs[0].data["text/plain"] == "3"
