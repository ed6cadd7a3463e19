"""Modules whose calls go through a function, while their network runs as it always does."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.nn as nn

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
        # A class refers to itself and so stays until Python looks for such circles: what the
        # function holds, all inputs of a block perhaps, must not stay with it.
        lead.clear()


def _led(own_class: type, lead: list[Through]) -> type:
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return lead[0](self, partial(own_class.__call__, self), args, kwargs)

    return type(own_class.__name__, (own_class,), {"__call__": call})
