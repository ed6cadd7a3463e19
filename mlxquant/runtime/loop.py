"""The loops that make tokens: one by one, or by verifying guesses in one pass over the weights.

Guesses come from a small draft model (https://arxiv.org/abs/2211.17192; mlx-lm's own
loop) or, with no second model, from the text itself: what followed the last place
where the newest tokens occurred (prompt look-up,
https://github.com/apoorvumang/prompt-lookup-decoding). A token is kept only if the
model would have chosen it, so greedy output is unchanged, up to rounding between
products of one row and of several, and sampled output has the same distribution.
"""

from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.generate import (
    generate_step,
    generation_stream,
    maybe_quantize_kv_cache,
    speculative_generate_step,
)
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache

from mlxquant.base import checks
from mlxquant.base.errors import BadValue, Unsupported
from mlxquant.layers.outline import KV_GROUP, attention_heads, token_cache
from mlxquant.layers.prompt_step import PROMPT_STEP, prompt_step
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime.prompt import Request
from mlxquant.runtime.prompt_cache import PromptCache, takes_back
from mlxquant.runtime.sampling import Processor

PromptProgress = Callable[[int, int], None]
KV_BITS = (2, 3, 4, 5, 6, 8)
DRAFT_TOKENS = 4
MATCHED = (3, 2)  # tokens that must occur before, longest first


class NextToken(NamedTuple):
    """A token, whether it was guessed, the log-probabilities (vocabulary,) behind it, and how many
    tokens went through the network in the pass that made it."""

    token: int
    guessed: bool
    logprobs: mx.array
    together: int = 1


@dataclass(frozen=True)
class Loop:
    """How tokens are computed: with keys and values stored at ``kv_bits`` in groups of 32 (None:
    as they are), and ``draft_tokens`` at a time guessed by a ``draft`` model, or up to ``lookup``
    taken from the text. Raises ``BadValue`` for what is out of range or excludes each other."""

    kv_bits: int | None = None
    draft: LanguageModel | None = None
    draft_tokens: int = DRAFT_TOKENS
    lookup: int = 0

    def __post_init__(self) -> None:
        if self.kv_bits is not None and (
                type(self.kv_bits) is not int or self.kv_bits not in KV_BITS):
            raise BadValue(f"kv_bits is {self.kv_bits!r}, "
                           f"allowed are {', '.join(map(str, KV_BITS))}")
        checks.integer("draft_tokens", self.draft_tokens, 1, 64)
        checks.integer("lookup", self.lookup, 0, 64)
        if self.draft is not None:
            checks.kind("draft", self.draft, LanguageModel)
        if self.draft is not None and self.lookup:
            raise BadValue("a draft model and prompt look-up exclude each other; give one")
        if self.draft is not None and self.kv_bits is not None:
            raise BadValue("kv_bits and a draft model exclude each other; give one")

    @property
    def guesses(self) -> bool:
        return self.draft is not None or self.lookup > 0

    def guessing_bytes(self) -> int:
        """Bytes of the draft model's weights read for one pass of the large one."""
        return self.draft_tokens * self.draft.weight_bytes_per_token if self.draft else 0

    def check(self, model: LanguageModel, cache: PromptCache) -> None:
        """Raise ``Unsupported`` where ``model`` or the draft cannot do it, and ``BadValue`` for a
        draft with other tokens; a ``cache`` at this width, or of both networks, has shown that all
        is well.
        """
        shown = cache.bits if cache.may_be_of(model.network) else set()
        if self.kv_bits is not None and self.kv_bits not in shown:
            token_cache(model.network, self.kv_bits, model.name, computed=True)
        if self.draft and cache.draft_layers and cache.may_be_of(model.network, self.draft.network):
            return  # which spares comparing whole vocabularies for every reply
        for each in [model] * self.guesses + ([self.draft] if self.draft else []):
            if not takes_back(make_prompt_cache(each.network)):
                raise Unsupported(f"{each.name} keeps a sliding window or a state that cannot take "
                                  "tokens back: it can be no draft, nor run with one or look-up")
        if self.draft is not None and not _agree(model.tokens, self.draft.tokens):
            raise BadValue(f"the draft {self.draft.name} has other tokens than {model.name}; "
                           "a draft needs the same tokenizer")

    def steps(self, model: LanguageModel, request: Request, cache: PromptCache, cached: int,
              progress: PromptProgress) -> Generator[NextToken, None, None]:
        """The tokens after a prompt whose first ``cached`` are in ``cache``."""
        sampling, fresh = request.sampling, request.prompt[cached:]
        if self.lookup:
            return _lookup_steps(model, request, cache.layers, self, len(fresh), progress)
        if self.draft is not None:
            return _draft_steps(model, request, cache, self, len(fresh), progress)
        return _told(1, generate_step(
            mx.array(fresh), model.network, prompt_cache=cache.layers, quantized_kv_start=0,
            max_tokens=request.max_tokens, sampler=sampling.sampler(model), kv_bits=self.kv_bits,
            kv_group_size=KV_GROUP, prompt_progress_callback=progress,
            prefill_step_size=_step_of(model, self.kv_bits, len(request.prompt)),
            logits_processors=sampling.processors(request.prompt[:cached])))


def _told(together: int, made: Generator[Any, None, None]) -> Generator[NextToken, None, None]:
    """The results of mlx-lm's loops as steps, of passes over so many tokens ``together``; one of
    the loops yields whether it guessed."""
    with closing(made):
        for token, logprobs, *guessed in made:
            yield NextToken(token, any(guessed), logprobs, together)


