"""Quantised layers as a checkpoint holds them: tensors by path, and entries for config.json."""

from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxquant.codes import hadamard
from mlxquant.codes.affine import Affine
from mlxquant.codes.packing import pack_codes
from mlxquant.codes.spec import PLAIN_GROUPS, Spec
from mlxquant.layers import grouped
from mlxquant.layers.transformed import ActivationSpec, TransformedLinear
from mlxquant.quantise.envelope import Replicas


@dataclass
class BlockResult:
    """Tensors by path in the block; ``plain``, ``layers`` and ``replicas`` are entries of config.json:
    plain layers' widths, single layers that stock mlx-lm lacks, and replicated siblings. ``errors``
    are E‖(Ŵ − W) x‖² / E‖W x‖² of every layer on the calibration text."""

    tensors: dict[str, mx.array] = field(default_factory=dict)
    plain: dict[str, dict] = field(default_factory=dict)
    layers: dict[str, dict] = field(default_factory=dict)
    replicas: dict[str, dict] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)


def store(path: str, linear: nn.Linear, affine: Affine, transform: dict,
          activation: ActivationSpec | None, dtype: mx.Dtype, result: BlockResult) -> None:
    """Put one affine layer, with what surrounds it, into ``result``."""
    inner, entry = f"{path}.linear" if transform or activation else path, {}
    if affine.spec.group_size in PLAIN_GROUPS:
        result.plain[inner] = {"group_size": affine.group, "bits": affine.spec.bits.code_bits}
        result.tensors |= {f"{inner}.weight": affine.packed(), f"{inner}.scales": affine.scales.astype(dtype),
                           f"{inner}.biases": affine.biases.astype(dtype)}
    else:
        entry["grouped"] = {"bits": affine.spec.bits.code_bits, "group_size": affine.spec.as_dict()["group_size"]}
        result.tensors |= {f"{inner}.{name}": array
                           for name, array in grouped.tensors_of(affine, dtype).items()}
    if "bias" in linear:
        result.tensors[f"{inner}.bias"] = linear.bias.astype(dtype)
    if inner != path:
        layer = TransformedLinear(linear, activation=activation, **transform)
        entry["transform"] = layer.describe()
        own = {name: array for name, array in tree_flatten(layer.parameters())
               if not name.startswith("linear.")}
        result.tensors |= {f"{path}.{name}": array.astype(dtype) if name == "input_scale"
                           else array for name, array in own.items()}
    if entry:
        result.layers[path] = entry


def store_replicas(siblings: dict[str, Replicas], modules: dict[str, nn.Linear], spec: Spec, transform: dict,
                   dtype: mx.Dtype, result: BlockResult) -> None:
    """Put replicated siblings, and what they share, into ``result``."""
    shape = spec.replica_shape(transform.get("rotation_block", 0))
    above, group = _group_path(list(siblings), modules)
    result.replicas[f"{above}.{group}"] = shape.as_dict() | {
        "linears": [path.removeprefix(f"{above}.") for path in siblings]}
    shared = next(iter(siblings.values()))
    tensors = {f"{above}.{group}.replica_in": shared.replica_in.astype(dtype)}
    if shared.column_scale is not None:
        tensors[f"{above}.{group}.column_scale"] = shared.column_scale.astype(dtype)
    if "rotation_signs" in transform:
        tensors[f"{above}.{group}.rotation_signs"] = hadamard.pack_signs(transform["rotation_signs"])
    for path, made in siblings.items():
        tensors |= {f"{path}.codes": pack_codes(made.codes.astype(mx.uint8), spec.bits),
                    f"{path}.replica_out": made.replica_out.astype(dtype)}
        if "bias" in modules[path]:
            tensors[f"{path}.bias"] = modules[path].bias.astype(dtype)
    result.tensors |= tensors


def _group_path(paths: list[str], modules: dict[str, nn.Linear]) -> tuple[str, str]:
    """The module that holds siblings, and a name beside them: self_attn and qkv, mlp and gate_up."""
    above = paths[0].rpartition(".")[0]
    names = [path.rpartition(".")[2].removesuffix("_proj") for path in paths]
    name = ("" if all(len(n) == 1 for n in names) else "_").join(names)
    return above, f"{name}_input" if f"{above}.{name}" in modules else name
