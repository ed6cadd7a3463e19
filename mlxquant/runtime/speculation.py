"""Guessing tokens ahead and verifying all guesses in one pass over the weights.

Guesses come from a small draft model (https://arxiv.org/abs/2211.17192; mlx-lm's own
loop) or, with no second model, from the text itself: what followed the last place
where the newest tokens occurred (prompt look-up,
https://github.com/apoorvumang/prompt-lookup-decoding). A token is kept only if the
model would have chosen it, so greedy output is unchanged, up to rounding between
products of one row and of several, and sampled output has the same distribution.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream, maybe_quantize_kv_cache, speculative_generate_step
from mlx_lm.models.cache import trim_prompt_cache

from mlxquant.base import checks
from mlxquant.base.errors import BadValue, Unsupported
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime.prompt_cache import PromptCache, takes_back
from mlxquant.runtime.sampling import Processor, Sampler

DRAFT_TOKENS = 4
MATCHED = (3, 2)  # tokens that must occur before, longest first
_PREFILL = 2048


class Step(NamedTuple):
    """A token, whether it was guessed, and the log-probabilities (vocabulary,) behind it."""

    token: int
    guessed: bool
    logprobs: mx.array


@dataclass(frozen=True)
class Speculation:
    """How tokens are guessed: by a ``draft`` model, or by looking up to ``lookup`` tokens up.

    ``draft_tokens`` are guessed at a time. Raises ``BadValue`` outside the ranges.
    """

    draft: LanguageModel | None = None
    draft_tokens: int = DRAFT_TOKENS
    lookup: int = 0

    def __post_init__(self) -> None:
        if self.draft is not None and self.lookup:
            raise BadValue("a draft model and prompt look-up exclude each other; give one")
        checks.integer("draft_tokens", self.draft_tokens, 1, 64)
        checks.integer("lookup", self.lookup, 0, 64)

    def __bool__(self) -> bool:
        return self.draft is not None or self.lookup > 0

    def check(self, model: LanguageModel, layers: list[Any], kv_bits: int | None) -> None:
        """Raises ``BadValue`` for a draft of another vocabulary or with a quantised cache, and
        ``Unsupported`` for a model whose cache cannot take tokens back."""
        if not self:
            return
        if not takes_back(layers):
            raise Unsupported(f"{model.name} keeps a sliding window or a state that cannot take "
                              "tokens back; run it without a draft model or look-up")
        if self.draft is None:
            return
        if kv_bits is not None:
            raise BadValue("kv_bits and a draft model exclude each other; give one")
        if model.vocabulary != self.draft.vocabulary:
            raise BadValue(
                f"the draft {self.draft.name} has {self.draft.vocabulary} tokens and {model.name} "
                f"{model.vocabulary}; a draft needs the same vocabulary")

    def guessing_bytes(self) -> int:
        """Bytes of the draft model's weights read for one pass of the large one."""
        return self.draft_tokens * self.draft.weight_bytes_per_token if self.draft else 0


@dataclass(frozen=True)
class Loop:
    """How tokens are computed: with keys and values at ``kv_bits`` (None: as they are), and
    with what guesses ahead."""

    kv_bits: int | None = None
    speculation: Speculation = Speculation()


def draft_steps(prompt: list[int], network: nn.Module, draft: nn.Module,
                cache: PromptCache, **options: Any) -> Generator[Step, None, None]:
    """Tokens by mlx-lm's loop over both models; ``options`` are its own."""
    steps = speculative_generate_step(mx.array(prompt), network, draft,
                                      prompt_cache=cache.layers + cache.draft_layers, **options)
    try:
        for token, logprobs, guessed in steps:
            yield Step(token, guessed, logprobs)
    finally:
        steps.close()


def lookup_steps(lookup: int, history: list[int], fresh: int, network: nn.Module,
                 layers: list[Any], *, progress: Callable[[int, int], None], max_tokens: int,
                 **options: Any) -> Generator[Step, None, None]:
    """Tokens after ``history``, of which the last ``fresh`` are not in the cache yet.

    ``options`` are those of ``_Verifier``.
    """
    model = _Verifier(network, layers, **options)
    found = _Occurrences(history)
    with mx.stream(generation_stream):
        pending = history[-fresh:]
        progress(0, fresh)
        while len(pending) > 1:
            step = pending[:-1][:_PREFILL]
            model.forward(step)
            mx.eval([layer.state for layer in layers])
            pending = pending[len(step):]
            progress(fresh - len(pending), fresh)
        produced = 0
        while produced < max_tokens:
            guesses = found.continuation(min(lookup, max_tokens - produced - 1))
            logits = model.forward(pending + guesses)
            tokens, logprobs = model.choose(logits, found.tokens, guesses)
            right = next((i for i, guess in enumerate(guesses) if tokens[i] != guess),
                         len(guesses))
            trim_prompt_cache(layers, len(guesses) - right)
            if not produced:
                progress(fresh, fresh)
            for i, token in enumerate(tokens[:right + 1]):
                found.append(token)
                produced += 1
                yield Step(token, i < right, logprobs[i])
            pending = tokens[right:right + 1]


class _Verifier:
    """The model over a text and guesses of what follows."""

    def __init__(self, network: nn.Module, layers: list[Any], *, sampler: Sampler,
                 logits_processors: list[Processor], kv_bits: int | None, kv_group_size: int):
        self._network, self._layers, self._sampler = network, layers, sampler
        self._processors, self._kv = logits_processors, (kv_group_size, kv_bits)

    def forward(self, tokens: list[int]) -> mx.array:
        """Logits (tokens, vocabulary)."""
        logits = self._network(mx.array(tokens)[None], cache=self._layers)
        maybe_quantize_kv_cache(self._layers, 0, *self._kv)
        return logits[0]

    def choose(self, logits: mx.array, text: list[int],
               guesses: list[int]) -> tuple[list[int], mx.array]:
        """The model's own token after ``text`` and after each guess, and all log-probabilities."""
        if self._processors:
            rows = [logits[i:i + 1] for i in range(len(logits))]
            for i in range(len(rows)):
                for process in self._processors:
                    rows[i] = process(mx.array(text + guesses[:i]), rows[i])
            logits = mx.concatenate(rows)
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        return self._sampler(logprobs).tolist(), logprobs


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
