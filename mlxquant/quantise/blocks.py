"""Quantise one block: balance, rotate and quantise each set of sibling layers."""

from dataclasses import replace
from typing import cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxquant.base.errors import BadValue
from mlxquant.base.trees import is_float
from mlxquant.codes import hadamard
from mlxquant.codes.spec import Spec
from mlxquant.codes.statistics import Statistics
from mlxquant.layers import formats
from mlxquant.layers.blocks import Block, release
from mlxquant.layers.dense import to_dense
from mlxquant.layers.siblings import Siblings
from mlxquant.layers.traffic import leaf_modules
from mlxquant.quantise.experts import quantise_experts, quantise_stacks
from mlxquant.quantise.matrices import by_spec, codes_of, relative_error, rotated, rotation_of
from mlxquant.quantise.methods import METHODS, Codes, treatment
from mlxquant.quantise.observe import Observation, Routed, linears
from mlxquant.quantise.plans import STACKS, BlockPlan
from mlxquant.quantise.profile import step
from mlxquant.quantise.results import BlockResult, Work
from mlxquant.quantise.settings import Settings
from mlxquant.quantise.storing import Around, store

_INSIDE = 0.45  # of a level: as far from the middle of its cell as training starts a code


def quantise_block(block: Block, plan: BlockPlan, seen: Observation,
                   settings: Settings) -> BlockResult:
    """Quantise the layers of a block that is dense in float32, as its plan says. Raises
    ``BadValue`` for a weight so large that its scale would be infinite."""
    work = Work(block, plan, settings, BlockResult(dict(plan.entries), tensors=dict(plan.kept)))
    modules = dict(leaf_modules(block.module))
    # In reverse, so that a factor folds into an earlier layer before that is quantised.
    for first, paths in reversed(seen.groups.items()):
        # Popped on their last use, so that their memory is freed as soon as they were used.
        if isinstance(seen.statistics[first], Routed):
            quantise_experts(work, paths, cast(Routed, seen.statistics.pop(first)))
            continue
        specs = {path: plan.specs[path] for path in paths if path in plan.specs}
        while specs:  # whose inputs are treated in one way, then in the next
            way = treatment(next(iter(specs.values())))
            alike = {path: specs.pop(path) for path in [*specs] if treatment(specs[path]) == way}
            take = seen.statistics.__getitem__ if specs else seen.statistics.pop
            _quantise_siblings(work, alike, cast(Statistics, take(first)))
    seen.statistics.clear()
    for path in seen.unseen:
        if path in plan.specs and not isinstance(modules[path], STACKS):
            _quantise_siblings(work, {path: plan.specs[path]}, None)
    for path, spec in plan.specs.items():
        if isinstance(modules[path], STACKS) and path not in work.result.errors:
            quantise_stacks(work, spec, {path: modules[path]})
    inside = tuple(f"{path}." for path in (*plan.specs, *plan.entries))
    work.result.tensors = {
        path: array.astype(settings.dtype) if is_float(array) else array
        for path, array in tree_flatten(block.module.parameters())
        if not path.startswith(inside) and path not in plan.kept} | work.result.tensors
    _require_finite(work)
    return work.result


def _require_finite(work: Work) -> None:
    for path, array in work.result.tensors.items():
        if is_float(array) and not mx.isfinite(array).all().item():
            held = str(array.dtype).removeprefix("mlx.core.")
            raise BadValue(f"{work.block.full(path)} would exceed what {held} holds: give the "
                           "layer more bits, or start from a model in bfloat16")


