"""Quantise siblings in many ways at once, to compare what each costs."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import groupby

import mlx.core as mx

from mlxquant.codes import hadamard
from mlxquant.codes.spec import Spec
from mlxquant.codes.statistics import Statistics
from mlxquant.quantise import envelope
from mlxquant.quantise.envelope import Replicas
from mlxquant.quantise.matrices import rotated, rotation_of, split
from mlxquant.quantise.methods import METHODS, Codes
from mlxquant.quantise.settings import Settings
from mlxquant.quantise.sweep import Sweep

_ROUNDS = 2  # of the 8 that a result is fitted in: enough to tell ways apart


def quantise_trials(weights: list[mx.array], path: str, specs: list[Spec], statistics: Statistics,
                    seed: int) -> Iterator[tuple[mx.array, mx.array, list[int], int]]:
    """For each of ``specs``, which differ in widths and replicas alone: the error (m, n) of the
    stacked siblings' ``weights``, the second moments (n, n) of the input they multiply, both
    rotated where the spec rotates, the bits that each stores by itself, and those that they
    share. ``path`` is the first sibling's. Balancing and refinement are left out."""
    weight, rows, spec = mx.concatenate(weights), list(map(len, weights)), specs[0]
    turned = 0  # bits of the rotation's signs
    if spec.rotation == "online":
        signs, size = rotation_of(seed, path, weight.shape[1])
        weight, turned = hadamard.rotate(weight, signs, size), len(signs)
        statistics = rotated(statistics, signs, size)
    moments, statistics = statistics.hessian, statistics.sound()
    for made in _tried(weight.astype(mx.float32), specs, statistics):
        shared = turned + (made.shared_bits() if isinstance(made, Replicas) else 0)
        own = [part.own_bits() for part in split(made, rows)]
        yield made.dequantise() - weight, moments, own, shared


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
