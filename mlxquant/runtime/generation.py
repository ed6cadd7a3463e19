"""Text from a prompt or a conversation, over mlx-lm's generation loops."""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generate_step, generation_stream, wired_limit

from mlxquant.layers import traffic
from mlxquant.layers.outline import KV_GROUP
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime import speed
from mlxquant.runtime.kv_bits import check_kv_bits
from mlxquant.runtime.prompt import Prompt, Tool
from mlxquant.runtime.prompt_cache import PromptCache
from mlxquant.runtime.reply import Chunk, Response
from mlxquant.runtime.request import Request
from mlxquant.runtime.sampling import GREEDY, Sampling
from mlxquant.runtime.speculation import (
    DRAFT_TOKENS,
    Loop,
    Speculation,
    Step,
    draft_steps,
    lookup_steps,
)
from mlxquant.runtime.writer import Writer

PromptProgress = Callable[[int, int], None]


def generate(model: LanguageModel, prompt: Prompt, *, tools: Sequence[Tool] | None = None,
             **options: Any) -> Response:
    """The whole reply to a prompt; the options are those of ``stream_generate``."""
    parse = model.tokenizer.tool_parser
    return Response.of(stream_generate(model, prompt, tools=tools, **options),
                       parse and (lambda text: parse(text, tools)))


def stream_generate(  # noqa: PLR0913 - a public call: each option by its own name
        model: LanguageModel, prompt: Prompt, *, max_tokens: int = 256,
        sampling: Sampling = GREEDY, stop: str | Sequence[str] = (),
        tools: Sequence[Tool] | None = None, logprobs: int | None = None,
        cache: PromptCache | None = None, kv_bits: int | None = None,
        draft: LanguageModel | None = None, draft_tokens: int = DRAFT_TOKENS, lookup: int = 0,
        progress: PromptProgress | None = None) -> Generator[Chunk, None, None]:
    """Yield the reply piece by piece.

    ``prompt`` is raw text, a list of chat messages (``{"role", "content"}``,
    put through the model's template) or token ids. ``stop``, one string or
    several, ends the reply and is not part of it. ``tools`` are JSON schemas of
    functions, for templates that have a place for them. ``logprobs`` asks for each
    token's log-probability, and those of the so many likeliest. ``cache`` carries
    keys and values over calls; ``kv_bits`` stores them quantised, in groups of 32.
    ``draft`` is a small model of the same vocabulary that guesses ``draft_tokens``
    at a time; ``lookup`` guesses up to so many tokens from the text itself; either
    only changes the speed. ``progress`` is told the prompt tokens processed, and all.

    Closing the generator early keeps ``cache`` usable. Raises ``BadValue``,
    ``Unsupported``, or ``TooLarge`` for a prompt longer than the context.
    """
    speculation = Speculation(draft, draft_tokens, lookup)
    request = Request.of(model, prompt, max_tokens=max_tokens, sampling=sampling, stop=stop,
                         tools=tools, logprobs=logprobs)
    cache = PromptCache() if cache is None else cache
    if not cache.tokens:  # else it was made this way before
        check_kv_bits(model, kv_bits)
    return answer(model, request, cache, Loop(kv_bits, speculation),
                  progress or (lambda done, total: None))


def answer(model: LanguageModel, request: Request, cache: PromptCache, loop: Loop,
           progress: PromptProgress) -> Generator[Chunk, None, None]:
    """The reply to a request, as ``stream_generate`` yields it."""
    request.sampling.start()
    draft = loop.speculation.draft
    cached = cache.reuse(model.network, request.prompt, draft and draft.network)
    loop.speculation.check(model, cache.layers, loop.kv_bits)
    writer, run = Writer(model, request), _Run()
    fresh = request.prompt[cached:]
    steps = _steps(model, request, cached, cache, loop, progress)
    try:
        with wired_limit(model.network, [generation_stream]):
            for step in steps:
                run.note(step, cache)
                chunk = writer.add(step.token, step.logprobs)
                if chunk.finish_reason:
                    break
                if chunk.text:
                    yield chunk
    finally:
        steps.close()
        if mx.distributed.init().size() > 1:
            # A token begun ahead must not add up with the other machines' next sum.
            mx.synchronize(generation_stream)
        cache.record(fresh + run.tokens)
    kv = (run.kv_bytes + traffic.kv_bytes(cache.layers)) // 2
    yield replace(chunk, report=speed.make(
        prompt_tokens=len(fresh), cached_tokens=cached, generation_tokens=len(run.tokens),
        guessed_tokens=run.guessed if loop.speculation else None,
        # The last pass may have ended before its own token, in one that was guessed.
        passes=len(run.tokens) - run.guessed + step.guessed,
        ttft_s=run.first - run.start, decode_s=run.last - run.first,
        bytes_per_token=(model.weight_bytes_per_token + kv + loop.speculation.guessing_bytes()),
        peak_bytes=mx.get_peak_memory()))


class _Run:
    """Tokens, times and traffic of one reply, as they come."""

    def __init__(self) -> None:
        mx.reset_peak_memory()
        self.start = self.first = self.last = time.perf_counter()
        self.tokens: list[int] = []
        self.guessed = self.kv_bytes = 0

    def note(self, step: Step, cache: PromptCache) -> None:
        self.last = time.perf_counter()
        self.tokens.append(step.token)
        self.guessed += step.guessed
        if len(self.tokens) == 1:
            self.first, self.kv_bytes = self.last, traffic.kv_bytes(cache.layers)


def _steps(model: LanguageModel, request: Request, cached: int, cache: PromptCache, loop: Loop,
           progress: PromptProgress) -> Generator[Step, None, None]:
    """Tokens by the loop that is asked for; the prompt's first ``cached`` are in ``cache``."""
    speculation, fresh = loop.speculation, request.prompt[cached:]
    options: dict[str, Any] = {
        "max_tokens": request.max_tokens, "sampler": request.sampling.sampler(model.tokenizer),
        "kv_bits": loop.kv_bits, "kv_group_size": KV_GROUP}
    if speculation.draft is not None:
        options["logits_processors"] = request.sampling.processors(request.prompt[:-1])
        return draft_steps(fresh, model.network, speculation.draft.network, cache,
                           num_draft_tokens=speculation.draft_tokens, **options)
    if speculation.lookup:
        options["logits_processors"] = request.sampling.processors()
        return lookup_steps(speculation.lookup, request.prompt, len(fresh), model.network,
                            cache.layers, progress=progress, **options)
    options["logits_processors"] = request.sampling.processors(request.prompt[:cached])
    return (Step(token, False, logprobs) for token, logprobs in generate_step(
        mx.array(fresh), model.network, prompt_cache=cache.layers, quantized_kv_start=0,
        prompt_progress_callback=progress, **options))
