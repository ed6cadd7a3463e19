"""Which layers read the same input, and what stands before them: read from a network's own graph.

One token is traced through the network, nothing is computed. Linear layers and RMSNorms are called
through marks: operations on a scalar of their own, by which the exported graph names them. What
reads an array is then known exactly, whatever the architecture calls its parts; where a network
cannot be traced, because it looks at values on its way, nothing is known and each layer stands by
itself (``untraceable`` says why).
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlxquant.base.errors import Unsupported
from mlxquant.layers.blocks import shape_of
from mlxquant.layers.grouped import GroupedLinear
from mlxquant.layers.hooks import intercepted
from mlxquant.layers.replicated import ReplicatedLinear, ReplicatedSwitchLinear
from mlxquant.layers.transformed import TransformedLinear

_STACKS = (SwitchLinear, QuantizedSwitchLinear, ReplicatedSwitchLinear)
_MARKED = {nn.Linear, nn.QuantizedLinear, GroupedLinear, ReplicatedLinear, TransformedLinear,
           nn.RMSNorm, *_STACKS}  # these very classes: others do more
# Operations that hand an array's numbers on, as they are or in another shape.
_SAME = {"AsType", "Broadcast", "Contiguous", "Copy", "ExpandDims", "Squeeze", "StopGradient"}
_SHAPES = {"Flatten", "Reshape", "Unflatten"}
_RESULT = -1  # the number of what reads the network's results
_HEADS = [0, 2, 1, 3]  # the axes of (sequences, tokens, heads, size) as attention wants them


@dataclass(frozen=True)
class Siblings:
    """Linear layers that read one input, by their paths in the order in which they are called.

    ``norm`` is the RMSNorm whose output it is and that nothing else reads. ``gate`` and ``up`` are
    linear layers such that it is silu(gate) ∘ up, and nothing else reads either. ``before`` is a
    linear layer whose rows are each multiplied into one input or, where they are the values of so
    many key-value ``heads``, into those of the heads of queries that read it; nothing else reads
    them. Each is None where there is none.
    """

    paths: tuple[str, ...]
    norm: str | None = None
    gate: str | None = None
    up: str | None = None
    before: str | None = None
    heads: int | None = None


def find_siblings(network: nn.Module) -> list[Siblings]:
    """All linear layers: those that one token calls in the order in which it does, and others, or
    all where the network cannot be traced, each by itself."""
    modules = _marked(network)
    norms = {path for path, module in modules.items() if type(module) is nn.RMSNorm}
    try:
        exported = _trace(network, modules)
    except Unsupported:
        exported = []
    graph = _Graph(exported, list(modules), norms)
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path, calls in graph.calls.items():
        if path not in norms:
            groups[tuple(call.input for call in calls)].append(path)
    others = [path for path in modules if path not in norms and path not in graph.calls]
    return [*(_describe(graph, paths) for paths in groups.values()),
            *(Siblings((path,)) for path in others)]


def untraceable(network: nn.Module) -> str | None:
    """Why ``find_siblings`` knows nothing of a network, None where it does."""
    try:
        _trace(network, _marked(network))
    except Unsupported as error:
        return str(error)
    return None


def _marked(network: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in network.named_modules() if type(module) in _MARKED}


@dataclass(frozen=True)
class _Node:
    """An operation of the graph; arrays by their names, the inputs' shapes as they are read."""

    number: int
    name: str
    arguments: list[Any]
    inputs: list[str]
    shapes: list[tuple[int, ...]]


@dataclass(frozen=True)
class _Call:
    """What one call of a marked layer read and made, and the number of what reads it there."""

    input: str
    output: str
    reader: int


class _Graph:
    """What makes and what reads each array of a trace, and the calls of the marked layers. Arrays
    that hold the same numbers have one name."""

    def __init__(self, exported: list[dict[str, Any]], marked: list[str], norms: set[str]):
        self.makers: dict[str, _Node] = {}
        self.readers: dict[str, set[int]] = defaultdict(set)
        self.norms = norms
        self.calls: dict[str, list[_Call]] = defaultdict(list)
        self.layers: dict[str, str] = {}  # the linear layers by what they make
        same: dict[str, str] = {}
        marks: dict[str, str] = {}
        repeated: set[str] = set()
        for number, part in enumerate(exported):
            if part["type"] == "inputs":
                marks = {name: path for (name, *_), path in zip(part["inputs"][1:], marked)}
            elif part["type"] == "outputs":
                result = part["outputs"][0][0]
            elif part["type"] == "primitive":
                inputs = [same.get(name, name) for name, *_ in part["inputs"]]
                outputs = [name for name, *_ in part["outputs"]]
                shapes = [tuple(shape) for _, shape, _ in part["inputs"]]
                own, made = part["inputs"][0][0] if inputs else "", part["outputs"][0][1]
                # What repeats an array hands it on, but not in another shape: there it is longer.
                if part["name"] in _SAME or (part["name"] in _SHAPES and own not in repeated):
                    same[outputs[0]] = inputs[0]
                    if own in repeated or prod(shapes[0]) < prod(made):
                        repeated.add(outputs[0])
                    continue
                node = _Node(number, part["name"], part["arguments"], inputs, shapes)
                self.makers |= dict.fromkeys(outputs, node)
                for name in inputs:
                    self.readers[name].add(number)
                if mark := next((name for name in inputs if name in marks), None):
                    self._note(marks[mark], node, mark, outputs[0])
        if exported:
            self.readers[same.get(result, result)].add(_RESULT)

    def _note(self, path: str, node: _Node, mark: str, output: str) -> None:
        read, reader = next(name for name in node.inputs if name != mark), node.number
        if path not in self.norms:
            self.layers[output] = path
            part = self.makers.get(read)
            if part is not None and part.name == "Slice":  # of what it reads: see ``_trace``
                read, reader = part.inputs[0], part.number
        self.calls[path].append(_Call(read, output, reader))
        del self.makers[output]  # nothing is to look into a layer

    def product(self, name: str) -> list[str]:
        """The two arrays of which ``name`` is the product by elements, or none."""
        maker = self.makers.get(name)
        return maker.inputs if maker is not None and maker.name == "Multiply" else []


