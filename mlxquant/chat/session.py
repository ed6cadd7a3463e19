"""One sitting: reads messages, answers them, obeys commands. Replies go to stdout, all else to stderr."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

from mlxquant.base.errors import MlxquantError
from mlxquant.base.storage import state_dir
from mlxquant.chat import commands, saved, status, terminal
from mlxquant.chat.conversation import Conversation
from mlxquant.chat.screen import LiveScreen, PlainScreen, Screen
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime.prompt_cache import PromptCache
from mlxquant.sources.names import resolve

Load = Callable[[str], LanguageModel]


class Session:
    """A conversation and what is around it: the screen, attached files, the model's loader."""

    def __init__(self, conversation: Conversation, load: Load | None = None):
        self.conversation = conversation
        self.thoughts = "folded"
        self.attached: list[str] = []
        self.draft = ""
        self.over = False
        self._load = load or _load
        self._notes = Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty())
        self._bits = status.bits_per_weight(conversation.model)
        self._screen = self._make_screen()
        self._progress = ""

    def say(self, text: str) -> None:
        """A remark on stderr."""
        self._notes.print(text, style="dim", markup=False)

    def status(self, width: int) -> str:
        """The line under the prompt."""
        return status.fit(status.segments(self.conversation, self._bits), width)

    def answer(self, text: str) -> None:
        """Let the model answer; Ctrl-C ends the reply and keeps what came."""
        talk, before = self.conversation, self.conversation.last_report
        talk.check_fits(text)
        if turns := talk.make_room(text):
            self.say(f"(the context is full: the model no longer sees the oldest {turns} "
                     f"turn{'s' * (turns > 1)}; /save keeps them)")
        self._progress = "reading the prompt"
        self._screen.begin()
        reason: str | None = None
        try:
            with _interruptible() as interrupted:
                pieces = talk.reply(text, self._reading(interrupted))
                try:
                    start, count = time.perf_counter(), 0
                    for count, chunk in enumerate(pieces, 1):
                        if count == 1:
                            start = time.perf_counter()
                        self._progress = _speed(count - 1, time.perf_counter() - start)
                        self._screen.feed(chunk.parts)
                        reason = chunk.finish_reason
                        if interrupted():
                            raise KeyboardInterrupt
                finally:
                    pieces.close()
        except KeyboardInterrupt:
            reason = "stopped"
        finally:
            self._screen.end()
        if reason == "stopped":
            self.say("(stopped)")
        elif reason == "length":
            room = talk.last_report is not None and talk.last_report.generation_tokens >= talk.max_tokens
            self.say(f"(cut at {talk.max_tokens} tokens; /set max_tokens allows more)" if room else
                     "(cut: the context is full)")
        if talk.last_report is not None and talk.last_report is not before:
            self.say(talk.last_report.line())

    def change_model(self, name: str) -> None:
        """Go on with another model; on any failure with the one there was."""
        resolve(name)  # an error here costs nothing
        talk, old = self.conversation, self.conversation.model
        talk.cache, talk.draft = PromptCache(), None
        old.network = None  # free before the other comes: it may not fit beside
        try:
            talk.model = self._load(name)
        except BaseException:
            talk.model = self._load(old.name)
            raise
        finally:
            self._bits = status.bits_per_weight(talk.model)
        talk.last_report = None

    def read(self, reader: terminal.Read) -> str:
        """The next message, or a command, in one piece."""
        start, self.draft = self.draft, ""
        return terminal.unquoted(reader(start))

    def handle(self, text: str) -> None:
        """One message or command; errors are said, and nothing is lost."""
        try:
            if text.startswith("/") and "\n" not in text:
                commands.obey(self, text)
            elif text:
                attached, self.attached = self.attached, []
                self.answer("\n".join([*attached, text]))
        except MlxquantError as error:
            self.say(f"error: {error}")
        except KeyboardInterrupt:
            self.say("(stopped)")

    def _make_screen(self) -> Screen:
        console = Console(highlight=False)
        if not console.is_terminal or console.is_dumb_terminal:
            return PlainScreen(lambda: self.thoughts == "shown", self.say)
        return LiveScreen(console, lambda: self.thoughts == "shown",
                          lambda: status.fit([self._progress], console.width - 1))

    def _reading(self, interrupted: Callable[[], bool]) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            if interrupted():
                raise KeyboardInterrupt
            self._progress = f"reading the prompt, {done} of {total} tokens"
            self._screen.feed(())

        return progress


def run(session: Session) -> None:
    """Talk until Ctrl-D, ``/exit`` or the end of the pipe."""
    reader = terminal.reader({name: command.takes for name, command in commands.TABLE.items()}, session.status)
    while not session.over:
        try:
            text = session.read(reader)
        except KeyboardInterrupt:
            session.say("(Ctrl-D or /exit leaves)")
            continue
        except EOFError:
            return
        try:
            session.handle(text)
        except Exception:  # a bug of ours or MLX's must not take the conversation with it
            session.conversation.cache = PromptCache()
            kept = saved.save(session.conversation, state_dir("kept"))
            session.say(f"(the conversation is kept: /load {kept[0]})")
            raise


def _load(name: str) -> LanguageModel:
    from mlxquant.model.loading import load

    return load(name)


def _speed(tokens: int, seconds: float) -> str:
    return f"{tokens / seconds:.1f} tokens/s" if tokens and seconds > 0 else "…"


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Let Ctrl-C be asked for between tokens instead of falling into the middle of one; twice
    within one token it falls all the same."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    count = 0

    def note(number: int, frame: Any) -> None:
        nonlocal count
        count += 1
        if count > 2:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, before)
