"""From tokens to the pieces of a reply: one way for a single prompt, a batch and the server."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.generate import TextStateMachine
from transformers.convert_slow_tokenizer import bytes_to_unicode

from mlxquant.base.errors import MlxquantError
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime.prompt import Request
from mlxquant.runtime.reply import Chunk, FinishReason, ReplySplitter, Scored

_CONTEXT = 6  # tokens before the new ones, which decide about spaces between words
_PENDING = 64  # tokens that are held back at most until a character is whole
_BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}  # of byte-level vocabularies


class Writer:
    """Takes the tokens of one reply, and gives the pieces that they add."""

    def __init__(self, model: LanguageModel, request: Request):
        self.count = 0  # tokens taken, an end of turn among them
        self._length = 0  # characters made
        self._name, self._ends = model.name, model.tokenizer.eos_token_ids
        self._request, self._tokenizer = request, model.tokenizer
        self._text = Detokenizer(model.tokenizer, request.prompt if request.continues else ())
        self._stops = StopStrings(request.stop)
        self._splitter = ReplySplitter(model.tokenizer, request.prompt)
        self._scored: list[Scored] = []

    def add(self, token: int, logprobs: mx.array | None = None) -> Chunk:
        """The piece that ``token`` adds, empty where its text may yet become a stop string.

        ``logprobs`` (vocabulary,) are read where the request asks for them. A piece with a
        ``finish_reason`` is the last one. Raises ``MlxquantError`` for logits not finite.
        """
        if token < 0:
            raise MlxquantError(f"{self._name} computes logits that are not finite after "
                                f"{len(self._request.prompt) + self.count} tokens: a weight is "
                                "broken, or an activation overflows")
        self.count += 1
        reason: FinishReason | None = "stop" if token in self._ends else None
        piece = ""
        if reason is None:
            self._score(token, logprobs)
            piece = self._text.add(token)
            self._length += len(piece)
            reason = "length" if self.count == self._request.max_tokens else None
        text, stopped_by = self._stops.feed(piece + (self._text.finish() if reason else ""))
        if stopped_by is not None:
            reason = "stop"
        elif reason:
            text += self._stops.finish()
        parts = self._splitter.feed(text) + (self._splitter.finish() if reason else [])
        scored: tuple[Scored, ...] = ()
        if text or reason:
            scored, self._scored = tuple(self._scored), []
        return Chunk(text, tuple(parts), reason, stopped_by, scored=scored)

    def _score(self, token: int, logprobs: mx.array | None) -> None:
        count = self._request.logprobs
        if count is None or logprobs is None:
            return
        best = mx.argpartition(-logprobs, count - 1)[:count].tolist() if count else []
        values = logprobs[mx.array([token, *best])].tolist()
        made, *others = (Scored(spell(self._tokenizer, each), value, self._length)
                         for each, value in zip([token, *best], values))
        ranked = sorted(others, key=lambda scored: -scored.logprob)
        self._scored.append(replace(made, likeliest=tuple(ranked)))


def spell(tokenizer: Any, token: int) -> bytes:
    """The bytes of a token, with the space before a word."""
    once, twice = (tokenizer.decode([token] * n, clean_up_tokenization_spaces=False)
                   for n in (1, 2))  # a text's first space may be dropped
    entry = tokenizer.convert_ids_to_tokens(token)
    if "\ufffd" in twice and isinstance(entry, str):  # it may be part of a character
        if fallback := re.fullmatch("<0x([0-9A-F]{2})>", entry):
            return bytes.fromhex(fallback[1])
        if _BYTES.keys() >= set(entry):
            return bytes(_BYTES[letter] for letter in entry)
    return str(twice[len(once):]).encode()


class Detokenizer:
    """Text of tokens as they come, whole characters at a time.

    All pieces together are what the tokenizer decodes; ``before`` is what the text goes on
    from, so that a first word keeps the space before it. Spaces are never cleaned up.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()):
        special = set(tokenizer.all_special_ids)
        self._tokenizer = tokenizer
        self._context = [token for token in before[-_CONTEXT:] if token not in special]
        self._pending: list[int] = []
        self._known = self._decode(self._context).rstrip("\ufffd")

    def add(self, token: int) -> str:
        self._pending.append(token)
        text = self._decode(self._context + self._pending)
        if text.endswith("\ufffd") and len(self._pending) < _PENDING:
            return ""  # the character goes on in the next token
        return self._take(text)

    def finish(self) -> str:
        """What is left, an unfinished character as U+FFFD."""
        return self._take(self._decode(self._context + self._pending))

    def _take(self, text: str) -> str:
        piece = text[len(self._known):]
        self._context = (self._context + self._pending)[-_CONTEXT:]
        self._pending, self._known = [], self._decode(self._context)
        return piece

    def _decode(self, tokens: list[int]) -> str:
        return str(self._tokenizer.decode(tokens, clean_up_tokenization_spaces=False))


class StopStrings:
    """Finds the first of some strings to be complete, in whatever pieces the text comes."""

    def __init__(self, stops: Sequence[str]):
        # mlx-lm's machine is in a state named by the string that it has found, before in "".
        self._state = TextStateMachine({stop: [] for stop in stops} | {
            "": [(stop, stop) for stop in stops]}).make_state("")

    def feed(self, piece: str) -> tuple[str, str | None]:
        """Text that is safe to show, and the string that was found, which is not part of it."""
        self._state, segments = TextStateMachine.split(self._state, piece)
        return segments[0][1], self._state[0] or None

    def finish(self) -> str:
        """What was held back and turned out to be none of the strings."""
        self._state, held, _ = TextStateMachine.flush(self._state)
        return held
