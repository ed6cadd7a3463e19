"""Calibration text: sequences of tokens from files or from a data set on a hub."""

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlxquant.base.errors import BadValue
from mlxquant.model import windows

SAMPLES, SEQUENCE_LENGTH = 128, 512
# How often a text may be used before a warning: for calibration, and for training.
_PASSES, _TRAINING_PASSES = 2, 32


@dataclass(frozen=True)
class Calibration:
    """Token ids (samples, length), and where they came from for the record."""

    tokens: np.ndarray
    source: str

    @property
    def digest(self) -> str:
        tokens = np.ascontiguousarray(self.tokens, np.int32)
        return hashlib.sha256(repr(tokens.shape).encode() + tokens.tobytes()).hexdigest()[:16]

    def rows(self, size: int) -> list[np.ndarray]:
        """Batches of ``size`` samples, of which the last may be smaller."""
        return [self.tokens[i:i + size] for i in range(0, len(self.tokens), size)]

    def joined(self, rows: np.ndarray, what: str, seed: int = 0) -> "Calibration":
        """These samples and ``rows`` (some, length) together, in random order."""
        tokens = np.random.default_rng(seed).permutation(np.concatenate([self.tokens, rows]))
        return Calibration(tokens, f"{self.source}, {len(rows)} {what}")

    def mixed_with(self, rows: np.ndarray, share: float, what: str,
                   seed: int = 0) -> "Calibration":
        """These samples with a ``share`` of them, chosen at random, replaced by random ``rows``
        (some, length)."""
        tokens, random = self.tokens.copy(), np.random.default_rng(seed)
        places = random.permutation(len(tokens))[:round(share * len(tokens))]
        tokens[places] = rows[random.integers(0, len(rows), len(places))]
        return Calibration(tokens, f"{self.source}, {len(rows)} {what}")


def none() -> Calibration:
    """For methods that need no data: two tokens, enough to run the blocks once."""
    return Calibration(np.zeros((1, 2), np.int64), "none needed")


def from_files(tokenizer: Any, names: list[str], samples: int = SAMPLES,
               length: int = SEQUENCE_LENGTH, seed: int = 0, *, vocabulary: int) -> Calibration:
    """Sequences of ``length`` tokens at random places of the texts, each text in turn.

    A name is a file, or ``hf://datasets/OWNER/NAME/FILE`` on the hub (plain text,
    or JSON lines with a ``text`` field). What the tokenizer puts before a text (BOS) begins
    every sequence and counts into its ``length``. Raises ``BadValue`` for a text shorter than one
    sequence or more texts than ``samples``, ``BadCheckpoint`` for tokens beyond ``vocabulary``;
    says on stderr where the sequences go over a text more than twice.
    """
    texts = _Texts(tokenizer, names, samples, length, vocabulary)
    return texts.drawn(texts.streams, samples, seed, _PASSES)


def held_apart(tokenizer: Any, names: list[str], samples: int, held: int, length: int,
               seed: int = 0, *, vocabulary: int) -> tuple[Calibration, Calibration]:
    """``samples`` sequences to train on, as ``from_files``, and ``held`` others to check with.

    The held sequences come from the ends of the texts (a twentieth of each, at least one sequence),
    on which nothing is trained. Raises ``BadValue`` for texts of fewer than two sequences, or more
    texts than ``samples``; warns on stderr where training uses a text more than 32 times.
    """
    texts = _Texts(tokenizer, names, samples, length, vocabulary, least=2)
    ends = [max(texts.own, len(stream) // 20) for stream in texts.streams]
    parts = [(stream[:-end], stream[-end:]) for stream, end in zip(texts.streams, ends)]
    training, last = zip(*parts)
    return (texts.drawn(training, samples, seed, _TRAINING_PASSES),
            texts.drawn(last, held, seed, math.inf))


class _Texts:
    """The tokens of texts (``streams``), from which sequences of ``length`` are drawn; ``own``
    tokens of each sequence are the text's. Raises ``BadValue`` for a text that is shorter than
    ``least`` sequences, and where fewer ``samples`` than texts would leave some unread."""

    def __init__(self, tokenizer: Any, names: list[str], samples: int, length: int,
                 vocabulary: int, least: int = 1):
        if samples < len(names):
            raise BadValue(f"{samples} samples cannot be drawn from {len(names)} texts, "
                           "at least one of each is needed")
        self.names, self.lead = names, windows.beginning(tokenizer)
        self.own = length - len(self.lead)
        if self.own < 1:
            raise BadValue(f"a sequence of {length} tokens begins with {len(self.lead)} of the "
                           "tokenizer's and has no room for text")
        self.streams = [windows.encode(tokenizer, windows.read_text(name), vocabulary)
                        for name in names]
        for name, stream in zip(names, self.streams):
            if len(stream) < least * self.own:
                raise BadValue(f"{name} has {len(stream)} tokens, a sample needs {self.own}"
                               + f", and there must be {least} of them" * (least > 1))

    def drawn(self, streams: Sequence[np.ndarray], samples: int, seed: int,
              passes: float) -> Calibration:
        """Sequences at random places of ``streams``, each in turn; a remark where one of these is
        gone over more than ``passes`` times."""
        random, rows = np.random.default_rng(seed), []
        for index in range(samples):
            stream = streams[index % len(streams)]
            start = int(random.integers(0, len(stream) - self.own + 1))
            rows.append(windows.cut(stream, [start], self.own, self.lead))
        for index, (name, stream) in enumerate(zip(self.names, streams)):
            count = len(range(index, samples, len(streams)))
            if count * self.own > passes * len(stream):
                print(f"{name} has {len(stream)} distinct tokens for {count} sequences of "
                      f"{self.own}: each is used {count * self.own / len(stream):.0f} times; more "
                      "text would do better", file=sys.stderr)
        source = ", ".join(Path(name).name for name in self.names)
        return Calibration(np.concatenate(rows), source)
