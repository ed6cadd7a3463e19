"""Look at, or change, the hidden state after every transformer block of a running network."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn

from mlxquant.base.errors import Unsupported


@contextmanager
def after_each_block(network: nn.Module, hook: Callable[[mx.array], mx.array]) -> Iterator[None]:
    """Within the context every block's hidden state goes through ``hook``, in order of running.

    The state is of shape (batch, tokens, channels), for some architectures with an axis in
    front. The blocks' classes are exchanged for hooked ones, and put back however the context
    ends. Wrappers in ``network.layers`` would not do: for the architectures that can be split
    over machines that list is a copy, and others read attributes of their blocks. Raises
    ``Unsupported`` where no block ran, as for a network that calls the parts of its blocks.
    """
    ran = False

    def noted(state: mx.array) -> mx.array:
        nonlocal ran
        ran = True
        return hook(state)

    blocks = list({id(block): block for block in network.layers if block is not None}.values())
    classes = [type(block) for block in blocks]
    try:
        for block in blocks:
            block.__class__ = _hooked(type(block), noted)
        yield
    finally:
        for block, original in zip(blocks, classes):
            block.__class__ = original
    if not ran:
        raise Unsupported(f"the blocks of {type(network).__module__} cannot be observed one by one")


def _hooked(block_class: type, hook: Callable[[mx.array], mx.array]) -> type:
    def call(self, *args, **kwargs):
        output = block_class.__call__(self, *args, **kwargs)
        if isinstance(output, (tuple, list)):  # keys and values for later blocks, behind the state
            return type(output)([hook(output[0]), *output[1:]])
        return hook(output)

    return type(block_class.__name__, (block_class,), {"__call__": call})
