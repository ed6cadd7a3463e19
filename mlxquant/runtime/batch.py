"""Several prompts at once: every pass over the weights then makes a token for each of them."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache

from mlxquant.base import checks
from mlxquant.base.errors import BadValue, MlxquantError, Unsupported
from mlxquant.layers import traffic
from mlxquant.layers.in_place import InPlaceCache
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime import speed
from mlxquant.runtime.prompt import Prompt, Request
from mlxquant.runtime.prompt_cache import PromptCache, cut
from mlxquant.runtime.reply import Chunk, FinishReason, joined
from mlxquant.runtime.sampling import GREEDY, Sampling
from mlxquant.runtime.speed import Report
from mlxquant.runtime.writer import Writer

BATCH = 32
_PREFILL = 8  # prompts read at the same time


@dataclass(frozen=True)
class BatchResponse:
    """Replies in the order of their prompts: raw ``texts``, the ``answers`` in them without any
    reasoning, why each ended, and the speed of all together."""

    texts: tuple[str, ...]
    answers: tuple[str, ...]
    finish_reasons: tuple[FinishReason, ...]
    report: Report


def batch_generate(model: LanguageModel, prompts: Sequence[Prompt], *, max_tokens: int = 256,
                   sampling: Sampling = GREEDY, stop: str | Sequence[str] = (),
                   batch_size: int = BATCH,
                   progress: Callable[[int, int], None] | None = None) -> BatchResponse:
    """Answer ``prompts``, up to ``batch_size`` of them in each pass over the weights.

    Prompts and ``stop`` are as for ``generate``. ``progress`` is called with the number of replies
    done and of all replies. Rounding differs from that of a single prompt, so a token that is
    chosen by a narrow margin may differ. Raises ``BadValue``, ``TooLarge``, or ``Unsupported`` for
    a model whose keys and values cannot be batched.
    """
    checks.integer("batch_size", batch_size, 1)
    checks.several("prompts", prompts)
    checks.kind("model", model, LanguageModel)
    if not prompts:
        raise BadValue("there is no prompt")
    if not batchable(model):
        raise Unsupported(f"{model.name} keeps a state that cannot be put side by side; "
                          "give one prompt at a time")
    requests = [Request.of(model, prompt, max_tokens=max_tokens, sampling=sampling, stop=stop)
                for prompt in prompts]
    sampling.start()
    mx.reset_peak_memory()
    batch = Batch(model, batch_size)
    chunks: dict[int, list[Chunk]] = {batch.add(request): [] for request in requests}
    kv = made = done = 0
    with batch.generator.stats() as stats:
        while batch:
            for event in batch.step():
                if event.error is not None:
                    raise event.error
                if event.chunk is None:
                    continue
                chunks[event.row].append(event.chunk)
                if event.cache is not None:
                    made, done = made + event.tokens, done + 1
                    cut(event.cache.layers, event.tokens // 2)  # as long as it was on average
                    kv += traffic.kv_bytes(event.cache.layers) * event.tokens
                    if progress is not None:
                        progress(done, len(prompts))
    batch.close()
    replies = [joined(row) for row in chunks.values()]
    return BatchResponse(
        tuple(reply.text for reply in replies),
        tuple(reply.text_of("answer", "tool") for reply in replies),
        tuple(reply.finish_reason or "stop" for reply in replies), speed.make(
            prompt_tokens=sum(len(request.prompt) for request in requests), cached_tokens=0,
            generation_tokens=made, ttft_s=stats.prompt_time, decode_s=stats.generation_time,
            peak_bytes=mx.get_peak_memory(), bytes_per_token=round(
                (traffic.passes_bytes(model.network, batch.passes) + kv) / made)))


def batchable(model: LanguageModel) -> bool:
    """Whether several sequences of this model can share a pass."""
    return all(hasattr(layer, "merge") for layer in make_prompt_cache(model.network))


class Event(NamedTuple):
    """One of a row's events: (prompt tokens read, of how many), a piece of its reply, or an error.

    The last piece comes with the ``cache`` of prompt and reply, and the number of ``tokens`` made.
    """

    row: int
    progress: tuple[int, int] | None = None
    chunk: Chunk | None = None
    error: MlxquantError | None = None
    cache: PromptCache | None = None
    tokens: int = 0


class Batch:
    """Replies that are made together; rows can be added and removed while others are under way.

    It is false when it has no rows. ``keep`` gets the cache of each whole prompt, where the cache
    of prompt and reply cannot be trimmed back to it.
    """

    def __init__(self, model: LanguageModel, size: int = BATCH,
                 keep: Callable[[PromptCache], None] | None = None):
        self.generator = BatchGenerator(model.network, completion_batch_size=size,
                                        prefill_batch_size=min(size, _PREFILL))
        self.passes = Counter[int]()  # by the rows that made a token
        self._model, self._keep = model, keep
        self._writers: dict[int, Writer] = {}

    def __bool__(self) -> bool:
        return bool(self._writers)

    def add(self, request: Request, cache: PromptCache | None = None) -> int:
        """Begin a reply, reusing what ``cache`` holds of its prompt; returns its row's number."""
        cache = PromptCache() if cache is None else cache
        cached = cache.reuse(self._model.network, request.prompt)
        for layer in cache.layers:
            InPlaceCache.of(layer)  # a row by itself is then quick as a single prompt
        sampling = request.sampling
        (row,) = self.generator.insert(
            [request.prompt[cached:]],
            [request.max_tokens + 1],  # the writer ends it
            caches=[cache.layers], all_tokens=[request.prompt[:cached]],
            samplers=[sampling.sampler(self._model)],
            logits_processors=[sampling.processors()])
        self._writers[row] = Writer(self._model, request)
        return row

    def step(self) -> list[Event]:
        """One pass over the weights for all rows."""
        read, made = self.generator.next()
        if made:
            self.passes[len(made)] += 1
        if self._keep is not None:
            whole = [step.uid for step in read if step.end_of_segment and not step.end_of_prompt]
            for layers, tokens in self.generator.extract_cache(whole).values():
                if not can_trim_prompt_cache(layers):
                    self._keep(PromptCache(list(tokens), layers))
        return [Event(step.uid, progress=step.progress) for step in read] + [
            event for step in made if (event := self._written(step))]

    def remove(self, row: int) -> None:
        """Remove a row whose reply is no longer wanted, or done."""
        del self._writers[row]
        self.generator.remove([row])

    def close(self) -> None:
        self.generator.close()

    def _written(self, step: Any) -> Event | None:
        writer = self._writers[step.uid]
        try:
            chunk = writer.add(step.token, step.logprobs)
        except MlxquantError as error:
            self.remove(step.uid)
            return Event(step.uid, error=error)
        if not chunk.finish_reason:
            return Event(step.uid, chunk=chunk) if chunk.text else None
        layers, tokens = self.generator.extract_cache([step.uid])[step.uid]
        self.remove(step.uid)
        return Event(step.uid, chunk=chunk, cache=PromptCache(list(tokens), layers),
                     tokens=writer.count)
