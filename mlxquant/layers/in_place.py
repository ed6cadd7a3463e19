"""A KV cache whose arrays a kernel may write to.

An assignment to a part of an MLX array gives the object new contents, which reuse the old memory if
nothing else refers to it. A kernel that writes to its inputs (``kernels/rotary.py``) cannot check
this, so its arrays are made here and given to nothing else.

In mlx-lm's batches, too, a sequence keeps this cache for as long as it is the only one. When others
join or leave, the cache changes its class, because a batch keeps the object.
"""

import copy
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, KVCache


class InPlaceCache(KVCache):
    """mlx-lm's cache of one sequence; ``room`` provides arrays that can be written in place."""

    _own: tuple[mx.array, mx.array] | None = None  # made here; nothing else refers to them

    @classmethod
    def of(cls, cache: Any) -> "InPlaceCache | None":
        """``cache`` itself, a ``KVCache`` turned into this class; None for other caches."""
        if type(cache) is KVCache:
            cache.__class__ = cls
        return cache if type(cache) is cls else None

    @property
    def ready(self) -> bool:
        """Whether what is held was made here and has room for a token."""
        return (self._own is not None and self.keys is self._own[0]
                and self.values is self._own[1] and self.offset < self.keys.shape[2])

    def room(self, heads: int, size: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array] | None:
        """Keys and values (1, heads, capacity, size) with room for one token at ``offset``; None
        where those that are held have another shape or type."""
        old = self.keys, self.values
        if self.ready:
            return old
        if any(array is not None and ((*array.shape[:2], array.shape[3]) != (1, heads, size)
                                      or array.dtype != dtype) for array in old):
            return None
        # In steps that grow, because traced functions are traced again for each new capacity.
        steps = self.offset // self.step
        shape = (1, heads, (steps + 1 + steps // 8) * self.step, size)
        return self.hold(*(self._copy(array, shape, dtype) for array in old))

    def hold(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Hold ``keys`` and ``values``, to which nothing else refers, in place of the old ones."""
        self.keys, self.values = self._own = keys, values
        return self._own

    def _copy(self, array: mx.array | None, shape: tuple[int, ...],
              dtype: mx.Dtype) -> mx.array:
        made = mx.zeros(shape, dtype)
        if array is not None and self.offset:
            made[:, :, :self.offset] = array[:, :, :self.offset]
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> "InPlaceCache":
        """Each has arrays of its own on memory that both share: MLX copies it before an assignment,
        and ``room`` before a kernel writes."""
        self._own, made = None, InPlaceCache()
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made

    @classmethod
    def merge(cls, caches: "Sequence[InPlaceCache]") -> "InPlaceCache | _SideBySide":
        """The cache of a batch of these sequences."""
        if len(caches) == 1:
            return caches[0]
        return _become(InPlaceCache(), BatchKVCache.merge(caches), _SideBySide)

    def extend(self, other: "InPlaceCache | _SideBySide") -> None:
        """Become the cache of these sequences and those of ``other``."""
        _become(self, BatchKVCache.merge([self]), _SideBySide).extend(other)

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Nothing to do for one sequence: mlx-lm drops the caches of a batch that becomes empty."""

    def extract(self, idx: int) -> "InPlaceCache":
        return copy.deepcopy(self)


class _SideBySide(BatchKVCache):
    """mlx-lm's cache of several sequences, which becomes an ``InPlaceCache`` when one is left."""

    def extend(self, other: "InPlaceCache | _SideBySide") -> None:
        super().extend(BatchKVCache.merge([other]) if isinstance(other, KVCache) else other)

    def filter(self, batch_indices: Sequence[int]) -> None:
        super().filter(batch_indices)
        if len(batch_indices) == 1:
            _become(self, KVCache() if self.keys is None else self.extract(0), InPlaceCache)


def _become(cache: Any, other: Any, kind: type) -> Any:
    """``cache`` with what ``other`` holds, as one of ``kind``."""
    cache.__dict__, cache.__class__ = vars(other), kind
    return cache


InPlaceCache.__name__ = KVCache.__name__  # the name by which mlx-lm saves and loads a cache
