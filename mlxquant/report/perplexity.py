"""Perplexity: the exponential of the mean next-token loss over a text's first windows.

With WikiText-2's raw test split, 1,024 tokens and 40 windows this is the protocol ``wt2-40``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxquant.model.inspection import inspect_folder
from mlxquant.model.loading import LanguageModel
from mlxquant.model.windows import Window, first_windows

Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Perplexity:
    """``tokens`` counts the predicted ones, ``context`` − 1 a window; ``bos`` says whether every
    window begins with BOS, or what else the tokenizer puts before a text, beside its ``context``
    tokens of text. ``bits_per_weight`` and ``file_bytes`` are the checkpoint's."""

    perplexity: float
    tokens: int
    context: int
    windows: int
    bos: bool
    bits_per_weight: float
    file_bytes: int

    def line(self) -> str:
        bos = ", each window behind BOS" if self.bos else ""
        return (f"perplexity {self.perplexity:.2f} over {self.windows} windows of {self.context} "
                f"tokens ({self.tokens:,} predicted{bos}) · {self.bits_per_weight:.2f} bits per "
                f"weight · {self.file_bytes / 1e6:.1f} MB on disk")


def evaluate(model: LanguageModel, text: str | Path, *, context: int = 1024,
             windows: int | None = None, progress: Progress = lambda *_: None) -> Perplexity:
    """Perplexity of ``model`` on a text (a string, or a UTF-8 file's path), on all windows or the
    first ``windows``. ``progress`` is called after each with (done, total, perplexity so far).
    Raises what ``first_windows`` does."""
    batches, total, result = first_windows(model, text, context, windows), 0.0, 0.0
    for done, window in enumerate(batches, 1):
        total += loss(window.logits(model.network), window).item()
        result = math.exp(total / (done * (context - 1)))
        progress(done, len(batches), result)
    return Perplexity(result, **described(model, batches))


def described(model: LanguageModel, batches: list[Window]) -> dict[str, Any]:
    """All fields of ``Perplexity`` but the first: about the windows, and about the checkpoint."""
    predicted, summary = batches[0].targets.size, inspect_folder(model.folder)
    return {"tokens": len(batches) * predicted, "context": predicted + 1, "windows": len(batches),
            "bos": batches[0].lead > 0, "bits_per_weight": summary.bits_per_weight,
            "file_bytes": summary.file_bytes}


def loss(logits: mx.array, window: Window) -> mx.array:
    """Summed next-token cross-entropy (nats, float32) of a window whose logits are given."""
    return nn.losses.cross_entropy(logits, window.targets, reduction="sum")
