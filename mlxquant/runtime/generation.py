"""Text from a prompt or a conversation, over mlx-lm's generation loops."""

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
from jinja2 import TemplateError
from mlx_lm.generate import TextStateMachine, generate_step, generation_stream, wired_limit

from mlxquant.base.errors import BadValue, TooLarge, Unsupported
from mlxquant.layers import traffic
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime import speed
from mlxquant.runtime.prompt_cache import PromptCache
from mlxquant.runtime.reply import Chunk, FinishReason, Response, Splitter
from mlxquant.runtime.sampling import Sampling
from mlxquant.runtime.speculation import DRAFT_TOKENS, Speculation, Token, draft_steps, lookup_steps

Message = dict[str, Any]
Tool = Mapping[str, Any]
Prompt = str | Sequence[Message] | Sequence[int]
PromptProgress = Callable[[int, int], None]

KV_GROUP = 32
_KV_BITS = (None, 2, 3, 4, 5, 6, 8)


def generate(model: LanguageModel, prompt: Prompt, *, tools: Sequence[Tool] | None = None,
             **options: Any) -> Response:
    """The whole reply to a prompt; the options are those of ``stream_generate``."""
    parse = model.tokenizer.tool_parser
    return Response.of(stream_generate(model, prompt, tools=tools, **options),
                       parse and partial(_parse_call, parse, tools))


def stream_generate(model: LanguageModel, prompt: Prompt, *, max_tokens: int = 256, sampling: Sampling = Sampling(),
                    stop: Sequence[str] = (), tools: Sequence[Tool] | None = None,
                    cache: PromptCache | None = None, kv_bits: int | None = None,
                    draft: LanguageModel | None = None, draft_tokens: int = DRAFT_TOKENS, lookup: int = 0,
                    progress: PromptProgress | None = None) -> Generator[Chunk, None, None]:
    """Yield the reply piece by piece.

    ``prompt`` is raw text, a list of chat messages (``{"role", "content"}``,
    put through the model's template) or token ids. ``stop`` strings end the
    reply and are not part of it. ``tools`` are JSON schemas of functions, for
    templates that have a place for them. ``cache`` carries keys and values over
    calls; ``kv_bits`` stores them quantised, in groups of 32. ``draft`` is a
    small model of the same vocabulary that guesses ``draft_tokens`` at a time;
    ``lookup`` guesses up to so many tokens from the text itself; either only
    changes the speed. ``progress`` is told the prompt tokens processed, and all.

    Closing the generator early keeps ``cache`` usable. Raises ``BadValue``,
    ``Unsupported``, or ``TooLarge`` for a prompt longer than the context.
    """
    if max_tokens < 1:
        raise BadValue(f"max_tokens is {max_tokens}, at least 1 is needed")
    if kv_bits not in _KV_BITS:
        raise BadValue(f"kv_bits is {kv_bits}, allowed are {', '.join(map(str, _KV_BITS[1:]))}")
    if not all(stop):
        raise BadValue("a stop string is empty")
    speculation = Speculation(draft, draft_tokens, lookup)
    tokens = encode(model, prompt, tools)
    max_tokens = room(model, len(tokens), max_tokens)
    cache = PromptCache() if cache is None else cache
    return _stream(model, tokens, max_tokens, sampling, tuple(stop), cache, kv_bits, speculation,
                   progress or (lambda done, total: None))


def encode(model: LanguageModel, prompt: Prompt, tools: Sequence[Tool] | None = None) -> list[int]:
    """Token ids of raw text, of chat messages through the template, or of ids as they are."""
    tokenizer = model.tokenizer
    chat = not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], dict)
    if tools and not (chat and tokenizer.has_tool_calling):
        raise Unsupported(f"{model.name} has no place for tools in its template" if chat
                          else "tools need a list of chat messages")
    if isinstance(prompt, str):
        special = not (tokenizer.bos_token and prompt.startswith(tokenizer.bos_token))
        tokens = tokenizer.encode(prompt, add_special_tokens=special)
    elif chat:
        if not tokenizer.has_chat_template:
            raise Unsupported(f"{model.name} has no chat template; give raw text instead")
        given = {"tools": [dict(tool) for tool in tools]} if tools else {}
        try:
            tokens = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, **given)
        except TemplateError as error:
            raise Unsupported(f"the template of {model.name} refuses these messages: {error}") from error
    else:
        tokens = list(prompt)
    if not tokens:
        raise BadValue("the prompt is empty")
    return list(tokens)


