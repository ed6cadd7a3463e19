"""What a transformer block consists of, read from its graph: whether it is the plain one.

    h = x + O attention(rotary(q x), rotary(k x), v x)        y = h + MLP(h)

One token goes through the block as a graph. Each packed layer, norm of heads, rotary embedding,
attention and call of the cache hands on an array of its own, an input of the graph, and what it was
handed is an output. So the names in the exported graph tell what is connected, and the only
operations left between are the two additions: whatever else a block does, it is another block.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import KVCache

from mlxquant.kernels.first_step import Norm
from mlxquant.kernels.rotary import Rotary
from mlxquant.layers.hooks import intercepted
from mlxquant.layers.packed import PackedGroup, PackedLinear, PackedMLP, TracedForFew

_SHAPES = {"Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze"}
_POSITIONS = (3, 1 << 20)  # some rotary embeddings change far out


@dataclass(frozen=True, eq=False)
class Parts:
    """``qkv`` is one group of three, with ``bias`` (m,) or none; ``scale`` is that of attention."""

    qkv: PackedGroup
    bias: mx.array | None
    out: PackedLinear
    mlp: PackedMLP
    rotary: Rotary
    scale: float


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


def read_parts(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Parts | None:
    """The parts of a block that its network calls with such arguments for one token: the hidden
    state, a cache, and nothing else. None where it is not the plain block of packed layers."""
    try:
        near, far = (_read(block, args, kwargs, position) for position in _POSITIONS)
    except Exception:  # another kind, or one that no graph can hold
        return None
    return near if mx.array_equal(near.rotary.steps, far.rotary.steps) else None


def _read(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any],
          position: int) -> Parts:
    arrays = [a for a in (*args, *kwargs.values()) if isinstance(a, mx.array)]
    _need(len(arrays) == 1)
    modules = [m for m in block.modules()
               if type(m) in (PackedLinear, PackedMLP, TracedForFew, nn.RMSNorm)]

    def run(x: mx.array, *given: mx.array) -> list[mx.array]:
        recorder.start(given)

        def instead(argument: Any) -> Any:
            _need(argument is None or argument is arrays[0] or type(argument) is KVCache)
            return x if argument is arrays[0] else argument and _Recorder(position, recorder)

        with recorder.listening(modules):
            y = block(*map(instead, args), **{k: instead(a) for k, a in kwargs.items()})
        return [y, *(array for call in recorder.calls for array in call.handed)]

    recorder = _Calls()
    exported: list[dict[str, Any]] = []
    run(x := mx.zeros(arrays[0].shape, arrays[0].dtype))
    mx.export_function(exported.append, run, x, *recorder.made())
    return _match(*_named(exported, recorder.calls), position)


class _Calls:
    """Everything that a block calls, in order."""

    def start(self, given: tuple[mx.array, ...]) -> None:
        """Hand on the arrays ``given``; without any, zeros."""
        self.calls: list[_Call] = []
        self._given = iter(given) if given else None

    def made(self) -> list[mx.array]:
        return [array for call in self.calls for array in call.made]

    def note(self, kind: str, what: Any, handed: list[mx.array],
             shapes: list[tuple[int, ...]]) -> list[mx.array]:
        made = [mx.zeros(shape, handed[0].dtype) if self._given is None else next(self._given)
                for shape in shapes]
        self.calls.append(_Call(kind, what, handed, made))
        return made

    def through(self, module: nn.Module, own: Callable[..., Any], args: tuple[Any, ...],
                kwargs: dict[str, Any]) -> mx.array:
        inner, shape = module.module if isinstance(module, TracedForFew) else module, args[0].shape
        if isinstance(inner, PackedLinear):
            shape = (*shape[:-1], inner.rows)
        return self.note(type(inner).__name__, inner, [args[0]], [shape])[0]

    @contextmanager
    def listening(self, modules: list[nn.Module]) -> Iterator[None]:
        own = mx.fast.rope, mx.fast.scaled_dot_product_attention

        def rope(x: mx.array, dims: int, **how: Any) -> mx.array:
            return self.note("rope", {"dims": dims, **how}, [x], [x.shape])[0]

        def attention(q: mx.array, k: mx.array, v: mx.array, **how: Any) -> mx.array:
            return self.note("attention", how, [q, k, v], [q.shape])[0]

        mx.fast.rope, mx.fast.scaled_dot_product_attention = rope, attention
        try:
            with intercepted(modules, self.through):
                yield
        finally:
            mx.fast.rope, mx.fast.scaled_dot_product_attention = own


class _Recorder(KVCache):
    """A cache in the middle of a text."""

    def __init__(self, offset: int, calls: _Calls):
        super().__init__()
        self.offset, self._calls = offset, calls

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> list[mx.array]:
        return self._calls.note("cache", None, [keys, values], [keys.shape, values.shape])


def _named(exported: list[dict[str, Any]], calls: list[_Call]) -> tuple[
        list[_Call], dict[str, set[str]], str, str]:
    """The calls with names, the additions by what they make, and the names of x and y."""
    same: dict[str, str] = {}
    added: dict[str, set[str]] = {}
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
                _need(part["name"] == "Add" and shapes[0] == shapes[1])
                added[output] = set(inputs)
    y, *handed = (same.get(name, name) for name in ends)
    names, outputs = iter(handed), iter(given)
    return [_Call(call.kind, call.what, call.handed, call.made,
                  tuple(next(names) for _ in call.handed), tuple(next(outputs) for _ in call.made))
            for call in calls], added, x, y


def _keeps_order(axes: list[int], shape: tuple[int, ...]) -> bool:
    """Whether only axes of length 1 change places."""
    long = [axis for axis in axes if shape[axis] > 1]
    return long == sorted(long)


def _match(calls: list[_Call], added: dict[str, set[str]], x: str, y: str, position: int) -> Parts:
    makers = {name: call for call in calls for name in call.outputs}

    def by(kind: str, name: str) -> _Call:
        _need(makers[name].kind == kind)
        return makers[name]

    attention, cache, mlp = (call for kind in ("attention", "cache", "PackedMLP")
                             for call in calls if call.kind == kind)
    _need(attention.inputs[1:] == cache.outputs)
    ropes = [by("rope", name) for name in (attention.inputs[0], cache.inputs[0])]
    before = [rope.inputs[0] for rope in ropes]
    norms = [makers[name] for name in before if makers[name].kind == "RMSNorm"]
    if norms:
        before = [by("RMSNorm", name).inputs[0] for name in before]
    qkv = [by("PackedLinear", name) for name in (*before, cache.inputs[1])]
    out = next(call for call in calls if call.inputs == attention.outputs)
    _need(out.kind == "PackedLinear" and out.what.group.siblings == 1)
    h, = mlp.inputs
    _need(added == {h: {x, *out.outputs}, y: {h, *mlp.outputs}})
    _need([call.inputs for call in qkv] == 3 * [(x,)])
    _need(len(calls) == 9 + len(norms))
    group = qkv[0].what.group
    _need(group.siblings == 3 and all(call.what.group is group for call in qkv))
    how = {key: value for key, value in attention.what.items() if value is not None}
    _need(how.keys() == {"scale"})
    rotary = _rotary([call.what for call in qkv], ropes, [norm.what for norm in norms], position)
    return Parts(group, _biases(group, [call.what for call in qkv]), out.what, mlp.what, rotary,
                 how["scale"])


def _rotary(qkv: list[PackedLinear], ropes: list[_Call], norms: list[nn.RMSNorm],
            position: int) -> Rotary:
    (_, queries, _, size), (_, stored, _, key_size) = (rope.handed[0].shape for rope in ropes)
    _need(size == key_size and size % 2 == 0 and 8 <= size <= 1024)
    _need([layer.rows for layer in qkv] == [heads * size for heads in (queries, stored, stored)])
    _need(all(rope.what["offset"] == position for rope in ropes))
    steps = [_steps(**rope.what) for rope in ropes]
    traditional = {rope.what["traditional"] for rope in ropes}
    _need(np.array_equal(steps[0], steps[1]) and len(traditional) == 1)
    starts = [layer.group.bounds[layer.index] for layer in qkv]
    made = [Norm(norm.weight, norm.eps) for norm in norms]
    _need(all(len(norm.weight) == size for norm in made))
    return Rotary(queries, stored, size, (starts[0], starts[1], starts[2]),
                  mx.array(steps[0].astype(np.float32)), traditional.pop(),
                  (made[0], made[1]) if made else None)


def _steps(dims: int, base: float | None, scale: float, freqs: mx.array | None = None,
           **_: Any) -> np.ndarray:
    """Radians a position, (dims / 2,), of what ``mx.fast.rope`` is called with."""
    if freqs is not None:
        return scale / np.array(freqs.astype(mx.float32), np.float64)
    _need(base is not None)
    return scale * float(base or 1) ** (-np.arange(0, dims, 2) / dims)


def _biases(group: PackedGroup, layers: list[PackedLinear]) -> mx.array | None:
    """The biases of a group's layers, zeros where one has none, one behind the other."""
    if not any("bias" in layer for layer in layers):
        return None
    order = sorted(layers, key=lambda layer: layer.index)
    parts = [layer.bias if "bias" in layer else mx.zeros(layer.rows, group.replica_out.dtype)
             for layer in order]
    return mx.concatenate(parts)
