"""Quantise the experts of a mixture, stacks of matrices (experts, m, n)."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn

from mlxquant.codes import hadamard
from mlxquant.codes.spec import Spec
from mlxquant.codes.statistics import Statistics
from mlxquant.layers.replicated import stacked
from mlxquant.quantise.matrices import by_spec, codes_of, relative_error, rotated, rotation_of
from mlxquant.quantise.methods import METHODS
from mlxquant.quantise.observe import Routed, linears
from mlxquant.quantise.results import BlockResult, Work
from mlxquant.quantise.storing import Around, store


def quantise_experts(work: Work, paths: list[str], routed: Routed) -> None:
    """The experts of a mixture, each for the tokens that it is given; siblings as one matrix."""
    asked = {path: work.plan.specs[path] for path in paths if path in work.plan.specs}
    for spec, alike in by_spec(asked).items():
        quantise_stacks(work, spec, {p: linears(work.block.module)[p] for p in alike}, routed)


def quantise_stacks(work: Work, spec: Spec, modules: dict[str, nn.Module],
                    routed: Routed | None = None) -> None:
    """Sibling stacks of matrices (…, m, n), by path, that are stored alike, with one rotation for
    all. Without ``routed`` nothing is known of their inputs."""
    settings, around, stacks = replace(work.settings, correction=0.0), Around(), []
    errors, first = work.result.errors, next(iter(modules))
    experts, *_, columns = modules[first].weight.shape
    if spec.rotation == "online":
        signs, size = rotation_of(settings.seed, work.block.full(first), columns)
        around = Around(rotation_signs=signs, rotation_block=size)
    unknown = Statistics.flat(columns) if METHODS[spec.method].calibrated else None
    for expert in range(experts):
        weights = {path: module.weight[expert] for path, module in modules.items()}
        statistics = unknown if routed is None else routed.of(expert)
        if spec.rotation == "online":
            weights = {p: hadamard.rotate(w, signs, size) for p, w in weights.items()}
            statistics = statistics and rotated(statistics, signs, size)
        statistics = statistics and statistics.sound()
        made, own = codes_of(weights, statistics, spec, settings), BlockResult()
        for path, codes in made.items():
            error = relative_error(weights[path], codes, statistics) / experts
            errors[path] = errors.get(path, 0.0) + error
        store(made, work.block.module, spec, around, settings.dtype, own)
        stacks.append({n: a for n, a in own.tensors.items() if not n.endswith(".bias")})
        mx.eval(stacks[-1])
    work.result.plain |= own.plain
    work.result.replicas |= own.replicas
    work.result.tensors |= stacked(stacks) | {
        f"{path}.bias": module.bias.astype(settings.dtype)
        for path, module in modules.items() if "bias" in module}
