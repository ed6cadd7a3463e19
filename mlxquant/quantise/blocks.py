"""Quantise one block: balance, rotate and quantise each set of sibling layers."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxquant.codes import hadamard, rtn
from mlxquant.codes.affine import Affine
from mlxquant.codes.spec import Overrides, Spec, Whole
from mlxquant.codes.statistics import Statistics
from mlxquant.layers import formats
from mlxquant.layers.graph import linear_before, norm_before, shared_factors
from mlxquant.layers.transformed import ActivationSpec
from mlxquant.quantise import awq, gptq, replica, smoothquant
from mlxquant.quantise.capture import Observation, linears
from mlxquant.quantise.envelope import Replicas
from mlxquant.quantise.storing import BlockResult, store, store_replicas

_METHODS = {"rtn": rtn, "gptq": gptq, "awq": awq, "smoothquant": smoothquant,
            "replica": replica}
_MEASURED = 2e10  # rows · columns²: above it, measuring would take longer than rounding


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
    for kind, paths in _by_spec(specs).items():
        made = _quantise({path: weights[path] for path in paths}, statistics, kind, context)
        result.errors |= {path: _relative_error(weights[path], made[path], statistics)
                          for path in paths}
        if kind.method == "replica":
            store_replicas(made, modules, kind, transform, context.dtype, result)
            continue
        for path, affine in made.items():
            store(path, modules[path], affine, transform, activation, context.dtype, result)


def _relative_error(weight: mx.array, made: Affine | Replicas, statistics: Statistics) -> float:
    """E‖(Ŵ − W) x‖² / E‖W x‖², of evenly spread rows, at least 256, where a matrix is very large."""
    rows, columns = weight.shape
    step = max(1, min(rows // 256, round(rows * columns**2 / _MEASURED)))
    weight, hessian = weight[::step], statistics.hessian
    stored = (made.rows(slice(None, None, step)).dequantise() if isinstance(made, Affine)
              else made.dequantise()[::step])
    whole = awq.output_error(weight, hessian)
    return awq.output_error(stored - weight, hessian) / whole if whole > 0 else 0.0


def _by_spec(specs: dict[str, Spec]) -> dict[Spec, list[str]]:
    kinds: dict[Spec, list[str]] = {}
    for path, spec in specs.items():
        kinds.setdefault(spec, []).append(path)
    return kinds


def _quantise(weights: dict[str, mx.array], statistics: Statistics, spec: Spec,
              context: Context) -> dict[str, Affine | Replicas]:
    """Siblings of one spec as one matrix: rows are independent, the input is shared."""
    if spec.group_size is Whole.MATRIX and len(weights) > 1:  # one scale per matrix: they must stay apart
        apart = [_quantise({path: weight}, statistics, spec, context) for path, weight in weights.items()]
        return {path: made for one in apart for path, made in one.items()}
    stack, rows = mx.concatenate(list(weights.values())), [len(weight) for weight in weights.values()]
    options = {"correction": context.correction} if spec.method in ("gptq", "replica") else {}
    made = _METHODS[spec.method].quantise(stack, statistics, spec, context.dtype, **options)
    return dict(zip(weights, made.split(rows)))


def quantise_trials(block: nn.Module, prefix: str, paths: list[str], specs: list[Spec], statistics: Statistics,
                    seed: int) -> Iterator[tuple[mx.array, mx.array, list[int], int]]:
    """For each of ``specs``, which differ in widths and replicas alone: the error (m, n) of stacked siblings, the
    second moments (n, n) of the input they multiply, both rotated where the spec rotates, the bits that each
    stores by itself, and those that they share. Balancing is left out."""
    weights, signs, spec = [linears(block)[path].weight for path in paths], (), specs[0]
    weight, rows = mx.concatenate(weights), list(map(len, weights))
    if spec.rotation == "online":
        signs, size = _rotation(seed, prefix, paths[0], statistics)
        weight, statistics = hadamard.rotate_weight(weight, signs, size), _rotated(statistics, signs, size)
    sweeping = spec.method in ("gptq", "replica") and len(specs) > 1
    options = {"sweep": gptq.Sweep.of(statistics, spec.act_order)} if sweeping else {}
    for trial in specs:
        made = _METHODS[trial.method].quantise(weight, statistics, trial, **options)
        shared = made.shared_bits() if trial.method == "replica" else 0
        own = [part.stored_bits() - shared for part in made.split(rows)]
        yield made.dequantise() - weight, statistics.hessian, own, shared + len(signs)


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


def rebuild(block: nn.Module, result: BlockResult) -> nn.Module:
    """Load a result into ``block``, which then runs as the checkpoint will."""
    formats.install(block, result.layers, result.replicas)

    def predicate(path: str, module: nn.Module):
        return result.plain.get(path, False) if hasattr(module, "to_quantized") else False

    nn.quantize(block, class_predicate=predicate)
    block.load_weights(list(result.tensors.items()), strict=True)
    return block
