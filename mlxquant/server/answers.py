"""Replies as clients of OpenAI's protocol expect them, whole or as a stream of pieces."""

import json
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from mlxquant.base.version import __version__
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime.reply import CallReader, Chunk, Scored
from mlxquant.server.engine import Job
from mlxquant.server.forms import ChatForm, Form

_FINGERPRINT = f"mlxquant-{__version__}-mlx-{mx.__version__}"


@dataclass
class Piece:
    """What a chunk adds to a choice."""

    text: str = ""
    thoughts: str = ""
    calls: list[dict[str, Any]] = field(default_factory=list)
    scored: tuple[Scored, ...] = ()
    reason: str | None = None


class Choice:
    """Sorts the chunks of one reply, or all of them joined, for its client.

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
        reason: str | None = chunk.finish_reason
        if self._chat is None:
            return Piece(chunk.text, scored=chunk.scored, reason=reason)
        if not self._offered:
            return Piece(chunk.text_of("answer", "tool"), chunk.text_of("thought"),
                         scored=chunk.scored, reason=reason)
        found = [call for part in chunk.parts for call in self._calls.feed(part)]
        found += self._calls.finish() if reason else []
        if not self._chat.parallel_tool_calls:
            found = found[:max(0, 1 - self._called)]
        calls = [_call(call, self._called + i) for i, call in enumerate(found)]
        self._called += len(calls)
        if reason == "stop" and self._called:
            reason = "tool_calls"
        return Piece(chunk.text_of("answer"), chunk.text_of("thought"), calls, chunk.scored, reason)


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
        return {**self.usage(jobs), "choices": choices}

    def part(self, index: int, piece: Piece) -> dict[str, Any]:
        return {**self._head, "choices": [self._choice(index, piece, "delta")]}

    def usage(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """The part of a stream that counts the tokens of all replies.

        A prompt that several share counts once for each.
        """
        prompt, cached, made = (sum(job.usage[i] for job in jobs) for i in range(3))
        return {**self._head, "choices": [], "usage": {
            "prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached}}}

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
