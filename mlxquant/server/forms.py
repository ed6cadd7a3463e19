"""What clients may ask: every field of every body, checked in one place.

A field of null is absent. What is not understood is refused by name, never dropped.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from mlxquant.base.errors import BadValue
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime.prompt import Prompt
from mlxquant.runtime.request import MOST_LOGPROBS, Request
from mlxquant.runtime.sampling import Sampling
from mlxquant.server.options import Options

BODY_LIMIT = 16 << 20  # bytes
MOST_CHOICES = 128  # replies to one body
_SAMPLING = {field.name for field in fields(Sampling)}
# What transformers itself takes where a template's variables are given.
_RESERVED = {
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation",
    "max_length", "messages", "padding", "return_assistant_tokens_mask", "return_dict",
    "return_tensors", "tokenize", "tokenizer_kwargs", "tools", "truncation"}
_WORDING = {
    "missing": "is missing", "extra_forbidden": "is not supported",
    "int_type": "must be a whole number", "float_type": "must be a number",
    "bool_type": "must be true or false", "string_type": "must be text",
    "list_type": "must be a list", "dict_type": "must be an object",
    "finite_number": "must be finite", "literal_error": "must be {expected}",
    "greater_than_equal": "must be at least {ge}", "less_than_equal": "must be at most {le}",
    "too_short": "must have at least {min_length}", "too_long": "must have at most {max_length}",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must not be empty", "value_error": "{error}"}

AnyForm = TypeVar("AnyForm", bound="Form")


def _several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _text_only(value: Any) -> Any:
    if not isinstance(value, dict) or value.get("type") != "text":
        kind = value.get("type") if isinstance(value, dict) else value
        raise ValueError(f"is {str(kind)[:40]!r}; only text is supported")
    return value


def _tokens(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if not all(re.fullmatch("[0-9]{1,9}", key) for key in value):
        raise ValueError("must give a number for each token id")
    return {int(key): bias for key, bias in value.items()}


def _functions(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for tool in tools:
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict) \
                or not isinstance(function.get("name"), str):
            raise ValueError("must be a list of functions, each with a name")
    return tools


def _choosable(value: Any) -> Any:
    if value not in ("none", "auto"):
        raise ValueError(f"is {str(value)[:40]!r}; a model cannot be made to call a function: "
                         "only none and auto are supported")
    return value


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Form(BaseModel):
    """What both kinds of completion take; ranges of sampling are ``Sampling``'s own."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    chat: ClassVar[bool] = False

    model: str = "default"
    max_tokens: int | None = Field(None, ge=1)
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=1000)]],
                    BeforeValidator(_several), Field(max_length=16)] = []
    n: int = Field(1, ge=1, le=16)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    temperature: float = 0
    top_p: float = 0
    top_k: int = 0
    min_p: float = 0
    seed: int = 0
    repetition_penalty: float = 0
    repetition_context_size: int = 0
    presence_penalty: float = 0
    presence_context_size: int = 0
    frequency_penalty: float = 0
    frequency_context_size: int = 0
    xtc_probability: float = 0
    xtc_threshold: float = 0
    logit_bias: Annotated[dict[int, float], BeforeValidator(_tokens)] = {}

    # These say nothing about the reply.
    user: str = ""
    metadata: dict[str, Any] = {}
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"
    prompt_cache_key: str = ""
    safety_identifier: str = ""

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        return {name: field for name, field in value.items() if field is not None}

    def requests(self, model: LanguageModel, options: Options) -> list[Request]:
        """One request for each reply that is asked for; raises as ``Request.of``."""
        given = {name: getattr(self, name) for name in self.model_fields_set & _SAMPLING}
        sampling = replace(options.sampling, **given)
        if len(self.prompts()) * self.n > MOST_CHOICES:
            raise BadValue(f"prompt and n ask for {len(self.prompts()) * self.n} replies, "
                           f"allowed are {MOST_CHOICES}")
        made = []
        for prompt in self.prompts():
            first = Request.of(
                model, prompt, sampling=sampling, stop=self.stop,
                max_tokens=self.limit() or options.max_tokens, **self.further(model))
            made += [first] + [_with_another_seed(first, i) for i in range(1, self.n)]
        return made

    def prompts(self) -> Sequence[Prompt]:
        raise NotImplementedError

    def limit(self) -> int | None:
        return self.max_tokens

    def further(self, model: LanguageModel) -> dict[str, Any]:
        """Arguments of ``Request.of`` for this kind of body."""
        raise NotImplementedError


