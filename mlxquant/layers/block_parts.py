"""Read from a block's graph whether the block, or at least its attention, is the plain one, and
which layers it consists of.

    h = x + O attention(rotary(q z), rotary(k z), v z)    y = h + down(silu(gate u) ∘ up u)
    z = norm(x)                                           u = norm(h)

One token goes through the module as a graph (``graph.py``), in which not only layers, but rotary
embeddings, attention and the cache are calls. In a plain block the only other operations are two
additions and those of the gate; a block with any other operation is not plain.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache

from mlxquant.kernels.first_step import Norm
from mlxquant.kernels.rotary import Rotary
from mlxquant.layers.blocks import shape_of
from mlxquant.layers.graph import Graph, GraphCall
from mlxquant.layers.hooks import intercepted
from mlxquant.layers.replicated import ReplicatedLinear

_MARKED = {nn.Linear, nn.QuantizedLinear, ReplicatedLinear, nn.RMSNorm}  # these very classes
_SAME = {"Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze", "Transpose"}
_POSITIONS = (3, 1 << 20)  # at far positions some rotary embeddings change, and windows begin
_LISTENING = threading.Lock()  # MLX's functions are replaced in all threads at once


@dataclass(frozen=True, eq=False)
class Mlp:
    """The second half of a plain block: its norm, and its linear layers by their paths."""

    norm: Norm
    gate_up: tuple[str, str]
    down: str


@dataclass(frozen=True, eq=False)
class BlockParts:
    """The parts of attention on hidden states of ``inputs`` channels: linear layers by their paths
    in the module, ``rotary``, whose ``starts`` are set later (``fused_block.fuse``), and
    attention's ``scale``; for a whole block its ``norm`` and ``mlp`` too."""

    inputs: int
    qkv: tuple[str, str, str]
    rotary: Rotary
    scale: float
    out: str
    norm: Norm | None = None
    mlp: Mlp | None = None


class _Another(Exception):
    """Raised where a block is not a plain one."""


def _need(holds: bool) -> None:
    if not holds:
        raise _Another


def read_parts(module: nn.Module, args: tuple[Any, ...],
               kwargs: dict[str, Any]) -> BlockParts | None:
    """The parts of ``module``, a block or a block's attention. ``args`` and ``kwargs`` are what it
    is called with for one token: the hidden state, a cache, and nothing else. None where it is not
    the plain one."""
    try:
        near, far = (_read(module, args, kwargs, position) for position in _POSITIONS)
    except Exception:  # another kind, or one that no graph can hold
        return None
    return near if mx.array_equal(near.rotary.steps, far.rotary.steps) else None


def _read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
          position: int) -> BlockParts:
    arrays = [a for a in (*args, *kwargs.values()) if isinstance(a, mx.array)]
    _need(len(arrays) == 1)
    modules = [(path, m) for path, m in module.named_modules() if type(m) in _MARKED]
    block = _Block({id(m): path for path, m in modules}, position)

    def run(x: mx.array) -> mx.array:
        def instead(argument: Any) -> Any:
            _need(argument is None or argument is arrays[0] or type(argument) is KVCache)
            return x if argument is arrays[0] else argument and _Cache(position, block)

        with _listening(block, [m for _, m in modules]):
            return module(*map(instead, args), **{k: instead(a) for k, a in kwargs.items()})

    block.trace(run, [mx.zeros(arrays[0].shape, arrays[0].dtype)], _SAME)
    return block.parts()


@contextmanager
def _listening(graph: Graph, modules: list[nn.Module]) -> Iterator[None]:
    here = threading.get_ident()

    def rope(x: mx.array, dims: int, **how: Any) -> mx.array:
        return (graph.note("rope", {"dims": dims, **how}, [x], [x.shape])[0]
                if threading.get_ident() == here else own[0](x, dims, **how))

    def attention(q: mx.array, k: mx.array, v: mx.array, **how: Any) -> mx.array:
        return (graph.note("attention", how, [q, k, v], [q.shape])[0]
                if threading.get_ident() == here else own[1](q, k, v, **how))

    with _LISTENING, intercepted(modules, graph.through):
        own = mx.fast.rope, mx.fast.scaled_dot_product_attention
        mx.fast.rope, mx.fast.scaled_dot_product_attention = rope, attention
        try:
            yield
        finally:
            mx.fast.rope, mx.fast.scaled_dot_product_attention = own


class _Cache(KVCache):
    """A cache in the middle of a text: it counts as holding ``offset`` tokens."""

    def __init__(self, offset: int, graph: Graph):
        super().__init__()
        self.offset, self._graph = offset, graph

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> list[mx.array]:
        # As long as it would be: of one token, the last so many are all.
        shapes = [(*a.shape[:2], self.offset + 1, a.shape[3]) for a in (keys, values)]
        return self._graph.note("cache", None, [keys, values], shapes)


