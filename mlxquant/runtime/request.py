"""What one reply is made from, checked before anything is computed."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlxquant.base import checks
from mlxquant.base.errors import BadValue
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime.prompt import Prompt, Tool, encode, is_chat, room
from mlxquant.runtime.sampling import GREEDY, Sampling

MOST_LOGPROBS = 20


@dataclass(frozen=True)
class Request:
    """``prompt`` in token ids, and what decides the tokens after it.

    ``continues``: the prompt was raw text or ids, so that the reply goes on where it ends,
    with a space or without. ``logprobs``: so many likeliest tokens are told with each token
    chosen; None for none of it.
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
        checks.integer("max_tokens", max_tokens, 1)
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        if not all(isinstance(text, str) and text for text in stops):
            raise BadValue("a stop string is empty" if "" in stops else
                           "stop must be text, or a list of texts")
        if logprobs is not None:
            checks.integer("logprobs", logprobs, 0, MOST_LOGPROBS)
        largest = max(sampling.logit_bias or (0,))
        if largest >= model.vocabulary:
            raise BadValue(f"logit_bias names token {largest}, {model.name} has 0 to "
                           f"{model.vocabulary - 1}")
        tokens = encode(model, prompt, tools, template_options)
        return cls(tokens, room(model, len(tokens), max_tokens), sampling, stops,
                   not is_chat(prompt), logprobs)
