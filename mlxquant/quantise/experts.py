"""Quantise the experts of a mixture, stacks of matrices (experts, m, n)."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn

from mlxquant.codes import hadamard, rtn
from mlxquant.codes.affine import Affine
from mlxquant.codes.spec import Spec
from mlxquant.layers.replicated import stacked
from mlxquant.layers.traffic import leaf_modules
from mlxquant.quantise.envelope import Replicas
from mlxquant.quantise.matrices import by_spec, codes_of, relative_error, rotated, rotation_of
from mlxquant.quantise.methods import Codes
from mlxquant.quantise.observe import Routed, linears
from mlxquant.quantise.results import BlockResult, Work
from mlxquant.quantise.storing import Around, store_replicas, store_stack


def quantise_experts(work: Work, paths: list[str], routed: Routed) -> None:
    """The experts of a mixture, each for the tokens that it is given; siblings as one matrix."""
    asked = {path: work.plan.specs[path] for path in paths if path in work.plan.specs}
    for spec, alike in by_spec(asked).items():
        mixture = _Mixture(work, spec, {p: linears(work.block.module)[p] for p in alike}, routed)
        if spec.method == "replica":
            mixture.store_replicas()
        else:
            mixture.store()


@dataclass
class _Mixture:
    """Sibling stacks of experts, by path, that are stored alike."""

    work: Work
    spec: Spec
    modules: dict[str, nn.Module]
    routed: Routed

    def made(self, around: Around) -> Iterator[dict[str, Codes]]:
        """The codes of one expert after the other; notes their mean errors."""
        settings = replace(self.work.settings, correction=0.0)
        errors = self.work.result.errors
        experts = len(next(iter(self.modules.values())).weight)
        for expert in range(experts):
            weights = {path: module.weight[expert] for path, module in self.modules.items()}
            statistics = self.routed.of(expert)
            if around.rotation_signs is not None and around.rotation_block is not None:
                turn = around.rotation_signs, around.rotation_block
                weights = {p: hadamard.rotate(w, *turn) for p, w in weights.items()}
                statistics = rotated(statistics, *turn)
            statistics = statistics.sound()
            codes = codes_of(weights, statistics, self.spec, settings)
            for path, found in codes.items():
                error = relative_error(weights[path], found, statistics) / experts
                errors[path] = errors.get(path, 0.0) + error
            yield codes

    def store(self) -> None:
        """As MLX's own stacks of affine groups."""
        parts: dict[str, list[Affine]] = {path: [] for path in self.modules}
        for codes in self.made(Around()):
            for path, affine in codes.items():
                parts[path] += [affine] if isinstance(affine, Affine) else []
        for path, module in self.modules.items():
            store_stack(path, module, parts[path], self.work.settings.dtype, self.work.result)

    def store_replicas(self) -> None:
        """Replicated, with one rotation for all."""
        work, around, first = self.work, Around(), next(iter(self.modules))
        if self.spec.rotation == "online":
            signs, size = rotation_of(work.settings.seed, work.block.full(first),
                                      self.modules[first].weight.shape[-1])
            around = Around(rotation_signs=signs, rotation_block=size)
        stacks, dtype = [], work.settings.dtype
        for codes in self.made(around):
            own = BlockResult()
            replicas = {p: found for p, found in codes.items() if isinstance(found, Replicas)}
            store_replicas(replicas, work.block.module, self.spec, around, dtype, own)
            stacks.append({n: a for n, a in own.tensors.items() if not n.endswith(".bias")})
            mx.eval(stacks[-1])
        work.result.replicas |= own.replicas
        work.result.tensors |= stacked(stacks) | {
            f"{path}.bias": module.bias.astype(dtype)
            for path, module in self.modules.items() if "bias" in module}


def round_stack(work: Work, path: str, spec: Spec) -> None:
    """Round a stack of matrices (…, m, n) that no statistics are known of."""
    module, dtype = dict(leaf_modules(work.block.module))[path], work.settings.dtype
    parts = [rtn.quantise(weight, spec, dtype) for weight in module.weight]
    store_stack(path, module, parts, dtype, work.result)
    work.result.errors[path] = sum(relative_error(weight, part, None) for weight, part
                                   in zip(module.weight, parts)) / len(parts)
