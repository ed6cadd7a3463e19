"""Markdown that arrives piece by piece, as lines for a terminal.

A block (paragraph, list, table, code) is finished once another begins; until then
more text may change how all of it looks.
"""

import re

from markdown_it import MarkdownIt
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown
from rich.padding import Padding
from rich.syntax import Syntax

from mlxquant.base.text import clean

# HTML and link definitions, which Rich shows as nothing, stay text; an image is a link.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(
    ["table", "strikethrough"]).disable(["reference", "image"])
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


class _Code(CodeBlock):
    """Code in the terminal's own colours; lines are not padded, so that it can be copied."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        syntax = Syntax("", self.lexer_name, theme="ansi_dark")
        yield Padding(syntax.highlight(str(self.text).rstrip()), (0, 0, 0, 2))


class _Heading(Heading):
    """Headings aligned left at every level."""

    LEVEL_ALIGN = dict.fromkeys(Heading.LEVEL_ALIGN, "left")


class _Markdown(Markdown):
    elements = Markdown.elements | {"fence": _Code, "code_block": _Code, "heading_open": _Heading}

    def __init__(self, markup: str):
        super().__init__("", hyperlinks=False)
        self.parsed = _PARSER.parse(markup)
        for token in self.parsed:  # cleaned again: an entity such as &#x202e; is now its character
            for part in (token, *(token.children or ())):
                part.content = clean(part.content)


def split(text: str) -> tuple[list[str], str]:
    """The finished blocks of ``text``, and the rest that may still change."""
    starts = [token.map[0] for token in _PARSER.parse(text) if token.level == 0 and token.map]
    lines = text.splitlines(keepends=True)
    edges = sorted({0, *starts})
    blocks = ["".join(lines[a:b]) for a, b in zip(edges, [*edges[1:], len(lines)])]
    return [block for block in blocks[:-1] if block.strip()], blocks[-1] if blocks else ""


def render(console: Console, block: str) -> list[str]:
    """The lines of one block, with escape sequences where the console has them; none is empty
    at either end. One column stays free, so that no terminal wraps a full line."""
    width = max(console.width - 1, 10)
    with console.capture() as capture:
        console.print(_Markdown(block), width=width)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    shown = [i for i, line in enumerate(lines) if _ESCAPE.sub("", line).strip()]
    return lines[shown[0]:shown[-1] + 1] if shown else []


def plain(console: Console, text: str, style: str) -> list[str]:
    """Lines of ``text`` as it is, in one style."""
    with console.capture() as capture:
        console.print(text, style=style, markup=False, width=max(console.width - 1, 10))
    return capture.get().splitlines()
