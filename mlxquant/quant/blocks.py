"""Quantise one block: balance, rotate and quantise each set of sibling layers.

The result is what the checkpoint stores: tensors by path, the plain layers'
widths, and descriptions of layers that stock mlx-lm does not have.
"""

import zlib
from dataclasses import dataclass, field, replace
from typing import Iterator

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxquant.layers import formats, grouped
from mlxquant.layers.transformed import ActivationSpec, TransformedLinear
from mlxquant.quant import awq, gptq, hadamard, rtn, smoothquant
from mlxquant.quant.affine import Affine
from mlxquant.quant.capture import Observation, linears
from mlxquant.quant.graph import linear_before, norm_before, shared_factors
from mlxquant.quant.spec import PLAIN_GROUPS, Overrides, Spec
from mlxquant.quant.statistics import Statistics

_METHODS = {"rtn": rtn, "gptq": gptq, "awq": awq, "smoothquant": smoothquant}


@dataclass
class BlockResult:
    """Tensors by path in the block; ``plain`` and ``layers`` are their entries in config.json."""

    tensors: dict[str, mx.array] = field(default_factory=dict)
    plain: dict[str, dict] = field(default_factory=dict)
    layers: dict[str, dict] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What is the same for every block of a job."""

    overrides: Overrides
    model_type: str
    dtype: mx.Dtype
    seed: int
    correction: float = 0.0
    activation: ActivationSpec | None = None
    alpha: float | None = None


def quantise_block(block: nn.Module, prefix: str, seen: Observation, context: Context) -> BlockResult:
    """Quantise every linear layer of ``block`` (dense float32; changed by folding)."""
    result = BlockResult()
    # In reverse, so that a factor folds into an earlier layer before that is quantised.
    for paths, statistics in reversed(list(seen.siblings())):
        specs = {path: context.overrides.spec_for(f"{prefix}.{path}") for path in paths}
        _quantise_siblings(block, prefix, paths, specs, statistics, context, result)
    inside = tuple(f"{path}." for path in linears(block))
    result.tensors |= {path: array.astype(context.dtype)
                       for path, array in tree_flatten(block.parameters()) if not path.startswith(inside)}
    return result


def _quantise_siblings(block: nn.Module, prefix: str, paths: list[str], specs: dict[str, Spec],
                       statistics: Statistics, context: Context, result: BlockResult) -> None:
    modules = linears(block)
    weights = {path: modules[path].weight for path in paths}
    spec = specs[paths[0]]
    factors = _balance(list(weights.values()), statistics, spec, context)
    transform: dict = {}  # what ``TransformedLinear`` takes beside the layer
    if factors is not None:
        norm = norm_before(block, paths, context.model_type)
        before = linear_before(block, paths, context.model_type)
        if norm:
            getattr(block, norm).weight = getattr(block, norm).weight / factors
        elif before:
            factors, rows = shared_factors(block, before, factors)
            _divide_rows(modules[before], rows)
        else:
            factors = 1 / (1 / factors).astype(context.dtype).astype(mx.float32)  # as it will be stored
            transform["input_scale"] = 1 / factors
        weights = {path: weight * factors for path, weight in weights.items()}
        statistics = _rescaled(statistics, factors)
    if spec.rotation == "online":
        signs, size = _rotation(context.seed, prefix, paths[0], statistics)
        weights = {path: hadamard.rotate_weight(w, signs, size) for path, w in weights.items()}
        statistics = _rotated(statistics, signs, size)
        transform |= {"rotation_signs": signs, "rotation_block": size}
    activation = _calibrated(context.activation, statistics)
    for affine_by_path in _stacked(weights, specs, statistics, context):
        for path, affine in affine_by_path.items():
            _store(path, modules[path], affine, transform, activation, context, result)


def quantise_trial(block: nn.Module, prefix: str, path: str, spec: Spec, statistics: Statistics,
                   seed: int) -> tuple[mx.array, mx.array, int]:
    """One layer's error (m, n) under ``spec``, the second moments (n, n) of the input it multiplies,
    both rotated where the spec rotates, and the bits it stores. Balancing is left out."""
    weight = linears(block)[path].weight
    if spec.rotation == "online":
        signs, size = _rotation(seed, prefix, path, statistics)
        weight, statistics = hadamard.rotate_weight(weight, signs, size), _rotated(statistics, signs, size)
    affine = _METHODS[spec.method].quantise(weight, statistics, spec)
    stored = 8 * (affine.packed().nbytes + 2 * 2 * affine.scales.size)
    return affine.dequantise() - weight, statistics.hessian, stored


def _stacked(weights: dict[str, mx.array], specs: dict[str, Spec], statistics: Statistics,
             context: Context) -> Iterator[dict[str, Affine]]:
    """Quantise siblings of one spec as one matrix: rows are independent, the input is shared."""
    for spec in dict.fromkeys(specs.values()):
        paths = [path for path in weights if specs[path] == spec]
        if spec.group_size == -1:  # one scale per matrix: the matrices must stay apart
            groups = [[path] for path in paths]
        else:
            groups = [paths]
        for group in groups:
            rows = [len(weights[path]) for path in group]
            stack = mx.concatenate([weights[path] for path in group])
            options = {"correction": context.correction} if spec.method == "gptq" else {}
            whole = _METHODS[spec.method].quantise(stack, statistics, spec, context.dtype, **options)
            yield dict(zip(group, whole.split(rows)))


def _divide_rows(linear: nn.Linear, factors: mx.array) -> None:
    linear.weight = linear.weight / factors[:, None]
    if "bias" in linear:
        linear.bias = linear.bias / factors


def _balance(weights: list[mx.array], statistics: Statistics, spec: Spec,
             context: Context) -> mx.array | None:
    """Per-input factors, for the methods that move scale between inputs and weights."""
    if spec.method == "awq":
        return awq.balance(weights, statistics, spec, context.dtype)
    if spec.method == "smoothquant" and context.alpha != 0:
        if context.alpha is None:
            return smoothquant.search_alpha(weights, statistics, spec, context.activation)[1]
        return smoothquant.balance(weights, statistics, spec, context.alpha)
    return None


def _calibrated(activation: ActivationSpec | None, statistics: Statistics) -> ActivationSpec | None:
    """A static activation gets the step of this input: its calibrated maximum is the last level."""
    if activation is None or activation.granularity != "static":
        return activation
    return replace(activation, scale=max(statistics.largest.max().item(), 1e-8) / activation.largest)


def _rescaled(statistics: Statistics, factors: mx.array) -> Statistics:
    """The statistics of x / factors."""
    return Statistics(statistics.count, statistics.hessian / (factors[:, None] * factors),
                      statistics.mean_magnitude / factors, statistics.largest / factors,
                      None if statistics.cross is None
                      else statistics.cross / (factors[:, None] * factors))


def _rotated(statistics: Statistics, signs: mx.array, size: int) -> Statistics:
    """The second moments of R x. Magnitudes do not carry over; their bounds are kept."""
    def turn(moments: mx.array) -> mx.array:
        return hadamard.rotate_hessian(moments, signs, size)

    hessian = turn(statistics.hessian)
    deviation = mx.sqrt(mx.maximum(hessian.diagonal(), 0))
    cross = None if statistics.cross is None else turn(statistics.cross)
    return Statistics(statistics.count, hessian, deviation, deviation * 4, cross)


def _rotation(seed: int, prefix: str, path: str, statistics: Statistics) -> tuple[mx.array, int]:
    """Signs (n,) and block of an input's rotation, the same in every run."""
    columns = len(statistics.largest)
    mixed = zlib.crc32(f"{seed}:{prefix}.{path}".encode())
    return hadamard.random_signs(columns, mixed), hadamard.default_block(columns)


