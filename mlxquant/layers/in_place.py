"""A KV cache whose arrays a kernel may write to.

MLX's arrays never change: what looks as if it did is a new array, in whose place the old memory is
used if nobody else holds it. A kernel that writes where it reads (``kernels/rotary.py``) cannot ask
who does, so its arrays are made here, and nobody else gets them.
"""

import functools
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from mlxquant.kernels import backend


class InPlaceCache(KVCache):
    """mlx-lm's cache of one sequence, and all that it can do; ``room`` makes it write in place."""

    _own: tuple[mx.array, mx.array] | None = None  # what was made here, if that is still in use

    @classmethod
    def of(cls, cache: Any) -> "InPlaceCache | None":
        """``cache`` itself, from now on one of these; None where it is of another kind."""
        if type(cache) is KVCache:
            cache.__class__ = cls
        return cache if type(cache) is cls else None

    def room(self, heads: int, size: int, dtype: mx.Dtype) -> tuple[mx.array, mx.array] | None:
        """Keys and values (1, heads, capacity, size) with room for one token at ``offset``; None
        where those that are held have another shape or type."""
        shape, old = (1, heads, size), (self.keys, self.values)
        for array in old:
            if array is not None and ((*array.shape[:2], array.shape[3]) != shape
                                      or array.dtype != dtype):
                return None
        if (self._own is None or old[0] is not self._own[0] or old[1] is not self._own[1]
                or self.offset >= old[0].shape[2]):
            # In steps that grow, as whatever depends on the capacity is traced anew.
            more = self.step * (1 + self.offset // (8 * self.step))
            capacity = (self.offset // self.step + 1) * self.step + more - self.step
            self.hold(*(self._copy(array, capacity, shape, dtype) for array in old))
        return self.keys, self.values

    def hold(self, keys: mx.array, values: mx.array) -> None:
        """Take arrays that nobody else has in the place of the old ones."""
        self.keys, self.values = self._own = keys, values

    def _copy(self, array: mx.array | None, capacity: int, shape: tuple[int, int, int],
              dtype: mx.Dtype) -> mx.array:
        made = mx.zeros((*shape[:2], capacity, shape[2]), dtype)
        if array is not None and self.offset:
            made[:, :, :self.offset] = array[:, :, :self.offset]
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> "InPlaceCache":
        """MLX's own copies would share memory, and see what is written after."""
        copy = InPlaceCache()
        copy.offset = self.offset
        if self.keys is not None:
            _, heads, capacity, size = self.keys.shape
            copy.hold(*(self._copy(array, capacity, (1, heads, size), array.dtype)
                        for array in (self.keys, self.values)))
            mx.eval(copy.keys, copy.values)
        return copy


InPlaceCache.__name__ = KVCache.__name__  # by which mlx-lm saves a cache and finds it again


@functools.lru_cache(maxsize=4)
def place_of(position: int) -> mx.array:
    """A position as kernels read it; one array for all blocks."""
    return mx.array([position, *[0] * (backend.SMALLEST - 1)], mx.int32)
