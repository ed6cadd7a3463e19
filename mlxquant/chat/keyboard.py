"""A terminal's keyboard while the program is busy: nothing is shown, and all is kept."""

import os
import re
import signal
import sys
import termios
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from mlxquant.base.text import clean

# What keys without a character of their own send, and a terminal's answers to questions.
_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|O.|.)?", re.DOTALL)
_ERASE, _ERASE_LINE = "\x7f\b", "\x15"


@contextmanager
def quiet() -> Iterator[Callable[[], str]]:
    """Do not echo what is typed; the context gives a function that returns what was, so far.

    Ctrl-C keeps its meaning. The terminal's mode is restored however the block ends, also
    by SIGTERM, SIGHUP or SIGQUIT. Where standard input is no terminal nothing is typed.
    """
    if not sys.stdin.isatty():
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
    """The text that keys make: erasing takes effect, other control keys have none."""
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
