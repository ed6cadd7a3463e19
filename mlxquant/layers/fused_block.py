"""Plain transformer blocks of packed layers, one token at a time: ten dispatches each.

    norm and preparation · q, k, v · norms of heads, rotary embedding and the cache's write ·
    attention · preparation · O and the residual · norm and preparation · gate, up · SwiGLU and
    preparation · down and the residual

A block keeps its place, its parameters and its attributes: only its class gets another call, which
takes one token behind a plain cache, and leaves everything else to the block's own. What stands
before attention and what stands behind it is traced once each and replayed, as Python's time for a
token is that of its calls.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from mlxquant.kernels import rotary
from mlxquant.kernels.check import trusted
from mlxquant.kernels.matrix import Added
from mlxquant.layers.block_parts import Parts, read_parts
from mlxquant.layers.blocks import Block
from mlxquant.layers.hooks import intercepted
from mlxquant.layers.in_place import InPlaceCache, place_of
from mlxquant.layers.packed import PackedMLP


def fuse_blocks(network: nn.Module, blocks: list[Block]) -> None:
    """Have the plain ones of a network's ``blocks`` take single tokens in few dispatches."""
    candidates = [block.module for block in blocks
                  if any(isinstance(module, PackedMLP) for module in block.module.modules())]
    if not candidates:
        return
    calls: dict[int, tuple[Any, ...]] = {}

    def through(block: nn.Module, own: Callable[..., Any], args: tuple[Any, ...],
                kwargs: dict[str, Any]) -> Any:
        calls[id(block)] = args, kwargs
        return next(a for a in (*args, *kwargs.values()) if isinstance(a, mx.array))

    try:
        with intercepted(candidates, through):
            network(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(network))
    except Exception:  # it takes no cache, or its blocks make more than a hidden state
        return
    for block in candidates:
        parts = read_parts(block, *calls[id(block)]) if id(block) in calls else None
        if parts is not None:
            mx.eval(parts.rotary.steps, parts.bias)
            _exchange_call(block, OneToken(parts))


def _exchange_call(block: nn.Module, one_token: "OneToken") -> None:
    own = type(block)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        y = one_token(*args, *kwargs.values())
        return own.__call__(self, *args, **kwargs) if y is None else y

    block.__class__ = type(own.__name__, (own,), {"__call__": call})


class OneToken:
    """A block's parts as they take one token."""

    def __init__(self, parts: Parts):
        self.parts, self.shape = parts, (1, 1, parts.qkv.inputs)
        self._dtypes: dict[mx.Dtype, bool] = {}
        self._before, self._after = mx.compile(self._to_attention), mx.compile(self._behind)

    def __call__(self, *arguments: Any) -> mx.array | None:
        """The block's result of what it is called with; None where that is not one token, a cache
        that can be written in place, and nothing else."""
        x = cache = None
        for argument in arguments:
            if argument is None:
                continue
            if x is None and isinstance(argument, mx.array):
                x = argument
            elif cache is None:
                cache = argument
            else:
                return None
        if x is None or x.shape != self.shape or not self._keeps(x.dtype):
            return None
        how, held = self.parts.rotary, InPlaceCache.of(cache)
        if held is None or (room := held.room(how.stored, how.size, x.dtype)) is None:
            return None
        queries, keys, values = self._before(x, *room, place_of(held.offset))
        held.hold(keys, values)
        held.offset = end = held.offset + 1
        y = mx.fast.scaled_dot_product_attention(queries, keys[:, :, :end], values[:, :, :end],
                                                 scale=self.parts.scale)
        return self._after(y, x)

    def _keeps(self, dtype: mx.Dtype) -> bool:
        """Whether a hidden state of ``dtype`` keeps it through the norms."""
        if dtype not in self._dtypes:
            norms = [self.parts.qkv.first, *(self.parts.rotary.norms or ())]
            like = mx.zeros(1, dtype)
            self._dtypes[dtype] = all(norm.dtype(like) == dtype for norm in norms)
        return self._dtypes[dtype]

    def _to_attention(self, x: mx.array, keys: mx.array, values: mx.array,
                      place: mx.array) -> list[mx.array]:
        parts = self.parts
        made = parts.qkv.stacked(x.reshape(1, -1), added=Added(parts.bias))
        turn = rotary.turn if trusted("rotary") else rotary.reference
        return turn(made, keys, values, place, parts.rotary)

    def _behind(self, y: mx.array, x: mx.array) -> mx.array:
        out = self.parts.out  # in two dimensions: a reshape is no kernel, but costs its time
        h = out.group.stacked(y.reshape(1, -1), added=Added(out.get("bias"), x))
        return self.parts.mlp.onto(h, h).reshape(self.shape)
