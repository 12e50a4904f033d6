"""All settings as a table in the terminal, and as the page docs/settings.md.

python -m configs.settings.listing > docs/settings.md
"""

import shutil
import textwrap

from configs.base import SETTINGS
from configs.settings.declaration import Group

_PAGE = """\
# Settings

Every setting, its default and its permitted values. `--config.train.batch_size=64` overrides one
on the command line; `config.train.batch_size = 64` does so in a config file or a notebook.
`python main.py --helpconfig` prints this list.

This page is generated from the declarations in [configs/settings/](../configs/settings/) by
`python -m configs.settings.listing > docs/settings.md`. A name that a notebook adds to a registry,
such as a schedule or a sampler, is permitted at once.
"""


def table(settings: Group) -> str:
    """Name, default, permitted values and help of every setting, aligned for a terminal."""
    rows = [(name, repr(setting.default), setting) for name, setting in settings.flat()]
    first, second = (max(len(row[column]) for row in rows) + 2 for column in (0, 1))
    columns = max(shutil.get_terminal_size((140, 24)).columns, first + second + 50)
    lines = []
    for name, default, setting in rows:
        lines += textwrap.wrap(
            f"{setting.help} [{setting.kind.describe()}]",
            columns,
            initial_indent=f"{name:{first}}{default:{second}}",
            subsequent_indent=" " * (first + second),
        )
    return "\n".join(lines)


def page(settings: Group) -> str:
    """The page docs/settings.md."""
    top = Group("", **{k: v for k, v in settings.members.items() if not isinstance(v, Group)})
    groups = {"": top} | {k: v for k, v in settings.members.items() if isinstance(v, Group)}
    parts = [_PAGE]
    for name, group in groups.items():
        if name:
            parts.append(f"## {name}\n\n{group.help}\n")
        rows = [
            f"| `{setting}` | `{declared.default!r}` | {_cell(declared.kind.describe())} | "
            f"{_cell(declared.help)} |"
            for setting, declared in group.flat(f"{name}." if name else "")
        ]
        head = "| setting | default | permitted | meaning |\n| --- | --- | --- | --- |"
        parts.append("\n".join([head, *rows]) + "\n")
    return "\n".join(parts)


def _cell(text: str) -> str:
    """Text in a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


if __name__ == "__main__":
    print(page(SETTINGS), end="")
