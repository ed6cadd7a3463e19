"""What a reply is made of: the answer, the reasoning before it, and calls of tools."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mlx_lm.generate import TextStateMachine, make_text_state_machine

from mlxquant.runtime.speed import Report

Kind = Literal["answer", "thought", "tool"]
FinishReason = Literal["stop", "length"]
_KINDS: dict[str | None, Kind] = {"reasoning": "thought", "tool": "tool"}  # mlx-lm's names for ours
_TAGS = {"normal": [("<think>", "reasoning")], "reasoning": [("</think>", "normal")]}


@dataclass(frozen=True)
class Part:
    """Text of one kind, without the markers around it."""

    kind: Kind
    text: str


class Splitter:
    """Sorts a reply, as it comes, into answer, reasoning and tool calls.

    Markers are the tokenizer's, or ``<think>`` where it names none. ``prompt`` tells
    whether the template has already opened the reasoning.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()):
        known = tokenizer.has_thinking or tokenizer.has_tool_calling or tokenizer.response_transitions
        machine = make_text_state_machine(tokenizer) if known else TextStateMachine(_TAGS)
        tail = list(prompt[-16:])
        opened = (tokenizer.has_thinking
                  and tokenizer.rfind_think_start(tail) > tokenizer.rfind_think_end(tail))
        self._state = machine.make_state(
            tokenizer.response_initial_state or ("reasoning" if opened else "normal"))

    def feed(self, text: str) -> list[Part]:
        """The parts that ``text`` adds; what may yet become a marker is held back.

        An empty part stands where a marker ended one kind and began another.
        """
        self._state, segments = TextStateMachine.split(self._state, text)
        parts = [Part(_KINDS.get(state, "answer"), piece) for state, piece in segments]
        return [part for part in parts if part.text or len(parts) > 1]

    def finish(self) -> list[Part]:
        """What was held back and turned out to be no marker."""
        self._state, rest, state = TextStateMachine.flush(self._state)
        return [Part(_KINDS.get(state, "answer"), rest)] if rest else []


@dataclass(frozen=True)
class Chunk:
    """A piece of a reply: the raw ``text``, and the ``parts`` it adds.

    The last chunk carries ``finish_reason``, ``stopped_by`` (the stop string that ended
    the reply, None where it was the model) and the ``report``.
    """

    text: str
    parts: tuple[Part, ...] = ()
    finish_reason: FinishReason | None = None
    stopped_by: str | None = None
    report: Report | None = None


@dataclass(frozen=True)
class Response:
    """A whole reply: its raw text, why it ended ("stop" or "length"), and how fast it was.

    ``answer`` and ``thoughts`` are the text without and within reasoning markers;
    ``tool_calls`` are dicts with "name" and "arguments".
    """

    text: str
    finish_reason: FinishReason
    report: Report
    stopped_by: str | None = None
    answer: str = ""
    thoughts: str = ""
    tool_calls: tuple[dict[str, Any], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The JSON form: text, finish_reason and every field of the report, flat."""
        return {"text": self.text, **asdict(self.report), "finish_reason": self.finish_reason}

    @classmethod
    def of(cls, chunks: Iterable[Chunk], parse_call: Callable[[str], Any] | None = None) -> "Response":
        """The reply that ``chunks`` make up; ``parse_call`` reads the text of a tool call."""
        chunks = list(chunks)
        parts = [part for chunk in chunks for part in chunk.parts]
        text = {kind: "".join(part.text for part in parts if part.kind == kind) for kind in ("answer", "thought")}
        last = chunks[-1]
        if last.finish_reason is None or last.report is None:
            raise ValueError("the chunks of a reply end with the one that carries its report")
        calls = [call for written in _calls(parts) for call in _parsed(written, parse_call)]
        return cls("".join(chunk.text for chunk in chunks), last.finish_reason, last.report, last.stopped_by,
                   text["answer"], text["thought"], tuple(calls))


def _calls(parts: list[Part]) -> list[str]:
    """The text of every tool call: a run of parts of that kind, whatever pieces it came in."""
    calls: list[str] = []
    inside = False
    for part in parts:
        if part.kind == "tool":
            calls = [*calls[:-1], calls[-1] + part.text] if inside else [*calls, part.text]
        inside = part.kind == "tool"
    return [call for call in calls if call.strip()]


def _parsed(written: str, parse_call: Callable[[str], Any] | None) -> list[dict[str, Any]]:
    """One text may hold several calls; one cut off in the middle holds none."""
    if parse_call is None:
        return []
    try:
        found = parse_call(written)
    except (ValueError, KeyError, json.JSONDecodeError):
        return []
    return found if isinstance(found, list) else [found]
