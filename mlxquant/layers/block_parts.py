"""What a transformer block consists of, read from its graph: whether it is the plain one, or at
least its attention is.

    h = x + O attention(rotary(q z), rotary(k z), v z)    y = h + down(silu(gate u) ∘ up u)
    z = norm(x)                                           u = norm(h)

One token goes through the module as a graph. Each linear layer, norm, rotary embedding, attention
and call of the cache hands on an array of its own, an input of the graph, and what it was handed is
an output. So the names in the exported graph tell what is connected, and the only operations left
between are two additions and the gate's: whatever else a block does, it is another block.
"""

import threading
from collections.abc import Callable, Iterator
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
from mlxquant.layers.hooks import intercepted
from mlxquant.layers.replicated import ReplicatedLinear

_MARKED = {nn.Linear, nn.QuantizedLinear, ReplicatedLinear, nn.RMSNorm}  # these very classes
_Operations = dict[str, tuple[str, set[str]]]  # by what they make: their names and inputs
_SHAPES = {"Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze"}
_POSITIONS = (3, 1 << 20)  # some rotary embeddings change far out, and windows begin
_LISTENING = threading.Lock()  # MLX's functions are exchanged for all threads


@dataclass(frozen=True, eq=False)
class Mlp:
    """The second half of a plain block: its norm, and its linear layers by their paths."""

    norm: Norm
    gate_up: tuple[str, str]
    down: str


@dataclass(frozen=True, eq=False)
class Parts:
    """Attention to a hidden state of so many ``inputs``: linear layers by their paths in the
    module, what is between them (``rotary``, whose heads start where its ``starts`` will say, and
    attention's ``scale``); of a whole block its ``norm`` and ``mlp`` too."""

    inputs: int
    qkv: tuple[str, str, str]
    rotary: Rotary
    scale: float
    out: str
    norm: Norm | None = None
    mlp: Mlp | None = None


class _Another(Exception):
    """It is another kind of block."""


def _need(holds: bool) -> None:
    if not holds:
        raise _Another


@dataclass(frozen=True, eq=False)
class _Call:
    """What one call was handed and made: arrays at first, then their names in the graph too."""

    kind: str
    what: Any
    handed: list[mx.array]
    made: list[mx.array]
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


def read_parts(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parts | None:
    """The parts of a block, or of a block's attention, that is called with such arguments for one
    token: the hidden state, a cache, and nothing else. None where it is not the plain one."""
    try:
        near, far = (_read(module, args, kwargs, position) for position in _POSITIONS)
    except Exception:  # another kind, or one that no graph can hold
        return None
    return near if mx.array_equal(near.rotary.steps, far.rotary.steps) else None


def _read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
          position: int) -> Parts:
    arrays = [a for a in (*args, *kwargs.values()) if isinstance(a, mx.array)]
    _need(len(arrays) == 1)
    modules = {id(m): (path, m) for path, m in module.named_modules() if type(m) in _MARKED}

    def run(x: mx.array, *given: mx.array) -> list[mx.array]:
        recorder.start(given)

        def instead(argument: Any) -> Any:
            _need(argument is None or argument is arrays[0] or type(argument) is KVCache)
            return x if argument is arrays[0] else argument and _Recorder(position, recorder)

        with recorder.listening([module for _, module in modules.values()]):
            y = module(*map(instead, args), **{k: instead(a) for k, a in kwargs.items()})
        return [y, *(array for call in recorder.calls for array in call.handed)]

    recorder = _Calls()
    exported: list[dict[str, Any]] = []
    run(x := mx.zeros(arrays[0].shape, arrays[0].dtype))
    mx.export_function(exported.append, run, x,
                       *(array for call in recorder.calls for array in call.made))
    paths = {key: path for key, (path, _) in modules.items()}
    return _Graph(*_named(exported, recorder.calls), paths, position).parts()


class _Calls:
    """Everything that a block calls, in order."""

    def start(self, given: tuple[mx.array, ...]) -> None:
        """Hand on the arrays ``given``; without any, zeros."""
        self.calls: list[_Call] = []
        self._given = iter(given) if given else None

    def note(self, kind: str, what: Any, handed: list[mx.array],
             shapes: list[tuple[int, ...]]) -> list[mx.array]:
        zero = mx.zeros((), handed[0].dtype)  # which takes no memory in any shape
        made = [mx.broadcast_to(zero, shape) if self._given is None else next(self._given)
                for shape in shapes]
        self.calls.append(_Call(kind, what, handed, made))
        return made

    def through(self, module: nn.Module, own: Callable[..., Any], args: tuple[Any, ...],
                kwargs: dict[str, Any]) -> mx.array:
        is_norm = isinstance(module, nn.RMSNorm)
        shape = args[0].shape if is_norm else (*args[0].shape[:-1], shape_of(module)[-2])
        return self.note("norm" if is_norm else "linear", module, [args[0]], [shape])[0]

    @contextmanager
    def listening(self, modules: list[nn.Module]) -> Iterator[None]:
        here = threading.get_ident()

        def rope(x: mx.array, dims: int, **how: Any) -> mx.array:
            return (self.note("rope", {"dims": dims, **how}, [x], [x.shape])[0]
                    if threading.get_ident() == here else own[0](x, dims, **how))

        def attention(q: mx.array, k: mx.array, v: mx.array, **how: Any) -> mx.array:
            return (self.note("attention", how, [q, k, v], [q.shape])[0]
                    if threading.get_ident() == here else own[1](q, k, v, **how))

        with _LISTENING, intercepted(modules, self.through):
            own = mx.fast.rope, mx.fast.scaled_dot_product_attention
            mx.fast.rope, mx.fast.scaled_dot_product_attention = rope, attention
            try:
                yield
            finally:
                mx.fast.rope, mx.fast.scaled_dot_product_attention = own


