"""Perplexity over the first windows of a text.

The text is tokenised whole, without special tokens, and cut into windows of
``context`` tokens; the mean next-token loss over positions 1 … context − 1 of
every window is exponentiated. With WikiText-2's raw test split, 1,024 tokens
and 40 windows this is the protocol ``wt2-40``.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlxquant.base.errors import BadValue, MlxquantError, TooLarge
from mlxquant.model.inspection import inspect_folder
from mlxquant.model.loading import LanguageModel


@dataclass(frozen=True)
class Perplexity:
    """``tokens`` counts the predicted ones; ``bits_per_weight`` and ``file_bytes`` are the checkpoint's."""

    perplexity: float
    tokens: int
    context: int
    windows: int
    bits_per_weight: float
    file_bytes: int


def evaluate(model: LanguageModel, text: str | Path, *, context: int = 1024,
             windows: int | None = None,
             progress: Callable[[int, int, float], None] = lambda *_: None) -> Perplexity:
    """Perplexity of ``model`` on a text (a string, or the path of a UTF-8 file).

    ``windows`` None means all. ``progress`` is called after each window with
    (done, total, perplexity so far). Raises ``BadValue`` for a text with fewer
    windows than asked for, ``TooLarge`` for a context the model does not have.
    """
    batches = token_windows(model, text, context, windows)
    total, count = 0.0, 0
    for done, window in enumerate(batches, 1):
        total += window_loss(model.network, window).item()
        count += context - 1
        progress(done, len(batches), math.exp(total / count))
    summary = inspect_folder(model.folder)
    return Perplexity(math.exp(total / count), count, context, len(batches),
                      summary.bits_per_weight, summary.file_bytes)


def token_windows(model: LanguageModel, text: str | Path, context: int,
                  windows: int | None = None) -> list[mx.array]:
    """The first ``windows`` runs of ``context`` token ids of a text, each of shape (1, context).

    Raises what ``evaluate`` does.
    """
    if context < 2 or (windows is not None and windows < 1):
        raise BadValue(f"context is {context} and windows is {windows}; at least 2 and 1 are needed")
    check_context(model, context)
    tokens = model.tokenizer.encode(_read(text), add_special_tokens=False, verbose=False)
    available = len(tokens) // context
    if available < (windows or 1):
        raise BadValue(f"the text has {len(tokens)} tokens, {windows or 1} windows of {context} "
                       f"need {context * (windows or 1)}")
    return list(_cut(tokens, context, available if windows is None else windows))


def check_context(model: LanguageModel, context: int) -> None:
    """Raise ``TooLarge`` for a context of more tokens than ``model`` holds."""
    if model.context_length is not None and context > model.context_length:
        raise TooLarge(f"a context of {context} tokens was asked for, "
                       f"{model.name} holds {model.context_length}")


def window_loss(network: nn.Module, window: mx.array) -> mx.array:
    """Summed next-token cross-entropy (nats, float32) of one window of shape (1, context)."""
    return logits_loss(window_logits(network, window), window)


def window_logits(network: nn.Module, window: mx.array) -> mx.array:
    """Float32 logits of a window of shape (1, context): (1, context − 1, vocabulary)."""
    return network(window[:, :-1]).astype(mx.float32)


def logits_loss(logits: mx.array, window: mx.array) -> mx.array:
    """The loss of ``window_loss`` where the window's logits are there already."""
    return nn.losses.cross_entropy(logits, window[:, 1:], reduction="sum")


def _cut(tokens: list[int], context: int, windows: int) -> Iterator[mx.array]:
    for index in range(windows):
        yield mx.array(tokens[index * context:(index + 1) * context])[None]


def _read(text: str | Path) -> str:
    if isinstance(text, str):
        return text
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise MlxquantError(f"cannot read {text} as UTF-8 text: {error}") from error
