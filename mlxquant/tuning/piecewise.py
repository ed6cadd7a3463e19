"""Differentiate a network in pieces, its blocks and its head, so that memory holds one at a time.

Gradient checkpointing (Chen et al. 2016, https://arxiv.org/abs/1604.06174): only a block's inputs
and outputs are kept, and the backward pass computes the rest again. Logits and their gradients are
computed for some tokens at a time, so that a large vocabulary takes no more memory than a small
one. A block is only assumed to be called, with arguments and results that are arrays in any
nesting.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlxquant.base.trees import floats, with_floats
from mlxquant.layers.blocks import arrays_outside, find_blocks
from mlxquant.layers.head import Head, Judge
from mlxquant.layers.repeated import RepeatedBlock

Arrays = dict[str, mx.array]


class Pieces:
    """The pieces of ``network``, and the paths of its arrays that are ``trained``."""

    def __init__(self, network: nn.Module, trained: frozenset[str]):
        self.network, self.trained, self.blocks = network, trained, find_blocks(network)

    def loss(self, tokens: mx.array, judge: Judge) -> mx.array:
        """The sum of ``judge`` over all chunks of logits, differentiable by the trained arrays."""
        head = self._head(tokens)
        outside = {path: array for path, array in
                   arrays_outside(self.network, self.blocks).items() if path in self.trained}

        def piece(inputs: mx.array, arrays: Arrays, place: slice) -> mx.array:
            with _holding(self.network, arrays):
                return judge(head.logits(inputs), place)

        # The gradient of a chunk is computed with its loss, before the next chunk: so logits are
        # computed once, and memory holds those of one chunk at a time.
        @mx.custom_function
        def loss_of(inputs: mx.array, arrays: Arrays) -> tuple[mx.array, mx.array, Arrays]:
            made: list[tuple[mx.array, mx.array]] = []
            sums = tree_map(mx.zeros_like, arrays)
            for place in head.places:
                part = inputs[place]
                if made:
                    part, = mx.depends([part], [*made[-1], *sums.values()])
                value, (slope, slopes) = mx.value_and_grad(piece, (0, 1))(part, arrays, place)
                made.append((value, slope))
                sums = tree_map(mx.add, sums, slopes)
            values, slopes = zip(*made)
            return mx.stack(values).sum(), mx.concatenate(slopes), sums

        @loss_of.vjp
        def gradient(_: Any, cotangents: Any, outputs: Any) -> tuple[mx.array, Arrays]:
            change, (_, slope, slopes) = cotangents[0], outputs
            return tree_map(lambda array: change.astype(array.dtype) * array, (slope, slopes))

        return loss_of(head.inputs, outside)[0]

    def _head(self, tokens: mx.array) -> Head:
        """Run the blocks; returns the head that computes logits from the last block's output."""
        paths = {id(block.module): block.full("") for block in self.blocks}

        def through(module: nn.Module, own: Callable[..., Any], args: tuple[Any, ...],
                    kwargs: dict[str, Any]) -> Any:
            above = paths[id(module)]
            trained = {path: array for path, array in tree_flatten(module.parameters())
                       if above + path in self.trained}
            # Passes of repeated blocks run other blocks too, whose arrays are not the module's.
            plain = not trained or isinstance(module, RepeatedBlock)
            return (own(*args, **kwargs) if plain
                    else _recomputed(module, own, trained, (args, kwargs)))

        return Head(self.network, self.blocks, tokens, through)


def _recomputed(module: nn.Module, own: Callable[..., Any], trained: Arrays, given: Any) -> Any:
    """The result of ``own`` for the arguments ``given`` (positional, keyword). Its gradient by the
    ``trained`` arrays of the module, and by the arguments, runs it again."""
    # Vectors are not replaced: layers cache results computed from them.
    fixed = {path: array for path, array in tree_flatten(module.parameters())
             if path not in trained and array.ndim > 1}
    outputs: list[Any] = []

    def run(arrays: Arrays, inputs: list[mx.array]) -> Any:
        with _holding(module, arrays):
            args, kwargs = with_floats(given, inputs)
            return own(*args, **kwargs)

    # The rerun waits for the incoming gradient. Otherwise common-subexpression elimination, or the
    # scheduler, could make it hold what all blocks computed in the first run.
    @mx.custom_function
    def forward(values: Arrays, inputs: list[mx.array]) -> list[mx.array]:
        outputs.append(run(values, inputs))
        return floats(outputs[0])

    @forward.vjp
    def backward(primals: Any, cotangents: list[mx.array], _: Any) -> tuple[Arrays, list[mx.array]]:
        names, after = list(trained), list(cotangents)
        values, inputs, matrices = _behind((*primals, fixed), after)

        def again(*arrays: mx.array) -> list[mx.array]:
            own_arrays = dict(zip(names, arrays))
            return floats(run(own_arrays | matrices, list(arrays[len(names):])))

        _, slopes = mx.vjp(again, [*(values[name] for name in names), *inputs], after)
        own_slopes, others = slopes[:len(names)], slopes[len(names):]
        # The module's own gradients first: otherwise their inputs would stay in memory to the end.
        return dict(zip(names, own_slopes)), mx.depends(others, own_slopes) if others else others

    made = forward(trained, floats(given))
    # Popped: arrays that a graph reaches through its own functions are never freed.
    return with_floats(outputs.pop(), made)


def _behind(tree: Any, arrays: list[mx.array]) -> Any:
    """The same arrays, but not before ``arrays`` are computed."""
    leaves = [leaf for _, leaf in tree_flatten(tree)]
    later = iter(mx.depends(leaves, arrays))
    return tree_map(lambda _: next(later), tree)


@contextmanager
def _holding(module: nn.Module, arrays: Arrays) -> Iterator[None]:
    """Within the context ``module`` holds other ``arrays``, by path."""
    before = [(path, array) for path, array in tree_flatten(module.parameters()) if path in arrays]
    module.update(tree_unflatten(list(arrays.items())))
    try:
        yield
    finally:
        module.update(tree_unflatten(before))
