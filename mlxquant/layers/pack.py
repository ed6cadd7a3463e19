"""Put the packed form in the place of every replicated layer, when a model is loaded on a GPU."""

import inspect

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxquant.kernels.first_step import Norm
from mlxquant.layers.blocks import blocks_or_itself
from mlxquant.layers.graph import gates_by_swiglu, norm_before
from mlxquant.layers.packed import (
    NormInReader,
    PackedCodes,
    PackedGroup,
    PackedLinear,
    PackedMLP,
    TracedForFew,
)
from mlxquant.layers.packed_experts import (
    PackedExperts,
    PackedSwitchGLU,
    PackedSwitchLinear,
    can_fuse,
)
from mlxquant.layers.replicated import ReplicaInput, Replicated


def pack(network: nn.Module) -> nn.Module:
    """Pack a network in place, one group after the other, so that the stored codes of one group at
    most are held beside the packed ones."""
    modules = dict(network.named_modules())
    model_type = getattr(network, "model_type", "")
    for path, shared in list(modules.items()):
        if isinstance(shared, ReplicaInput):
            _pack_group(network, path, shared, modules, model_type)
    network.update_modules(tree_unflatten([
        (path, PackedSwitchGLU(module)) for path, module in network.named_modules()
        if can_fuse(module)]))
    for block in blocks_or_itself(network):
        for name, child in block.module.children().items():
            if isinstance(child, nn.Module) and _can_trace(child):
                block.module[name] = TracedForFew(_without_a_step_between(child, model_type))
    return network


def _pack_group(network: nn.Module, path: str, shared: ReplicaInput,
                modules: dict[str, nn.Module], model_type: str) -> None:
    """Pack what reads ``shared``, the module at ``path``, and let go of it in ``modules``."""
    linears = {p: m for p, m in sorted(modules.items())  # gate before up
               if isinstance(m, Replicated) and m.input is shared}
    made: list[tuple[str, nn.Module]] = []
    group: PackedCodes
    if shared.experts is None:
        group = PackedGroup(shared, list(linears.values()))
        made += [(below, PackedLinear(group, index, linear.get("bias")))
                 for index, (below, linear) in enumerate(linears.items())]
        made += _take_norm(group, modules, list(linears), model_type)
    else:
        group = PackedExperts(shared, list(linears.values()))
        made += [(below, PackedSwitchLinear(group, index, linear.get("bias")))
                 for index, (below, linear) in enumerate(linears.items())]
    mx.eval(group.parameters())
    for below in linears:
        del modules[below]
    network.update_modules(tree_unflatten([(path, group), *made]))
    mx.clear_cache()


def _take_norm(group: PackedGroup, modules: dict[str, nn.Module], readers: list[str],
               model_type: str) -> list[tuple[str, nn.Module]]:
    """Have ``group``, the layers at the paths ``readers``, do the norm that feeds it alone; what
    then takes the norm's place, by path, or nothing."""
    above = readers[0].rpartition(".")[0].rpartition(".")[0]
    if above not in modules:
        return []
    name = norm_before(modules[above], [p.removeprefix(f"{above}.") for p in readers], model_type)
    if name is None:
        return []
    norm = modules[f"{above}.{name}"]
    group.first = Norm(norm.weight, norm.eps)
    return [(f"{above}.{name}", NormInReader(norm))]


def _can_trace(module: nn.Module) -> bool:
    """Whether ``module`` holds packed layers and is called with one array alone."""
    if not callable(module) or not any(isinstance(inner, PackedCodes)
                                       for inner in module.modules()):
        return False
    return len(inspect.signature(type(module).__call__).parameters) == 2  # with ``self``


def _without_a_step_between(mlp: nn.Module, model_type: str) -> nn.Module:
    """``mlp`` as a ``PackedMLP`` where it can be one, else ``mlp`` itself."""
    if not gates_by_swiglu(mlp, model_type):
        return mlp
    gate, up, down = mlp.gate_proj, mlp.up_proj, mlp.down_proj
    if (not all(isinstance(linear, PackedLinear) for linear in (gate, up, down))
            or "bias" in gate or "bias" in up or gate.group is not up.group
            or [gate.index, up.index] != [0, 1] or gate.group.siblings != 2
            or down.group.siblings != 1):
        return mlp
    return PackedMLP(gate.group, down)