def _agree(tokens: dict[str, int], others: dict[str, int]) -> bool:
    """Whether two vocabularies have the same ids, but for tokens added to one of them."""
    return tokens.items() <= others.items() or tokens.items() >= others.items()


def _step_of(model: LanguageModel, kv_bits: int | None, context: int) -> int:
    """How many tokens of a prompt of ``context`` are computed together."""
    on_cpu = mx.default_device() == mx.cpu
    if kv_bits is None and not on_cpu:
        return PROMPT_STEP
    return prompt_step(attention_heads(model.config), context, 4 if on_cpu else 2)


def _read(tokens: list[int], take: Callable[[mx.array], list[Any]], size: int,
          progress: PromptProgress) -> list[int]:
    """Have ``take``, which returns the caches, compute all ``tokens`` but the last, ``size`` at a
    time, and return that one."""
    total = len(tokens)
    progress(0, total)
    while len(tokens) > 1:
        step = tokens[:-1][:size]
        mx.eval([layer.state for layer in take(mx.array(step)[None])])
        tokens = tokens[len(step):]
        mx.clear_cache()
        progress(total - len(tokens), total)
    return tokens


def _draft_steps(model: LanguageModel, request: Request, cache: PromptCache, loop: Loop, fresh: int,
                 progress: PromptProgress) -> Generator[NextToken, None, None]:
    """Tokens after a prompt of which the last ``fresh`` are not in the cache yet."""
    assert loop.draft is not None
    draft, sampling = _as_wide(loop.draft, model.vocabulary), request.sampling

    def take(tokens: mx.array) -> list[Any]:
        model.network(tokens, cache=cache.layers)
        draft(tokens, cache=cache.draft_layers)
        return cache.layers + cache.draft_layers

    with mx.stream(generation_stream):
        last = _read(request.prompt[-fresh:], take,
                     _step_of(model, loop.kv_bits, len(request.prompt)), progress)
    with closing(_told(1 + loop.draft_tokens, speculative_generate_step(
            mx.array(last), model.network, draft, max_tokens=request.max_tokens,
            num_draft_tokens=loop.draft_tokens, prompt_cache=cache.layers + cache.draft_layers,
            sampler=sampling.sampler(model),
            logits_processors=sampling.processors(request.prompt[:-1])))) as steps:
        first = next(steps)
        progress(fresh, fresh)
        yield first
        yield from steps


def _as_wide(draft: LanguageModel, width: int) -> Callable[..., mx.array]:
    """The draft's network for a model of ``width`` tokens, as embeddings of one tokenizer may be
    padded differently: it takes ids that it lacks for its last one, and never guesses them."""
    network, known = draft.network, draft.vocabulary
    if known == width:
        return network

    def call(tokens: mx.array, cache: list[Any]) -> mx.array:
        logits = network(mx.minimum(tokens, known - 1), cache=cache)[..., :width]
        lacking = width - logits.shape[-1]
        return mx.pad(logits, [(0, 0), (0, 0), (0, lacking)], constant_values=-mx.inf)

    return call


def _lookup_steps(model: LanguageModel, request: Request, layers: list[Any], loop: Loop, fresh: int,
                  progress: PromptProgress) -> Generator[NextToken, None, None]:
    """Tokens after a prompt of which the last ``fresh`` are not in the cache yet."""
    sampler, processors = request.sampling.sampler(model), request.sampling.processors()
    found, left = _Occurrences(request.prompt), request.max_tokens

    def logits_of(tokens: mx.array) -> mx.array:
        logits = model.network(tokens, cache=layers)
        maybe_quantize_kv_cache(layers, 0, KV_GROUP, loop.kv_bits)
        return logits[0]

    def take(tokens: mx.array) -> list[Any]:
        logits_of(tokens)
        return layers

    with mx.stream(generation_stream):
        pending = _read(request.prompt[-fresh:], take,
                        _step_of(model, loop.kv_bits, len(request.prompt)), progress)
        while left:
            guesses = found.continuation(min(loop.lookup, left - 1))
            logits = _processed(logits_of(mx.array(pending + guesses)[None]), processors,
                                found.tokens, guesses)
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            tokens = sampler(logprobs).tolist()
            right = next((i for i, guess in enumerate(guesses) if tokens[i] != guess),
                         len(guesses))
            trim_prompt_cache(layers, len(guesses) - right)
            if left == request.max_tokens:
                progress(fresh, fresh)
            left -= right + 1
            for i, token in enumerate(tokens[:right + 1]):
                found.append(token)
                yield NextToken(token, i < right, logprobs[i], 1 + len(guesses))
            pending = tokens[right:right + 1]


def _processed(logits: mx.array, processors: list[Processor], text: list[int],
               guesses: list[int]) -> mx.array:
    """Logits (1 + guesses, vocabulary) after ``text`` and each guess, with penalties and biases."""
    if not processors:
        return logits
    rows = [logits[i:i + 1] for i in range(len(logits))]
    for process in processors:
        rows = [process(mx.array(text + guesses[:i]), row) for i, row in enumerate(rows)]
    return mx.concatenate(rows)


class _Occurrences:
    """Where short runs of tokens last occurred in a growing text, but for its very end."""

    def __init__(self, tokens: list[int]):
        self.tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        for size in MATCHED:
            if len(self.tokens) >= size:
                self._after[tuple(self.tokens[-size:])] = len(self.tokens)
        self.tokens.append(token)

    def continuation(self, limit: int) -> list[int]:
        """Up to ``limit`` tokens that followed the newest ones before; [] where nothing did."""
        for size in MATCHED:
            start = self._after.get(tuple(self.tokens[-size:]))
            if start is not None and len(self.tokens) >= size:
                return self.tokens[start:start + limit]
        return []