def _store(path: str, linear: nn.Linear, affine: Affine, transform: dict,
           activation: ActivationSpec | None, context: Context, result: BlockResult) -> None:
    inner = f"{path}.linear" if transform or activation else path
    entry: dict = {}
    if affine.spec.group_size in PLAIN_GROUPS:
        result.plain[inner] = {"group_size": affine.group, "bits": affine.spec.code_bits}
        result.tensors |= {f"{inner}.weight": affine.packed(),
                           f"{inner}.scales": affine.scales.astype(context.dtype),
                           f"{inner}.biases": affine.biases.astype(context.dtype)}
    else:
        entry["grouped"] = {"bits": affine.spec.code_bits, "group_size": affine.spec.group_size}
        result.tensors |= {f"{inner}.{name}": array
                           for name, array in grouped.tensors_of(affine, context.dtype).items()}
    if "bias" in linear:
        result.tensors[f"{inner}.bias"] = linear.bias.astype(context.dtype)
    if inner != path:
        layer = TransformedLinear(linear, activation=activation, **transform)
        entry["transform"] = layer.describe()
        own = {name: array for name, array in tree_flatten(layer.parameters())
               if not name.startswith("linear.")}
        result.tensors |= {f"{path}.{name}": array.astype(context.dtype) if name == "input_scale"
                           else array for name, array in own.items()}
    if entry:
        result.layers[path] = entry


def rebuild(block: nn.Module, result: BlockResult) -> nn.Module:
    """Load a result into ``block``, which then runs as the checkpoint will."""
    formats.install(block, result.layers)

    def predicate(path: str, module: nn.Module):
        return result.plain.get(path, False) if hasattr(module, "to_quantized") else False

    nn.quantize(block, class_predicate=predicate)
    block.load_weights(list(result.tensors.items()), strict=True)
    return block