def _describe(graph: _Graph, paths: list[str]) -> Siblings:
    """What stands before layers that read one input: the same in all their calls."""
    inputs = [call.input for call in graph.calls[paths[0]]]
    alone = all({graph.calls[path][i].reader for path in paths} == graph.readers[name]
                for i, name in enumerate(inputs))
    norm = next((path for path in graph.norms
                 if [call.output for call in graph.calls[path]] == inputs), None)
    gates = {_gate(graph, name) for name in inputs}
    befores = {_before(graph, name) for name in inputs}
    gate, up = gates.pop() if len(gates) == 1 else (None, None)
    before, heads = befores.pop() if len(befores) == 1 else (None, None)
    return Siblings(tuple(paths), norm if alone else None, gate, up, up or before, heads)


def _gate(graph: _Graph, name: str) -> tuple[str | None, str | None]:
    """The layers gate and up of which ``name`` is silu(gate) ∘ up, and nothing else reads them."""
    for activated, up in permutations(graph.product(name), 2):
        for gate, sigmoid in permutations(graph.product(activated), 2):
            maker = graph.makers.get(sigmoid)
            if maker is None or maker.name != "Sigmoid" or maker.inputs != [gate]:
                continue
            alone = [len(graph.readers[array]) for array in (gate, activated, up)] == [2, 1, 1]
            if alone and gate in graph.layers and up in graph.layers:
                return graph.layers[gate], graph.layers[up]
    return None, None


def _before(graph: _Graph, name: str) -> tuple[str | None, int | None]:
    """The layer whose rows are each multiplied into one column of ``name``, or attention's values
    and their heads."""
    for factor in graph.product(name):
        if factor in graph.layers and len(graph.readers[factor]) == 1:
            return graph.layers[factor], None
    turned = graph.makers.get(name)
    if turned is None or turned.name != "Transpose" or turned.arguments[0] != _HEADS:
        return None, None
    mixed = graph.makers.get(turned.inputs[0])
    place = None if mixed is None else {"Matmul": 1, "ScaledDotProductAttention": 2}.get(mixed.name)
    if mixed is None or place is None:
        return None, None
    values = graph.makers.get(mixed.inputs[place])
    if (values is None or values.name != "Transpose" or values.arguments[0] != _HEADS
            or len(graph.readers[mixed.inputs[place]]) != 1
            or len(graph.readers[values.inputs[0]]) != 1):
        return None, None
    path = graph.layers.get(values.inputs[0])
    return path, values.shapes[0][2] if path else None


def _trace(network: nn.Module, modules: dict[str, nn.Module]) -> list[dict[str, Any]]:
    """The exported graph of one token, with a mark in the place of each of ``modules``: an input
    behind the token's, in the same order. Raises ``Unsupported``."""
    weights = tree_flatten(network.parameters())
    marks = [mx.ones(_outputs(module)) for module in modules.values()]
    traced: dict[int, mx.array] = {}
    made: list[mx.array] = []
    exported: list[dict[str, Any]] = []

    def through(module: nn.Module, own: Callable[..., Any], args: tuple[Any, ...],
                kwargs: dict[str, Any]) -> mx.array:
        x = args[0] if isinstance(module, nn.RMSNorm) else args[0][..., :1]
        if isinstance(module, _STACKS):
            x = mx.broadcast_to(x, (*args[1].shape, *x.shape[-2:]))
        made.append(x * traced[id(module)])
        return made[-1]

    def run(tokens: mx.array, *given: mx.array) -> list[mx.array]:
        traced.update(zip(map(id, modules.values()), given))
        # Weights too: arrays of a file are no part of a graph.
        network.update(tree_unflatten([
            (name, array) for (name, _), array in zip(weights, given[len(marks):])]))
        # What a layer makes may matter only in a long prompt: it reads its input nevertheless.
        return [network(tokens), *made]

    inputs = [mx.zeros((1, 1), mx.int32), *marks, *(array for _, array in weights)]
    with intercepted(modules.values(), through):
        try:
            mx.export_function(exported.append, run, *inputs)
        except Exception as error:  # it looks at values, does what no graph can hold, or fails
            raise Unsupported(" ".join(str(error).split()) or type(error).__name__) from error
        finally:
            network.update(tree_unflatten(weights))
    return exported


def _outputs(module: nn.Module) -> int:
    linear = module.linear if isinstance(module, TransformedLinear) else module
    return len(module.weight) if isinstance(module, nn.RMSNorm) else shape_of(linear)[-2]
