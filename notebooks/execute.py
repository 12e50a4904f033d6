"""Executes the notebooks in full and stores their outputs.

    python -m notebooks.execute            # all of them
    python -m notebooks.execute lecture    # one

Prints the minutes of each, and those of a processor. What is stored has no progress bars.
"""

import base64
import io
import os
import pathlib
import re
import resource
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

FOLDER = pathlib.Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.ipynb")))
TIMEOUT = 3600  # seconds for a cell
PNG = "image/png"


def read(name: str) -> NotebookNode:
    """A notebook of this folder, by its name without .ipynb."""
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def parameters_of(notebook: NotebookNode) -> str:
    """The source of the cell tagged `parameters`, whose settings can be replaced."""
    cells = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", ())]
    if len(cells) != 1:
        raise ValueError(f"{len(cells)} cells have the tag parameters; one must have it")
    return cells[0].source


def execute(
    notebook: NotebookNode,
    folder: pathlib.Path,
    parameters: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
) -> NotebookNode:
    """Runs all cells of a notebook in a new kernel, and returns it with its outputs.

    Args:
      notebook: the notebook; it is not changed.
      folder: the current directory of the kernel.
      parameters: new values of settings in the cell tagged `parameters`.
      environment: variables of the kernel beside those of this process.

    Raises:
      ValueError: for a setting that the cell does not have.
      nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    notebook = nbformat.from_dict(notebook)
    source = parameters_of(notebook)
    for name, value in (parameters or {}).items():
        source, count = re.subn(rf"^{name} = .*$", f"{name} = {value!r}", source, flags=re.M)
        if count != 1:
            raise ValueError(f"the cell of parameters does not set {name}: {source}")
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source = source
    paths = [str(FOLDER.parent), os.environ.get("PYTHONPATH", "")]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=variables | dict(environment or {}))
    return notebook


def cleaned(notebook: NotebookNode) -> NotebookNode:
    """A notebook with small pictures, without widgets and standard error, where bars are."""
    notebook = nbformat.from_dict(notebook)
    notebook.metadata.pop("widgets", None)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if not _is_noise(output)]
            for output in cell.outputs:
                if PNG in output.get("data", {}):
                    output.data[PNG] = _small(output.data[PNG])
    return notebook


def _small(picture: str) -> str:
    """A PNG in base64, with at most 256 colours."""
    image = Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")
    buffer = io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode()


def _is_noise(output: NotebookNode) -> bool:
    is_widget = "application/vnd.jupyter.widget-view+json" in output.get("data", {})
    return is_widget or output.get("name") == "stderr"


def main(names: tuple[str, ...]) -> None:
    """Executes these notebooks and writes them back."""
    for name in names or NAMES:
        start, before = time.monotonic(), _processor_seconds()
        with tempfile.TemporaryDirectory() as folder:  # so that no earlier run is found
            executed = execute(read(name), pathlib.Path(folder))
        nbformat.write(cleaned(executed), FOLDER / f"{name}.ipynb")
        wall, busy = time.monotonic() - start, _processor_seconds() - before
        print(f"{name}: {wall / 60:.1f} minutes, {busy / 60:.1f} of a processor")


def _processor_seconds() -> float:
    """Of the kernels that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main(tuple(sys.argv[1:]))
