"""Replies as clients of OpenAI's protocol expect them, whole or as a stream of pieces."""

import json
import time
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlxquant.base.version import __version__
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime.reply import CallReader, Chunk, Scored, text_of
from mlxquant.server.engine import Job
from mlxquant.server.forms import ChatForm, Form

_FINGERPRINT = f"mlxquant-{__version__}-mlx-{mx.__version__}"


@dataclass
class Piece:
    """What a chunk adds to a choice."""

    text: str = ""
    thoughts: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    scored: list[Scored] = field(default_factory=list)
    reason: str | None = None

    @classmethod
    def joined(cls, pieces: Iterable["Piece"]) -> "Piece":
        made = cls()
        for piece in pieces:
            made.text, made.thoughts = made.text + piece.text, made.thoughts + piece.thoughts
            made.calls, made.scored = made.calls + piece.calls, made.scored + piece.scored
            made.reason = piece.reason or made.reason
        return made


class Choice:
    """Sorts the chunks of one reply for its client.

    A completion gets the raw text. A chat gets answer, reasoning and calls of the functions
    it offered; where it offered none, what looks like a call is part of the answer.
    """

    def __init__(self, form: Form, model: LanguageModel):
        self._chat = form if isinstance(form, ChatForm) else None
        self._offered = self._chat.offered if self._chat else []
        parse = model.tokenizer.tool_parser
        self._calls = CallReader(parse and (lambda text: parse(text, self._offered)))
        self._called = 0

    def take(self, chunk: Chunk) -> Piece:
        piece = Piece(scored=list(chunk.scored), reason=chunk.finish_reason)
        if self._chat is None:
            piece.text = chunk.text
            return piece
        piece.thoughts = text_of(chunk.parts, "thought")
        if not self._offered:
            piece.text = "".join(part.text for part in chunk.parts if part.kind != "thought")
            return piece
        piece.text = text_of(chunk.parts, "answer")
        found = [call for part in chunk.parts for call in self._calls.feed(part)]
        found += self._calls.finish() if chunk.finish_reason else []
        for call in found:
            if self._called and not self._chat.parallel_tool_calls:
                break
            piece.calls.append(_call(call, self._called))
            self._called += 1
        if chunk.finish_reason == "stop" and self._called:
            piece.reason = "tool_calls"
        return piece


class Answer:
    """The JSON of one HTTP answer, or of its parts."""

    def __init__(self, form: Form):
        kind = "chat.completion" if form.chat else "text_completion"
        self._chat, self._scoring = form.chat, bool(form.model_fields_set & {"logprobs"})
        self._head = {
            "id": f"{'chatcmpl' if form.chat else 'cmpl'}-{uuid.uuid4()}",
            "object": kind + ".chunk" * (form.stream and form.chat),
            "created": int(time.time()), "model": form.model, "system_fingerprint": _FINGERPRINT}
        self._offsets: dict[int, int] = {}

    def whole(self, pieces: Sequence[Piece], jobs: Sequence[Job]) -> dict[str, Any]:
        choices = [self._choice(i, piece, "message") for i, piece in enumerate(pieces)]
        return {**self._head, "choices": choices, "usage": usage(jobs)}

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        return {**self._head, "choices": [self._choice(index, piece, "delta")]}

    def usage(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """The part of a stream that counts tokens."""
        return {**self._head, "choices": [], "usage": usage(jobs)}

    def _choice(self, index: int, piece: Piece, key: str) -> dict[str, Any]:
        made: dict[str, Any] = {"index": index, "finish_reason": piece.reason}
        if not self._chat:
            made["text"] = piece.text
            made["logprobs"] = self._columns(index, piece) if self._scoring else None
            return made
        made[key] = {"role": "assistant"}
        if piece.text or key == "message":
            made[key]["content"] = piece.text or None
        if piece.thoughts:
            made[key]["reasoning"] = piece.thoughts
        if piece.calls:
            made[key]["tool_calls"] = piece.calls
        made["logprobs"] = {"content": [_token(token) for token in piece.scored]} \
            if self._scoring and piece.scored else None
        return made

    def _columns(self, index: int, piece: Piece) -> dict[str, Any]:
        """Log-probabilities as the older endpoint has them."""
        offsets, at = [], self._offsets.get(index, 0)
        for token in piece.scored:
            offsets.append(at)
            at += len(token.text)
        self._offsets[index] = at
        return {"tokens": [token.text for token in piece.scored], "text_offset": offsets,
                "token_logprobs": [token.logprob for token in piece.scored],
                "top_logprobs": [dict(token.likeliest) for token in piece.scored]}


def usage(jobs: Sequence[Job]) -> dict[str, Any]:
    """Tokens of all replies; a prompt that several share counts once for each."""
    prompt, cached, made = (sum(job.usage[i] for job in jobs) for i in range(3))
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached}}


def _token(token: Scored) -> dict[str, Any]:
    def entry(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    return {**entry(token.text, token.logprob),
            "top_logprobs": [entry(*pair) for pair in token.likeliest]}


def _call(call: dict[str, Any], index: int) -> dict[str, Any]:
    arguments = call.get("arguments")
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"index": index, "id": call.get("id") or str(uuid.uuid4()), "type": "function",
            "function": {"name": call.get("name"), "arguments": written}}