class _Block(Graph):
    """A block's graph at a ``position`` of a text; ``paths`` are modules' paths by their id."""

    def __init__(self, paths: dict[int, str], position: int):
        super().__init__()
        self.paths, self.position = paths, position

    def parts(self) -> BlockParts:
        _need(all(len(set(node.shapes)) == 1 for node in self.makers.values()))
        attention, cache = (next(call for call in self.calls if call.kind == kind)
                            for kind in ("attention", "cache"))
        _need(attention.inputs[1:] == cache.outputs)
        ropes = [self.maker("rope", name) for name in (attention.inputs[0], cache.inputs[0])]
        before = [rope.inputs[0] for rope in ropes]
        heads = [call for call in self.calls if call.outputs[0] in before and call.kind == "norm"]
        if heads:
            heads = [self.maker("norm", name) for name in before]
            before = [call.inputs[0] for call in heads]
        qkv = [self.maker("linear", name) for name in (*before, cache.inputs[1])]
        (z,), *others = (call.inputs for call in qkv)
        _need(others == 2 * [[z]])
        out = next(call for call in self.calls if call.inputs == attention.outputs)
        _need(out.kind == "linear")
        how = {key: value for key, value in attention.what.items() if value is not None}
        _need(how.keys() == {"scale"})
        q, k, v = map(self.path, qkv)
        parts = BlockParts(shape_of(qkv[0].what)[-1], (q, k, v),
                           _rotary(ropes, heads, qkv, self.position), how["scale"], self.path(out))
        used = 8 + len(heads)
        if (z, self.y) == (self.x, out.outputs[0]):
            _need(not self.makers and len(self.calls) == used)
            return parts
        norm = self.maker("norm", z)
        _need(norm.inputs == [self.x] and len(self.calls) == used + 5)
        return replace(parts, norm=_as_step(norm), mlp=self.mlp(out.outputs[0]))

    def mlp(self, attended: str) -> Mlp:
        """The block's second half, which must account for all operations that are left."""
        between = {name: (node.name, set(node.inputs)) for name, node in self.makers.items()}
        h = next(name for name in between if between[name][1] == {self.x, attended})
        down = self.maker("linear", *between[self.y][1] - {h})
        gate = self.maker("linear", *(name for how, names in between.values() if how == "Sigmoid"
                                      for name in names))
        norm = self.maker("norm", *gate.inputs)
        up = next(call for call in self.calls if call.inputs == gate.inputs and call is not gate)
        _need(norm.inputs == [h] and up.kind == "linear")
        gated, = down.inputs
        activated, = between[gated][1] - {*up.outputs}
        sigmoid, = between[activated][1] - {*gate.outputs}
        _need(between == {h: ("Add", {self.x, attended}), self.y: ("Add", {h, *down.outputs}),
                          sigmoid: ("Sigmoid", {*gate.outputs}),
                          activated: ("Multiply", {sigmoid, *gate.outputs}),
                          gated: ("Multiply", {activated, *up.outputs})})
        return Mlp(_as_step(norm), (self.path(gate), self.path(up)), self.path(down))

    def maker(self, kind: str, name: str) -> GraphCall:
        """The call that made an array, which must be of such a kind."""
        call = next(call for call in self.calls if name in call.outputs)
        _need(call.kind == kind)
        return call

    def path(self, call: GraphCall) -> str:
        return self.paths[id(call.what)]


def _as_step(norm: GraphCall) -> Norm:
    return Norm(norm.what.weight, norm.what.eps)


def _rotary(ropes: list[GraphCall], norms: list[GraphCall], qkv: list[GraphCall],
            position: int) -> Rotary:
    (_, queries, _, size), (_, stored, _, key_size) = (rope.made.shape for rope in ropes)
    _need(size == key_size and size % 2 == 0 and 8 <= size <= 1024)
    _need([shape_of(call.what)[-2] for call in qkv]
          == [heads * size for heads in (queries, stored, stored)])
    _need(all(rope.what["offset"] == position for rope in ropes))
    steps = [_steps(**rope.what) for rope in ropes]
    traditional = {rope.what["traditional"] for rope in ropes}
    _need(np.array_equal(steps[0], steps[1]) and len(traditional) == 1)
    made = [_as_step(norm) for norm in norms]
    _need(all(len(norm.weight) == size for norm in made))
    return Rotary(queries, stored, size, (0, 0, 0), mx.array(steps[0].astype(np.float32)),
                  traditional.pop(), (made[0], made[1]) if made else None)


def _steps(dims: int, base: float | None, scale: float, freqs: mx.array | None = None,
           **_: Any) -> np.ndarray:
    """Radians a position, (dims / 2,), from the arguments of a call of ``mx.fast.rope``."""
    if freqs is not None:
        return scale / np.array(freqs.astype(mx.float32), np.float64)
    _need(base is not None)
    return scale * float(base or 1) ** (-np.arange(0, dims, 2) / dims)
