"""A quantised network whose scales, and gates of repeated blocks, can be trained.

Every trained array θ is written θ₀ + s∘u, with s its own size: steps in u are relative, so that
one learning rate fits scalings of every magnitude. Codes that are not trained stay packed, and
matrices are expanded from them in every step, which for hundreds of tokens costs little beside the
products.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from mlxquant.base.errors import Unsupported
from mlxquant.codes.spec import Spec
from mlxquant.layers.blocks import Block, find_blocks, inside
from mlxquant.layers.dense import dense_layer
from mlxquant.layers.grouped import GroupedLinear
from mlxquant.layers.replicated import ReplicaInput, Replicated, ReplicatedLinear
from mlxquant.layers.transformed import TransformedLinear
from mlxquant.layers.unpacked import (
    AffineCodes,
    MovingReplica,
    UnpackedAffine,
    UnpackedExperts,
)


@dataclass(frozen=True)
class TrainedParts:
    """What is trained beside scales. ``norms``: the weights of normalisation layers. ``codes``: how
    many levels u = 1 moves a code (0: codes stay); ``starts``: by layer path, where codes start, in
    levels from the middle of their cell (default 0). ``specs``: by layer path, what was asked."""

    norms: bool = True
    codes: float = 0.0
    starts: dict[str, mx.array] = field(default_factory=dict)
    specs: Mapping[str, Spec] = field(default_factory=dict)


class Trainable:
    """The trained arrays of a network, by path, and the network that computes with them. Where it
    was opened lazily nothing is computed yet.

    The quantised layers of ``blocks`` (default: all) are trained. Arrays that are not trained are
    cast to ``dtype``, in which the network then computes. Raises ``Unsupported`` where nothing in
    the network has scales.
    """

    def __init__(self, network: nn.Module, dtype: mx.Dtype, parts: TrainedParts = TrainedParts(),
                 blocks: list[Block] | None = None):
        self.network, self.dtype = network, dtype
        self.stored = {path: array.dtype for path, array in tree_flatten(network.parameters())}
        _unpack(network, parts, find_blocks(network) if blocks is None else blocks)
        self._affine = [(path, module) for path, module in network.named_modules()
                        if isinstance(module, AffineCodes)]  # trained by their groups' centres
        self.base, self.size = _trained(network, parts)
        if not any(path.endswith(("replica_out", "scales")) for path in self.base):
            raise Unsupported("the model has no quantised layers in its blocks: "
                              "there is nothing to tune")
        kept = {path: array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array
                for path, array in tree_flatten(network.parameters()) if path not in self.base}
        network.update(tree_unflatten(list(kept.items())))

    def start(self) -> dict[str, mx.array]:
        """The u of no change: zeros, float32."""
        return {path: mx.zeros(array.shape) for path, array in self.base.items()}

    def values(self, moved: dict[str, mx.array]) -> dict[str, mx.array]:
        """The trained arrays that u = ``moved`` stands for, float32."""
        return {path: self.base[path] + self.size[path] * u for path, u in moved.items()}

    def stored_values(self, moved: dict[str, mx.array]) -> dict[str, mx.array]:
        """The same as the types of the checkpoint hold them; moved codes are whole, but not
        packed."""
        values = self._as_stored(moved)
        for name, module in self._affine:
            scales, biases = values[f"{name}.scales"], values.pop(f"{name}.biases")
            values[f"{name}.centres"] = module.centres_of(scales, biases)
        return values

    def _as_stored(self, moved: dict[str, mx.array]) -> dict[str, mx.array]:
        """The same in the types of the checkpoint, with biases in place of centres."""
        values = {path: array.astype(self.stored.get(path, mx.float32))
                  for path, array in self.values(moved).items()}
        for name, module in self._affine:
            biases = module.biases_of(values[f"{name}.scales"], values.pop(f"{name}.centres"))
            values[f"{name}.biases"] = biases.astype(self.stored[f"{name}.biases"])
        return values

    def tensors(self, moved: dict[str, mx.array]) -> dict[str, mx.array]:
        """The trained arrays as a checkpoint holds them, by name."""
        values = self._as_stored(moved)
        modules = dict(self.network.named_modules())
        for path in [path for path in values if path.endswith(".moves")]:
            module = modules[path.removesuffix(".moves")]
            values[path.removesuffix("moves") + module.stored_as] = module.packed(values.pop(path))
        return values

    def moved_share(self, moved: dict[str, mx.array]) -> float:
        """The share of the movable codes that differ from their first values."""
        modules, changed, codes = dict(self.network.named_modules()), 0, 0
        for path, moves in self.values(moved).items():
            if path.endswith(".moves"):
                module = modules[path.removesuffix(".moves")]
                changed += int((module.rounded(moves) != module.codes).sum().item())
                codes += moves.size
        return changed / max(1, codes)

    def install(self, values: dict[str, mx.array]) -> nn.Module:
        """The network with these values in it."""
        kept = [(path, array if path.endswith(".moves") else array.astype(self.dtype))
                for path, array in values.items()]
        self.network.update(tree_unflatten(kept))
        return self.network


def _unpack(network: nn.Module, parts: TrainedParts, blocks: list[Block]) -> None:
    """Replace quantised layers of ``blocks`` by ones with a gradient, others by dense ones."""
    paths, made = inside(blocks), []
    for path, module in network.named_modules():
        layer = path.removesuffix(".linear")
        start = parts.starts.get(layer, mx.zeros(1)) if parts.codes else None
        if isinstance(module, TransformedLinear) and module.activation:
            raise Unsupported(f"{path} rounds activations, which tuning does not cover")
        if isinstance(module, ReplicatedLinear) and start is not None:
            made.append((path, MovingReplica(module, start)))
        elif (isinstance(module, (nn.QuantizedEmbedding, nn.QuantizedLinear))
              and not path.startswith(paths)):
            made.append((path, dense_layer(module)))
        elif getattr(module, "mode", "affine") != "affine":
            continue  # fixed levels, with scales of few bits: it stays as it is
        elif isinstance(module, (nn.QuantizedLinear, GroupedLinear)):
            made.append((path, UnpackedAffine(module, start, parts.specs.get(layer))))
        elif isinstance(module, QuantizedSwitchLinear):
            made.append((path, UnpackedExperts(module, spec=parts.specs.get(layer))))
    network.update_modules(tree_unflatten(made))


def _trained(network: nn.Module, parts: TrainedParts
             ) -> tuple[dict[str, mx.array], dict[str, mx.array]]:
    """θ₀ and s by path. The unit s of a group's scale is itself; of its centre, ``centre_steps``;
    of an input's or output's scaling, its replica's root mean square; of a column scale, itself; of
    a norm, its root mean square; of a gate, which starts at 0, one."""
    base, size = {}, {}
    for path, module in network.named_modules():
        if isinstance(module, AffineCodes):
            names = {"scales": mx.abs(module.scales), "centres": module.centre_steps()}
        elif isinstance(module, (Replicated, MovingReplica)):
            names = {"replica_out": _rms(module.replica_out, -2)}
        elif isinstance(module, ReplicaInput):
            names = {"replica_in": _rms(module.replica_in, -2)}
            if "column_scale" in module:
                names["column_scale"] = mx.abs(module.column_scale)
        elif parts.norms and isinstance(module, (nn.RMSNorm, nn.LayerNorm)) and "weight" in module:
            names = {"weight": _rms(module.weight, 0)}
        elif "repeat_gates" in module:  # of the last block of a range that is repeated
            names = {"repeat_gates": mx.ones_like(module.repeat_gates)}
        else:
            continue
        if "moves" in module:
            names["moves"] = mx.array(parts.codes)
        for name, scale in names.items():
            base[f"{path}.{name}"] = (module[name] if name == "moves"  # as exact as its start
                                      else module[name].astype(mx.float32))
            size[f"{path}.{name}"] = scale.astype(mx.float32)
    return base, size


def _rms(array: mx.array, axis: int) -> mx.array:
    """Root mean square over one axis, which stays."""
    return mx.sqrt(mx.square(array.astype(mx.float32)).mean(axis, keepdims=True))
