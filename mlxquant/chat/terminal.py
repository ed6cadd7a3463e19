"""Reading what the user says: a line editor on a terminal, plain lines from a pipe.

A message that begins with three double quotes goes on until three close it. What is typed
while the program is busy is not shown, and kept.
"""

import os
import re
import signal
import sys
import termios
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from mlxquant.base.storage import state_dir
from mlxquant.base.text import clean

# Escape sequences: of keys without a character of their own, and a terminal's answers to queries.
_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|O.|.)?", re.DOTALL)
_ERASE, _ERASE_LINE = "\x7f\b", "\x15"
QUOTES = '"""'
Read = Callable[[str], str]  # takes text to begin with; raises EOFError at the end
Completions = Mapping[str, Callable[[], list[str]] | None]


def reader(completions: Completions, status: Callable[[int], str]) -> Read:
    """A function that reads one message; ``status`` gives the line under the prompt for a width,
    ``completions``, by a command's name, the words that may follow it, or None for paths."""
    return _editor(completions, status) if has_editor() else _lines


def has_editor() -> bool:
    """Whether somebody types and sees it, be it on stderr."""
    return sys.stdin.isatty() and (sys.stdout.isatty() or sys.stderr.isatty())


def unquoted(text: str) -> str:
    """``text`` without the quotes around several lines, and without blanks around it."""
    text = text.strip()
    if text.startswith(QUOTES):
        text = text.removeprefix(QUOTES).removesuffix(QUOTES)
    return text.strip()


def is_open(text: str) -> bool:
    """Whether quotes were opened and not closed."""
    text = text.strip()
    return text.startswith(QUOTES) and not (text.endswith(QUOTES) and len(text) >= 2 * len(QUOTES))


def _lines(_: str) -> str:
    text = sys.stdin.readline()
    if not text:
        raise EOFError
    while is_open(text) and (line := sys.stdin.readline()):
        text += line
    return text


def _editor(completions: Completions, status: Callable[[int], str]) -> Read:
    from prompt_toolkit import PromptSession  # here and below: a pipe needs none of it
    from prompt_toolkit.application import get_app
    from prompt_toolkit.filters import Condition
    from prompt_toolkit.key_binding import KeyBindings
    from prompt_toolkit.output import create_output
    from prompt_toolkit.shortcuts import CompleteStyle
    from prompt_toolkit.styles import Style

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession[str] = PromptSession(
        output=None if sys.stdout.isatty() else create_output(sys.stderr),  # in no file
        history=_history(), completer=_completer(completions), complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE, enable_history_search=True, key_bindings=keys,
        multiline=Condition(lambda: is_open(get_app().current_buffer.text)),
        prompt_continuation=lambda width, number, wrapped: "" if wrapped else "… ".rjust(width),
        bottom_toolbar=lambda: status(get_app().output.get_size().columns),
        style=Style.from_dict({"bottom-toolbar": "noreverse fg:ansibrightblack"}))
    return lambda start: session.prompt("> ", default=start)


def _history() -> Any:
    """What was typed in earlier sessions; only this one's where it cannot be kept."""
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    class History(FileHistory):
        """Ignores a full disk, and lines that are not valid text."""

        def store_string(self, string: str) -> None:
            with suppress(OSError, UnicodeError):
                super().store_string(string)

    path = state_dir("chat_history")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return History(path)


def _completer(completions: Completions) -> Any:
    from prompt_toolkit.completion import Completer, Completion, PathCompleter, WordCompleter
    from prompt_toolkit.document import Document

    class Commands(Completer):
        """Commands after a slash, then what each of them takes."""

        def get_completions(self, document: Document, complete_event: Any) -> Iterator[Completion]:
            command, space, rest = document.text_before_cursor.partition(" ")
            words = completions.get(command, list) if space else lambda: list(completions)
            if command.startswith("/"):
                each = (PathCompleter(expanduser=True) if words is None
                        else WordCompleter(sorted(words()), sentence=True))
                yield from each.get_completions(Document(rest if space else command),
                                                complete_event)

    return Commands()


@contextmanager
def quiet() -> Iterator[Callable[[], str]]:
    """Do not echo what is typed; the context gives a function that returns what was, so far.

    Ctrl-C keeps its meaning. The terminal's mode is restored however the block ends, also
    by SIGTERM, SIGHUP or SIGQUIT. Where there is no editor the terminal stays as it is.
    """
    if not has_editor():
        yield lambda: ""
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)

    def typed() -> str:
        with suppress(OSError, termios.error):  # the terminal may be gone
            _silence(terminal)  # again: a stopped and continued job has the shell's mode
            return edited(b"".join(iter(lambda: os.read(terminal, 4096), b"")))
        return ""

    handlers = {number: signal.signal(number, _leave)
                for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)}
    try:
        _silence(terminal)
        yield typed
    finally:
        with suppress(termios.error):
            termios.tcsetattr(terminal, termios.TCSANOW, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def edited(typed: bytes) -> str:
    """The text that typed keys give: erasing takes effect, other control keys are dropped."""
    line = ""
    for character in _SEQUENCE.sub("", typed.decode("utf-8", "ignore")):
        if character in _ERASE:
            line = line[:-1]
        else:
            line = "" if character == _ERASE_LINE else line + character
    return clean(line).strip("\n")


def _silence(terminal: int) -> None:
    """Keys come one by one and unseen, a read returns at once, Ctrl-C drops none of them."""
    mode = termios.tcgetattr(terminal)
    mode[3] = mode[3] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH
    mode[6][termios.VMIN] = mode[6][termios.VTIME] = 0
    termios.tcsetattr(terminal, termios.TCSANOW, mode)


def _leave(number: int, _: Any) -> None:
    raise SystemExit(128 + number)
