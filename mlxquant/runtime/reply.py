"""What a reply is made of: the answer, the reasoning before it, and calls of tools."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mlx_lm.generate import TextStateMachine, make_text_state_machine

from mlxquant.runtime.speed import Report

Kind = Literal["answer", "thought", "tool"]
FinishReason = Literal["stop", "length"]
ToolParser = Callable[[str, Any], Any]
_KINDS: dict[str | None, Kind] = {"reasoning": "thought", "tool": "tool"}  # mlx-lm's names for ours
_TAGS = {"normal": [("<think>", "reasoning")], "reasoning": [("</think>", "normal")]}


@dataclass(frozen=True)
class ReplyPart:
    """Text of one kind, without the markers around it."""

    kind: Kind
    text: str


class ReplySplitter:
    """Sorts a reply, as it comes, into answer, reasoning and tool calls, by the tokenizer's markers
    or ``<think>``; ``prompt`` tells whether the template has already opened the reasoning."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int] = ()):
        known = (tokenizer.has_thinking or tokenizer.has_tool_calling
                 or tokenizer.response_transitions)
        machine = make_text_state_machine(tokenizer) if known else TextStateMachine(_TAGS)
        tail = list(prompt[-16:])
        opened = (tokenizer.has_thinking
                  and tokenizer.rfind_think_start(tail) > tokenizer.rfind_think_end(tail))
        self._state = machine.make_state(
            tokenizer.response_initial_state or ("reasoning" if opened else "normal"))

    def feed(self, text: str) -> list[ReplyPart]:
        """The parts that ``text`` adds; what may yet become a marker is held back.

        An empty part stands where a marker ended one kind and began another.
        """
        self._state, segments = TextStateMachine.split(self._state, text)
        parts = [ReplyPart(_KINDS.get(state, "answer"), piece) for state, piece in segments]
        return [part for part in parts if part.text or len(parts) > 1]

    def finish(self) -> list[ReplyPart]:
        """What was held back and turned out to be no marker."""
        self._state, rest, state = TextStateMachine.flush(self._state)
        return [ReplyPart(_KINDS.get(state, "answer"), rest)] if rest else []


@dataclass(frozen=True)
class Scored:
    """A token's bytes, which may be part of a character, its log-probability, how many characters
    of the reply come before it, and the ``likeliest`` tokens in its place."""

    spelled: bytes
    logprob: float
    offset: int
    likeliest: tuple["Scored", ...] = ()

    @property
    def text(self) -> str:
        """The token as text; as ``bytes:\\xf0\\x9f``, in OpenAI's way, where it is none."""
        try:
            return self.spelled.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.spelled)


@dataclass(frozen=True)
class Chunk:
    """A piece of a reply: the raw ``text``, and the ``parts`` it adds.

    The last chunk carries ``finish_reason``, ``stopped_by`` (the stop string that ended
    the reply, None where it was the model) and the ``report``. ``scored`` are the tokens
    since the last chunk, where log-probabilities were asked for.
    """

    text: str
    parts: tuple[ReplyPart, ...] = ()
    finish_reason: FinishReason | None = None
    stopped_by: str | None = None
    report: Report | None = None
    scored: tuple[Scored, ...] = ()

    def text_of(self, *kinds: Kind) -> str:
        """The text of some kinds, without the markers around it."""
        return "".join(part.text for part in self.parts if part.kind in kinds)


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
    scored: tuple[Scored, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """The JSON form: text, finish_reason and every field of the report, flat."""
        return {"text": self.text, **asdict(self.report), "finish_reason": self.finish_reason}

    @classmethod
    def of(cls, chunks: Iterable[Chunk],
           parse: ToolParser | None = None, tools: Any = None) -> "Response":
        """The reply that ``chunks`` make up; the rest is as for ``CallReader``."""
        whole = joined(list(chunks))
        if whole.finish_reason is None or whole.report is None:
            raise ValueError("the chunks of a reply end with the one that carries its report")
        answer, calls = CallReader(parse, tools).read(whole)
        return cls(whole.text, whole.finish_reason, whole.report, whole.stopped_by,
                   answer, whole.text_of("thought"), tuple(calls), whole.scored)


def joined(chunks: Sequence[Chunk]) -> Chunk:
    """One chunk with the text of all ``chunks``, and the last one's finish reason and report."""
    return replace(chunks[-1], text="".join(chunk.text for chunk in chunks),
                   parts=tuple(part for chunk in chunks for part in chunk.parts),
                   scored=tuple(token for chunk in chunks for token in chunk.scored))


class CallReader:
    """Finds calls of tools in the parts of a reply, whatever pieces they come in.

    ``parse`` reads the text between a call's markers, given the ``tools`` that were offered. What
    is no call with a name, was cut off at the end, or is not to be parsed (None) is answer text.
    """

    def __init__(self, parse: ToolParser | None, tools: Any):
        self._parse, self._tools, self._written = parse, tools, ""

    def read(self, chunk: Chunk) -> tuple[str, list[dict[str, Any]]]:
        """The answer in ``chunk``, and the calls that it completes: one text may hold several."""
        answer, calls = "", list[dict[str, Any]]()
        for part in chunk.parts:
            if part.kind == "tool" and self._parse is not None:
                self._written += part.text
            else:
                answer += self._end_call(calls) + part.text * (part.kind != "thought")
        if chunk.finish_reason:
            answer += self._end_call(calls, cut=chunk.finish_reason == "length")
        return answer, calls

    def _end_call(self, calls: list[dict[str, Any]], cut: bool = False) -> str:
        """Add what was called between the last markers to ``calls``; their text if that is none."""
        written, self._written = self._written, ""
        found = [] if cut else self._calls_in(written)
        calls += found
        return "" if found else written

    def _calls_in(self, written: str) -> list[dict[str, Any]]:
        if self._parse is None or not written:
            return []
        try:
            found = self._parse(written, self._tools)
            calls = found if isinstance(found, list) else [found]
            json.dumps(calls, ensure_ascii=False).encode()  # no set, nor half a surrogate pair
        except Exception:  # a model wrote it, and mlx-lm's parsers raise whatever they meet
            return []
        named = (isinstance(call, dict) and call.get("name") for call in calls)
        return calls if all(name and isinstance(name, str) for name in named) else []
