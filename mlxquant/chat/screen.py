"""Where a reply appears: a terminal that can redraw, or any stream of text.

On a terminal finished Markdown is written once and only its unfinished end is drawn
again: of that, only the lines that changed, in one write. Nothing flickers, and a slow
line carries little more than the text.
"""

import sys
import time
from collections.abc import Callable

from rich.console import Console

from mlxquant.base.text import clean
from mlxquant.chat import markdown
from mlxquant.runtime.reply import ReplyPart

_PAUSE_S = 0.05  # between two drawings of a growing end


class PlainScreen:
    """Prints the answer on stdout as it comes, and reasoning on stderr, whole or as a summary."""

    def __init__(self, show_thoughts: Callable[[], bool], say: Callable[[str], None]):
        self._show_thoughts, self._say = show_thoughts, say

    def begin(self) -> None:
        self._thoughts, self._after_thoughts = "", False

    def feed(self, parts: tuple[ReplyPart, ...]) -> None:
        for part in parts:
            if part.kind == "thought":
                self._thoughts += part.text
                continue
            self._tell()
            text = clean(part.text)
            text = text.lstrip("\n") if self._after_thoughts else text
            self._after_thoughts = self._after_thoughts and not text
            print(text, end="", flush=True)

    def end(self) -> None:
        self._tell()
        print(flush=True)

    def _tell(self) -> None:
        if thoughts := self._thoughts.strip():
            self._say(thoughts if self._show_thoughts() else folded(thoughts))
            self._after_thoughts = True
        self._thoughts = ""


class LiveScreen:
    """Shows rendered Markdown, and a status line under its growing end."""

    def __init__(self, console: Console, show_thoughts: Callable[[], bool],
                 status: Callable[[], str]):
        self._console, self._show_thoughts, self._status = console, show_thoughts, status

    def begin(self) -> None:
        self._tail = _Tail(self._console)
        self._answer = self._thoughts = ""
        self._blocks = 0
        self._drawn = 0.0
        self._draw()

    def feed(self, parts: tuple[ReplyPart, ...]) -> None:
        for part in parts:
            text = clean(part.text)
            if part.kind == "thought":
                self._thoughts += text
            else:
                self._fold()
                self._answer = (self._answer + text).lstrip("\n")
        if time.monotonic() - self._drawn >= _PAUSE_S:
            self._draw()

    def end(self) -> None:
        self._fold()
        blocks, rest = markdown.split(self._answer)
        for block in [*blocks, rest]:
            self._finish(block)
        self._tail.draw([])

    def _draw(self) -> None:
        blocks, self._answer = markdown.split(self._answer)
        for block in blocks:
            self._finish(block)
        lines = self._spaced(markdown.render(self._console, self._answer))
        if self._thoughts:
            lines = self._thinking("…")
        self._tail.draw(lines + markdown.plain(self._console, self._status(), "dim"))
        self._drawn = time.monotonic()

    def _finish(self, block: str) -> None:
        if lines := self._spaced(markdown.render(self._console, block)):
            self._tail.finish(lines)
            self._blocks += 1

    def _spaced(self, lines: list[str]) -> list[str]:
        return ["", *lines] if lines and self._blocks else lines

    def _thinking(self, more: str) -> list[str]:
        thoughts = self._thoughts.strip()
        text = thoughts if self._show_thoughts() else folded(thoughts) + more
        return markdown.plain(self._console, text, "dim italic")

    def _fold(self) -> None:
        """Reasoning is over: leave one line of it, or all where asked for."""
        if self._thoughts.strip():
            self._tail.finish(self._thinking(" (/show thoughts)"))
            self._blocks += 1
        self._thoughts = ""


class _Tail:
    """The lines at the end of the screen that may change; the cursor stands below them."""

    def __init__(self, console: Console):
        self._console, self._width = console, console.width
        self._lines: list[str] = []

    def draw(self, lines: list[str]) -> None:
        """Show ``lines`` in the place of those before; what has left the window stays as it was."""
        width, height = self._console.size
        if width != self._width:  # the terminal has wrapped them anew: leave them
            self._lines, self._width = [], width
        same = next((i for i, (old, new) in enumerate(zip(self._lines, lines)) if old != new),
                    min(len(self._lines), len(lines)))
        keep = max(same, len(self._lines) - (height - 1))
        up = len(self._lines) - keep
        text = (f"\x1b[{up}A\r" if up > 0 else "") + "".join(
            f"{line}\x1b[K\n" for line in lines[keep:])
        if len(lines) < len(self._lines):
            text += "\x1b[J"
        if text:
            sys.stdout.write(text)
            sys.stdout.flush()
        self._lines = lines

    def finish(self, lines: list[str]) -> None:
        """Show ``lines`` for good."""
        self.draw(lines)
        self._lines = []


def folded(thoughts: str) -> str:
    """Reasoning in one line."""
    count = len(thoughts.split())
    return f"thought, {count} word{'s' * (count != 1)}"
