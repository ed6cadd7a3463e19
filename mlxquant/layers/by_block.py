"""A network's predictions block by block: memory holds what one block computes, and of a network
that does not fit one block."""

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
    """Whether ``judged`` holds one block at a time with ``once``: not where a network calls the
    parts of its blocks, or repeats a range of them."""
    return bool(_calls(network, find_blocks(network)))


def _calls(network: nn.Module, blocks: list[Block]) -> Counter[int]:
    """How often each block is called, by its index; empty where that cannot tell when it is no
    longer needed."""
    if any(isinstance(block.module, RepeatedBlock) for block in blocks):
        return Counter()
    return Counter(call_order(network, blocks))


def judged(network: nn.Module, tokens: mx.array, judge: Judge, *,
           once: bool = False) -> Iterator[Any]:
    """What ``judge`` says of the logits of ``tokens`` (batch, length), some tokens after the other.

    Each block is computed before the next is laid out. With ``once`` the arrays of ``network`` are
    yet to be read: a block is read when it is called and let go of after its last call, so the
    network is of no use afterwards. Raises ``BadCheckpoint`` for an array read with a value that is
    not finite.
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
    if head is None:  # it asks for other blocks' outputs, which are kept
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
    """What makes logits of the last block's output alone; None where that is not enough."""
    for head in foreseen(network, blocks).values():
        if not mx.isnan(head.logits(mx.zeros((1, head.inputs.shape[-1])))).any():
            return head
    return None


def _read(arrays: dict[str, mx.array]) -> None:
    """Compute arrays, one after the other: what each takes in between would add up."""
    for path, array in arrays.items():
        mx.eval(array)
        require_finite(path, array)
