"""The graph of one token's pass through a network or a part of it, in which layers are calls.

Each call returns new arrays that depend on its inputs, so the names of arrays in MLX's export tell
what is connected, whatever an architecture calls its parts. Nothing is computed.
"""

from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxquant.layers.blocks import shape_of

_SHAPES = {"Flatten", "Reshape", "Unflatten"}


@dataclass(frozen=True, eq=False)
class Node:
    """An operation: arrays by their names, the inputs' shapes as they are read."""

    name: str
    arguments: list[Any]
    inputs: list[str]
    shapes: list[tuple[int, ...]]


@dataclass(eq=False)
class GraphCall:
    """A call of ``what``, the first array that it ``made``, and the names of its inputs and
    outputs."""

    kind: str
    what: Any
    made: mx.array
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)


class Graph:
    """The maker and the readers of each array, and the calls in the order of the graph. Arrays that
    hold the same numbers have one name. ``x`` is the first input, ``y`` the result; None is among
    the readers of the result."""

    def __init__(self) -> None:
        self.calls: list[GraphCall] = []
        self.makers: dict[str, Node] = {}
        self.readers: dict[str, set[Node | GraphCall | None]] = defaultdict(set)

    def note(self, kind: str, what: Any, handed: list[mx.array],
             shapes: list[tuple[int, ...]]) -> list[mx.array]:
        """Record a call that reads ``handed``. It returns arrays of ``shapes`` that depend on
        these inputs and stand for its results; their values mean nothing."""
        made = mx.depends([mx.zeros(shape, handed[0].dtype) for shape in shapes], handed)
        self.calls.append(GraphCall(kind, what, made[0]))
        return made

    def through(self, module: nn.Module, own: Callable[..., Any], args: tuple[Any, ...],
                kwargs: dict[str, Any]) -> mx.array:
        """The call of an RMSNorm, a linear layer or a stack of experts'."""
        x = args[0]
        if isinstance(module, nn.RMSNorm):
            return self.note("norm", module, [x], [x.shape])[0]
        *experts, rows, _ = shape_of(getattr(module, "linear", module))
        before = (*args[1].shape, x.shape[-2]) if experts else x.shape[:-1]
        return self.note("linear", module, [x], [(*before, rows)])[0]

    def trace(self, run: Callable[..., mx.array], inputs: list[mx.array],
              same: Collection[str]) -> None:
        """Read the graph of ``run``, which makes the calls. ``same`` are operations that return an
        array's numbers unchanged, in the same or another shape."""
        parts: list[dict[str, Any]] = []
        # All calls are results: a layer's output may be used only in a long prompt.
        mx.export_function(parts.append, lambda *given: [
            run(*given), *(call.made for call in self.calls)], *inputs)
        ends = {part["type"]: part for part in parts if part["type"] != "primitive"}
        self.x = _names(ends["inputs"]["inputs"])[0]
        self.y, *made = _names(ends["outputs"]["outputs"])
        calls, self.calls = dict(zip(made, self.calls)), []
        constant = set(_names(ends["constants"]["constants"]))
        known: dict[str, str] = {}
        repeated: set[str] = set()
        for part in parts:
            if part["type"] != "primitive":
                continue
            own, outputs = _names(part["inputs"]), _names(part["outputs"])
            read = [known.get(name, name) for name in own]
            if call := calls.get(outputs[0]):
                call.inputs, call.outputs = read[len(outputs):], outputs
                self.calls.append(call)
                for name in call.inputs:
                    self.readers[name].add(call)
                continue
            if constant.issuperset(own):
                constant.update(outputs)
                continue
            node = Node(part["name"], part["arguments"], read,
                        [tuple(shape) for _, shape, _ in part["inputs"]])
            # A repeated (broadcast) array counts as the same, but not once reshaped: it is longer.
            if node.name in same and _keeps_order(node) and not (
                    node.name in _SHAPES and own[0] in repeated):
                known[outputs[0]] = read[0]
                if own[0] in repeated or prod(node.shapes[0]) < prod(part["outputs"][0][1]):
                    repeated.add(outputs[0])
                continue
            self.makers |= dict.fromkeys(outputs, node)
            for name in read:
                self.readers[name].add(node)
        self.y = known.get(self.y, self.y)
        self.readers[self.y].add(None)


def _names(arrays: list[tuple[Any, ...]]) -> list[str]:
    return [name for name, *_ in arrays]


def _keeps_order(node: Node) -> bool:
    """Whether only axes of length 1 change places."""
    if node.name != "Transpose":
        return True
    long = [axis for axis in node.arguments[0] if node.shapes[0][axis] > 1]
    return long == sorted(long)
