"""Several prompts at once: every pass over the weights then makes a token for each of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import make_prompt_cache

from mlxquant.base.errors import BadValue, Unsupported
from mlxquant.layers import traffic
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime import speed
from mlxquant.runtime.generation import Prompt, encode, room
from mlxquant.runtime.reply import FinishReason, Part, Splitter
from mlxquant.runtime.sampling import Sampling
from mlxquant.runtime.speed import Report

BATCH = 32


@dataclass(frozen=True)
class BatchResponse:
    """Replies in the order of their prompts: raw ``texts``, the ``answers`` in them without any
    reasoning, why each ended, and the speed of all together."""

    texts: tuple[str, ...]
    answers: tuple[str, ...]
    finish_reasons: tuple[FinishReason, ...]
    report: Report


def batch_generate(model: LanguageModel, prompts: Sequence[Prompt], *, max_tokens: int = 256,
                   sampling: Sampling = Sampling(), batch_size: int = BATCH,
                   progress: Callable[[int, int], None] | None = None) -> BatchResponse:
    """Answer ``prompts``, up to ``batch_size`` of them in each pass over the weights.

    Prompts are as for ``generate``. ``progress`` is told the replies that are done, and
    all. Rounding differs from that of a single prompt, so a close choice may fall
    otherwise. Raises ``BadValue``, ``TooLarge``, or ``Unsupported`` for a model whose
    keys and values cannot be put side by side.
    """
    for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise BadValue(f"{name} is {value}, at least 1 is needed")
    if not prompts:
        raise BadValue("there is no prompt")
    if not all(hasattr(layer, "merge") for layer in make_prompt_cache(model.network)):
        raise Unsupported(f"{model.name} keeps a state that cannot be put side by side; give one prompt at a time")
    tokens = [encode(model, prompt) for prompt in prompts]
    limits = [room(model, len(t), max_tokens) for t in tokens]
    if sampling.seed is not None:
        mx.random.seed(sampling.seed)
    mx.reset_peak_memory()
    generator = BatchGenerator(
        model.network, stop_tokens=[[t] for t in model.tokenizer.eos_token_ids],
        sampler=sampling.sampler(len(model.tokenizer)), logits_processors=sampling.logits_processors(),
        completion_batch_size=batch_size, prefill_batch_size=min(batch_size, 8))
    written: dict[int, list[int]] = {}
    reasons: dict[int, FinishReason] = {}
    kv = passes = 0
    try:
        uids = generator.insert(tokens, limits)
        written = {uid: [] for uid in uids}
        with generator.stats() as stats:
            while responses := generator.next_generated():
                passes += 1
                for response in responses:
                    if response.finish_reason != "stop":
                        written[response.uid].append(response.token)
                    if response.finish_reason is not None:
                        reasons[response.uid] = response.finish_reason
                        kv += traffic.kv_bytes(response.prompt_cache) * (len(written[response.uid]) + 1)
                        if progress is not None:
                            progress(len(reasons), len(prompts))
    finally:
        generator.close()
    texts = [model.tokenizer.decode(written[uid]) for uid in uids]
    answers = list(map(partial(_answer, model.tokenizer), texts, tokens))
    made = sum(len(written[uid]) + (reasons[uid] == "stop") for uid in uids)
    return BatchResponse(tuple(texts), tuple(answers), tuple(reasons[uid] for uid in uids), speed.make(
        prompt_tokens=sum(map(len, tokens)), cached_tokens=0, generation_tokens=made, ttft_s=stats.prompt_time,
        decode_s=stats.generation_time, peak_bytes=mx.get_peak_memory(),
        bytes_per_token=round((passes * model.weight_bytes_per_token + kv) / made)))


def _answer(tokenizer: Any, text: str, prompt: list[int]) -> str:
    splitter = Splitter(tokenizer, prompt)
    parts: list[Part] = [*splitter.feed(text), *splitter.finish()]
    return "".join(part.text for part in parts if part.kind == "answer")
