"""Windows of tokens cut from a text: what evaluation, calibration and tuning read.

A text is tokenised whole, without special tokens. Every window then begins with what the tokenizer
puts before a text (BOS, where it adds one): models trained behind a BOS predict badly without it.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxquant.base import checks
from mlxquant.base.errors import (
    BadCheckpoint,
    BadValue,
    MlxquantError,
    ModelNotFound,
    TooLarge,
    first_line,
)
from mlxquant.model.loading import LanguageModel


@dataclass(frozen=True)
class Window:
    """``tokens`` (1, lead + context): ``lead`` tokens that the tokenizer puts before a text, then
    ``context`` tokens of the text. All of the text's tokens but the first are predicted, so the
    context − 1 positions do not depend on the lead; the network reads lead + context − 1 tokens."""

    tokens: mx.array
    lead: int

    @property
    def targets(self) -> mx.array:
        """The predicted tokens, (1, context − 1)."""
        return self.tokens[:, self.lead + 1:]

    def logits(self, network: nn.Module) -> mx.array:
        """Float32 logits at the predicted positions, (1, context − 1, vocabulary)."""
        return network(self.tokens[:, :-1])[:, self.lead:].astype(mx.float32)


def first_windows(model: LanguageModel, text: str | Path, context: int,
                  windows: int | None = None) -> list[Window]:
    """The first ``windows`` (None: all) runs of ``context`` tokens of a text (a string, or a file's
    path). Raises ``BadValue`` for a text of fewer, ``TooLarge`` for a context that the model does
    not have, ``BadCheckpoint`` for tokens that it does not know."""
    checks.kind("model", model, LanguageModel)
    checks.integer("context", context, 2)
    if windows is not None:
        checks.integer("windows", windows, 1)
    lead = beginning(model.tokenizer)
    check_context(model, context, len(lead))
    text = text if isinstance(text, str) else read_text(str(text))
    tokens = encode(model.tokenizer, text, model.vocabulary)
    available = len(tokens) // context
    if available < (windows or 1):
        raise BadValue(f"the text has {len(tokens)} tokens, {windows or 1} windows of {context} "
                       f"need {context * (windows or 1)}")
    rows = cut(tokens, [context * i for i in range(windows or available)], context, lead)
    return [Window(mx.array(row[None]), len(lead)) for row in rows]


def cut(tokens: np.ndarray, starts: Sequence[int], length: int, lead: list[int]) -> np.ndarray:
    """Rows (starts, lead + length) of ``length`` tokens from each start, each behind ``lead``."""
    return np.stack([np.concatenate([lead, tokens[start:start + length]]) for start in starts]
                    ).astype(tokens.dtype)


def check_context(model: LanguageModel, context: int, lead: int) -> None:
    """Raise ``TooLarge`` where ``model`` cannot read ``context`` tokens of text behind a lead."""
    if model.context_length is not None and context + max(lead - 1, 0) > model.context_length:
        raise TooLarge(f"a context of {context} tokens was asked for, "
                       f"{model.name} holds {model.context_length}")


def beginning(tokenizer: Any) -> list[int]:
    """The token ids that ``tokenizer`` puts before a text: mostly none, or BOS alone."""
    plain = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a", add_special_tokens=True)
    return next((full[:i] for i in range(len(full)) if full[i:i + len(plain)] == plain), [])


def encode(tokenizer: Any, text: str, vocabulary: int) -> np.ndarray:
    """Token ids of a text without special tokens, int64; raises ``BadCheckpoint`` for ids that a
    model of ``vocabulary`` tokens lacks: MLX would read past its embedding."""
    tokens = np.array(tokenizer.encode(text, add_special_tokens=False, verbose=False), np.int64)
    largest = max(int(tokens.max(initial=0)), *beginning(tokenizer), 0)
    if largest >= vocabulary:
        raise BadCheckpoint(f"the tokenizer gives token {largest}, the model knows {vocabulary} "
                            "tokens: they do not belong together")
    return tokens


def read_text(name: str) -> str:
    """The text of a UTF-8 file, or of ``hf://datasets/OWNER/NAME/FILE`` on the hub; of JSON lines
    (``.jsonl``) the ``text`` fields, blank lines between them."""
    path = _from_hub(name) if name.startswith("hf://") else Path(name).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            lines = [line for line in text.split("\n") if line.strip()]  # U+2028 ends none
            text = "\n\n".join(json.loads(line)["text"] for line in lines)
        return text
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise MlxquantError(f"cannot read {name} as UTF-8 text: {error}") from error


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download  # slow to import, and seldom needed

    place = re.fullmatch("hf://datasets/([^/]*/[^/]*)/(.*)", name)
    if place is None:
        raise BadValue(f"{name!r}: write hf://datasets/OWNER/NAME/FILE")
    try:
        return Path(hf_hub_download(*place.groups(), repo_type="dataset"))
    except Exception as error:  # the hub's client raises many kinds
        raise ModelNotFound(f"cannot fetch {name}: {first_line(error)}") from error
