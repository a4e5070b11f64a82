"""A page of text, tables and pictures, written once and rendered as Markdown and as one self-contained HTML file.

Everything that comes from a run or a command line is a `Code`, and is shown as the text that it is.
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mnist_dist.disk.files import replace_synced
from mnist_dist.tables import table

ASSETS = Path(__file__).parent / "assets"
REPORT, PICTURES = "report", "pictures"  # the name of a page, and of the folder of its pictures


class Code(str):
    """Text from outside: a name, a value, a reason."""

    __slots__ = ()


class Strong(str):
    """Important text."""

    __slots__ = ()


class Text(tuple):
    """A sentence of parts, of which some are `Code` or `Strong`."""

    __slots__ = ()


Inline = str | Text  # type: ignore[operator]


class Heading(NamedTuple):
    """A heading: `level` 1 is the page's title."""

    level: int
    text: str


class Table(NamedTuple):
    """A table; in HTML it scrolls if it is wider than the screen."""

    head: Sequence[Inline]
    lines: Sequence[Sequence[Inline]]


class Picture(NamedTuple):
    """A picture that lies beside the page as NAME.png and NAME.svg; `svg` is the element that HTML has inline."""

    name: str
    alt: str
    svg: str


@dataclass
class Page:
    """Blocks in their order: a string or `Text` is a paragraph, a list of them is a bullet list."""

    title: str
    blocks: list[Inline | Heading | Table | Picture | list[Inline]] = field(default_factory=list)

    def add(self, *blocks: Inline | Heading | Table | Picture | list[Inline]) -> None:
        """Append blocks."""
        self.blocks += blocks

    def markdown(self, pictures: str) -> str:
        """The page as Markdown; pictures are links into the folder `pictures`."""
        parts = [f"# {_markdown(self.title)}"]
        for block in self.blocks:
            if isinstance(block, Heading):
                parts.append(f"{'#' * block.level} {_markdown(block.text)}")
            elif isinstance(block, Table):
                head, *lines = ([_markdown(cell) for cell in cells] for cells in (block.head, *block.lines))
                parts.append("\n".join(table(head, lines)).strip())
            elif isinstance(block, Picture):
                parts.append(f"![{_markdown(block.alt)}]({pictures}/{block.name}.png)")
            elif isinstance(block, list):
                parts.append("\n".join(f"- {_markdown(item)}" for item in block))
            else:
                parts.append(_markdown(block))
        return "\n\n".join(parts) + "\n"

    def write(self, folder: Path, stem: str) -> list[Path]:
        """Write STEM.md and STEM.html into the folder; returns the two files."""
        written = []
        for suffix, text in ((".md", self.markdown(PICTURES)), (".html", self.html())):
            written.append(folder / f"{stem}{suffix}")
            replace_synced(written[-1], text.encode())
        return written

    def html(self) -> str:
        """The page as one file that needs no other."""
        body = "\n".join(_html_block(block) for block in self.blocks)
        style = (ASSETS / "page.css").read_text(encoding="utf-8")
        return (
            f"<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n"
            f"<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n"
            f"<meta name=\"color-scheme\" content=\"light dark\">\n<link rel=\"icon\" href=\"data:,\">\n"
            f"<title>{html.escape(self.title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
            f"<h1>{html.escape(self.title)}</h1>\n{body}\n</main>\n</body>\n</html>\n"
        )


def _parts(text: Inline) -> Sequence[str]:
    return text if isinstance(text, Text) else [text]


def _markdown(text: Inline) -> str:
    def one(part: str) -> str:
        if isinstance(part, Code):
            return _code_span(part)
        escaped = re.sub(r"([\\`*_<>\[\]|])", r"\\\1", part)
        return f"**{escaped}**" if isinstance(part, Strong) else escaped

    return "".join(map(one, _parts(text)))


def _code_span(text: str) -> str:
    """A Markdown code span that shows the text as it is, also in a table."""
    text = " ".join(text.split()).replace("|", "\\|")
    if not text:
        return ""
    fence = "`" * (max((len(run) for run in re.findall("`+", text)), default=0) + 1)
    space = " " if text[0] == "`" or text[-1] == "`" else ""
    return f"{fence}{space}{text}{space}{fence}"


def _html(text: Inline) -> str:
    def one(part: str) -> str:
        tag = "code" if isinstance(part, Code) else "strong" if isinstance(part, Strong) else ""
        return f"<{tag}>{html.escape(part)}</{tag}>" if tag and part else html.escape(part)

    return "".join(map(one, _parts(text)))


def _html_block(block: Inline | Heading | Table | Picture | list[Inline]) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
    if isinstance(block, Table):
        head = "".join(f"<th>{_html(cell)}</th>" for cell in block.head)
        lines = "\n".join("<tr>" + "".join(f"<td>{_html(cell)}</td>" for cell in cells) + "</tr>"
                          for cells in block.lines)
        return f"<div class=\"wide\"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{lines}\n</tbody></table></div>"
    if isinstance(block, Picture):
        return (f"<figure>{block.svg}<figcaption>{html.escape(block.alt)}</figcaption></figure>")
    if isinstance(block, list):
        return "<ul>\n" + "\n".join(f"<li>{_html(item)}</li>" for item in block) + "\n</ul>"
    return f"<p>{_html(block)}</p>"
