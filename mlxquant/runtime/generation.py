"""Text from a prompt or a conversation, over mlx-lm's generation loops."""

import time
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream, wired_limit

from mlxquant.base import checks
from mlxquant.base.threads import close_streams_at_end
from mlxquant.layers import traffic
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime import speed
from mlxquant.runtime.loop import DRAFT_TOKENS, Loop, PromptProgress
from mlxquant.runtime.prompt import Prompt, Request, Tool
from mlxquant.runtime.prompt_cache import PromptCache
from mlxquant.runtime.reply import Chunk, Response
from mlxquant.runtime.sampling import GREEDY, Sampling
from mlxquant.runtime.writer import Writer


def generate(model: LanguageModel, prompt: Prompt, *, tools: Sequence[Tool] | None = None,
             **options: Any) -> Response:
    """The whole reply to a prompt; the options are those of ``stream_generate``."""
    return Response.of(stream_generate(model, prompt, tools=tools, **options),
                       model.tokenizer.tool_parser, tools)


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
    keys and values over calls; ``kv_bits`` stores them quantised, in groups of 32;
    where ``cache`` has them at another width they are computed again.
    ``draft`` is a small model with the same tokenizer that guesses ``draft_tokens``
    at a time; ``lookup`` guesses up to so many tokens from the text itself; either
    only changes the speed. ``progress`` gets the prompt tokens processed so far, and of all.

    Closing the generator early keeps ``cache`` usable. Raises ``BadValue``,
    ``Unsupported``, or ``TooLarge`` for a prompt longer than the context.
    """
    loop = Loop(kv_bits, draft, draft_tokens, lookup)
    request = Request.of(model, prompt, max_tokens=max_tokens, sampling=sampling, stop=stop,
                         tools=tools, logprobs=logprobs)
    cache = PromptCache() if cache is None else cache
    checks.kind("cache", cache, PromptCache)
    loop.check(model, cache)
    return answer(model, request, cache, loop, progress)


def answer(model: LanguageModel, request: Request, cache: PromptCache, loop: Loop,
           progress: PromptProgress | None = None) -> Generator[Chunk, None, None]:
    """The reply to a request, as ``stream_generate`` yields it."""
    close_streams_at_end()  # it may be read in another thread than it was asked for
    request.sampling.start()
    mx.reset_peak_memory()
    cached = cache.reuse(model.network, request.prompt, loop.draft and loop.draft.network,
                         loop.kv_bits)
    fresh, writer = request.prompt[cached:], Writer(model, request)
    tokens: list[int] = []
    passes = Counter[int]()  # over the weights, by the tokens in them
    guessed = kv = 0
    start = first = last = time.perf_counter()
    steps = loop.steps(model, request, cache, cached, progress or (lambda done, total: None))
    try:
        with wired_limit(model.network, [generation_stream]):
            for step in steps:
                last = time.perf_counter()
                if not tokens:
                    first, kv = last, traffic.kv_bytes(cache.layers)
                tokens.append(step.token)
                guessed += step.guessed
                passes[step.together] += not step.guessed  # which ends what its pass makes
                chunk = writer.add(step.token, step.logprobs)
                if chunk.finish_reason:
                    break
                if chunk.text:
                    yield chunk
    finally:
        steps.close()
        if mx.distributed.init().size() > 1:
            # A token begun ahead must not take part in the other machines' next sum.
            mx.synchronize(generation_stream)
        cache.record(fresh + tokens)
    passes[step.together] += step.guessed  # the reply ended inside its last pass
    kv = (kv + traffic.kv_bytes(cache.layers)) // 2
    weights = traffic.passes_bytes(model.network, passes) // passes.total()
    yield replace(chunk, report=speed.make(
        prompt_tokens=len(fresh), cached_tokens=cached, generation_tokens=len(tokens),
        guessed_tokens=guessed if loop.guesses else None,
        passes=passes.total(), ttft_s=first - start, decode_s=last - first,
        bytes_per_token=weights + kv + loop.guessing_bytes(),
        peak_bytes=mx.get_peak_memory()))
