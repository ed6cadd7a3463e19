"""Calibration text: from files or from a data set on a hub."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxquant.base.errors import BadValue, MlxquantError, ModelNotFound

SAMPLES, SEQUENCE_LENGTH = 128, 512


@dataclass(frozen=True)
class Calibration:
    """Token ids (samples, length), and where they came from for the record."""

    tokens: np.ndarray
    source: str

    @property
    def digest(self) -> str:
        return hashlib.sha256(np.ascontiguousarray(self.tokens, np.int32).tobytes()).hexdigest()[:16]

    def batches(self, size: int) -> list[mx.array]:
        return [mx.array(self.tokens[i:i + size]) for i in range(0, len(self.tokens), size)]

    def mixed_with(self, rows: np.ndarray, share: float, what: str, seed: int = 0) -> "Calibration":
        """With ``rows`` (some, length) in place of a ``share`` of the samples, both drawn at random."""
        tokens, random = self.tokens.copy(), np.random.default_rng(seed)
        places = random.permutation(len(tokens))[:round(share * len(tokens))]
        tokens[places] = rows[random.integers(0, len(rows), len(places))]
        return Calibration(tokens, f"{self.source}, {len(rows)} {what}")


def none() -> Calibration:
    """For methods that need no data: two tokens, from which only the model's structure is learnt."""
    return Calibration(np.zeros((1, 2), np.int64), "none needed")


def from_files(tokenizer, names: list[str], samples: int = SAMPLES,
               length: int = SEQUENCE_LENGTH, seed: int = 0) -> Calibration:
    """Windows of ``length`` tokens at random places of the texts, each text in turn.

    A name is a file, or ``hf://datasets/OWNER/NAME/FILE`` on the hub (plain text,
    or JSON lines with a ``text`` field). Raises ``BadValue`` for texts too short.
    """
    check(samples, length)
    return _drawn(_streams(tokenizer, names, length), names, samples, length, seed)


def held_apart(tokenizer, names: list[str], samples: int, held: int, length: int,
               seed: int = 0) -> tuple[Calibration, Calibration]:
    """``samples`` windows to train on, as ``from_files``, and ``held`` from the ends of the texts, a twentieth
    of each or one window, which training never sees. Drawn together with calibration's windows, as they once were, they
    would be those that the codes were fitted to. Raises ``BadValue`` for texts of fewer than two windows."""
    check(min(samples, held), length)
    streams = _streams(tokenizer, names, length, windows=2)
    ends = [max(length, len(stream) // 20) for stream in streams]
    return (_drawn([stream[:-end] for stream, end in zip(streams, ends)], names, samples, length, seed),
            _drawn([stream[-end:] for stream, end in zip(streams, ends)], names, held, length, seed))


def _streams(tokenizer, names: list[str], length: int, windows: int = 1) -> list[np.ndarray]:
    """The tokens of each text; raises ``BadValue`` for fewer than so many windows of ``length``."""
    streams = [np.array(tokenizer.encode(_text(name), add_special_tokens=False, verbose=False))
               for name in names]
    for name, stream in zip(names, streams):
        if len(stream) < windows * length:
            raise BadValue(f"{name} has {len(stream)} tokens, a sample needs {length}"
                           + f", and there must be {windows} of them" * (windows > 1))
    return streams


def _drawn(streams: list[np.ndarray], names: list[str], samples: int, length: int, seed: int) -> Calibration:
    """Windows at random places of the streams, each stream in turn."""
    random = np.random.default_rng(seed)
    rows = []
    for index in range(samples):
        stream = streams[index % len(streams)]
        start = int(random.integers(0, len(stream) - length + 1))
        rows.append(stream[start:start + length])
    return Calibration(np.stack(rows), ", ".join(Path(name).name for name in names))


def check(samples: int, length: int) -> None:
    """Raises ``BadValue`` where there would be nothing to calibrate on."""
    if samples < 1 or length < 2:
        raise BadValue(f"samples is {samples} and sequence length {length}; at least 1 and 2 are needed")


def _text(name: str) -> str:
    path = _from_hub(name) if name.startswith("hf://") else Path(name).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            text = "\n\n".join(json.loads(line)["text"] for line in text.splitlines() if line.strip())
        return text
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
        raise MlxquantError(f"cannot read calibration text {name}: {error}") from error


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download

    parts = name.removeprefix("hf://").split("/")
    if parts[0] != "datasets" or len(parts) < 4:
        raise BadValue(f"{name!r}: write hf://datasets/OWNER/NAME/FILE")
    try:
        return Path(hf_hub_download("/".join(parts[1:3]), "/".join(parts[3:]), repo_type="dataset"))
    except Exception as error:  # the hub's client raises many kinds
        raise ModelNotFound(f"cannot fetch {name}: {str(error).splitlines()[0]}") from error
