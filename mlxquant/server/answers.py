"""Replies as clients of OpenAI's protocol expect them, whole or as a stream of pieces."""

import json
import time
import uuid
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from mlxquant.base.version import __version__
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime.reply import CallReader, Chunk, Scored
from mlxquant.server.engine import ServedReply
from mlxquant.server.forms import ChatForm, CompletionForm, TextForm

_FINGERPRINT = f"mlxquant-{__version__}-mlx-{mx.__version__}"


def head(form: CompletionForm, model: LanguageModel) -> dict[str, Any]:
    """The fields that an answer to a request, and each part of a streamed answer, begin with."""
    chat = isinstance(form, ChatForm)
    kind = "chat.completion" if chat else "text_completion"
    return {"id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4()}",
            "object": kind + ".chunk" * (form.stream and chat), "created": int(time.time()),
            "model": model.name, "system_fingerprint": _FINGERPRINT}


def usage(jobs: Sequence[ServedReply]) -> dict[str, Any]:
    """The tokens of all replies; a prompt that several share counts once for each."""
    prompt, cached, made = (sum(job.usage[i] for job in jobs) for i in range(3))
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made,
            "prompt_tokens_details": {"cached_tokens": cached}}


class Choice:
    """Puts one reply to a request into the protocol's form, chunk by chunk or all chunks joined.

    A completion gets the raw text. A chat gets answer, reasoning and calls of the functions
    it offered; where it offered none, what looks like a call is part of the answer. Its role
    is told once.
    """

    def __init__(self, index: int, form: CompletionForm, model: LanguageModel):
        self._index, self._form = index, form
        offered = form.offered if isinstance(form, ChatForm) else []
        self._calls = CallReader(model.tokenizer.tool_parser if offered else None, offered)
        self._called, self._begun = 0, False

    def take(self, chunk: Chunk, key: str = "delta") -> dict[str, Any] | None:
        """What ``chunk`` adds, None for nothing; ``key`` is "message" for a whole reply."""
        made: dict[str, Any] = {"index": self._index, "finish_reason": chunk.finish_reason}
        if isinstance(self._form, TextForm):
            scoring = self._form.logprobs is not None
            return made | {"text": chunk.text,
                           "logprobs": _columns(chunk.scored) if scoring else None}
        told: dict[str, Any] = {}
        text, calls = self._calls.read(chunk)
        if text or key == "message":
            told["content"] = text or None
        if thoughts := chunk.text_of("thought"):
            told["reasoning"] = thoughts
        if calls := self._wanted(calls):
            told["tool_calls"] = calls
        if chunk.finish_reason == "stop" and self._called:
            made["finish_reason"] = "tool_calls"
        if not (told or chunk.scored or chunk.finish_reason):
            return None
        if not self._begun:
            told, self._begun = {"role": "assistant", **told}, True
        return made | {key: told, "logprobs": {
            "content": [_token(token) for token in chunk.scored]} if chunk.scored else None}

    def _wanted(self, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        if isinstance(self._form, ChatForm) and not self._form.parallel_tool_calls:
            found = found[:max(0, 1 - self._called)]
        calls = [_call(call, self._called + i) for i, call in enumerate(found)]
        self._called += len(calls)
        return calls


def _columns(scored: Sequence[Scored]) -> dict[str, Any]:
    """Log-probabilities as the older endpoint has them."""
    return {"tokens": [token.text for token in scored],
            "text_offset": [token.offset for token in scored],
            "token_logprobs": [_finite(token.logprob) for token in scored],
            "top_logprobs": [  # of two with the same text the likelier one
                {other.text: _finite(other.logprob) for other in reversed(token.likeliest)}
                for token in scored]}


def _token(token: Scored) -> dict[str, Any]:
    made, *likeliest = (
        {"token": each.text, "logprob": _finite(each.logprob), "bytes": list(each.spelled)}
        for each in (token, *token.likeliest))
    return {**made, "top_logprobs": likeliest}


def _finite(logprob: float) -> float:
    """JSON has no infinity; this is what OpenAI tells for a token that is out of the question."""
    return max(logprob, -9999.0)


def _call(call: dict[str, Any], index: int) -> dict[str, Any]:
    arguments = call.get("arguments") or {}
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"index": index, "id": str(call.get("id") or uuid.uuid4()), "type": "function",
            "function": {"name": call["name"], "arguments": written}}
