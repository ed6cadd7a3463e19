"""Run a network block by block, and watch the inputs of its linear layers.

mlx-lm's models call ``layer(h, mask, cache)`` with arguments of their own, so
those are taken from one dry run in which every block only notes its call.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlxquant.base.errors import Unsupported
from mlxquant.codes.statistics import Statistics
from mlxquant.layers.traffic import leaf_modules


class _Noted:
    """Stands in for a block: notes the call, hands the hidden state through."""

    def __init__(self, block: nn.Module, calls: list):
        self._block, self._calls = block, calls

    def __getattr__(self, name: str):
        return getattr(self._block, name)

    def __call__(self, hidden: mx.array, *args, **kwargs) -> mx.array:
        self._calls.append((hidden, args, kwargs))
        return hidden


class _Watched(nn.Module):
    """A linear layer whose inputs are reported before it runs."""

    def __init__(self, linear: nn.Linear, path: str, report: Callable[[str, mx.array], None]):
        super().__init__()
        self.linear = linear
        self._path, self._report = path, report

    def __call__(self, x: mx.array) -> mx.array:
        self._report(self._path, x)
        return self.linear(x)


def block_calls(network: nn.Module, tokens: mx.array) -> tuple[mx.array, list[tuple[tuple, dict]]]:
    """The hidden state that enters the first block for ``tokens`` (batch, length), and the
    further arguments that each block is called with."""
    layers = network.layers
    originals, calls = list(layers), []
    try:
        for index, block in enumerate(originals):
            layers[index] = _Noted(block, calls)
        network(tokens)
    finally:
        layers[:] = originals
    if len(calls) != len(originals):
        raise Unsupported(f"the architecture runs {len(calls)} of its {len(originals)} blocks in turn; "
                          "block-by-block quantization does not cover it")
    return calls[0][0], [(args, kwargs) for _, args, kwargs in calls]


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The dense linear layers of a block by path."""
    return {path: module for path, module in leaf_modules(block) if isinstance(module, nn.Linear)}


def replace(block: nn.Module, modules: dict[str, nn.Module]) -> None:
    block.update_modules(tree_unflatten(list(modules.items())))


@dataclass
class Observation:
    """Statistics per distinct input of a block, and which layers share each input."""

    groups: dict[str, list[str]] = field(default_factory=dict)
    statistics: dict[str, Statistics] = field(default_factory=dict)

    def siblings(self) -> Iterable[tuple[list[str], Statistics]]:
        """(paths that read the same input, its statistics), in the order they were called."""
        return ((paths, self.statistics[first]) for first, paths in self.groups.items())


def observe(block: nn.Module, run: Callable[[mx.array], mx.array], hidden: list[mx.array],
            target: list[mx.array] | None = None, *, idle: bool = False,
            ) -> tuple[Observation, list[mx.array], list[mx.array]]:
    """Run ``block`` over batches of hidden states and gather its inputs' statistics.

    With ``target``, the float model's hidden states for the same batches, the
    block runs on those too and cross moments are gathered. Returns the
    observation, the outputs for ``hidden`` and the outputs for ``target``. An
    ``idle`` observation gathers nothing and only runs the block.
    """
    seen = Observation()
    batch: dict[str, mx.array] = {}
    watched = linears(block)
    replace(block, {p: _Watched(m, p, batch.__setitem__) for p, m in watched.items()})
    outputs, targets = [], []
    try:
        for index, state in enumerate(hidden):
            float_inputs = None
            if target is not None:
                targets.append(run(target[index]))
                float_inputs = dict(batch)
            outputs.append(run(state))
            if not idle:
                _add(seen, batch, float_inputs)
            mx.eval(outputs[-1], targets[-1:], [s.arrays() for s in seen.statistics.values()])
            batch.clear()
    finally:
        replace(block, watched)
    return seen, outputs, targets


def _add(seen: Observation, batch: dict[str, mx.array], targets: dict[str, mx.array] | None) -> None:
    if not seen.groups:  # layers that were handed the very same array are siblings
        first_with = {}
        for path, x in batch.items():
            first = first_with.setdefault(id(x), path)
            seen.groups.setdefault(first, []).append(path)
            seen.statistics.setdefault(first, Statistics.empty(x.shape[-1]))
    for first in seen.groups:
        seen.statistics[first].add(batch[first], None if targets is None else targets[first])
