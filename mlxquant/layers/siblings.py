"""Which layers read the same input, and what stands before them: read from a network's own graph.

One token is traced through the network, in whose graph linear layers and RMSNorms are calls. What
reads an array is then known exactly, whatever the architecture calls its parts; where a network
cannot be traced, because it looks at values on its way, nothing is known and each layer stands by
itself (``untraceable`` says why).
"""

from collections import defaultdict
from dataclasses import dataclass
from itertools import permutations

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from mlxquant.base.errors import Unsupported
from mlxquant.layers.graph import Graph, GraphCall, Node
from mlxquant.layers.grouped import GroupedLinear
from mlxquant.layers.hooks import intercepted
from mlxquant.layers.replicated import ReplicatedLinear, ReplicatedSwitchLinear
from mlxquant.layers.transformed import TransformedLinear

_MARKED = {nn.Linear, nn.QuantizedLinear, GroupedLinear, ReplicatedLinear, TransformedLinear,
           nn.RMSNorm, SwitchLinear, QuantizedSwitchLinear, ReplicatedSwitchLinear}
# Operations that hand an array's numbers on, as they are or in another shape.
_SAME = {"AsType", "Broadcast", "Contiguous", "Copy", "ExpandDims", "Squeeze", "StopGradient",
         "Flatten", "Reshape", "Unflatten"}
_HEADS = [0, 2, 1, 3]  # the axes of (sequences, tokens, heads, size) as attention wants them


@dataclass(frozen=True)
class Siblings:
    """Linear layers that read one input, by their paths in the order in which they are called.

    ``norm`` is the RMSNorm whose output this input is; ``gate`` and ``up`` are linear layers such
    that it is silu(gate) ∘ up; nothing else reads their outputs. ``before`` is a linear layer that
    nothing else reads, each of whose outputs is a factor of one input (``up``), or v with so many
    key-value ``heads``: each of its outputs enters one input of every query head that reads it.
    Each is None where there is none.
    """

    paths: tuple[str, ...]
    norm: str | None = None
    gate: str | None = None
    up: str | None = None
    before: str | None = None
    heads: int | None = None


def find_siblings(network: nn.Module) -> list[Siblings]:
    """All linear layers in groups that read one input, in the order in which one token calls them.
    Layers that it does not call, and all where the network cannot be traced, are groups of one."""
    modules = _marked(network)
    linear = [path for path, module in modules.items() if type(module) is not nn.RMSNorm]
    try:
        traced = _Traced(network, modules)
    except Unsupported:
        return [Siblings((path,)) for path in linear]
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for path in filter(linear.__contains__, traced.of):
        groups[tuple(call.inputs[0] for call in traced.of[path])].append(path)
    others = [path for path in linear if path not in traced.of]
    return [*map(traced.describe, groups.values()), *(Siblings((path,)) for path in others)]


def untraceable(network: nn.Module) -> str | None:
    """Why ``find_siblings`` knows nothing of a network, None where it does."""
    try:
        _Traced(network, _marked(network))
    except Unsupported as error:
        return str(error)
    return None


def _marked(network: nn.Module) -> dict[str, nn.Module]:
    return {path: module for path, module in network.named_modules() if type(module) in _MARKED}


class _Traced(Graph):
    """The graph of one token, in which ``modules`` are calls; raises ``Unsupported``."""

    def __init__(self, network: nn.Module, modules: dict[str, nn.Module]):
        super().__init__()
        weights = tree_flatten(network.parameters())

        def run(tokens: mx.array, *given: mx.array) -> mx.array:
            # Arrays of a file are no part of a graph.
            network.update(tree_unflatten([(name, x) for (name, _), x in zip(weights, given)]))
            return network(tokens)

        with intercepted(modules.values(), self.through):
            try:
                self.trace(run, [mx.zeros((1, 1), mx.int32), *(x for _, x in weights)], _SAME)
            except Exception as error:  # it looks at values, does what no graph can hold, or fails
                raise Unsupported(" ".join(str(error).split()) or type(error).__name__) from error
            finally:
                network.update(tree_unflatten(weights))
        self.of: dict[str, list[GraphCall]] = defaultdict(list)  # the calls by their layers' paths
        self.layers: dict[str, str] = {}  # the linear layers by what they make
        paths = {id(module): path for path, module in modules.items()}
        for call in self.calls:
            path = paths[id(call.what)]
            self.of[path].append(call)
            if call.kind == "linear":
                self.layers[call.outputs[0]] = path

    def describe(self, paths: list[str]) -> Siblings:
        """What stands before layers that read one input: the same in all their calls."""
        inputs = [call.inputs[0] for call in self.of[paths[0]]]
        alone = all({self.of[path][i] for path in paths} == self.readers[name]
                    for i, name in enumerate(inputs))
        norm = next((path for path, calls in self.of.items() if calls[0].kind == "norm"
                     and [call.outputs[0] for call in calls] == inputs), None)
        gates, befores = set(map(self.gate, inputs)), set(map(self.before, inputs))
        gate, up = gates.pop() if len(gates) == 1 else (None, None)
        before, heads = befores.pop() if len(befores) == 1 else (None, None)
        return Siblings(tuple(paths), norm if alone else None, gate, up, up or before, heads)

    def product(self, name: str) -> list[str]:
        """The two arrays of which ``name`` is the product by elements, or none."""
        maker = self.makers.get(name)
        return maker.inputs if maker is not None and maker.name == "Multiply" else []

    def gate(self, name: str) -> tuple[str | None, str | None]:
        """The layers gate and up of which ``name`` is silu(gate) ∘ up, and nothing else reads
        them."""
        for activated, up in permutations(self.product(name), 2):
            for gate, sigmoid in permutations(self.product(activated), 2):
                maker = self.makers.get(sigmoid)
                if maker is None or maker.name != "Sigmoid" or maker.inputs != [gate]:
                    continue
                alone = [len(self.readers[array]) for array in (gate, activated, up)] == [2, 1, 1]
                if alone and gate in self.layers and up in self.layers:
                    return self.layers[gate], self.layers[up]
        return None, None

    def before(self, name: str) -> tuple[str | None, int | None]:
        """The layer whose rows are each multiplied into one column of ``name``, or attention's
        values and their heads."""
        for factor in self.product(name):
            if factor in self.layers and len(self.readers[factor]) == 1:
                return self.layers[factor], None
        turned = self.turned(name)
        mixed = self.makers.get(turned.inputs[0]) if turned else None
        place = {"Matmul": 1, "ScaledDotProductAttention": 2}.get(mixed.name) if mixed else None
        if mixed is None or place is None:
            return None, None
        read = mixed.inputs[place]
        values = self.turned(read)
        if values is None or any(len(self.readers[x]) != 1 for x in (read, values.inputs[0])):
            return None, None
        path = self.layers.get(values.inputs[0])
        return path, values.shapes[0][2] if path else None

    def turned(self, name: str) -> Node | None:
        """The transposition of heads and tokens that made ``name``, or None."""
        maker = self.makers.get(name)
        turns = maker is not None and maker.name == "Transpose" and maker.arguments[0] == _HEADS
        return maker if turns else None
