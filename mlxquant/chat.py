"""A conversation in a terminal, or through a pipe.

``Conversation`` keeps the messages and the KV cache; ``run`` reads lines,
answers them and obeys the commands. Replies go to stdout, all else to stderr.
"""

import sys
from dataclasses import dataclass, field
from typing import Callable, Iterator

from mlxquant.errors import MlxquantError
from mlxquant.generation import Message, stream_generate
from mlxquant.loading import LanguageModel
from mlxquant.prompt_cache import PromptCache
from mlxquant.report import Report
from mlxquant.sampling import Sampling

HELP = """\
/help           this list
/system TEXT    set the system prompt and start over (alone: show it)
/clear          forget the conversation, keep the system prompt
/stats          speed of the last reply, and how full the context is
/exit           leave (also Ctrl-D)
Ctrl-C stops a reply and keeps the conversation."""


@dataclass
class Conversation:
    """Messages so far, and the keys and values already computed for them."""

    model: LanguageModel
    system: str | None = None
    sampling: Sampling = Sampling()
    max_tokens: int = 1024
    kv_bits: int | None = None
    messages: list[Message] = field(default_factory=list)
    cache: PromptCache = field(default_factory=PromptCache)
    last_report: Report | None = None

    def reply(self, text: str) -> Iterator[str]:
        """Stream the answer to ``text``; a stopped answer stays in the history as far as it came.

        Raises ``TooLarge`` when the context is full; the message is then not kept.
        """
        history = [*self.messages, {"role": "user", "content": text}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        chunks = stream_generate(
            self.model, system + history, max_tokens=self.max_tokens, sampling=self.sampling,
            cache=self.cache, kv_bits=self.kv_bits)
        answer: list[str] = []
        try:
            for chunk in chunks:
                answer.append(chunk.text)
                self.last_report = chunk.report or self.last_report
                yield chunk.text
        finally:
            chunks.close()
            self.messages = [*history, {"role": "assistant", "content": "".join(answer)}]

    def clear(self) -> None:
        """Forget the messages; the cache keeps what the next prompt will share."""
        self.messages = []

    def stats(self) -> str:
        """Speed of the last whole reply and use of the context."""
        context = self.model.context_length
        room = f" of {context}" if context else ""
        used = f"{len(self.cache.tokens)}{room} tokens of context in use"
        return f"{self.last_report.line()}\n{used}" if self.last_report else f"no reply yet; {used}"


def run(conversation: Conversation) -> None:
    """Talk until Ctrl-D, ``/exit`` or the end of the pipe."""
    read = _reader()
    while True:
        try:
            line = read()
        except KeyboardInterrupt:
            _say("(Ctrl-D or /exit leaves)")
            continue
        except EOFError:
            return
        text = line.strip()
        if text == "/exit":
            return
        try:
            if text.startswith("/"):
                _obey(conversation, text)
            elif text:
                _answer(conversation, text)
        except MlxquantError as error:
            _say(f"error: {error}")


def _reader() -> Callable[[], str]:
    """A prompt with line editing on a terminal, plain lines from a pipe."""
    if sys.stdin.isatty():
        from prompt_toolkit import PromptSession

        session = PromptSession()
        return lambda: session.prompt("> ")

    def read_line() -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line

    return read_line


def _answer(conversation: Conversation, text: str) -> None:
    before = conversation.last_report
    try:
        for piece in conversation.reply(text):
            print(piece, end="", flush=True)
        print(flush=True)
    except KeyboardInterrupt:
        print(flush=True)
        _say("(stopped)")
    if conversation.last_report is not before:
        _say(conversation.last_report.line())


def _obey(conversation: Conversation, line: str) -> None:
    command, _, argument = line.partition(" ")
    if command == "/help":
        _say(HELP)
    elif command == "/clear":
        conversation.clear()
        _say("(conversation cleared)")
    elif command == "/stats":
        _say(conversation.stats())
    elif command == "/system" and argument.strip():
        conversation.system = argument.strip()
        conversation.clear()
        _say("(system prompt set, conversation cleared)")
    elif command == "/system":
        _say(conversation.system or "(no system prompt)")
    else:
        _say(f"no command {command}; /help lists them")


def _say(text: str) -> None:
    dim, plain = ("\033[2m", "\033[0m") if sys.stderr.isatty() else ("", "")
    print(f"{dim}{text}{plain}", file=sys.stderr, flush=True)
