"""The part of a network after its blocks: from the last block's output to logits."""

from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map, tree_unflatten

from mlxquant.base.trees import is_float
from mlxquant.layers.blocks import Block, arrays_outside, inside
from mlxquant.layers.dense import dense_layer
from mlxquant.layers.hooks import Through, intercepted

# Called with logits (n, vocabulary), float32, and the place of these n tokens in the batch.
Judge = Callable[[mx.array, slice], Any]
AT_ONCE = 1 << 25  # logits: more tokens at once take more memory and hardly less time


class Head:
    """The part of a network after its ``blocks``, computed for some of ``tokens`` at a time.

    Construction runs the network, with each block's call going ``through`` a function. ``inputs``
    (tokens, n) are the output of the ``last`` block that ran. Where logits need more than that,
    ``inputs`` are the logits themselves and ``made`` is true.
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
        """Make all weights outside the blocks dense float32, lazily: otherwise every product of
        many tokens would expand them again."""
        paths = inside(self._blocks)
        self._network.update_modules(tree_unflatten([
            (path, dense_layer(module)) for path, module in self._network.named_modules()
            if isinstance(module, (nn.QuantizedEmbedding, nn.QuantizedLinear))
            and not path.startswith(paths)]))
        self._network.update(tree_unflatten([
            (path, array.astype(mx.float32))
            for path, array in arrays_outside(self._network, self._blocks).items()
            if is_float(array)]))

    def judged(self, judge: Judge, inputs: mx.array | None = None) -> Iterator[Any]:
        """What ``judge`` returns for the logits of ``inputs`` (tokens, n; default: its own), chunk
        by chunk. The graph of a chunk is built once the result before it was taken."""
        inputs = self.inputs if inputs is None else inputs
        for place in self._chunks(len(inputs)):
            yield judge(self.logits(inputs[place]), place)

    def _chunks(self, tokens: int) -> list[slice]:
        """The places of ``tokens`` in chunks whose logits are computed at once."""
        step = max(1, AT_ONCE // self.vocabulary)
        return [slice(start, min(tokens, start + step)) for start in range(0, tokens, step)]

    def logits(self, inputs: mx.array) -> mx.array:
        """The logits of some of the inputs, in float32."""
        made = inputs if self.made else self._through(inputs)[0]
        return made.astype(mx.float32)

    def _through(self, inputs: mx.array) -> mx.array:
        """Run the network with each block's recorded output, but ``inputs`` as the last one's."""
        given = iter([*self._outputs[:-1], inputs[None]])
        with intercepted((block.module for block in self._blocks), lambda *_: next(given)):
            return self._network(self._tokens)


def logits_bytes(tokens: int, vocabulary: int) -> int:
    """Bytes of the float32 logits that are computed at once for so many ``tokens``."""
    return 4 * min(tokens * vocabulary, max(vocabulary, AT_ONCE))


def foreseen(network: nn.Module, blocks: list[Block]) -> dict[str, Head]:
    """The head of a network whose blocks have not run, by the last block's path; empty where, by
    shapes, logits need more than that block's output. Nothing is computed, no block's arrays are
    held: block outputs are NaN here, so logits that also need an earlier block's are NaN."""
    head = Head(network, blocks, mx.zeros((1, 2), mx.int32), lambda _, own, args, kwargs: tree_map(
        lambda leaf: mx.full(leaf.shape, mx.nan, leaf.dtype) if is_float(leaf) else leaf,
        own(*args, **kwargs)))
    return {} if head.made else {b.path: head for b in blocks if b.module is head.last}
