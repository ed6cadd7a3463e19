"""What has been said, and the keys and values computed for it."""

from bisect import bisect_left
from collections.abc import Generator
from dataclasses import dataclass, field, replace

from mlxquant.base import checks
from mlxquant.base.errors import BadValue, MlxquantError, TooLarge
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime.generation import answer
from mlxquant.runtime.loop import Loop, PromptProgress
from mlxquant.runtime.prompt import Message, Request, encode
from mlxquant.runtime.prompt_cache import PromptCache
from mlxquant.runtime.reply import Chunk
from mlxquant.runtime.sampling import GREEDY, Sampling
from mlxquant.runtime.speed import Report


@dataclass
class Conversation:
    """Messages so far, and the keys and values already computed for them.

    The model no longer sees the first ``forgotten`` of the messages: the context was
    full. ``thoughts`` are the reasoning before the last reply. Raises ``BadValue`` for
    ``max_tokens`` out of range.
    """

    model: LanguageModel
    system: str | None = None
    sampling: Sampling = GREEDY
    max_tokens: int = 1024
    loop: Loop = field(default_factory=Loop)
    messages: list[Message] = field(default_factory=list)
    forgotten: int = 0
    cache: PromptCache = field(default_factory=PromptCache)
    thoughts: str = ""
    last_report: Report | None = None

    def __post_init__(self) -> None:
        checks.integer("max_tokens", self.max_tokens, 1)

    def reply(self, text: str, progress: PromptProgress | None = None
              ) -> Generator[Chunk, None, None]:
        """The answer to ``text``, streamed; a stopped one stays in the history as far as it came.

        Where the context has no room for it, the oldest turns are forgotten before this
        returns. Raises ``TooLarge`` for a message longer than the context, ``MlxquantError``
        without a model, and what ``stream_generate`` does; the message is then not kept.
        """
        self.require_model()
        history: list[Message] = [*self.messages, {"role": "user", "content": text}]
        self.loop.check(self.model, self.cache)
        request = replace(Request.of(self.model, self._prompt(history), sampling=self.sampling,
                                     max_tokens=self.max_tokens), continues=False)
        return self._recorded(
            history, answer(self.model, request, self.cache, self.loop, progress))

    def _recorded(self, history: list[Message], chunks: Generator[Chunk, None, None]
                  ) -> Generator[Chunk, None, None]:
        said = thoughts = ""
        try:
            for chunk in chunks:
                said += chunk.text
                thoughts += chunk.text_of("thought")
                self.last_report = chunk.report or self.last_report
                yield chunk
        finally:
            self.messages = [*history, {"role": "assistant", "content": said}]
            self.thoughts = thoughts
            chunks.close()

    def _prompt(self, history: list[Message]) -> list[int]:
        """Token ids of what the model gets: the system prompt, and the messages not forgotten.

        The history is put through the template once. Only where no room for a reply is
        left the oldest turns are forgotten, until half the context is free, so that the
        next turns need not forget again.
        """
        tokens, context = self._encoded(history, self.forgotten), self.model.context_length
        if context is None or len(tokens) <= context - min(self.max_tokens, context // 4):
            return tokens
        starts = range(self.forgotten + 2, len(history), 2)
        fits = bisect_left(starts, True, key=lambda start: (
            len(self._encoded(history, start)) <= context // 2))
        forgotten = starts[min(fits, len(starts) - 1)] if starts else self.forgotten
        tokens = self._encoded(history, forgotten)
        if len(tokens) >= context:
            raise TooLarge(f"the message has {len(tokens)} tokens, the context of "
                           f"{self.model.name} holds {context}")
        self.forgotten = forgotten
        return tokens

    def _encoded(self, history: list[Message], start: int) -> list[int]:
        told: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        return encode(self.model, [*told, *history[start:]])

    def require_model(self) -> None:
        """Raise ``MlxquantError`` where a change of models has left none."""
        if self.model.network is None:
            raise MlxquantError("no model is loaded; /model NAME loads one")

    def used(self) -> str:
        """How full the context is, in tokens."""
        context = self.model.context_length
        return f"{len(self.cache.tokens)}/{context}" if context else str(len(self.cache.tokens))

    def kept(self) -> PromptCache:
        """Keys and values of the messages, and of nothing that was cleared or taken back."""
        if not self.messages or not self.cache.tokens:
            return PromptCache()
        return self.cache.shared(self._encoded(self.messages, self.forgotten))

    def clear(self) -> None:
        """Forget the messages; the cache keeps what the next prompt will share."""
        self.messages, self.forgotten, self.thoughts = [], 0, ""

    def last_said(self) -> str:
        """The user's last message; raises ``BadValue`` where nothing has been said."""
        if not self.messages:
            raise BadValue("nothing has been said yet")
        return str(self.messages[-2]["content"])

    def undo(self) -> None:
        """Take the last exchange back."""
        self.messages, self.thoughts = self.messages[:-2], ""
        self.forgotten = min(self.forgotten, len(self.messages))