class _Recorder(KVCache):
    """A cache in the middle of a text."""

    def __init__(self, offset: int, calls: _Calls):
        super().__init__()
        self.offset, self._calls = offset, calls

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> list[mx.array]:
        # As long as it would be: of one token, the last so many are all.
        shapes = [(*a.shape[:2], self.offset + 1, a.shape[3]) for a in (keys, values)]
        return self._calls.note("cache", None, [keys, values], shapes)


def _named(exported: list[dict[str, Any]], calls: list[_Call]) -> tuple[
        list[_Call], _Operations, str, str]:
    """The calls with names, the operations between them, and the names of x and y."""
    same: dict[str, str] = {}
    between: _Operations = {}
    for part in exported:
        if part["type"] == "inputs":
            x, *given = (name for name, *_ in part["inputs"])
        elif part["type"] == "outputs":
            ends = [name for name, *_ in part["outputs"]]
        elif part["type"] == "primitive":
            inputs = [same.get(name, name) for name, *_ in part["inputs"]]
            shapes, output = [tuple(shape) for _, shape, _ in part["inputs"]], part["outputs"][0][0]
            if part["name"] in _SHAPES or (part["name"] == "Transpose" and _keeps_order(
                    part["arguments"][0], shapes[0])):
                same[output] = inputs[0]
            else:
                _need(len(set(shapes)) == 1)
                between[output] = part["name"], set(inputs)
    y, *handed = (same.get(name, name) for name in ends)
    names, outputs = iter(handed), iter(given)
    return [_Call(call.kind, call.what, call.handed, call.made,
                  tuple(next(names) for _ in call.handed), tuple(next(outputs) for _ in call.made))
            for call in calls], between, x, y


def _keeps_order(axes: list[int], shape: tuple[int, ...]) -> bool:
    """Whether only axes of length 1 change places."""
    long = [axis for axis in axes if shape[axis] > 1]
    return long == sorted(long)


@dataclass(frozen=True, eq=False)
class _Graph:
    """The calls with names, the operations between them, the names of x and y, and the paths of the
    modules that were called."""

    calls: list[_Call]
    between: _Operations
    x: str
    y: str
    paths: dict[int, str]
    position: int

    def parts(self) -> Parts:
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
        _need(others == 2 * [(z,)])
        out = next(call for call in self.calls if call.inputs == attention.outputs)
        _need(out.kind == "linear")
        how = {key: value for key, value in attention.what.items() if value is not None}
        _need(how.keys() == {"scale"})
        q, k, v = map(self.path, qkv)
        parts = Parts(shape_of(qkv[0].what)[-1], (q, k, v),
                      _rotary(ropes, heads, qkv, self.position), how["scale"], self.path(out))
        used = 8 + len(heads)
        if (z, self.y) == (self.x, out.outputs[0]):
            _need(not self.between and len(self.calls) == used)
            return parts
        norm = self.maker("norm", z)
        _need(norm.inputs == (self.x,) and len(self.calls) == used + 5)
        return replace(parts, norm=_as_step(norm), mlp=self.mlp(out.outputs[0]))

    def mlp(self, attended: str) -> Mlp:
        """What follows attention: all that is left."""
        between = self.between
        h = next(name for name in between if between[name][1] == {self.x, attended})
        down = self.maker("linear", *between[self.y][1] - {h})
        gate = self.maker("linear", *(name for how, names in between.values() if how == "Sigmoid"
                                      for name in names))
        norm = self.maker("norm", *gate.inputs)
        up = next(call for call in self.calls if call.inputs == gate.inputs and call is not gate)
        _need(norm.inputs == (h,) and up.kind == "linear")
        gated, = down.inputs
        activated, = between[gated][1] - {*up.outputs}
        sigmoid, = between[activated][1] - {*gate.outputs}
        _need(between == {h: ("Add", {self.x, attended}), self.y: ("Add", {h, *down.outputs}),
                          sigmoid: ("Sigmoid", {*gate.outputs}),
                          activated: ("Multiply", {sigmoid, *gate.outputs}),
                          gated: ("Multiply", {activated, *up.outputs})})
        return Mlp(_as_step(norm), (self.path(gate), self.path(up)), self.path(down))

    def maker(self, kind: str, name: str) -> _Call:
        """The call that made an array, which must be of such a kind."""
        call = next(call for call in self.calls if name in call.outputs)
        _need(call.kind == kind)
        return call

    def path(self, call: _Call) -> str:
        return self.paths[id(call.what)]


def _as_step(norm: _Call) -> Norm:
    return Norm(norm.what.weight, norm.what.eps)


def _rotary(ropes: list[_Call], norms: list[_Call], qkv: list[_Call], position: int) -> Rotary:
    (_, queries, _, size), (_, stored, _, key_size) = (rope.handed[0].shape for rope in ropes)
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
    """Radians a position, (dims / 2,), of what ``mx.fast.rope`` is called with."""
    if freqs is not None:
        return scale / np.array(freqs.astype(mx.float32), np.float64)
    _need(base is not None)
    return scale * float(base or 1) ** (-np.arange(0, dims, 2) / dims)
