"""The request bodies that clients may send, with every field checked, and the server's defaults.

A field of null counts as absent. A field that is not supported is refused by name, never ignored.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    create_model,
    model_validator,
)

from mlxquant.base import checks
from mlxquant.base.errors import BadValue
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime.loop import Loop
from mlxquant.runtime.prompt import MOST_LOGPROBS, Prompt, Request
from mlxquant.runtime.sampling import Sampling

BODY_LIMIT = 16 << 20  # bytes
MOST_CHOICES = 128  # replies to one body
_SAMPLING = get_type_hints(Sampling)
# Arguments of transformers itself, in the place where a template's variables are given.
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


@dataclass(frozen=True)
class Options:
    """``origins`` are those of web pages that may call it, ``*`` any; ``prompt_caches`` is how
    many conversations keep their keys and values. Raises ``BadValue`` outside the ranges."""

    host: str = "127.0.0.1"
    port: int = 8080
    max_tokens: int = 1024
    sampling: Sampling = field(default_factory=Sampling)
    loop: Loop = field(default_factory=Loop)
    origins: tuple[str, ...] = ()
    prompt_caches: int = 10
    verbose: bool = False

    def __post_init__(self) -> None:
        checks.integer("port", self.port, 0, 65535)
        checks.integer("max_tokens", self.max_tokens, 1)
        checks.integer("prompt_caches", self.prompt_caches, 0)
        object.__setattr__(self, "origins", tuple(map(_origin, self.origins)))


def _origin(given: str) -> str:
    """An origin as browsers send it: they compare every letter."""
    origin = given.lower().removesuffix("/")
    if not re.fullmatch(r"\*|[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[^/:@?#\[\]\s]+)(:[0-9]+)?",
                        origin):
        raise BadValue(f"origin is {given!r}, allowed are scheme://host, scheme://host:port or *")
    return origin


def _text_only(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else value
    if not isinstance(value, dict) or kind != "text":
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


# The fields of ``Sampling``, which also checks their ranges; absent ones are the server's own.
_FIELDS: dict[str, Any] = {
    name: (kind, None) for name, kind in _SAMPLING.items() if name != "logit_bias"}
_SamplingForm: Any = create_model("_SamplingForm", **_FIELDS)


class CompletionForm(_SamplingForm, BaseModel):
    """What both kinds of completion take."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    model: str = "default"
    max_tokens: int | None = Field(None, ge=1)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=1000)]], Field(max_length=16),
        BeforeValidator(lambda value: [value] if isinstance(value, str) else value)] = []
    n: int = Field(1, ge=1, le=16)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]],
                          BeforeValidator(_tokens)] = {}

    # These are accepted, and do not affect the reply.
    user: str = ""
    metadata: dict[str, Any] = {}
    store: Literal[False] = False
    service_tier: Literal["auto", "default"] = "auto"
    prompt_cache_key: str = ""
    safety_identifier: str = ""

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, value: Any) -> Any:
        return {name: given for name, given in value.items() if given is not None}

    def requests_for(self, model: LanguageModel, options: Options, prompts: Sequence[Prompt],
                     max_tokens: int | None, **further: Any) -> list[Request]:
        """One request for each reply to each prompt; raises as ``Request.of``."""
        given = {name: getattr(self, name) for name in self.model_fields_set & _SAMPLING.keys()}
        sampling = replace(options.sampling, **given)
        if len(prompts) * self.n > MOST_CHOICES:
            raise BadValue(f"prompt and n ask for {len(prompts) * self.n} replies, "
                           f"allowed are {MOST_CHOICES}")
        seeds = [None if sampling.seed is None else sampling.seed + i for i in range(self.n)]
        requests = [Request.of(model, prompt, max_tokens=max_tokens or options.max_tokens,
                               sampling=sampling, stop=self.stop, **further) for prompt in prompts]
        return [replace(request, sampling=replace(sampling, seed=seed))
                for request in requests for seed in seeds]


class TextForm(CompletionForm):
    """A body of /v1/completions."""

    prompt: str | list[Any]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: Literal[False] = False
    best_of: int = 1

    def requests(self, model: LanguageModel, options: Options) -> list[Request]:
        if self.best_of not in (1, self.n):
            raise BadValue("best_of is not supported; n gives several replies")
        prompts: list[Any] = self.prompt if isinstance(self.prompt, list) else [self.prompt]
        several = [isinstance(prompt, (str, list)) for prompt in prompts]
        if any(several) and not all(several):
            raise BadValue("prompt must be text, token ids, or a list of either")
        return self.requests_for(model, options, prompts if any(several) else [prompts],
                                 self.max_tokens, logprobs=self.logprobs)


class ChatForm(CompletionForm):
    """A body of /v1/chat/completions."""

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

    def requests(self, model: LanguageModel, options: Options) -> list[Request]:
        if self.top_logprobs is not None and not self.logprobs:
            raise BadValue("top_logprobs needs logprobs to be true")
        return self.requests_for(
            model, options, [self.messages], self.max_completion_tokens or self.max_tokens,
            tools=self.offered or None, template_options=self._variables(model),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None)

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


AnyForm = TextForm | ChatForm


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
    """Whether a chat template mentions a variable; a template that is not text may use any."""
    if not isinstance(template, str):
        return True
    return re.search(rf"\b{re.escape(name)}\b", template) is not None


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")
