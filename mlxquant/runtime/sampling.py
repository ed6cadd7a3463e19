"""How the next token is chosen; mlx-lm does the choosing."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx
from mlx_lm.sample_utils import greedy_sampler, make_logits_processors, make_sampler

from mlxquant.base import checks
from mlxquant.base.errors import BadValue
from mlxquant.model.loading import LanguageModel

NOT_FINITE = -1  # in place of a token: the model's logits were NaN or infinite
Sampler = Callable[[mx.array], mx.array]
Processor = Callable[[mx.array, mx.array], mx.array]

_RANGES = {
    "temperature": (0, 100), "top_p": (0, 1), "min_p": (0, 1), "repetition_penalty": (0.01, 100),
    "presence_penalty": (-100, 100), "frequency_penalty": (-100, 100),
    "xtc_probability": (0, 1), "xtc_threshold": (0, 0.5)}
_COUNTS = ("top_k", "repetition_context_size", "presence_context_size", "frequency_context_size")


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Temperature 0 is greedy. ``top_p`` 1, ``top_k`` 0, ``min_p`` 0, ``repetition_penalty`` 1,
    the other penalties 0 and ``xtc_probability`` 0 are off. A penalty looks at the newest
    tokens, its context size, of prompt and reply; ``logit_bias`` is added to the logits of
    token ids. Any whole number is a seed. Raises ``BadValue`` outside the ranges.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    repetition_context_size: int = 20
    presence_penalty: float = 0.0
    presence_context_size: int = 20
    frequency_penalty: float = 0.0
    frequency_context_size: int = 20
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    logit_bias: Mapping[int, float] | None = None

    def __post_init__(self) -> None:
        for name, (low, high) in _RANGES.items():
            checks.number(name, getattr(self, name), low, high)
        for name in _COUNTS:
            checks.integer(name, getattr(self, name), int(name != "top_k"), 10**9)
        if self.seed is not None and type(self.seed) is not int:
            raise BadValue(f"seed is {self.seed!r}, a whole number is needed")
        if self.logit_bias is not None:
            if not isinstance(self.logit_bias, Mapping):
                raise BadValue("logit_bias must give a number for each token id")
            for token, bias in self.logit_bias.items():
                checks.integer("a token of logit_bias", token, 0)
                checks.number(f"logit_bias of token {token}", bias, -float("inf"), 1e6)

    def start(self) -> None:
        """Set MLX's random state, where there is a seed."""
        if self.seed is not None:
            mx.random.seed(self.seed % 2**64)

    def sampler(self, model: LanguageModel) -> Sampler:
        """From log-probabilities (rows, vocabulary) to tokens (rows,), int32.

        A row that is not finite gives ``NOT_FINITE``, a valid index from the end, so that steps
        that were begun ahead do no harm before the token is checked.
        """
        if self.temperature == 0:
            return _greedy  # one for all rows: then mlx-lm samples them together
        tokenizer = model.tokenizer
        newlines = tokenizer.encode("\n", add_special_tokens=False) if self.xtc_probability else []
        choose = make_sampler(
            temp=self.temperature, top_p=self.top_p or 1e-9, min_p=self.min_p,
            top_k=self.top_k if self.top_k < model.vocabulary else 0,
            xtc_probability=self.xtc_probability, xtc_threshold=self.xtc_threshold,
            xtc_special_tokens=[*newlines, *tokenizer.eos_token_ids])
        return lambda logprobs: _finite(logprobs, choose(logprobs))

    def processors(self, before: Sequence[int] = ()) -> list[Processor]:
        """mlx-lm's functions of (tokens so far, logits), for penalties and biases.

        ``before`` are tokens that the loop does not know of, because they are in a cache.
        """
        made = make_logits_processors(
            self.logit_bias and dict(self.logit_bias),
            self.repetition_penalty if self.repetition_penalty != 1 else None,
            self.repetition_context_size, self.presence_penalty or None,
            self.presence_context_size, self.frequency_penalty or None,
            self.frequency_context_size)
        if not made or not before:
            return made
        longest = max(self.repetition_context_size, self.presence_context_size,
                      self.frequency_context_size)
        known = mx.array(before[-longest:])
        return [_after(known, process) for process in made]


GREEDY = Sampling()


def _after(known: mx.array, process: Processor) -> Processor:
    return lambda tokens, logits: process(mx.concatenate([known, tokens]), logits)


def _greedy(logprobs: mx.array) -> mx.array:
    return _finite(logprobs, greedy_sampler(logprobs))


@mx.compile
def _finite(logprobs: mx.array, tokens: mx.array) -> mx.array:
    """``tokens``, but ``NOT_FINITE`` where what was chosen has no finite probability."""
    chosen = mx.take_along_axis(logprobs, tokens[..., None], axis=-1)[..., 0]
    return mx.where(mx.isfinite(chosen), tokens.astype(mx.int32), NOT_FINITE)
