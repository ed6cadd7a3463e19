"""Quantise siblings in many ways at once, to compare what each costs.

For a mixture only a few experts, those with the most tokens, are tried and represent all.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate, groupby
from math import prod
from typing import Any

import mlx.core as mx

from mlxquant.codes import hadamard
from mlxquant.codes.affine import Affine
from mlxquant.codes.spec import Spec
from mlxquant.codes.statistics import Statistics
from mlxquant.layers.blocks import Block
from mlxquant.quantise import envelope
from mlxquant.quantise.envelope import Replicas
from mlxquant.quantise.matrices import rotated, rotation_of, split
from mlxquant.quantise.methods import METHODS, Codes
from mlxquant.quantise.observe import Routed, linears
from mlxquant.quantise.sensitivity import expected_divergence
from mlxquant.quantise.settings import Settings
from mlxquant.quantise.sweep import Sweep

_ROUNDS = 2  # of the 8 that a result is fitted in: enough to tell ways apart
_EXPERTS = 4  # experts of a mixture that are tried
_ROWS = 512  # rows of a matrix, or up to twice as many, that are tried and represent all

# For one way: the bits that each sibling stores by itself, the bits that siblings share, and the
# nats that each sibling costs.
Weighed = tuple[list[float], float, list[float]]


@dataclass
class Trial:
    """Siblings of a block to try in every way: linear layers, or stacks of experts."""

    block: Block
    paths: list[str]
    spec: Spec
    statistics: Statistics | Routed
    seed: int

    def full(self) -> list[str]:
        """The siblings' paths in the network."""
        return [self.block.full(path) for path in self.paths]

    def results(self, ways: list[dict[str, Any]], felt: list[mx.array]) -> Iterator[Weighed]:
        """The ``Weighed`` of each way; ``felt`` are the importances (m,) of siblings' outputs."""
        specs = [replace(self.spec, **way) for way in ways]
        modules, known, first = linears(self.block.module), self.statistics, self.full()[0]
        if isinstance(known, Statistics):
            weights = [modules[path].weight for path in self.paths]
            yield from weigh(weights, specs, known, felt, first, self.seed)
            return
        experts, each = len(modules[self.paths[0]].weight), known.each
        busiest = sorted(range(experts), key=lambda e: -each[e].count if each else e)[:_EXPERTS]
        tried = [list(weigh([modules[path].weight[e] for path in self.paths], specs, known.of(e),
                            felt, first, self.seed)) for e in busiest]
        for one in zip(*tried):
            yield ([experts * bits for bits in one[0][0]], experts * one[0][1],
                   [sum(column) / len(one) for column in zip(*(damages for *_, damages in one))])


def weigh(weights: list[mx.array], specs: list[Spec], statistics: Statistics,
          felt: list[mx.array], path: str, seed: int) -> Iterator[Weighed]:
    """The bits and the damage of siblings' ``weights`` (m, n) in each of ``specs``, which differ
    only in widths and replicas. Some of the rows are tried. ``felt`` (m,) is the importance of the
    siblings' outputs, ``path`` the first sibling's. Balancing and refinement are left out."""
    steps = [max(1, len(weight) // _ROWS) for weight in weights]
    tried = [weight[::step] for weight, step in zip(weights, steps)]
    felt = [_standing_for(every, step) for every, step in zip(felt, steps)]
    rows, weight, spec = list(map(len, tried)), mx.concatenate(tried), specs[0]
    turned = 0  # bits of the rotation's signs
    if spec.rotation == "online":
        signs, size = rotation_of(seed, path, weight.shape[1])
        weight, turned = hadamard.rotate(weight, signs, size), len(signs)
        statistics = rotated(statistics, signs, size)
    moments, statistics = statistics.hessian, statistics.sound()
    for made in _tried(weight.astype(mx.float32), specs, statistics):
        bits: list[float] = [part.own_bits() * len(every) // len(some)
                             for part, every, some in zip(split(made, rows), weights, tried)]
        shared = turned + (made.shared_bits() if isinstance(made, Replicas) else 0)
        errors = mx.split(made.dequantise() - weight, list(accumulate(rows))[:-1])
        yield bits, shared, [expected_divergence(error, moments, importance)
                             for error, importance in zip(errors, felt)]


def stored_bits(spec: Spec, shape: tuple[int, ...]) -> int:
    """Bits of a layer (m, n), or of a stack (…, m, n), that shares nothing with siblings."""
    *stack, rows, columns = shape
    codes = mx.zeros((rows, columns), mx.uint8)  # of which nothing is computed
    if spec.method == "replica":
        group = spec.replica_group or 1
        made = Replicas(codes, mx.zeros((rows, spec.replicas)), mx.zeros(
            (columns // group, spec.replicas)), mx.zeros(columns) if group > 1 else None, spec.bits)
        bits = made.own_bits() + made.shared_bits()
    else:
        scales = mx.zeros((rows, columns // spec.group_for(columns)))
        bits = Affine(codes, scales, scales, spec).own_bits()
    return prod(stack) * bits + (columns if spec.rotation == "online" else 0)


def _standing_for(every: mx.array, step: int) -> mx.array:
    """Every ``step``-th of the values (m,), scaled so that their sum is that of all values."""
    some = every[::step]
    return some * (every.sum() / mx.maximum(some.sum(), 1e-30))


def _tried(weight: mx.array, specs: list[Spec], statistics: Statistics) -> Iterator[Codes]:
    """The codes of each spec. Rows are swept independently, so neighbours of one width go through
    one sweep, whose many small launches are most of its time."""
    most, weights = max(spec.replicas for spec in specs), statistics.hessian.diagonal()
    method, settings = METHODS[specs[0].method], Settings(
        rounds=_ROUNDS, leading=cache(lambda: envelope.leading(weight, most, weights)))
    if method.refine is None:
        yield from (method.start(weight, statistics, spec, settings) for spec in specs)
        return
    sweep = Sweep.of(statistics, specs[0].act_order)
    for width, alike in groupby(specs, key=lambda spec: spec.bits):
        starts = [method.start(weight, statistics, spec, settings) for spec in alike]
        scales, biases = (mx.concatenate(part) for part in zip(*(s.grid() for s in starts)))
        codes = sweep.codes(mx.concatenate([weight] * len(starts)), scales, biases, width.levels)
        for start, part in zip(starts, mx.split(codes, len(starts))):
            yield replace(start, codes=part)
