"""Text that a model writes itself, to calibrate on or to be the teacher of another."""

from collections.abc import Callable, Iterator
from functools import partial

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlxquant.layers import outline
from mlxquant.machine.memory import memory_limit
from mlxquant.model.loading import LanguageModel
from mlxquant.model.windows import beginning
from mlxquant.quantise.calibration import SAMPLES, SEQUENCE_LENGTH, Calibration

_MOST_AT_ONCE = 512  # a GPU's pass over a small model takes no longer for hundreds than for a few


def self_written(model: LanguageModel, samples: int = SAMPLES, length: int = SEQUENCE_LENGTH,
                 seed: int = 0, batch: int = 16, starts: np.ndarray | None = None,
                 progress: Callable[[int, int], None] = lambda *_: None) -> Calibration:
    """Samples that the model itself writes at temperature 1.

    They continue the rows of ``starts`` (some, fewer tokens than ``length``), used in turn, or else
    one random token each, so that neither text nor internet is needed, after data-free
    quantization-aware training (LLM-QAT, https://arxiv.org/abs/2305.17888). ``batch`` samples are
    written in each pass; ``progress`` gets the number of samples done and of all.
    """
    key, rows = mx.random.key(seed), []
    for done in range(0, samples, batch):
        count = min(batch, samples - done)
        key, first, *steps = mx.random.split(key, length + 1)
        start = (_beginnings(model, count, first) if starts is None
                 else mx.array(starts[np.arange(done, done + count) % len(starts)]))
        keys = iter(steps[start.shape[1] - 1:])
        rows.append(write_on(model, start, length, partial(_drawn, keys)))
        progress(done + count, samples)
    return Calibration(np.concatenate(rows), "written by the model itself")


def _drawn(keys: Iterator[mx.array], logits: mx.array) -> mx.array:
    return mx.random.categorical(logits, key=next(keys))


def _beginnings(model: LanguageModel, rows: int, key: mx.array) -> mx.array:
    """One random token in each row, behind what the tokenizer puts before a text (BOS)."""
    known = min(len(model.tokenizer), model.vocabulary)
    drawn, lead = mx.random.randint(0, known, (rows, 1), key=key), beginning(model.tokenizer)
    return mx.concatenate([mx.array([lead] * rows), drawn], axis=1) if lead else drawn


def write_on(model: LanguageModel, start: mx.array, length: int,
             choose: Callable[[mx.array], mx.array]) -> np.ndarray:
    """``start`` (rows, some) and what follows, up to ``length`` tokens, as ``choose`` picks:
    logits (rows, vocabulary), float32, to tokens (rows,)."""
    token, written, cache = start[:, -1:], [start], make_prompt_cache(model.network)
    if start.shape[1] > 1:
        model.network(start[:, :-1], cache=cache)
        mx.eval([layer.state for layer in cache])  # the logits, of every token, are not computed
    for _ in range(length - start.shape[1]):
        token = choose(model.network(token, cache=cache)[:, -1].astype(mx.float32))[:, None]
        mx.async_eval(token)
        written.append(token)
    return np.array(mx.concatenate(written, axis=1))


def at_once(model: LanguageModel, length: int) -> int:
    """How many sequences of ``length`` tokens to write in each pass: as many as an eighth of the
    memory holds keys and values for, at most 512. It is a power of two, so that a little more free
    memory does not change what is drawn."""
    fitting = memory_limit() // 8 // max(1, outline.kv_bytes(model.network, length))
    return 1 << max(0, min(_MOST_AT_ONCE, fitting).bit_length() - 1)
