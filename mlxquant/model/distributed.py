"""One model over several machines, each holding a part of every matrix (tensor parallelism).

Started by ``mlx.launch``, each machine runs the same command: all compute the same tokens, and the
first one prints them. mlx-lm knows for each architecture which layers give a part of the outputs
(q, k, v, gate, up) and which take a part of the inputs and add their results up (o, down); here are
the same two splits for replicated layers. See https://arxiv.org/abs/1909.08053, section 3.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import AllToShardedLinear, ShardedToAllLinear
from mlx.utils import tree_unflatten

from mlxquant.base.errors import BadValue, Unsupported
from mlxquant.codes import hadamard
from mlxquant.codes.packing import pack_codes, unpack_codes
from mlxquant.layers.grouped import GroupedLinear
from mlxquant.layers.repeated import RepeatedBlock
from mlxquant.layers.replicated import ReplicaInput, ReplicatedLinear, ReplicatedSwitchLinear
from mlxquant.layers.transformed import TransformedLinear

_WHOLE = (GroupedLinear, ReplicatedSwitchLinear, TransformedLinear, RepeatedBlock)


def shard(network: nn.Module, name: str, group: Any) -> nn.Module:
    """Keep this machine's part of every layer, in place; the network then needs all of ``group``.

    Raises ``Unsupported`` for an architecture, a layer or a number of heads that cannot be split.
    """
    size = group.size()
    if not hasattr(network, "shard"):
        raise Unsupported(f"mlx-lm cannot split the architecture of {name} over machines")
    heads = getattr(network.args, "num_attention_heads", size)
    for what, count in (
            ("key-value heads", getattr(network.args, "num_key_value_heads", None) or heads),
            ("attention heads", heads),
            ("inputs of an MLP's last layer", getattr(network.args, "intermediate_size", size))):
        if count % size:
            raise Unsupported(f"{name} has {count} {what}, which {size} machines cannot share "
                              "evenly")
    modules = dict(network.named_modules())
    for path, module in modules.items():
        if isinstance(module, _WHOLE):
            raise Unsupported(f"{path} is a {type(module).__name__}, which cannot be split over "
                              "machines yet")
    replicated = {path: m for path, m in modules.items() if isinstance(m, ReplicatedLinear)}
    inputs = {id(m): path for path, m in modules.items() if isinstance(m, ReplicaInput)}
    # mlx-lm splits stand-ins, whose classes then say in which way to split each layer.
    stand_ins = [(path, nn.Linear(size, size, bias=False)) for path in replicated]
    network.update_modules(tree_unflatten(stand_ins))
    try:
        network.shard(group)
    except ValueError as error:
        raise Unsupported(f"{name} cannot be split over {size} machines: {error}") from error
    ways, made = dict(network.named_modules()), dict[str, nn.Module](replicated)
    for path, module in replicated.items():
        if isinstance(ways[path], AllToShardedLinear):
            made[path] = _rows(module, path, group)
        elif isinstance(ways[path], ShardedToAllLinear):
            made[path] = part = _columns(module, path, group)
            made[inputs[id(module.input)]] = part.linear.input
    network.update_modules(tree_unflatten(list(made.items())))
    return network


def agree_on_randomness(group: Any) -> None:
    """Give all machines the first one's random state, so that they sample the same tokens."""
    own = mx.random.randint(0, 1 << 30, (1,)) * (group.rank() == 0)
    mx.random.seed(int(mx.distributed.all_sum(own, group=group, stream=mx.cpu).item()))


class AddedReplicated(nn.Module):
    """y = Σ over machines of ``linear`` (a replicated layer of this machine's inputs) + bias."""

    def __init__(self, linear: ReplicatedLinear, bias: mx.array | None, group: Any):
        super().__init__()
        self.linear, self.group = linear, group
        if bias is not None:
            self.bias = bias

    def __call__(self, x: mx.array) -> mx.array:
        y = mx.distributed.all_sum(self.linear(x), group=self.group)
        return y + self.bias.astype(y.dtype) if "bias" in self else y


def _rows(module: ReplicatedLinear, path: str, group: Any) -> ReplicatedLinear:
    """This machine's outputs; A and R of the inputs stay shared and whole."""
    outputs = module.shape[0]
    if outputs % group.size():
        raise Unsupported(f"{path} has {outputs} outputs, which {group.size()} machines cannot "
                          "share evenly")
    count = outputs // group.size()
    own = slice(count * group.rank(), count * (group.rank() + 1))
    part = ReplicatedLinear(count, module.input, "bias" in module)
    for key in ("codes", "replica_out", "bias"):
        if key in module:
            part[key] = mx.contiguous(module[key][own])
    return part


def _columns(module: ReplicatedLinear, path: str, group: Any) -> AddedReplicated:
    """This machine's inputs: whole rotation blocks and groups, their codes packed anew."""
    whole, spec = module.input, module.input.spec
    count = whole.inputs // group.size()
    start = count * group.rank()
    try:
        if whole.inputs % group.size():
            raise BadValue(f"{whole.inputs} inputs do not divide")
        shared = ReplicaInput(count, spec, path)
    except BadValue as error:
        raise Unsupported(f"{path} cannot be split over {group.size()} machines: "
                          f"{error}") from error
    own = slice(start, start + count)
    grain = spec.replica_group or 1
    shared.replica_in = mx.contiguous(whole.replica_in[start // grain:(start + count) // grain])
    if "column_scale" in whole:
        shared.column_scale = mx.contiguous(whole.column_scale[own])
    if "rotation_signs" in whole:
        signs = hadamard.unpack_signs(whole.rotation_signs, whole.inputs, mx.float32)
        shared.rotation_signs = hadamard.pack_signs(signs[own])
    part = ReplicatedLinear(module.shape[0], shared)
    codes = unpack_codes(module.codes, spec.bits, whole.inputs)[:, own]
    part.codes = pack_codes(codes.astype(mx.uint8), spec.bits)
    part.replica_out = module.replica_out
    return AddedReplicated(part, module.bias if "bias" in module else None, group)
