"""README and docs: links, commands, settings, files and functions exist; examples run."""

import ast
import importlib
import importlib.util
import pathlib
import re
import shlex

import pytest

from configs import base
from experiments import notebook
from experiments.harness.arguments import EXPERIMENTS
from tests.test_architecture import LEVELS

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PACKAGES = ("diffusion", "models", "experiments", "configs")
SECTIONS = set(base.get_config())  # model.name is a setting, not a name in diffusion/model.py
FOLDERS = (*PACKAGES, "benchmarks", "docs", "tests")
each_page = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors of a page: explicit ids, and GitHub's for its headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r'<a id="([^"]+)">', text))


def code_blocks(page: pathlib.Path) -> list[str]:
    """The Python blocks of a page."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.S | re.M)


def code_words(page: pathlib.Path) -> set[str]:
    """The words of the code spans of a page."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    return {word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split()}


def commands(page: pathlib.Path) -> list[list[str]]:
    """The arguments of every command of a page that begins with python."""
    text = page.read_text().replace("\\\n", " ")
    lines = re.findall(r"^(?: {4})?(python .*)$", text, flags=re.M)
    return [shlex.split(line) for line in lines + re.findall(r"`(python [^`\n]+)`", text)]


def resolve(name: str) -> bool:
    """Whether a dotted name is a module, or an attribute of one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(parts[:length])
        try:
            found = importlib.import_module(module)
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            if not hasattr(found, part) and part not in getattr(found, "__annotations__", {}):
                return False
            found = getattr(found, part, None)
        return True
    return False


@each_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http:", "https:")):
            continue
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@each_page
def test_commands_name_what_exists(page):
    known = {*re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (ROOT / "main.py").read_text()), "config"}
    for command in commands(page):
        if command[1] == "main.py":
            words = command[2:]
            if "--experiment=report" in words:  # takes further directories
                words = [word for word in words if word.startswith("-")]
            flags = [re.match(r"--(\w+)", word) for word in words]
            assert all(flag and flag.group(1) in known for flag in flags), command
        elif command[1] == "-m":
            assert importlib.util.find_spec(command[2]), command
        else:
            raise AssertionError(f"{command} is neither main.py nor a module")


@each_page
def test_settings_configs_and_experiments_exist(page):
    text = page.read_text()
    for name in re.findall(r"--config\.([a-z][\w.]*\w)", text):
        value = base.get_config()
        for part in name.split("."):
            assert part in value, name
            value = value[part]
    for file in re.findall(r"--config=([\w/.]+)", text):
        assert (ROOT / file).is_file(), file
    assert set(re.findall(r"--experiment=(\w+)", text)) <= set(EXPERIMENTS)


@each_page
def test_files_and_names_in_code_spans_exist(page):
    for word in code_words(page):
        file, _, test = word.partition("::")
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w/.]*", file):
            assert (ROOT / file).exists(), word
            assert not test or f"def {test}(" in (ROOT / file).read_text(), word
        elif re.fullmatch(r"[a-z]\w*(\.\w+)+", word) and word.split(".")[0] in PACKAGES:
            assert resolve(word), word
        elif (
            re.fullmatch(r"[a-z]\w*(\.\w+)+", word)
            and word.split(".")[0] not in SECTIONS
            and importlib.util.find_spec(f"diffusion.{word.split('.')[0]}")
        ):
            assert resolve(f"diffusion.{word}"), word


@each_page
def test_examples_import_what_exists(page):
    for block in code_blocks(page):
        for name in re.findall(r"\brun\.(\w+)", block):
            assert hasattr(notebook.Run, name), f"run.{name}"
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    assert resolve(f"{node.module}.{alias.name}"), alias.name


@pytest.mark.parametrize("name", ["README.md", "docs/extending.md", "docs/checkpoints.md"])
def test_examples_run(name):
    """One after another, but for those that need a work directory."""
    namespace = {"__name__": "example"}
    for block in code_blocks(ROOT / name):
        if '"runs/' not in block:
            exec(compile(block, f"<{name}>", "exec"), namespace)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_figure_is_shown():
    shown = " ".join(page.read_text() for page in PAGES)
    assert [file.name for file in (ROOT / "docs").glob("*.png") if file.name not in shown] == []


def test_the_architecture_page_names_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text()
    words = set(re.findall(r"\w+", text[: text.index("## Imports")]))
    folders = [ROOT / "diffusion", ROOT / "models", ROOT / "experiments"]
    folders += sorted((ROOT / "experiments" / "harness").rglob("*/"))
    modules = {path.stem for folder in folders for path in folder.glob("*.py")} - {"__init__"}
    assert modules - words == set()


def test_the_architecture_page_has_the_levels_of_the_test_of_architecture():
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = dict(re.findall(r"^\| (\d) \| (.*) \|$", text, flags=re.M))
    pairs = enumerate(LEVELS, 1)
    assert {number: set(re.findall(r"\w+", rooms)) for number, rooms in rows.items()} == {
        str(number): set(rooms) for number, rooms in pairs
    }
