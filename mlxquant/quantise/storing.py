"""Quantised layers as a checkpoint holds them: tensors by path, and entries for config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

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
from mlxquant.quantise.profile import step
from mlxquant.quantise.results import BlockResult


@dataclass(frozen=True)
class Around:
    """The transform of a layer's input: a scale (n,), a rotation by signs (n,) in blocks, and
    rounding (with a step, if static); a part that the layer does not have is None."""

    input_scale: mx.array | None = None
    rotation_signs: mx.array | None = None
    rotation_block: int | None = None
    activation: ActivationSpec | None = None
    activation_scale: float | None = None

    def __bool__(self) -> bool:
        return any(value is not None for value in (self.input_scale, self.rotation_signs,
                                                   self.activation))

    def wrap(self, linear: nn.Module) -> TransformedLinear:
        """The layer with its input so treated."""
        return TransformedLinear(linear, self.input_scale, self.rotation_signs,
                                 self.rotation_block, self.activation, self.activation_scale)

    def calibrated(self, largest: mx.array) -> "Around":
        """With the step of a static activation: the calibrated maximum is the last level."""
        given = self.activation
        if given is None or given.granularity != "static":
            return self
        return replace(self, activation_scale=max(largest.max().item(), 1e-8) / given.largest)


def describe(path: str, spec: Spec, inputs: int, around: Around, linear: nn.Module,
             result: BlockResult) -> str:
    """Put the entries of an affine layer into ``result``; returns the path of its own tensors."""
    inner, entry = f"{path}.linear" if around else path, dict[str, Any]()
    if spec.group_size in PLAIN_GROUPS:
        result.plain[inner] = {"group_size": spec.group_for(inputs), "bits": spec.bits.code_bits}
    else:
        entry["grouped"] = {"bits": spec.bits.code_bits, "group_size": spec.as_dict()["group_size"]}
    if around:
        entry["transform"] = around.wrap(linear).describe()
    if entry:
        result.layers[path] = entry
    return inner


def describe_replicas(paths: list[str], block: nn.Module, spec: Spec, rotation_block: int | None,
                      result: BlockResult) -> str:
    """Put the entry of replicated siblings into ``result``; returns the path of what they share."""
    above, group = group_path(paths, dict(block.named_modules()))
    prefix = f"{above}." if above else ""
    result.replicas[f"{prefix}{group}"] = spec.replica_shape(rotation_block or 0).as_dict() | {
        "linears": [path.removeprefix(prefix) for path in paths]}
    return f"{prefix}{group}"


@step("storing")
def store(made: Mapping[str, Affine | Replicas], block: nn.Module, spec: Spec, around: Around,
          dtype: mx.Dtype, result: BlockResult) -> None:
    """Put siblings of ``block``, with what surrounds or what they share, into ``result``."""
    modules, shared = dict(block.named_modules()), next(iter(made.values()))
    if isinstance(shared, Replicas):
        group = describe_replicas(list(made), block, spec, around.rotation_block, result)
        result.tensors[f"{group}.replica_in"] = shared.replica_in.astype(dtype)
        if shared.column_scale is not None:
            result.tensors[f"{group}.column_scale"] = shared.column_scale.astype(dtype)
        if around.rotation_signs is not None:
            result.tensors[f"{group}.rotation_signs"] = hadamard.pack_signs(around.rotation_signs)
    for path, codes in made.items():
        inner, linear = path, modules[path]
        if isinstance(codes, Replicas):
            tensors = {"codes": pack_codes(codes.codes, spec.bits),
                       "replica_out": codes.replica_out.astype(dtype)}
        else:
            inner = describe(path, spec, codes.codes.shape[1], around, linear, result)
            tensors = codes.tensors(dtype) if inner in result.plain else grouped.tensors_of(
                codes, dtype)
        if "bias" in linear:
            tensors["bias"] = linear.bias.astype(dtype)
        result.tensors |= {f"{inner}.{name}": array for name, array in tensors.items()}
        if inner != path:
            result.tensors |= {
                f"{path}.{name}": array.astype(dtype) if name == "input_scale" else array
                for name, array in tree_flatten(around.wrap(linear).parameters())
                if not name.startswith("linear.")}


def group_path(paths: list[str], modules: dict[str, nn.Module]) -> tuple[str, str]:
    """The path of the module that holds all of some siblings, and a name that it does not have yet.

    ``self_attn`` and ``qkv``, ``mlp`` and ``gate_up``; siblings under different modules are held
    by the block itself, whose path is empty.
    """
    parts = [path.split(".") for path in paths]
    depth = 0
    while all(len(p) > depth + 1 and p[depth] == parts[0][depth] for p in parts):
        depth += 1
    while ".".join(parts[0][:depth]) not in modules:  # a list is no module
        depth -= 1
    above = ".".join(parts[0][:depth])
    names = list(dict.fromkeys(_name(p) for p in parts))
    name = ("" if all(len(n) == 1 for n in names) else "_").join(names)
    taken = f"{above}.{name}" if above else name
    return above, f"{name}_input" if taken in modules else name


def _name(parts: list[str]) -> str:
    """What to call the input of a layer: its own name, with that of its list before its number."""
    own = parts[-1].removesuffix("_proj")
    return f"{parts[-2]}_{own}" if own.isdecimal() else own
