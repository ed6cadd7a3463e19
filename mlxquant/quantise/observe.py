"""Watch the inputs of a block's linear layers while the block runs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchLinear

from mlxquant.codes.statistics import Statistics
from mlxquant.layers.hooks import listened
from mlxquant.layers.traffic import leaf_modules

LEAN = 256  # tokens' worth of all tokens' moments that an expert's own moments are mixed with
_EXPERT_BYTES = 8e9  # at most, for separate moments of all experts of one input


def linears(block: nn.Module) -> dict[str, nn.Module]:
    """The dense linear layers of a block, and its stacks of experts, by path."""
    return {path: module for path, module in leaf_modules(block)
            if type(module) in (nn.Linear, SwitchLinear)}


def keeps_experts_apart(experts: int, width: int) -> bool:
    """Whether each of so many experts has moments (width, width) of its own tokens."""
    return 4 * experts * width**2 <= _EXPERT_BYTES


@dataclass
class Routed:
    """Statistics of an input that a mixture routes: of each expert's tokens, and of all of them.

    ``each`` is empty where moments of every expert would not fit: then all experts share those
    of all tokens.
    """

    shared: Statistics
    each: list[Statistics]

    @classmethod
    def empty(cls, experts: int, width: int) -> "Routed":
        apart = keeps_experts_apart(experts, width)
        return cls(Statistics.empty(width),
                   [Statistics.empty(width) for _ in range(experts)] if apart else [])

    def add(self, x: mx.array, indices: mx.array) -> None:
        """Add inputs (…, 1, n) of a ``SwitchLinear`` call, and the expert of each (``indices``)."""
        lead, width = np.broadcast_shapes(x.shape[:-2], indices.shape), x.shape[-1]
        rows = mx.broadcast_to(x[..., 0, :], (*lead, width)).reshape(-1, width)
        chosen = np.array(mx.broadcast_to(indices, lead)).reshape(-1)
        self.shared.add(rows)
        if not self.each:
            return
        order = np.argsort(chosen, kind="stable")
        ends = np.cumsum(np.bincount(chosen, minlength=len(self.each)))
        for expert, (start, end) in enumerate(zip([0, *ends], ends)):
            if end > start:
                self.each[expert].add(rows[mx.array(order[start:end])])

    def of(self, expert: int) -> Statistics:
        """The statistics that ``expert`` is quantised with: the moments of its own tokens, mixed
        with ``LEAN`` tokens' worth of all tokens' moments. The fewer tokens reached an expert, the
        more it relies on those of all tokens; one that none reached uses these alone."""
        if not self.each:
            return self.shared
        own = self.each[expert]
        share = own.count / (own.count + LEAN)
        return Statistics(
            own.count, share * own.hessian + (1 - share) * self.shared.hessian,
            share * own.mean_magnitude + (1 - share) * self.shared.mean_magnitude,
            mx.maximum(own.largest, self.shared.largest) if own.count == 0 else own.largest)

    def arrays(self) -> list[mx.array]:
        return [array for part in (self.shared, *self.each) for array in part.arrays()]


@dataclass
class Observation:
    """Statistics per distinct input of a block, and which layers share each input.

    ``unseen`` are layers that no call reached.
    """

    groups: dict[str, list[str]] = field(default_factory=dict)
    statistics: dict[str, Statistics | Routed] = field(default_factory=dict)
    unseen: list[str] = field(default_factory=list)

    def siblings(self) -> Iterator[tuple[list[str], Statistics | Routed]]:
        """(paths that read the same input, its statistics), in the order they were called."""
        return ((paths, self.statistics[first]) for first, paths in self.groups.items())

    def arrays(self) -> list[mx.array]:
        return [array for part in self.statistics.values() for array in part.arrays()]


Inputs = dict[str, list[tuple[Any, ...]]]  # by layer, what each of its calls was given


class Watch:
    """Gathers an ``Observation`` of ``block`` from its runs."""

    def __init__(self, block: nn.Module):
        self._modules = linears(block)
        self._apart = set[str]()  # what was once not called alike in both models
        self.seen = Observation(unseen=list(self._modules))

    def run(self, call: Callable[[], Any]) -> tuple[Any, Inputs]:
        """What ``call`` returns, and the inputs that the block's layers had meanwhile."""
        inputs: Inputs = {}
        output, calls = listened(self._modules, call)
        for path, args in calls:
            inputs.setdefault(path, []).append(args)
        return output, inputs

    def take(self, inputs: Inputs, target: Inputs | None = None) -> None:
        """Add one run's inputs to the statistics; ``target`` are the float model's in that run.
        Layers that are not given the same tokens in both models, such as experts in a list, are
        not told of the float model's inputs at all."""
        seen, tokens = self.seen, sum(map(_rows, next(iter(inputs.values()), ())))
        self._group({path: inputs[path] for path in seen.unseen if path in inputs})
        for first in seen.groups:
            statistics, calls = seen.statistics[first], inputs.get(first, [])
            beside = [] if target is None else target.get(first, [])
            if target is not None and not _alike(calls, beside, tokens):
                self._apart.add(first)
            if isinstance(statistics, Routed):
                for x, indices, *_ in calls:
                    statistics.add(x, indices)
                continue
            if first in self._apart:
                beside, statistics.cross = [], None
            for args, other in zip_longest(calls, beside):
                statistics.add(args[0], None if other is None else other[0])
        seen.unseen = [path for path in seen.unseen if path not in inputs]
        mx.eval(seen.arrays())

    def _group(self, inputs: Inputs) -> None:
        """Layers that are handed the very same array are siblings; experts among themselves."""
        first_with: dict[tuple[int, bool, int], str] = {}
        for path, calls in inputs.items():
            module, x = self._modules[path], calls[0][0]
            experts = module.weight.shape[0] if isinstance(module, SwitchLinear) else 0
            first = first_with.setdefault((id(x), bool(experts), experts), path)
            self.seen.groups.setdefault(first, []).append(path)
            if first == path:
                self.seen.statistics[path] = (Routed.empty(experts, x.shape[-1]) if experts
                                              else Statistics.empty(x.shape[-1]))


def _rows(args: tuple[Any, ...]) -> int:
    return prod(args[0].shape[:-1])


def _alike(calls: list[tuple[Any, ...]], beside: list[tuple[Any, ...]], tokens: int) -> bool:
    """Whether a layer was given the same tokens in both models: in equal calls, which either keep
    the axes of sequences and tokens or have all ``tokens``. One picks out some of them otherwise,
    and equally many need not be the same."""
    shapes = [args[0].shape for args in calls]
    return shapes == [args[0].shape for args in beside] and (
        all(len(shape) > 2 for shape in shapes) or sum(map(_rows, calls)) % tokens == 0)
