"""Look at, or change, the hidden state after every transformer block of a running network."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxquant.base.errors import Unsupported
from mlxquant.layers.blocks import find_blocks
from mlxquant.layers.hooks import intercepted


@contextmanager
def after_each_block(network: nn.Module, hook: Callable[[mx.array], mx.array]) -> Iterator[None]:
    """Within the context every block's hidden state, (batch, tokens, channels), for some
    architectures with an axis in front, goes through ``hook``, in order of running. Raises
    ``Unsupported`` where no block ran, as for a network that calls the parts of its blocks."""
    ran = False

    def through(module: nn.Module, own: Callable[..., Any], args: tuple[Any, ...],
                kwargs: dict[str, Any]) -> Any:
        nonlocal ran
        ran = True
        output = own(*args, **kwargs)
        if isinstance(output, (tuple, list)):  # keys and values for later blocks, behind the state
            return type(output)([hook(output[0]), *output[1:]])
        return hook(output)

    with intercepted((block.module for block in find_blocks(network)), through):
        yield
    if not ran:
        raise Unsupported(f"the blocks of {type(network).__module__} cannot be observed one by one")
