"""One chat session: a conversation, the screen it appears on, and remarks to the user.

Replies go to stdout, all else to stderr.
"""

import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import Any

from rich.console import Console

from mlxquant.base.errors import MlxquantError, Unsupported
from mlxquant.base.text import clean
from mlxquant.chat.conversation import Conversation
from mlxquant.chat.screen import LiveScreen, PlainScreen
from mlxquant.model import loading
from mlxquant.model.inspection import inspect_folder
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime.loop import Loop
from mlxquant.runtime.prompt_cache import PromptCache
from mlxquant.runtime.reply import Chunk
from mlxquant.sources.names import resolve

Load = Callable[[str], LanguageModel]
Find = Callable[[str], object]


class Session:
    """A conversation and what is around it: the screen, files ``attached`` to the next message and
    in earlier ones, how a name is found and its model loaded; ``prefilled`` is what the next prompt
    begins with, ``over`` ends the sitting."""

    def __init__(self, conversation: Conversation, load: Load = loading.load,
                 find: Find = resolve):
        self.conversation = conversation
        self.thoughts = "folded"
        self.attached: list[str] = []
        self._sent: dict[str, list[str]] = {}  # the files in a message, by all that it says
        self.prefilled = ""
        self.over = False
        self._load, self._find = load, find
        self._notes = Console(stderr=True, highlight=False, emoji=False,
                              soft_wrap=not sys.stderr.isatty())
        self._bits = _bits_per_weight(conversation.model)
        self._screen = self._make_screen()
        self._progress = ""

    def say(self, text: str) -> None:
        """A remark on stderr."""
        self._notes.print(clean(text), style="dim", markup=False)

    def status(self, width: int) -> str:
        """The line under the prompt: what is most important first, what is not known left out."""
        talk = self.conversation
        report = talk.last_report
        parts = [talk.model.name.rstrip("/").rpartition("/")[2]]
        if self._bits is not None:
            parts.append(f"{self._bits:.2f} bits")
        parts.append(f"context {talk.used()}")
        if report is not None and report.generation_tps is not None:
            parts += [f"{report.generation_tps:.1f} tokens/s",
                      f"{report.percent_of_ceiling:.0f} % of ceiling"]
        return fit(parts, width)

    def send(self, text: str, files: Sequence[str] = ()) -> None:
        """Answer ``text`` after ``files`` and those attached, which stay so if it is not kept."""
        before, sent = self.conversation.messages, [*files, *self.attached]
        said = "\n".join([*sent, text])
        self._sent[said] = sent
        try:
            self.answer(said)
        finally:
            if self.conversation.messages is not before:
                self.attached = []
            self.remind()

    def last_sent(self) -> tuple[list[str], str]:
        """The files in the last message, and its text; raises ``BadValue`` where there is none."""
        said = self.conversation.last_said()
        files = self._sent.get(said, [])
        return files, said.removeprefix("\n".join([*files, ""]))

    def remind(self) -> None:
        """Say that files are attached, where any are."""
        if self.attached:
            self.say("(what was read goes with the next message; /read alone drops it)")

    def answer(self, text: str) -> None:
        """Let the model answer; Ctrl-C ends the reply and keeps what came."""
        talk = self.conversation
        report, forgotten = talk.last_report, talk.forgotten
        with _interruptible() as interrupted:
            pieces = talk.reply(text, self._reading(interrupted))
            if turns := (talk.forgotten - forgotten) // 2:
                self.say(f"(the context is full: the model no longer sees the oldest {turns} "
                         f"turn{'s' * (turns > 1)}; /save keeps them)")
            reason = self._show(pieces, interrupted)
        new = talk.last_report if talk.last_report is not report else None
        if reason == "stopped":
            self.say("(stopped)")
        elif reason == "length" and new and new.generation_tokens >= talk.max_tokens:
            self.say(f"(cut at {talk.max_tokens} tokens; /set max_tokens allows more)")
        elif reason == "length":
            self.say("(cut: the context is full)")
        if new:
            self.say(new.line())

    def _show(self, pieces: Generator[Chunk, None, None], interrupted: Callable[[], bool]
              ) -> str | None:
        """Put a reply on the screen as it comes; why it ended: "stop", "length" or "stopped"."""
        reason: str | None = None
        self._progress = "reading the prompt"
        self._screen.begin()
        try:
            with closing(pieces):
                start = 0.0
                for count, chunk in enumerate(pieces):
                    now = time.perf_counter()
                    start = start or now
                    self._progress = f"{count / (now - start):.1f} tokens/s" if count else "…"
                    self._screen.feed(chunk.parts)
                    reason = chunk.finish_reason
                    if interrupted():
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            reason = "stopped"
        finally:
            self._screen.end()
        return reason

    def change_model(self, name: str) -> None:
        """Continue the conversation with another model; on any failure load the old one again.
        Where that fails too, the old model stays without a network."""
        self._find(name)  # an error here costs nothing
        talk, old, loop = self.conversation, self.conversation.model, self.conversation.loop
        talk.cache = PromptCache()
        old.network = None  # free before the other comes: it may not fit beside
        try:
            talk.model = self._load(name)
        except BaseException:
            talk.model = self._load(old.name)
            raise
        finally:
            self._bits = _bits_per_weight(talk.model)
        talk.last_report, talk.loop = None, replace(loop, draft=None)
        if loop.draft:
            self.say(f"(without the draft model {loop.draft.name}, which was for {old.name})")
        self._leave_out()

    def _leave_out(self) -> None:
        """Set off what the model cannot do, for which it would refuse every message."""
        talk, off = self.conversation, dict[str, Any](kv_bits=None, lookup=0)
        for name in off:
            try:
                Loop(**{name: getattr(talk.loop, name)}).check(talk.model, talk.cache)
            except Unsupported as error:
                talk.loop = replace(talk.loop, **{name: off[name]})
                self.say(f"(without {name}: {str(error).partition('; ')[0]})")

    def _make_screen(self) -> PlainScreen | LiveScreen:
        console = Console(highlight=False, emoji=False)
        if not console.is_terminal or console.is_dumb_terminal:
            return PlainScreen(lambda: self.thoughts == "shown", self.say)
        return LiveScreen(console, lambda: self.thoughts == "shown",
                          lambda: fit([self._progress], console.width - 1))

    def _reading(self, interrupted: Callable[[], bool]) -> Callable[[int, int], None]:
        def progress(done: int, total: int) -> None:
            if interrupted():
                raise KeyboardInterrupt
            self._progress = f"reading the prompt, {done} of {total} tokens"
            self._screen.feed(())

        return progress


def fit(parts: list[str], width: int) -> str:
    """Those of ``parts`` that fit into one line; the first one is cut rather than left out."""
    line = parts[0][:width]
    for part in parts[1:]:
        if len(line) + len(part) + 3 <= width:
            line += f" · {part}"
    return line


def _bits_per_weight(model: LanguageModel) -> float | None:
    """Stored bits per weight of the body; None where the folder cannot be read again."""
    with suppress(MlxquantError):
        return inspect_folder(model.folder).bits_per_weight
    return None


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Record Ctrl-C, and yield a function that says whether it was pressed, to be called between
    two tokens; the third press raises ``KeyboardInterrupt`` at once."""
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
