"""Calibration text: from files, from a data set on a hub, or written by the model itself."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import mlx.core as mx
import numpy as np

from mlxquant.errors import BadValue, MlxquantError, ModelNotFound
from mlxquant.loading import LanguageModel, memory_limit
from mlxquant.roofline import outline

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
    _check(samples, length)
    return _drawn(_streams(tokenizer, names, length), names, samples, length, seed)


def held_apart(tokenizer, names: list[str], samples: int, held: int, length: int,
               seed: int = 0) -> tuple[Calibration, Calibration]:
    """``samples`` windows to train on, as ``from_files``, and ``held`` from the ends of the texts, a twentieth
    of each or one window, which training never sees. Drawn together with calibration's windows, as they once were, they
    would be those that the codes were fitted to. Raises ``BadValue`` for texts of fewer than two windows."""
    _check(min(samples, held), length)
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


def self_written(model: LanguageModel, samples: int = SAMPLES, length: int = SEQUENCE_LENGTH,
                 seed: int = 0, batch: int = 16, starts: np.ndarray | None = None,
                 progress: Callable[[int, int], None] = lambda *_: None) -> Calibration:
    """Samples that the model itself writes at temperature 1.

    They go on from the rows of ``starts`` (some, fewer tokens than ``length``), taken in turn, or from one random
    token each: for use with no text and no network, after data-free quantization-aware training (LLM-QAT,
    https://arxiv.org/abs/2305.17888). ``batch`` are written in each pass; ``progress`` is told the samples done, and all.
    """
    from mlx_lm.models.cache import make_prompt_cache

    _check(samples, length)
    key, rows = mx.random.key(seed), []
    for done in range(0, samples, batch):
        count = min(batch, samples - done)
        key, first, *steps = mx.random.split(key, length + 1)
        token = (mx.random.randint(0, len(model.tokenizer), (count, 1), key=first) if starts is None
                 else mx.array(starts[np.arange(done, done + count) % len(starts)]))
        written, cache = [token], make_prompt_cache(model.network)
        for step in steps[token.shape[1] - 1:]:
            logits = model.network(token, cache=cache)[:, -1].astype(mx.float32)
            token = mx.random.categorical(logits, key=step)[:, None]
            mx.async_eval(token)
            written.append(token)
        rows.append(np.array(mx.concatenate(written, axis=1)))
        progress(done + count, samples)
    return Calibration(np.concatenate(rows), "written by the model itself")


def at_once(model: LanguageModel, length: int, most: int) -> int:
    """How many sequences of ``length`` tokens to write in each pass: as many as a sixteenth of the memory holds keys and
    values for, but at most ``most``; a power of two, so that a little more free memory does not change what is drawn."""
    fitting = memory_limit() // 16 // max(1, outline.kv_bytes(model.network, length))
    return 1 << max(0, min(most, fitting).bit_length() - 1)


def _check(samples: int, length: int) -> None:
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
