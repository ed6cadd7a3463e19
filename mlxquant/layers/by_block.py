"""Compute a network's logits block by block: memory holds the activations of one block and, where
the network does not fit, the weights of one block."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxquant.base.tensor_file import require_finite
from mlxquant.base.trees import floats
from mlxquant.layers.blocks import Block, arrays_outside, find_blocks, release
from mlxquant.layers.head import Head, Judge, foreseen
from mlxquant.layers.hooks import call_order, intercepted
from mlxquant.layers.repeated import RepeatedBlock


def can_let_go(network: nn.Module) -> bool:
    """Whether ``judged`` with ``once`` holds one block at a time. It holds all where a network
    calls the parts of its blocks in place of the blocks, or repeats a range of blocks."""
    return bool(_calls(network, find_blocks(network)))


def _calls(network: nn.Module, blocks: list[Block]) -> Counter[int]:
    """How often each block is called, by its index; empty where this does not tell when a block is
    no longer needed."""
    if any(isinstance(block.module, RepeatedBlock) for block in blocks):
        return Counter()
    return Counter(call_order(network, blocks))


def judged(network: nn.Module, tokens: mx.array, judge: Judge, *,
           once: bool = False) -> Iterator[Any]:
    """What ``judge`` returns for the logits of ``tokens`` (batch, length), chunk by chunk.

    Each block is computed before the graph of the next is built. With ``once`` the arrays of
    ``network`` are still on disk: a block's arrays are read when it is called and freed after its
    last call, so the network cannot be used afterwards. Raises ``BadCheckpoint`` for an array with
    a value that is not finite.
    """
    blocks = find_blocks(network)
    left = _calls(network, blocks) if once else Counter[int]()
    places = {id(block.module): index for index, block in enumerate(blocks)}
    if left:
        _read(arrays_outside(network, blocks))

    def through(module: nn.Module, own: Callable[..., Any], args: tuple[Any, ...],
                kwargs: dict[str, Any]) -> Any:
        index = places[id(module)]
        if left:
            block = blocks[index]
            _read({block.full(path): array for path, array in tree_flatten(module.parameters())})
        output = own(*args, **kwargs)
        mx.eval(floats((output, args, kwargs)))
        if left:
            left[index] -= 1
            if not left[index]:
                release(module)
        return output

    head = _behind(network, blocks)
    if head is None:  # logits need other blocks' outputs too, which are kept
        return Head(network, blocks, tokens, through).judged(judge)
    last = mx.zeros(0)

    def pass_on(*call: Any) -> Any:
        nonlocal last
        last = through(*call)
        return last

    with intercepted((block.module for block in blocks), pass_on):
        network(tokens)  # its logits, of all tokens at once, are not computed
    return head.judged(judge, last.reshape(-1, last.shape[-1]))


def _behind(network: nn.Module, blocks: list[Block]) -> Head | None:
    """The head that computes logits from the last block's output; None where it needs more."""
    for head in foreseen(network, blocks).values():
        if not mx.isnan(head.logits(mx.zeros((1, head.inputs.shape[-1])))).any():
            return head
    return None


def _read(arrays: dict[str, mx.array]) -> None:
    """Compute arrays one after the other, so that their temporaries do not add up in memory."""
    for path, array in arrays.items():
        mx.eval(array)
        require_finite(path, array)