class TextForm(Form):
    """A body of /v1/completions."""

    prompt: str | list[Any]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: Literal[False] = False
    best_of: int = 1

    def prompts(self) -> Sequence[Prompt]:
        if self.best_of not in (1, self.n):
            raise BadValue("best_of is not supported; n gives several replies")
        several = isinstance(self.prompt, list) and any(
            isinstance(prompt, (str, list)) for prompt in self.prompt)
        if several and not all(isinstance(prompt, (str, list)) for prompt in self.prompt):
            raise BadValue("prompt must be text, token ids, or a list of either")
        return self.prompt if several else [self.prompt]

    def further(self, model: LanguageModel) -> dict[str, Any]:
        return {"logprobs": self.logprobs}


class ChatForm(Form):
    """A body of /v1/chat/completions."""

    chat: ClassVar[bool] = True

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    tools: Annotated[list[dict[str, Any]], AfterValidator(_functions)] = []
    tool_choice: Annotated[Any, AfterValidator(_choosable)] = "auto"
    parallel_tool_calls: bool = True
    response_format: Annotated[Any, AfterValidator(_text_only)] = None
    reasoning_effort: str | None = None
    chat_template_kwargs: dict[str, Any] = {}

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The functions that the model may call."""
        return [] if self.tool_choice == "none" else self.tools

    def prompts(self) -> Sequence[Prompt]:
        return [self.messages]

    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def further(self, model: LanguageModel) -> dict[str, Any]:
        if self.top_logprobs is not None and not self.logprobs:
            raise BadValue("top_logprobs needs logprobs to be true")
        return {"tools": self.offered or None, "template_options": self._variables(model),
                "logprobs": (self.top_logprobs or 0) if self.logprobs else None}

    def _variables(self, model: LanguageModel) -> dict[str, Any]:
        """Variables for the template, which must have a place for each."""
        template = model.tokenizer.chat_template
        for name in self.chat_template_kwargs:
            if name in _RESERVED or not _is_in(name, template):
                raise BadValue(f"chat_template_kwargs: the template of {model.name} has no "
                               f"variable {name[:40]!r}")
        if self.reasoning_effort is None:
            return self.chat_template_kwargs
        if not _is_in("reasoning_effort", template):
            raise BadValue(f"reasoning_effort is not supported by the template of {model.name}")
        return {"reasoning_effort": self.reasoning_effort, **self.chat_template_kwargs}


def read(form: type[AnyForm], body: bytes) -> AnyForm:
    """The checked form in a body; raises ``BadValue``, naming the first field that is wrong."""
    try:
        value = json.loads(body.decode(), parse_constant=_no_number)
        if b"\\u" in body:  # an escape may be half of a surrogate pair, which is no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise BadValue(f"the body is no JSON in UTF-8: {error}") from error
    if not isinstance(value, dict):
        raise BadValue("the body must be a JSON object")
    try:
        return form.model_validate(value)
    except ValidationError as error:
        raise BadValue(_reason(error)) from error


def _reason(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
    wording = _WORDING.get(first["type"])
    said = wording.format_map(first.get("ctx", {})) if wording else first["msg"]
    return f"{where.removeprefix('.')[:100]} {said}"


def _is_in(name: str, template: Any) -> bool:
    """Whether a template speaks of a variable; one that is no text may know any."""
    if not isinstance(template, str):
        return True
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _with_another_seed(request: Request, index: int) -> Request:
    sampling = request.sampling
    seed = None if sampling.seed is None else sampling.seed + index
    return replace(request, sampling=replace(sampling, seed=seed))
