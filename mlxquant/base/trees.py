"""The arrays in arguments, results and states: lists, tuples and dicts in any nesting."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map


def arrays(tree: Any) -> list[mx.array]:
    """All arrays of a tree, in its order."""
    return [leaf for _, leaf in tree_flatten(tree) if isinstance(leaf, mx.array)]


def is_float(leaf: Any) -> bool:
    """Whether a leaf is an array of floating point."""
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


def floats(tree: Any) -> list[mx.array]:
    """All floating-point arrays of a tree, in its order."""
    return list(filter(is_float, arrays(tree)))


def with_floats(tree: Any, arrays: Sequence[mx.array]) -> Any:
    """``tree`` with its floating-point arrays replaced by ``arrays``, in its order."""
    left = iter(arrays)
    return tree_map(lambda leaf: next(left) if is_float(leaf) else leaf, tree)
