"""What has been said, and the keys and values computed for it."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from mlxquant.base.errors import BadValue, TooLarge
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime.generation import stream_generate
from mlxquant.runtime.prompt import Message, encode
from mlxquant.runtime.prompt_cache import PromptCache
from mlxquant.runtime.reply import Chunk
from mlxquant.runtime.sampling import Sampling
from mlxquant.runtime.speed import Report


@dataclass
class Conversation:
    """Messages so far, and the keys and values already computed for them.

    The model no longer sees the first ``forgotten`` of the messages: the context was
    full. ``thoughts`` are the reasoning before the last reply.
    """

    model: LanguageModel
    system: str | None = None
    sampling: Sampling = Sampling()
    max_tokens: int = 1024
    kv_bits: int | None = None
    draft: LanguageModel | None = None
    lookup: int = 0
    messages: list[Message] = field(default_factory=list)
    forgotten: int = 0
    cache: PromptCache = field(default_factory=PromptCache)
    thoughts: str = ""
    last_report: Report | None = None

    def reply(self, text: str, progress: Callable[[int, int], None] | None = None) -> Generator[Chunk, None, None]:
        """Stream the answer to ``text``; a stopped answer stays in the history as far as it came.

        Raises ``TooLarge`` for a message longer than the context; it is then not kept.
        """
        history = [*self.messages, {"role": "user", "content": text}]
        chunks = stream_generate(
            self.model, self._seen(history), max_tokens=self.max_tokens, sampling=self.sampling, cache=self.cache,
            kv_bits=self.kv_bits, draft=self.draft, lookup=self.lookup, progress=progress)
        answer: list[str] = []
        thoughts: list[str] = []
        try:
            for chunk in chunks:
                answer.append(chunk.text)
                thoughts += [part.text for part in chunk.parts if part.kind == "thought"]
                self.last_report = chunk.report or self.last_report
                yield chunk
        finally:
            self.messages = [*history, {"role": "assistant", "content": "".join(answer)}]
            self.thoughts = "".join(thoughts)
            chunks.close()

    def check_fits(self, text: str) -> None:
        """Raise ``TooLarge`` where not even ``text`` alone, after the system prompt, fits the context."""
        context = self.model.context_length
        tokens = len(encode(self.model, [*self._told(), {"role": "user", "content": text}]))
        if context is not None and tokens >= context:
            raise TooLarge(f"the message has {tokens} tokens, the context of {self.model.name} holds {context}")

    def make_room(self, text: str) -> int:
        """Let the model forget the oldest turns where ``text`` and a reply would not fit; how many.

        The system prompt stays. Half the context is then free, so that the next turns
        need not forget again.
        """
        context = self.model.context_length
        if context is None:
            return 0
        message: Message = {"role": "user", "content": text}
        wanted = context - min(self.max_tokens, context // 4)
        turns = 0
        while self.forgotten < len(self.messages):
            if len(encode(self.model, self._seen([*self.messages, message]))) <= wanted:
                break
            wanted = context // 2
            self.forgotten += 2
            turns += 1
        return turns

    def used(self) -> str:
        """How full the context is, in tokens."""
        context = self.model.context_length
        return f"{len(self.cache.tokens)}/{context}" if context else str(len(self.cache.tokens))

    def clear(self) -> None:
        """Forget the messages; the cache keeps what the next prompt will share."""
        self.messages, self.forgotten, self.thoughts = [], 0, ""

    def undo(self) -> str:
        """Take the last exchange back; returns what the user had said. Raises ``BadValue`` for none."""
        if not self.messages:
            raise BadValue("nothing has been said yet")
        said = self.messages[-2]["content"]
        self.messages, self.thoughts = self.messages[:-2], ""
        self.forgotten = min(self.forgotten, len(self.messages))
        return str(said)

    def _seen(self, history: list[Message]) -> list[Message]:
        """What the model gets: the system prompt, and the messages not forgotten."""
        return self._told() + history[self.forgotten:]

    def _told(self) -> list[Message]:
        return [{"role": "system", "content": self.system}] if self.system else []
