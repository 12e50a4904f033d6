"""The little Markdown that the experiments write: paragraphs, headings, lists and tables."""

import html
import re
from typing import NamedTuple

Spans = list[tuple[str, str]]
"""Text in pieces: ("", "plain"), ("strong", "bold"), ("em", "italic") or ("code", "code")."""


class Block(NamedTuple):
    """A paragraph, a heading, or a table.

    Attributes:
      kind: "paragraph", "heading", "item" or "table".
      spans: its text; of a table, nothing.
      head: of a table: the cells of its first row.
      rows: of a table: the cells of the others.
    """

    kind: str
    spans: Spans
    head: list[Spans]
    rows: list[list[Spans]]


def blocks(text: str) -> list[Block]:
    """The blocks of a Markdown text. Links and pictures become their text."""
    result, paragraph, lines = [], [], text.splitlines()
    while lines:
        line = lines.pop(0).strip()
        heading = re.match(r"#+\s+(.*)", line)
        item = re.match(r"[-*]\s+(.*)", line)
        if line.startswith("|") or heading or item or not line:
            if paragraph:
                result.append(_text("paragraph", " ".join(paragraph)))
            paragraph = []
        if line.startswith("|"):
            table = [line]
            while lines and lines[0].strip().startswith("|"):
                table.append(lines.pop(0).strip())
            result.append(_table(table))
        elif heading:
            result.append(_text("heading", heading[1]))
        elif item:
            result.append(_text("item", item[1]))
        elif line:
            paragraph.append(line)
    if paragraph:
        result.append(_text("paragraph", " ".join(paragraph)))
    return result


def spans(text: str) -> Spans:
    """A line of Markdown in pieces."""
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    pieces, place = [], 0
    for match in re.finditer(r"\*\*(.+?)\*\*|`([^`]+)`|(?<![\\*\w])\*([^*\s][^*]*)\*(?!\w)", text):
        bold, code, italic = match.groups()
        pieces += [("", _plain(text[place : match.start()]))]
        pieces += [("strong", _plain(bold))] if bold else []
        pieces += [("code", code)] if code else []
        pieces += [("em", _plain(italic))] if italic else []
        place = match.end()
    pieces.append(("", _plain(text[place:])))
    return [piece for piece in pieces if piece[1]]


def _plain(text: str) -> str:
    """Without escapes of Markdown and HTML: the page escapes again."""
    return html.unescape(re.sub(r"\\([\\`*_{}\[\]<>()#+.!|~-])", r"\1", text))


def _text(kind: str, text: str) -> Block:
    return Block(kind, spans(text), [], [])


def _table(lines: list[str]) -> Block:
    rows = [
        [spans(cell.strip()) for cell in re.split(r"(?<!\\)\|", line.strip()[1:].removesuffix("|"))]
        for line in lines
        if not re.fullmatch(r"\|[\s:|-]+\|?", line)
    ]
    return Block("table", [], rows[0] if rows else [], rows[1:])
