"""What layers remember beside their parameters.

These are plain objects, because MLX takes every array, list, dict and module that a module holds as
its state.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlxquant.codes import hadamard

Kind = TypeVar("Kind", bound=nn.Module)


@dataclass(frozen=True, eq=False)
class Elsewhere(Generic[Kind]):
    """A module that a layer uses and another one holds: its parameters count there alone."""

    module: Kind


class Signs:
    """Those of a rotation, unpacked, until other bits or another type are asked about."""

    def __init__(self, inputs: int) -> None:
        self._inputs, self._bits, self._made = inputs, mx.array(0), mx.array(0)

    def get(self, bits: mx.array, dtype: mx.Dtype) -> mx.array:
        if self._bits is not bits or self._made.dtype != dtype:
            self._bits, self._made = bits, hadamard.unpack_signs(bits, self._inputs, dtype)
        return self._made


class MadeOnce:
    """What siblings share of the last arrays they were called with, such as R x, for as long as the
    first of these lives, and for each sibling once.

    The reference to it is weak, so that no activation or tracer outlives its call. A sibling that
    asks again for the same arrays gets it made anew: they may have changed in place.
    """

    def __init__(self) -> None:
        self._first: weakref.ref[mx.array] | None = None
        self._others: list[mx.array] = []
        self._made: Any = None
        self._asked: set[int] = set()

    def get(self, x: tuple[mx.array, ...], sibling: int, make: Callable[..., Any]) -> Any:
        """``make(*x)`` for the sibling of that number."""
        first, *others = x
        held = self._first is not None and self._first() is first
        if (not held or sibling in self._asked
                or any(a is not b for a, b in zip(others, self._others))):
            self._made, self._others = make(*x), others
            self._first, self._asked = weakref.ref(first, self._forget), set()
        self._asked.add(sibling)
        return self._made

    def _forget(self, _: object) -> None:
        self._first, self._others, self._made = None, [], None


def compiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """``mx.compile`` of a module's method, for the module to keep: with a reference to it the
    module, and its weights, would stay until Python looks for circles."""
    weak = weakref.WeakMethod(method)

    def call(*arguments: Any) -> Any:
        if (own := weak()) is None:
            raise ReferenceError("the module of a compiled method is gone")
        return own(*arguments)

    return mx.compile(call)
