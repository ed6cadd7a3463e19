"""Modules whose calls go through a function, while their network runs as it always does."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from mlxquant.base.errors import Unsupported
from mlxquant.layers.blocks import Block, find_blocks

_Key = TypeVar("_Key", str, int)
Through = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


@contextmanager
def intercepted(modules: Iterable[nn.Module], through: Through) -> Iterator[None]:
    """Within the context a call of one of ``modules`` becomes ``through(module, own, args,
    kwargs)``, where ``own`` is the module's own call. However it ends, calls are as before.

    Python looks a call up in the class, so the class is exchanged. Wrappers in the module tree
    would not do: networks read attributes of their parts, and some run a copy of their list of
    blocks.
    """
    originals = {id(module): (module, type(module)) for module in modules}
    lead = [through]
    try:
        for module, own_class in originals.values():
            module.__class__ = _led(own_class, lead)
        yield
    finally:
        for module, own_class in originals.values():
            module.__class__ = own_class
        # A class refers to itself and so stays until Python collects cycles. What the function
        # holds, perhaps all inputs of a block, must not stay with it.
        lead.clear()


def listened(modules: dict[_Key, nn.Module], call: Callable[[], Any],
             ) -> tuple[Any, list[tuple[_Key, tuple[Any, ...]]]]:
    """The result of ``call()``, and the calls of ``modules`` that it makes, in order: each as the
    module's key and the positional arguments."""
    keys, calls = {id(module): key for key, module in modules.items()}, []

    def through(module: nn.Module, own: Callable[..., Any], args: tuple[Any, ...],
                kwargs: dict[str, Any]) -> Any:
        calls.append((keys[id(module)], args))
        return own(*args, **kwargs)

    with intercepted(modules.values(), through):
        return call(), calls


def call_order(network: nn.Module, blocks: list[Block]) -> list[int]:
    """The blocks' indices in the order in which a forward pass calls them. Nothing is computed."""
    _, calls = listened(dict(enumerate(block.module for block in blocks)),
                        lambda: network(mx.zeros((1, 4), mx.int32)))
    return [index for index, _ in calls]


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


def _led(own_class: type, lead: list[Through]) -> type:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return lead[0](self, partial(own_class.__call__, self), args, kwargs)

    return type(own_class.__name__, (own_class,), {"__call__": call})
