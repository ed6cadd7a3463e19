"""A network's predictions block by block: memory holds what one block computes, and of a network
that does not fit one block."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxquant.base.trees import floats
from mlxquant.layers.blocks import find_blocks, release
from mlxquant.layers.head import Head, Judge
from mlxquant.layers.hooks import call_order


def judged(network: nn.Module, tokens: mx.array, judge: Judge, *,
           once: bool = False) -> Iterator[Any]:
    """What ``judge`` says of the logits of ``tokens`` (batch, length), some tokens after the other.

    Each block is computed before the next is laid out. With ``once`` the arrays of ``network`` are
    yet to be read: a block is read when it is called and let go of after its last call, so the
    network is of no use afterwards. What went into blocks stays until the end, for networks whose
    head asks for it.
    """
    blocks = find_blocks(network)
    calls = Counter(call_order(network, blocks) if once else [])  # without it none is the last
    left = {id(block.module): calls[index] for index, block in enumerate(blocks)}

    def through(module: nn.Module, own: Callable[..., Any], args: tuple[Any, ...],
                kwargs: dict[str, Any]) -> Any:
        left[id(module)] -= 1
        output = own(*args, **kwargs)
        mx.eval(floats((output, args, kwargs)))
        if not left[id(module)]:
            release(module)
        return output

    return Head(network, blocks, tokens, through).judged(judge)
