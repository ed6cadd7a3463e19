"""The original's predictions on disk, so that it need not be in memory while a model is tuned.

For each position the probabilities of the ``TOP`` likeliest next tokens are kept, and the sum of
all others as one. The divergence over these is a lower bound of that over the vocabulary; it is
nearer the more probability the kept tokens have. ``benchmarks/LOG.md`` has what this costs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxquant.base.storage import save_arrays
from mlxquant.layers.head import Judge

TOP = 128
Judged = Callable[[mx.array, Judge], Iterator[Any]]  # of tokens (batch, length), by their logits
_GROUP = 32  # logits, of which the largest is looked at first
_LEAST = 1e-7  # probability: below that float32 knows no difference from 1


class Wanted(NamedTuple):
    """For n positions the likeliest next tokens ``ids`` (n, k), their log-probabilities ``logs``
    (n, k), and the probability of all other tokens, ``rest`` (n,)."""

    ids: mx.array
    logs: mx.array
    rest: mx.array

    def part(self, place: slice) -> "Wanted":
        return Wanted(*(array[place] for array in self))


def likeliest(logits: mx.array) -> Wanted:
    """The ``Wanted`` of logits (n, vocabulary) in float32, in the types of the file."""
    logs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    ids = _largest(logits, min(TOP, logits.shape[-1]))
    best = mx.take_along_axis(logs, ids, axis=-1)
    rest = mx.maximum(1 - mx.exp(best).sum(-1), _LEAST)
    return Wanted(ids.astype(_id_type(logits.shape[-1])), mx.maximum(best, -6e4).astype(mx.float16),
                  rest)


def divergence(logits: mx.array, wanted: Wanted) -> mx.array:
    """The sum over n positions of KL(wanted ‖ softmax(logits)) in nats, for logits (n, vocabulary)
    in float32. All tokens that are not among the likeliest count as one."""
    logs, ids = wanted.logs.astype(mx.float32), wanted.ids.astype(mx.uint32)
    given = mx.take_along_axis(logits, ids, axis=-1) - mx.logsumexp(logits, axis=-1, keepdims=True)
    left = mx.maximum(1 - mx.exp(given).sum(-1), _LEAST)
    rest = wanted.rest * (mx.log(wanted.rest) - mx.log(left))
    return ((mx.exp(logs) * (logs - given)).sum(-1) + rest).sum()


def bytes_for(tokens: int, vocabulary: int) -> int:
    """What predictions take on the disk: tokens × (k × (id + logarithm) + rest)."""
    return tokens * (min(TOP, vocabulary) * (_id_type(vocabulary).size + 2) + 4)


@dataclass(frozen=True)
class Predictions:
    """Predictions for ``batches`` of tokens (batch, length), a file each in ``folder``."""

    folder: Path
    batches: Sequence[np.ndarray]
    vocabulary: int

    def file(self, index: int) -> Path:
        return self.folder / f"predictions-{index:05d}.safetensors"

    @property
    def missing(self) -> list[int]:
        """Batches that are yet to be predicted."""
        return [index for index in range(len(self.batches)) if not self.file(index).exists()]

    @property
    def bytes(self) -> int:
        """What all files take."""
        return bytes_for(sum(batch.size for batch in self.batches), self.vocabulary)

    def write(self, judged: Judged, at_once: int, progress: Callable[[int, int], None]) -> None:
        """Predict the batches that are missing, as many together as ``at_once`` tokens hold, or
        one; a killed run goes on where it was. ``progress`` gets the sequences that are done, and
        all."""
        sizes = [len(batch) for batch in self.batches]
        for group in self._groups(at_once):
            found = []
            tokens = np.concatenate([self.batches[index] for index in group])
            for wanted in judged(mx.array(tokens), lambda logits, _: likeliest(logits)):
                mx.eval(wanted)
                found.append(wanted)
            whole, start = Wanted(*map(mx.concatenate, zip(*found))), 0
            for index in group:
                part = whole.part(slice(start, start := start + self.batches[index].size))
                save_arrays(self.file(index), part._asdict(), {})
                progress(sum(sizes[:index + 1]), sum(sizes))

    def _groups(self, at_once: int) -> Iterator[list[int]]:
        """The batches that are missing, those together that are predicted together."""
        group, size = list[int](), 0
        for index in self.missing:
            if group and size + self.batches[index].size > at_once:
                yield group
                group, size = [], 0
            group.append(index)
            size += self.batches[index].size
        if group:
            yield group

    def __getitem__(self, index: int) -> tuple[mx.array, Wanted]:
        """The tokens of a batch, and what is wanted of them."""
        arrays = mx.load(str(self.file(index)))
        return mx.array(self.batches[index]), Wanted(*(arrays[name] for name in Wanted._fields))


def _id_type(vocabulary: int) -> mx.Dtype:
    return mx.uint16 if vocabulary <= 1 << 16 else mx.uint32


def _largest(logits: mx.array, count: int) -> mx.array:
    """The places (n, count) of the largest logits (n, vocabulary), in no order.

    They lie in the ``count`` groups of 32 with the largest maxima. On a GPU, where MLX selects by
    sorting, this leaves a twentieth to sort.
    """
    rows, size = logits.shape
    if size <= count * _GROUP:
        return mx.argpartition(logits, size - count, axis=-1)[:, size - count:]
    padded = mx.pad(logits, [(0, 0), (0, -size % _GROUP)], constant_values=-mx.inf)
    groups = padded.reshape(rows, -1, _GROUP)
    top = groups.max(-1)
    best = mx.argpartition(top, top.shape[-1] - count, axis=-1)[:, -count:]
    some = mx.take_along_axis(groups, best[..., None], axis=1).reshape(rows, -1)
    places = mx.argpartition(some, some.shape[-1] - count, axis=-1)[:, -count:]
    return mx.take_along_axis(best, places // _GROUP, axis=-1) * _GROUP + places % _GROUP
