"""What one reply is made from: a prompt in token ids, and what decides the tokens after it.

A prompt is raw text, chat messages, which go through the model's template, or token ids.
Everything is checked before anything is computed.
"""

import ctypes
import json
import operator
import reprlib
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

from mlxquant.base import checks
from mlxquant.base.errors import BadValue, TooLarge, Unsupported, first_line
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime.sampling import GREEDY, Sampling

Message = dict[str, Any]
Tool = Mapping[str, Any]
Prompt = str | Sequence[Message] | Sequence[int]

MOST_LOGPROBS = 20
TEMPLATE_SECONDS = 10.0
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Request:
    """``prompt`` in token ids, and what decides the tokens after it.

    ``continues``: the prompt was raw text or ids, so that the reply goes on where it ends,
    with a space or without. ``logprobs``: how many of the likeliest tokens are reported with each
    chosen token; None for no log-probabilities.
    """

    prompt: list[int]
    max_tokens: int
    sampling: Sampling = GREEDY
    stop: tuple[str, ...] = ()
    continues: bool = False
    logprobs: int | None = None

    @classmethod
    def of(cls, model: LanguageModel, prompt: Prompt, *, max_tokens: int,
           sampling: Sampling = GREEDY, stop: str | Sequence[str] = (),
           tools: Sequence[Tool] | None = None, logprobs: int | None = None,
           template_options: Mapping[str, Any] | None = None) -> "Request":
        """The request as ``stream_generate`` takes it; raises as that does."""
        checks.kind("model", model, LanguageModel)
        checks.kind("sampling", sampling, Sampling)
        checks.integer("max_tokens", max_tokens, 1)
        stops = [stop] if isinstance(stop, str) else stop
        if not isinstance(stops, (list, tuple)) or not all(isinstance(s, str) for s in stops):
            raise BadValue("stop must be text, or a list of texts")
        if "" in stops:
            raise BadValue("a stop string is empty")
        if logprobs is not None:
            checks.integer("logprobs", logprobs, 0, MOST_LOGPROBS)
        largest = max(sampling.logit_bias or (0,))
        if largest >= model.vocabulary:
            raise BadValue(f"logit_bias names token {largest}, {model.name} has 0 to "
                           f"{model.vocabulary - 1}")
        tokens = encode(model, prompt, tools, template_options)
        if context := model.context_length:
            if len(tokens) >= context:
                raise TooLarge(f"the prompt has {len(tokens)} tokens, "
                               f"the context of {model.name} holds {context}")
            max_tokens = min(max_tokens, context - len(tokens))
        return cls(tokens, max_tokens, sampling, tuple(stops), not is_chat(prompt), logprobs)


def encode(model: LanguageModel, prompt: Prompt, tools: Sequence[Tool] | None = None,
           template_options: Mapping[str, Any] | None = None) -> list[int]:
    """Token ids of a prompt, all of them in the model's vocabulary.

    ``template_options`` are further variables for the chat template. Raises ``BadValue``
    for what is no prompt, and ``Unsupported`` where the template cannot take it.
    """
    chat = is_chat(prompt)
    if tools and not (chat and model.tokenizer.has_tool_calling):
        raise Unsupported(f"{model.name} has no place for tools in its template" if chat
                          else "tools need a list of chat messages")
    if chat:
        text = _templated(model, plain_messages(prompt), tools, template_options or {})
        tokens = _tokenised(model, text, special=False)
    elif isinstance(prompt, str):
        begins = model.tokenizer.bos_token and prompt.startswith(model.tokenizer.bos_token)
        tokens = _tokenised(model, prompt, special=not begins)
    else:
        tokens = _ids(prompt)
    if not tokens:
        raise BadValue("the prompt is empty")
    wrong = [token for token in (min(tokens), max(tokens)) if not 0 <= token < model.vocabulary]
    if wrong:
        raise BadValue(f"the prompt holds token {wrong[0]}, {model.name} has 0 to "
                       f"{model.vocabulary - 1}")
    return tokens


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages rather than text or token ids."""
    return isinstance(prompt, Sequence) and not isinstance(prompt, (str, bytes)) and any(
        isinstance(message, Mapping) for message in prompt)


def plain_messages(messages: Any) -> list[Message]:
    """Messages as templates take them: content as one text, arguments of calls as objects.

    Raises ``BadValue``, naming the message, for anything else than text.
    """
    made = []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadValue(f"{where} must be an object with role and content")
        calls = message.get("tool_calls")
        made.append({**message, "content": _text(message.get("content"), f"{where}.content")})
        if calls is not None:
            made[-1]["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    return made


def _text(content: Any, where: str) -> str:
    """The text of a message, which may come in parts."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence) or not all(isinstance(p, Mapping) for p in content):
        raise BadValue(f"{where} must be text, or a list of text parts")
    for index, part in enumerate(content):
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise BadValue(f"{where}[{index}] is of type {reprlib.repr(part.get('type'))}; "
                           "images are not supported, nor anything but text")
    return "".join(part["text"] for part in content)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls of tools in an earlier reply; clients send their arguments as text."""
    try:
        made = [{**call, "function": dict(call["function"])} for call in calls]
        for call in made:
            if isinstance(call["function"].get("arguments"), str):
                call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    except (TypeError, KeyError, ValueError, RecursionError) as error:
        raise BadValue(f"{where} must be a list of calls, each with a function and its arguments "
                       "in JSON") from error
    return made


def _templated(model: LanguageModel, messages: list[Message], tools: Sequence[Tool] | None,
               options: Mapping[str, Any]) -> str:
    tokenizer = model.tokenizer
    if not tokenizer.has_chat_template:
        raise Unsupported(f"{model.name} has no chat template; give raw text instead")
    given = dict(options) | ({"tools": [dict(tool) for tool in tools]} if tools else {})

    def render() -> str:
        return tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **given)

    try:
        return within(TEMPLATE_SECONDS, render)
    except TimeoutError as error:
        raise Unsupported(f"the template of {model.name} took more than "
                          f"{TEMPLATE_SECONDS:g} s for these messages") from error
    except Exception as error:  # a template is a stranger's program: it may raise anything
        raise Unsupported(f"the template of {model.name} refuses these messages: "
                          f"{first_line(error)}") from error


def within(seconds: float, work: Callable[[], _Result]) -> _Result:
    """What ``work`` returns; raises ``TimeoutError`` where it takes longer than ``seconds``.

    It runs in a thread that is then interrupted at its next step of Python. A single
    operation in C, such as a product of long texts, ends by itself or not at all.
    """
    result: Future[_Result] = Future()

    def run() -> None:
        try:
            result.set_result(work())
        except BaseException as error:
            result.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        return result.result(seconds)
    except TimeoutError:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_TimeUp))
        raise


class _TimeUp(BaseException):
    """Ends a thread whose result nobody waits for any more."""


def _tokenised(model: LanguageModel, text: str, *, special: bool) -> list[int]:
    try:
        return list(model.tokenizer.encode(text, add_special_tokens=special, verbose=False))
    except (TypeError, ValueError) as error:  # half of a surrogate pair, for one
        raise BadValue("the prompt is no text that can be tokenised") from error


def _ids(prompt: Any) -> list[int]:
    try:
        if isinstance(prompt, bytes) or any(isinstance(token, bool) for token in prompt):
            raise TypeError
        return [operator.index(token) for token in prompt]
    except TypeError as error:
        raise BadValue(f"the prompt is {reprlib.repr(prompt)}; it must be text, a list of chat "
                       "messages, or token ids") from error
