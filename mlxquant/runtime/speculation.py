"""Guessing tokens ahead and verifying all guesses in one pass over the weights.

Guesses come from a small draft model (https://arxiv.org/abs/2211.17192; mlx-lm's own
loop) or, with no second model, from the text itself: what followed the last place
where the newest tokens occurred (prompt look-up, https://github.com/apoorvumang/prompt-lookup-decoding).
A token is kept only if the model would have chosen it, so greedy output is unchanged,
up to rounding between products of one row and of several, and sampled output has the
same distribution.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generation_stream, maybe_quantize_kv_cache, speculative_generate_step
from mlx_lm.models.cache import trim_prompt_cache

from mlxquant.base.errors import BadValue, Unsupported
from mlxquant.model.loading import LanguageModel
from mlxquant.runtime.prompt_cache import takes_back

DRAFT_TOKENS = 4
MATCHED = (3, 2)  # tokens that must occur before, longest first
_PREFILL = 2048

Token = tuple[int, bool]  # a token, and whether it was guessed
Sampler = Callable[[mx.array], mx.array]


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
        for name, value, low in (("draft_tokens", self.draft_tokens, 1), ("lookup", self.lookup, 0)):
            if not low <= value <= 64:
                raise BadValue(f"{name} is {value}, allowed are {low} to 64")

    def __bool__(self) -> bool:
        return self.draft is not None or self.lookup > 0

    def check(self, model: LanguageModel, layers: list[Any], kv_bits: int | None) -> None:
        """Raises ``BadValue`` for a draft of another vocabulary or with a quantised cache, and
        ``Unsupported`` for a model whose cache cannot take tokens back."""
        if not takes_back(layers):
            raise Unsupported(f"{model.name} keeps a sliding window or a state that cannot take tokens back; "
                              "run it without a draft model or look-up")
        if self.draft is None:
            return
        if kv_bits is not None:
            raise BadValue("kv_bits and a draft model exclude each other; give one")
        sizes = [m.config.get("vocab_size", len(m.tokenizer)) for m in (model, self.draft)]
        if sizes[0] != sizes[1]:
            raise BadValue(f"the draft {self.draft.name} has {sizes[1]} tokens and {model.name} {sizes[0]}; "
                           "a draft needs the same vocabulary")

    def guessing_bytes(self) -> int:
        """Bytes of the draft model's weights read for one pass of the large one."""
        return self.draft_tokens * self.draft.weight_bytes_per_token if self.draft else 0


def draft_steps(prompt: list[int], network: nn.Module, draft: nn.Module, layers: list[Any],
                draft_layers: list[Any], **options: Any) -> Generator[Token, None, None]:
    """Tokens by mlx-lm's loop over both models; ``options`` are its own."""
    steps = speculative_generate_step(mx.array(prompt), network, draft, prompt_cache=layers + draft_layers, **options)
    try:
        for token, _, guessed in steps:
            yield token, guessed
    finally:
        steps.close()


def lookup_steps(lookup: int, history: list[int], fresh: int, network: nn.Module, layers: list[Any], *,
                 max_tokens: int, sampler: Sampler, logits_processors: list[Any],
                 progress: Callable[[int, int], None], kv_bits: int | None,
                 kv_group_size: int) -> Generator[Token, None, None]:
    """Tokens after ``history``, of which the last ``fresh`` are not in the cache yet."""
    found = _Occurrences(history)

    def forward(tokens: list[int]) -> mx.array:
        logits = network(mx.array(tokens)[None], cache=layers)
        maybe_quantize_kv_cache(layers, 0, kv_group_size, kv_bits)
        return logits[0]

    def choose(logits: mx.array, guesses: list[int]) -> mx.array:
        """The model's own token after the text, and after each guess."""
        if logits_processors:
            rows = [logits[i:i + 1] for i in range(len(logits))]
            for i in range(len(rows)):
                for process in logits_processors:
                    rows[i] = process(mx.array(found.tokens + guesses[:i]), rows[i])
            logits = mx.concatenate(rows)
        return sampler(logits - mx.logsumexp(logits, axis=-1, keepdims=True))

    with mx.stream(generation_stream):
        pending, start = history[-fresh:], fresh
        progress(0, start)
        while len(pending) > 1:
            step = pending[:-1][:_PREFILL]
            forward(step)
            mx.eval([layer.state for layer in layers])
            pending = pending[len(step):]
            progress(start - len(pending), start)
        produced = 0
        while produced < max_tokens:
            guesses = found.continuation(min(lookup, max_tokens - produced - 1))
            tokens: list[int] = choose(forward(pending + guesses), guesses).tolist()
            right = next((i for i, guess in enumerate(guesses) if tokens[i] != guess), len(guesses))
            trim_prompt_cache(layers, len(guesses) - right)
            if not produced:
                progress(start, start)
            for i, token in enumerate(tokens[:right + 1]):
                found.append(token)
                produced += 1
                yield token, i < right
            pending = tokens[right:right + 1]


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
