"""What a network does behind its blocks: from what the last one gives to logits."""

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten

from mlxquant.base.trees import is_float
from mlxquant.layers.blocks import Block, arrays_outside
from mlxquant.layers.dense import dense_layer
from mlxquant.layers.hooks import Through, intercepted

# Of logits (n, vocabulary), float32, and the places of their n tokens in the batch: their share.
Judge = Callable[[mx.array, slice], Any]
AT_ONCE = 1 << 25  # logits: more tokens at once take more memory and hardly less time


class Head:
    """What a network does behind its ``blocks`` of ``tokens``, for some tokens at a time.

    The network runs; each block's call goes ``through`` a function. ``inputs`` (tokens, n) are what
    the ``last`` block gave. Where more is needed than that, they are the logits themselves, which
    are then ``made``.
    """

    def __init__(self, network: nn.Module, blocks: list[Block], tokens: mx.array, through: Through):
        self._network, self._blocks, self._tokens = network, blocks, tokens
        self._outputs, self.last, self.made = list[Any](), network, True

        def note(module: nn.Module, *call: Any) -> Any:
            self.last = module
            self._outputs.append(through(module, *call))
            return self._outputs[-1]

        with intercepted((block.module for block in blocks), note):
            whole = network(tokens)
        self.inputs, self.vocabulary = whole.reshape(-1, whole.shape[-1]), whole.shape[-1]
        last = self._outputs[-1] if self._outputs else None
        if isinstance(last, mx.array) and last.shape[:-1] == tokens.shape:
            flat = last.reshape(-1, last.shape[-1])
            try:  # a graph that is never computed
                self.made = self._through(flat[:1]).shape != (1, 1, self.vocabulary)
            except ValueError:  # shapes do not fit
                self.made = True
            self.inputs = self.inputs if self.made else flat
        self.places = self._chunks(tokens.size)

    def expand(self) -> None:
        """Have what is outside the blocks dense in float32, as soon as it is needed: products of
        many tokens would expand it each time."""
        inside = tuple(block.full("") for block in self._blocks)
        self._network.update_modules(tree_unflatten([
            (path, dense_layer(module)) for path, module in self._network.named_modules()
            if isinstance(module, (nn.QuantizedEmbedding, nn.QuantizedLinear))
            and not path.startswith(inside)]))
        self._network.update(tree_unflatten([
            (path, array.astype(mx.float32))
            for path, array in arrays_outside(self._network, self._blocks).items()
            if is_float(array)]))

    def judged(self, judge: Judge, inputs: mx.array | None = None) -> Iterator[Any]:
        """What ``judge`` says of the logits, of its own or other ``inputs`` (tokens, n), chunk
        after chunk. None is laid out before the one before it was taken."""
        inputs = self.inputs if inputs is None else inputs
        for place in self._chunks(len(inputs)):
            yield judge(self.logits(inputs[place]), place)

    def _chunks(self, tokens: int) -> list[slice]:
        """The places of so many tokens, those together whose logits are made at once."""
        step = max(1, AT_ONCE // self.vocabulary)
        return [slice(start, min(tokens, start + step)) for start in range(0, tokens, step)]

    def logits(self, inputs: mx.array) -> mx.array:
        """Of some of the inputs, in float32."""
        made = inputs if self.made else self._through(inputs)[0]
        return made.astype(mx.float32)

    def _through(self, inputs: mx.array) -> mx.array:
        """The network without its blocks: each gives what it gave, but the last one ``inputs``."""
        given = iter([*self._outputs[:-1], inputs[None]])
        with intercepted((block.module for block in self._blocks), lambda *_: next(given)):
            return self._network(self._tokens)


def logits_bytes(tokens: int, vocabulary: int) -> int:
    """Of so many tokens' logits those that are made at once, in float32."""
    return 4 * min(tokens * vocabulary, max(vocabulary, AT_ONCE))


def foreseen(network: nn.Module, blocks: list[Block]) -> dict[str, Head]:
    """The head of a network whose blocks have not run, by the last block's path; empty where, by
    shapes, logits need more than that block's output. Nothing is computed, no block's arrays are
    held: block outputs are NaN here, so logits that also need an earlier block's are NaN."""
    head = Head(network, blocks, mx.zeros((1, 2), mx.int32), lambda _, own, args, kwargs: tree_map(
        lambda leaf: mx.full(leaf.shape, mx.nan, leaf.dtype) if is_float(leaf) else leaf,
        own(*args, **kwargs)))
    return {} if head.made else {b.path: head for b in blocks if b.module is head.last}
