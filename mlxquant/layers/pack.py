"""Turn a loaded network into what a GPU runs: every replicated layer packed, and plain blocks
fused."""

import inspect
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxquant.kernels.first_step import Norm
from mlxquant.layers.blocks import blocks_or_itself
from mlxquant.layers.fused_block import fuse, read_plain
from mlxquant.layers.hooks import intercepted
from mlxquant.layers.packed import (
    NormInReader,
    PackedCodes,
    PackedGroup,
    PackedLinear,
    PackedMLP,
    TracedForFew,
    are_gated,
)
from mlxquant.layers.packed_experts import (
    PackedExperts,
    PackedSwitchGLU,
    PackedSwitchLinear,
    can_fuse,
)
from mlxquant.layers.replicated import ReplicaInput, Replicated
from mlxquant.layers.siblings import Siblings, find_siblings


def pack(network: nn.Module) -> nn.Module:
    """Pack a network in place, one group after the other, so that the stored codes of one group at
    most are held beside the packed ones."""
    modules = dict(network.named_modules())
    inputs = {path: m for path, m in modules.items() if isinstance(m, ReplicaInput)}
    siblings, blocks = find_siblings(network) if inputs else [], blocks_or_itself(network)
    plain = read_plain(network, blocks)
    for path, shared in inputs.items():
        _pack_group(network, path, shared, modules)
    modules = dict(network.named_modules())
    for group in siblings:
        _take_norm(network, modules, group)
    fused = [(module, fuse(module, parts)) for module, parts in plain]
    made: list[tuple[str, nn.Module]] = [(path, PackedSwitchGLU(module)) for path, module
                                         in modules.items() if can_fuse(module)]
    made += [mlp for group in siblings for mlp in _gated(modules, group)]
    network.update_modules(tree_unflatten(made))
    for block in blocks:
        for name, child in block.module.children().items():
            if isinstance(child, nn.Module) and _takes_one_array(child) and any(
                    isinstance(inner, PackedCodes) for inner in child.modules()):
                block.module[name] = TracedForFew(child)
    for module, one_token in fused:
        if one_token is not None:
            one_token.watch(module)
    return network


def _pack_group(network: nn.Module, path: str, shared: ReplicaInput,
                modules: dict[str, nn.Module]) -> None:
    """Pack the layers that read ``shared``, the module at ``path``; drop them from ``modules``."""
    linears = {p: m for p, m in sorted(modules.items())  # gate before up
               if isinstance(m, Replicated) and m.input is shared}
    kind, sibling = ((PackedGroup, PackedLinear) if shared.experts is None else
                     (PackedExperts, PackedSwitchLinear))
    group = kind(shared, list(linears.values()))
    made = [sibling(group, index, linear.get("bias"))
            for index, linear in enumerate(linears.values())]
    mx.eval(group.parameters())
    for below in linears:
        del modules[below]
    network.update_modules(tree_unflatten([(path, group), *zip(linears, made)]))
    mx.clear_cache()


def _take_norm(network: nn.Module, modules: dict[str, nn.Module], siblings: Siblings) -> None:
    """Move a norm into the groups that read its output, where nothing else reads it and each of
    the groups' layers does."""
    readers = [modules[path] for path in siblings.paths]
    if siblings.norm is None or not all(isinstance(reader, PackedLinear) for reader in readers):
        return
    groups = {id(reader.group): reader.group for reader in readers}
    if sum(group.siblings for group in groups.values()) > len(readers):
        return
    norm = modules[siblings.norm]
    for group in groups.values():
        group.first = Norm(norm.weight, norm.eps)
    network.update_modules(tree_unflatten([(siblings.norm, NormInReader(norm))]))


def _gated(modules: dict[str, nn.Module], siblings: Siblings) -> list[tuple[str, nn.Module]]:
    """A ``PackedMLP`` by the path of the MLP whose last layer ``siblings`` is, where it is one."""
    paths = [siblings.gate or "", siblings.up or "", *siblings.paths]
    layers = [m for path in paths if isinstance(m := modules.get(path), PackedLinear)]
    above = {path.rpartition(".")[0] for path in paths}
    if len(paths) != 3 or len(layers) != 3 or len(above) > 1:
        return []
    gate, up, down = layers
    mlp = modules[place := above.pop()]
    fits = are_gated(gate, up, down) and _is_all(mlp, gate, up, down)
    return [(place, PackedMLP(mlp, gate.group, down))] if fits else []


def _is_all(mlp: nn.Module, gate: PackedLinear, up: PackedLinear, down: PackedLinear) -> bool:
    """Whether ``mlp`` passes its input to gate and up unchanged, and returns down's output."""
    calls: dict[int, tuple[mx.array, mx.array]] = {}

    def through(layer: nn.Module, own: Callable[..., Any], args: tuple[Any, ...],
                kwargs: dict[str, Any]) -> mx.array:
        calls[id(layer)] = args[0], (y := own(*args, **kwargs))
        return y

    if not _takes_one_array(mlp):
        return False
    x = mx.zeros((1, 1, gate.group.inputs), gate.group.replica_out.dtype)
    with intercepted((gate, up, down), through):
        y = mlp(x)  # never computed
    return calls[id(gate)][0] is x and calls[id(up)][0] is x and y is calls[id(down)][1]


def _takes_one_array(module: nn.Module) -> bool:
    """Whether ``module`` is called with one array alone."""
    return callable(module) and len(inspect.signature(type(module).__call__).parameters) == 2
