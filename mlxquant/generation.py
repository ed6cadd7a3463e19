"""Text from a prompt or a conversation, over mlx-lm's generation loop."""

import time
from dataclasses import asdict, dataclass, field
from typing import Iterator, Sequence

import mlx.core as mx
import mlx_lm
from mlx_lm.generate import TextStateMachine
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.utils import common_prefix_len

from mlxquant import report
from mlxquant.errors import BadValue, TooLarge, Unsupported
from mlxquant.loading import LanguageModel
from mlxquant.report import Report
from mlxquant.roofline import traffic
from mlxquant.sampling import Sampling

Message = dict[str, str]

_KV_GROUP = 32
_KV_BITS = (None, 2, 3, 4, 5, 6, 8)


@dataclass
class PromptCache:
    """Keys and values of a conversation, kept between calls.

    Give the same object to successive calls: only the tokens after the longest
    prefix shared with the last call are processed again.
    """

    tokens: list[int] = field(default_factory=list)
    layers: list = field(default_factory=list)

    def reuse(self, model: LanguageModel, prompt: list[int]) -> int:
        """Trim to what ``prompt`` shares with the held tokens; returns how many remain.

        At least one prompt token is left to process. A cache that cannot be
        trimmed (a sliding window that has wrapped) is started afresh.
        """
        shared = min(common_prefix_len(self.tokens, prompt), len(prompt) - 1)
        surplus = len(self.tokens) - shared
        if not self.layers or (surplus and not can_trim_prompt_cache(self.layers)):
            self.layers, shared = make_prompt_cache(model.network), 0
        elif surplus:
            trim_prompt_cache(self.layers, surplus)
        self.tokens = self.tokens[:shared]
        return shared

    def record(self, fed: list[int]) -> None:
        """Note the tokens of the last call, as far as the layers have taken them in."""
        held = max((getattr(layer, "offset", 0) for layer in self.layers), default=0)
        surplus = held - len(self.tokens) - len(fed)
        if surplus > 0 and can_trim_prompt_cache(self.layers):
            held -= trim_prompt_cache(self.layers, surplus)
            surplus = 0
        if held == 0 or surplus > 0:  # unknown contents: start afresh next time
            self.tokens, self.layers = [], []
        else:
            self.tokens = (self.tokens + fed)[:held]


@dataclass(frozen=True)
class Chunk:
    """A piece of a reply. The last one carries ``finish_reason`` and the ``report``."""

    text: str
    finish_reason: str | None = None
    report: Report | None = None


@dataclass(frozen=True)
class Response:
    """A whole reply: its text, why it ended ("stop" or "length"), and how fast it was."""

    text: str
    finish_reason: str
    report: Report

    def as_dict(self) -> dict:
        """The JSON form: text, finish_reason and every field of the report, flat."""
        return {"text": self.text, **asdict(self.report), "finish_reason": self.finish_reason}


def generate(model: LanguageModel, prompt: str | Sequence[Message] | Sequence[int], **options) -> Response:
    """The whole reply to a prompt; the options are those of ``stream_generate``."""
    chunks = list(stream_generate(model, prompt, **options))
    return Response("".join(c.text for c in chunks), chunks[-1].finish_reason, chunks[-1].report)


def stream_generate(model: LanguageModel, prompt: str | Sequence[Message] | Sequence[int], *,
                    max_tokens: int = 256, sampling: Sampling = Sampling(),
                    stop: Sequence[str] = (), cache: PromptCache | None = None,
                    kv_bits: int | None = None) -> Iterator[Chunk]:
    """Yield the reply piece by piece.

    ``prompt`` is raw text, a list of chat messages (``{"role", "content"}``,
    put through the model's template) or token ids. ``stop`` strings end the
    reply and are not part of it. ``cache`` carries keys and values over calls;
    ``kv_bits`` stores them quantised, in groups of 32.

    Closing the generator early keeps ``cache`` usable. Raises ``BadValue``,
    ``Unsupported``, or ``TooLarge`` for a prompt longer than the context.
    """
    if max_tokens < 1:
        raise BadValue(f"max_tokens is {max_tokens}, at least 1 is needed")
    if kv_bits not in _KV_BITS:
        raise BadValue(f"kv_bits is {kv_bits}, allowed are {', '.join(map(str, _KV_BITS[1:]))}")
    if not all(stop):
        raise BadValue("a stop string is empty")
    tokens = encode(model, prompt)
    max_tokens = _room(model, len(tokens), max_tokens)
    cache = PromptCache() if cache is None else cache
    return _stream(model, tokens, max_tokens, sampling, tuple(stop), cache, kv_bits)


def encode(model: LanguageModel, prompt: str | Sequence[Message] | Sequence[int]) -> list[int]:
    """Token ids of raw text, of chat messages through the template, or of ids as they are."""
    tokenizer = model.tokenizer
    if isinstance(prompt, str):
        special = not (tokenizer.bos_token and prompt.startswith(tokenizer.bos_token))
        tokens = tokenizer.encode(prompt, add_special_tokens=special)
    elif prompt and isinstance(prompt[0], dict):
        if not tokenizer.has_chat_template:
            raise Unsupported(f"{model.name} has no chat template; give raw text instead")
        tokens = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True)
    else:
        tokens = list(prompt)
    if not tokens:
        raise BadValue("the prompt is empty")
    return tokens


def _room(model: LanguageModel, prompt: int, wanted: int) -> int:
    """How many tokens may follow a prompt within the context."""
    context = model.context_length
    if context is None:
        return wanted
    if prompt >= context:
        raise TooLarge(f"the prompt has {prompt} tokens, the context of {model.name} holds {context}")
    return min(wanted, context - prompt)


def _stream(model: LanguageModel, tokens: list[int], max_tokens: int, sampling: Sampling,
            stop: tuple[str, ...], cache: PromptCache, kv_bits: int | None) -> Iterator[Chunk]:
    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    cached = cache.reuse(model, tokens)
    fresh, generated = tokens[cached:], []
    matcher = TextStateMachine({"normal": [(s, None) for s in stop]}).make_state()
    mx.reset_peak_memory()
    start = first = time.perf_counter()
    steps = mlx_lm.stream_generate(
        model.network, model.tokenizer, mx.array(fresh), max_tokens=max_tokens,
        sampler=sampling.sampler(len(model.tokenizer)),
        logits_processors=sampling.logits_processors(), prompt_cache=cache.layers,
        kv_bits=kv_bits, kv_group_size=_KV_GROUP, quantized_kv_start=0)
    reason, kv_before = None, 0
    try:
        for step in steps:
            last = time.perf_counter()
            generated.append(step.token)
            if len(generated) == 1:
                first, kv_before = last, traffic.kv_bytes(cache.layers)
            matcher, text, state = TextStateMachine.step(matcher, step.text)
            reason = "stop" if state is None else step.finish_reason
            if reason:
                break
            if text:
                yield Chunk(text)
    except NotImplementedError as error:
        raise Unsupported(f"{model.name}: {error}") from error
    finally:
        steps.close()
        cache.record(fresh + generated)
    if state is not None:  # no stop string: what was held back as a possible one is text
        text += TextStateMachine.flush(matcher)[1]
    kv = (kv_before + traffic.kv_bytes(cache.layers)) // 2
    yield Chunk(text, reason, report.make(
        prompt_tokens=len(fresh), cached_tokens=cached, generation_tokens=len(generated),
        ttft_s=first - start, decode_s=last - first,
        bytes_per_token=model.weight_bytes_per_token + kv, peak_bytes=mx.get_peak_memory()))