def room(model: LanguageModel, prompt: int, wanted: int) -> int:
    """How many tokens may follow a prompt within the context; raises ``TooLarge`` for none."""
    context = model.context_length
    if context is None:
        return wanted
    if prompt >= context:
        raise TooLarge(f"the prompt has {prompt} tokens, the context of {model.name} holds {context}")
    return min(wanted, context - prompt)


def _parse_call(parse: Callable[[str, Any], Any], tools: Sequence[Tool] | None, text: str) -> Any:
    return parse(text, tools)


def _steps(model: LanguageModel, tokens: list[int], fresh: list[int], cache: PromptCache, sampling: Sampling,
           max_tokens: int, kv_bits: int | None, speculation: Speculation,
           progress: PromptProgress) -> Generator[Token, None, None]:
    """Tokens by the loop that ``speculation`` asks for."""
    network = model.network
    options: dict[str, Any] = {
        "max_tokens": max_tokens, "sampler": sampling.sampler(len(model.tokenizer)),
        "logits_processors": sampling.logits_processors(), "kv_bits": kv_bits, "kv_group_size": KV_GROUP}
    if speculation.draft is not None:
        return draft_steps(fresh, network, speculation.draft.network, cache.layers, cache.draft_layers,
                           num_draft_tokens=speculation.draft_tokens, **options)
    if speculation.lookup:
        return lookup_steps(speculation.lookup, tokens, len(fresh), network, cache.layers, progress=progress,
                            **options)
    return _plain_steps(generate_step(mx.array(fresh), network, prompt_cache=cache.layers, quantized_kv_start=0,
                                      prompt_progress_callback=progress, **options))


def _plain_steps(steps: Any) -> Generator[Token, None, None]:
    try:
        for token, _ in steps:
            yield token, False
    finally:
        steps.close()


def _stream(model: LanguageModel, tokens: list[int], max_tokens: int, sampling: Sampling,
            stop: tuple[str, ...], cache: PromptCache, kv_bits: int | None, speculation: Speculation,
            progress: PromptProgress) -> Generator[Chunk, None, None]:
    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    cached = cache.reuse(model.network, tokens, speculation.draft and speculation.draft.network)
    if speculation:
        speculation.check(model, cache.layers, kv_bits)
    fresh, generated = tokens[cached:], []
    guessed = passes = 0
    detokenizer, ends = model.tokenizer.detokenizer, model.tokenizer.eos_token_ids
    matcher = TextStateMachine({"normal": [(s, None) for s in stop]}).make_state()
    splitter, written = Splitter(model.tokenizer, tokens), ""
    reason: FinishReason | None = None
    stopped_by, kv_before = None, 0
    mx.reset_peak_memory()
    start = first = last = time.perf_counter()
    steps = _steps(model, tokens, fresh, cache, sampling, max_tokens, kv_bits, speculation, progress)
    try:
        with wired_limit(model.network, [generation_stream]):
            for token, was_guessed in steps:
                last = time.perf_counter()
                generated.append(token)
                guessed, passes = guessed + was_guessed, passes + (not was_guessed)
                if len(generated) == 1:
                    first, kv_before = last, traffic.kv_bytes(cache.layers)
                if token in ends:
                    reason = "stop"
                else:
                    detokenizer.add_token(token)
                    reason = "length" if len(generated) == max_tokens else None
                if reason:
                    detokenizer.finalize()
                piece = detokenizer.last_segment
                written += piece
                matcher, text, state = TextStateMachine.step(matcher, piece)
                if state is None:
                    reason, stopped_by = "stop", min((s for s in stop if s in written), key=written.index)
                if reason:
                    break
                if text:
                    yield Chunk(text, tuple(splitter.feed(text)))
    except NotImplementedError as error:
        raise Unsupported(f"{model.name}: {error}") from error
    finally:
        steps.close()
        if mx.distributed.init().size() > 1:  # a token begun ahead must not add up with other machines' next sum
            mx.synchronize(generation_stream)
        cache.record(fresh + generated)
    if stopped_by is None:  # what was held back as a possible stop string is text
        text += TextStateMachine.flush(matcher)[1]
    kv = (kv_before + traffic.kv_bytes(cache.layers)) // 2
    parts = (*splitter.feed(text), *splitter.finish())
    yield Chunk(text, parts, reason, stopped_by, speed.make(
        prompt_tokens=len(fresh), cached_tokens=cached, generation_tokens=len(generated),
        guessed_tokens=guessed if speculation else None,
        passes=passes + was_guessed,  # the last one, if the reply ended before its own token
        ttft_s=first - start, decode_s=last - first,
        bytes_per_token=model.weight_bytes_per_token + kv + speculation.guessing_bytes(),
        peak_bytes=mx.get_peak_memory()))
