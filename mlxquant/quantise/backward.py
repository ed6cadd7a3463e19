"""Gradients through a network block by block, with one block in memory at a time.

The inputs of every block are kept, and each block runs again for its gradient (Chen et al. 2016,
https://arxiv.org/abs/1604.06174). Blocks are read when they are needed, in the forward and again in
the backward pass. A network is only assumed to call its blocks: operations between two blocks are
differentiated by running the network once more with the blocks' recorded outputs. Anything a block
passes on other than by its result, such as keys that later blocks share, counts as a constant.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxquant.base.trees import floats, with_floats
from mlxquant.layers.blocks import Block, find_blocks, release
from mlxquant.layers.head import Head, Judge
from mlxquant.layers.hooks import call_order, intercepted


@dataclass(frozen=True, eq=False)
class BackwardCall:
    """A block's call: its positional and keyword arguments (``given``), its output, and the
    gradients by the output's floating-point arrays (``cotangents``)."""

    block: Block
    given: tuple[tuple[Any, ...], dict[str, Any]]
    output: Any
    cotangents: list[mx.array]

    def vjp(self, run: Callable[[list[mx.array]], Any], inputs: list[mx.array]) -> list[mx.array]:
        """The gradients by ``inputs``, from which ``run`` computes the block's output."""
        _, slopes = mx.vjp(lambda *arrays: floats(run(list(arrays))), inputs, self.cotangents)
        return slopes


@contextmanager
def _read(module: nn.Module, block: Block, again: bool) -> Iterator[None]:
    """Within the context ``module`` holds the weights of ``block``, which are read from disk when
    they are used. Afterwards they are freed, in ``block`` too unless needed ``again``."""
    module.update(block.module.parameters())
    try:
        yield
    finally:
        release(module)
        if not again:
            release(block.module)


class _Reached(Exception):
    """The network has come to the call that was asked for."""


class Backward:
    """The forward and backward pass of one batch of ``tokens`` (batch, length).

    Each call of ``opened`` gives a new dense float32 network whose arrays are still on disk. Of the
    first one, the arrays outside the blocks stay in memory once read.
    """

    def __init__(self, opened: Callable[[], nn.Module], tokens: mx.array):
        self.network, self.tokens, self._opened = opened(), tokens, opened
        self.blocks = find_blocks(self.network)
        self._order = call_order(self.network, self.blocks)
        self._calls: list[BackwardCall] = []
        weights = find_blocks(opened())
        places = {id(block.module): index for index, block in enumerate(self.blocks)}

        def through(module: nn.Module, own: Callable[..., Any], *given: Any) -> Any:
            index, (args, kwargs) = places[id(module)], given
            with _read(module, weights[index], index in self._order[len(self._calls) + 1:]):
                output = own(*args, **kwargs)
                mx.eval(floats((output, given)))
            self._calls.append(BackwardCall(self.blocks[index], given, output, []))
            return output

        self.head = Head(self.network, self.blocks, tokens, through)

    def calls(self, judge: Judge
              ) -> Iterator[tuple[BackwardCall, Callable[[list[mx.array]], None]]]:
        """The blocks' calls, the last first, each with the gradients of the summed ``judge`` by its
        outputs; meanwhile its block holds its weights. The function yielded with a call must be
        given the gradients by the call's float arguments."""
        slopes = []
        for place in self.head.places:
            slope = mx.grad(lambda part, place=place: judge(self.head.logits(part), place))(
                self.head.inputs[place])
            mx.eval(slope)
            slopes.append(slope)
        slope = mx.concatenate(slopes)
        left: list[list[mx.array | None]] = [[None] * len(floats(call.output))
                                             for call in self._calls]
        if self.head.made:
            self._between(left, [self.head.inputs], [slope])
        else:
            left[-1] = [slope.reshape(self._calls[-1].output.shape)]
        weights = find_blocks(self._opened())
        while self._calls:
            call, found = self._calls.pop(), left.pop()
            index = self._order[len(self._calls)]
            own = [mx.zeros_like(array) if made is None else made
                   for array, made in zip(floats(call.output), found)]
            with _read(call.block.module, weights[index],
                       index in self._order[:len(self._calls)]):
                yield (replace(call, cotangents=own),
                       partial(self._between, left, floats(call.given)))

    def _between(self, left: list[list[mx.array | None]], arrays: list[mx.array],
                 slopes: list[mx.array]) -> None:
        """Backpropagate ``slopes``, the gradients by ``arrays``, to earlier blocks' outputs and
        add the results to ``left``, one for each float output."""
        given = [array for call in self._calls for array in floats(call.output)]
        places = [(i, j) for i, gradients in enumerate(left) for j in range(len(gradients))]
        where = {id(array): place for array, place in zip(given, places)}

        def add(place: tuple[int, int], slope: mx.array) -> None:
            i, j = place
            held = left[i][j]
            left[i][j] = slope if held is None else held + slope

        made = []  # by the network, from what blocks gave
        for number, (array, slope) in enumerate(zip(arrays, slopes)):
            if id(array) in where:
                add(where[id(array)], slope)
            else:
                made.append(number)
        if made and given:
            _, back = mx.vjp(lambda *outputs: [self._inputs(list(outputs), arrays)[number]
                                               for number in made], given,
                             [slopes[number] for number in made])
            for place, slope in zip(places, back):
                add(place, slope)
        mx.eval([array for gradients in left for array in gradients if array is not None])

    def _inputs(self, outputs: list[mx.array], known: list[mx.array]) -> list[mx.array]:
        """The float arguments of the next block call, or the logits, that the network computes from
        earlier blocks' ``outputs``; ``known`` where the shapes differ from those of ``known``."""
        calls, left = iter(self._calls), iter(outputs)

        def through(_: nn.Module, own: Any, *given: Any) -> Any:
            if (call := next(calls, None)) is None:
                raise _Reached(given)
            return with_floats(call.output, [next(left) for _ in floats(call.output)])

        with intercepted((block.module for block in self.blocks), through):
            try:
                whole = self.network(self.tokens)
                found = [whole.reshape(-1, whole.shape[-1])]
            except _Reached as reached:
                found = floats(reached.args[0])
        same = [a.shape for a in found] == [a.shape for a in known]
        return found if same else known
