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
    """A reference to a module that another module holds: its parameters count there alone."""

    module: Kind


class Signs:
    """The unpacked signs of a rotation, kept until other bits or another type are asked for."""

    def __init__(self, inputs: int) -> None:
        self._inputs, self._bits, self._made = inputs, mx.array(0), mx.array(0)

    def get(self, bits: mx.array, dtype: mx.Dtype) -> mx.array:
        if self._bits is not bits or self._made.dtype != dtype:
            self._bits, self._made = bits, hadamard.unpack_signs(bits, self._inputs, dtype)
        return self._made


class MadeOnce:
    """A value, such as R x, that is computed from the arrays a sibling was called with and kept for
    the other siblings. It lives as long as the first array, and serves each sibling once.

    The reference to that array is weak, so that no activation or tracer outlives its call. Where a
    sibling asks again for the same arrays, the value is computed anew: they may have changed in
    place.
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
    """``mx.compile`` of a module's method, which the module may hold: the reference back to it is
    weak, since a strong one would keep its weights until Python collects cycles."""
    weak = weakref.WeakMethod(method)

    def call(*arguments: Any) -> Any:
        if (own := weak()) is None:
            raise ReferenceError("the module of a compiled method is gone")
        return own(*arguments)

    return mx.compile(call)
