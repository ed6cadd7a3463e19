"""Run plain blocks, or the plain attention of other blocks, for one token in few dispatches: ten a
block where layers are packed.

    norm and preparation · q, k, v · norms of heads, rotary embedding and the cache's write ·
    attention · preparation · O and the residual · norm and preparation · gate, up · SwiGLU and
    preparation · down and the residual

Siblings stored in several formats take one more preparation (with its norm) and product for each
further format, gate and up two copies too.
MLX's own layers take eleven: norm · q, k, v · … · attention · O · residual · norm · gate, up ·
SwiGLU · down · residual, and one more where there are biases. Attention alone takes four where its
block's norm went into its first product.

A module keeps its place, its parameters and its attributes. Only its class gets another call, which
handles one token with a plain cache; all other arguments go to the module's own call. The parts
before and after attention are each traced once and replayed, because the Python time of a token is
spent on its calls.
"""

import functools
import itertools
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from mlxquant.kernels import backend, rotary
from mlxquant.kernels.check import trusted
from mlxquant.kernels.first_step import Gate
from mlxquant.kernels.matrix import sizes
from mlxquant.kernels.rotary import Rotary
from mlxquant.layers.block_parts import BlockParts, read_parts
from mlxquant.layers.blocks import Block
from mlxquant.layers.hooks import intercepted
from mlxquant.layers.in_place import InPlaceCache
from mlxquant.layers.joined import Joined, join


def read_plain(network: nn.Module, blocks: list[Block]) -> list[tuple[nn.Module, BlockParts]]:
    """(module, parts) of each of a network's ``blocks`` that is plain, or of its attention where
    only that is plain."""
    calls: dict[int, tuple[Any, ...]] = {}

    def through(module: nn.Module, own: Callable[..., Any], args: tuple[Any, ...],
                kwargs: dict[str, Any]) -> Any:
        if any(type(argument) is KVCache for argument in (*args, *kwargs.values())):
            calls[id(module)] = args, kwargs
        return own(*args, **kwargs)

    tried = [[block.module, *(child for child in block.module.children().values()
                              if isinstance(child, nn.Module))] for block in blocks]
    # Nothing is computed. Some networks take no cache, and some blocks no ``KVCache``.
    with suppress(Exception), intercepted(itertools.chain(*tried), through):
        network(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(network))
    found = []
    for modules in tried:
        read = ((module, read_parts(module, *calls[id(module)])) for module in modules
                if id(module) in calls)
        found += [(module, parts) for module, parts in read if parts is not None][:1]
    return found


def fuse(module: nn.Module, parts: BlockParts) -> "OneToken | None":
    """Let ``module`` run single tokens in few dispatches, packed or not; None where its layers
    cannot be joined or a GPU's rotary kernel is not trusted. Call ``watch`` once the module is
    final."""
    if backend.has_gpu() and not trusted("rotary"):  # its reference copies the cache
        return None
    modules, mlp = dict(module.named_modules()), parts.mlp
    wanted = [parts.qkv, (parts.out,), *((mlp.gate_up, (mlp.down,)) if mlp else ())]
    joined = [made for paths in wanted if (made := join([modules[path] for path in paths]))]
    if len(joined) < len(wanted):
        return None
    how = replace(parts.rotary, starts=joined[0].starts)
    mx.eval(how.steps, [product.bias for part in joined for product in part.products])
    own = type(module)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.one_token is not None:
            if (y := self.one_token(self, (*args, *kwargs.values()))) is not None:
                return y
            if self.one_token.outdated(self):
                self.one_token = None
        return own.__call__(self, *args, **kwargs)

    # The module holds it, not the class: a class refers to itself, and would keep all weights until
    # Python collects cycles.
    module.one_token = one_token = OneToken(
        _Halves(parts, how, joined[0], joined[1], tuple(joined[2:])))
    module.__class__ = type(own.__name__, (own,), {"__call__": call})
    return one_token


@dataclass(frozen=True, eq=False)
class _Halves:
    """What runs before attention and after it; ``mlp`` are the products of a block's second half,
    empty where only attention is fused."""

    parts: BlockParts
    how: Rotary
    qkv: Joined
    out: Joined
    mlp: tuple[Joined, ...]

    def before(self, x: mx.array, keys: mx.array, values: mx.array,
               place: mx.array) -> list[mx.array]:
        made = self.qkv(x.reshape(1, -1), self.parts.norm)
        turn = rotary.turn if trusted("rotary") else rotary.reference
        return turn(made, keys, values, place, self.how)

    def behind(self, y: mx.array, x: mx.array) -> mx.array:
        # In two dimensions: a reshape is no kernel, but costs its time.
        if self.parts.mlp is None:
            return self.out.whole(y.reshape(1, -1)).reshape(1, 1, -1)
        gate_up, down = self.mlp
        h = self.out.whole(y.reshape(1, -1), residual=x.reshape(1, -1))
        gated = gate_up.whole(h, self.parts.mlp.norm)
        return down.whole(gated, Gate(), h).reshape(x.shape)

    def keep(self, dtype: mx.Dtype) -> bool:
        """Whether all results for hidden states of ``dtype`` have that type, without computing."""
        x, how = mx.zeros((1, 1, self.parts.inputs), dtype), self.how
        made = [*self.qkv(x.reshape(1, -1), self.parts.norm),
                self.behind(mx.zeros((1, how.queries * how.size), dtype), x)]
        return all(array.dtype == dtype for array in made) and all(
            norm.dtype(x) == dtype for norm in how.norms or ())


class OneToken:
    """A module's call with one token and a cache."""

    def __init__(self, halves: _Halves):
        self.halves, self.shape = halves, (1, 1, halves.parts.inputs)
        self._before, self._behind = mx.compile(halves.before), mx.compile(halves.behind)
        self._keeps = functools.cache(halves.keep)
        self._held: list[tuple[nn.Module | None, str, Any]] = []

    def watch(self, module: nn.Module) -> None:
        """Record the arrays and layers of ``module``: what was traced is valid only for them."""
        self._held = [(None if inner is module else inner, key, value)  # which refers to this
                      for inner in module.modules() for key, value in inner.items()]

    def outdated(self, module: nn.Module) -> bool:
        """Whether an array or a layer of ``module`` was replaced, by loaded weights or adapters."""
        return any((module if inner is None else inner).get(key) is not value
                   for inner, key, value in self._held)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """None: a copy of the module has other weights, and so uses its own call."""

    def __call__(self, module: nn.Module, arguments: tuple[Any, ...]) -> mx.array | None:
        """The output of ``module`` for its arguments; None where they are not one token, a cache
        that can be written in place, and nothing else."""
        given = [argument for argument in arguments if argument is not None]
        if len(given) != 2:
            return None
        x, cache = given if isinstance(given[0], mx.array) else reversed(given)
        how = self.halves.how
        if (getattr(x, "shape", None) != self.shape or (held := InPlaceCache.of(cache)) is None
                or not self._keeps(x.dtype) or (not held.ready and self.outdated(module))
                or (room := held.room(how.stored, how.size, x.dtype)) is None):
            return None
        queries, keys, values = self._before(x, *room, sizes(held.offset))
        held.hold(keys, values)
        held.offset = end = held.offset + 1
        y = mx.fast.scaled_dot_product_attention(queries, keys[:, :, :end], values[:, :, :end],
                                                 scale=self.halves.parts.scale)
        return self._behind(y, x)