def _quantise_siblings(work: Work, specs: dict[str, Spec], statistics: Statistics | None) -> None:
    """Layers that read one input in one way; without statistics one that no text reached."""
    modules, settings = linears(work.block.module), work.settings
    weights = {path: modules[path].weight for path in specs}
    around, spec = Around(activation=settings.activation), next(iter(specs.values()))
    if statistics is not None and (balance := METHODS[spec.method].balance) is not None:
        with step("balance"):
            factors = balance(list(weights.values()), statistics, spec, settings)
        if factors is not None:
            factors, around = _fold(work, list(specs), factors, around)
            weights = {path: weight * factors for path, weight in weights.items()}
            statistics = _rescaled(statistics, factors)
    if spec.rotation == "online":
        signs, size = rotation_of(work.settings.seed, work.block.full(next(iter(specs))),
                                  next(iter(weights.values())).shape[1])
        weights = {p: hadamard.rotate(w, signs, size) for p, w in weights.items()}
        statistics = statistics and rotated(statistics, signs, size)
        around = replace(around, rotation_signs=signs, rotation_block=size)
    if statistics is not None:
        around, statistics = around.calibrated(statistics.largest), statistics.sound()
    elif any(METHODS[s.method].calibrated for s in specs.values()):
        statistics = Statistics.flat(next(iter(weights.values())).shape[1])
    for kind, paths in by_spec(specs).items():
        made = codes_of({path: weights[path] for path in paths}, statistics, kind, settings)
        work.result.errors |= {p: relative_error(weights[p], made[p], statistics) for p in paths}
        if work.settings.remainders:
            work.result.remainders |= {p: _remainder(weights[p], made[p]) for p in paths}
        store(made, work.block.module, kind, around, settings.dtype, work.result)


def _fold(work: Work, paths: list[str], factors: mx.array,
          around: Around) -> tuple[mx.array, Around]:
    """Fold 1 / factors into the norm or the layer before, where that is possible and costs nothing,
    or else scale the layers' input. Returns the factors as they are then applied."""
    known = work.settings.siblings.get(work.block.full(paths[0]), Siblings(()))
    modules = {}
    if {work.block.full(path) for path in paths} == set(known.paths):  # and none of them is kept
        modules = {work.block.full(path): module for path, module in leaf_modules(work.block.module)
                   if f"{path}.weight" not in work.plan.kept}
    if norm := modules.get(known.norm or ""):
        norm.weight = norm.weight / factors
    elif before := modules.get(known.before or ""):
        factors, rows = _shared(factors, len(before.weight), known.heads)
        before.weight = before.weight / rows[:, None]
        if "bias" in before:
            before.bias = before.bias / rows
    else:
        stored = work.settings.dtype
        factors = 1 / (1 / factors).astype(stored).astype(mx.float32)  # as it will be stored
        around = replace(around, input_scale=1 / factors)
    return factors, around


def _remainder(weight: mx.array, made: Codes) -> mx.array:
    """The distance of each weight from its code, in 256ths of a level, int8, cut to the cell."""
    scale, _ = made.grid()
    away = (weight - made.dequantise()) / mx.where(scale == 0, 1.0, scale)
    cut = mx.round(256 * mx.clip(away, -_INSIDE, _INSIDE)).astype(mx.int8)
    mx.eval(cut)
    return cut


def _shared(factors: mx.array, rows: int, heads: int | None) -> tuple[mx.array, mx.array]:
    """Factors (n,) that the layer before can take: (for the reader's inputs, for its rows).

    Grouped-query heads share the rows of v, so the factors of the heads that read one of the
    key-value ``heads`` are replaced by their geometric mean.
    """
    if heads is None:
        return factors, factors
    grouped = factors.reshape(heads, -1, rows // heads)
    shared = mx.exp(mx.log(grouped).mean(1, keepdims=True))
    return mx.broadcast_to(shared, grouped.shape).reshape(-1), shared.reshape(-1)


def _rescaled(statistics: Statistics, factors: mx.array) -> Statistics:
    """The statistics of x / factors."""
    both = factors[:, None] * factors
    return Statistics(statistics.count, statistics.hessian / both,
                      statistics.mean_magnitude / factors, statistics.largest / factors,
                      None if statistics.cross is None else statistics.cross / both)


def restore(block: nn.Module, result: BlockResult) -> nn.Module:
    """Put the layers that a result holds in place of the dense ones of ``block``."""
    formats.install(block, result.layers, result.replicas)
    nn.quantize(block, class_predicate=lambda path, module:
                hasattr(module, "to_quantized") and result.plain.get(path, False))
    block.load_weights(list(result.tensors.items()), strict=True)
    return block


@step("rebuilding")
def rebuild(block: nn.Module, result: BlockResult) -> nn.Module:
    """Load a result into ``block``, which then computes in float32 what the checkpoint will."""
    before = [module for _, module in leaf_modules(block)]
    restore(block, result)
    held = {id(module) for _, module in leaf_modules(block)}
    for module in before:  # free replaced layers: something else may still refer to them
        if id(module) not in held:
            release(module)
    return to_dense(block)
