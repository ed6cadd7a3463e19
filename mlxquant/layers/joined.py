"""Linear layers that read one input, as one product: a packed group, or MLX's own, stacked."""

import itertools
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlxquant.kernels.first_step import AsIs
from mlxquant.kernels.matrix import NOTHING, Added
from mlxquant.layers.blocks import shape_of
from mlxquant.layers.packed import PackedGroup, PackedLinear

_FORM = ("bits", "group_size", "mode")  # of MLX's quantised layers, that they must share


class Stacked:
    """Layers of MLX, alike but for their rows. Their arrays become views of the stacked ones, so
    that nothing is held twice."""

    def __init__(self, layers: list[nn.Module]):
        self.form = {key: getattr(layers[0], key) for key in _FORM if hasattr(layers[0], key)}
        self.arrays: dict[str, mx.array] = {}
        for name in ("weight", "scales", "biases"):
            if layers[0].get(name) is not None:
                self.arrays[name] = _stack(layers, name) if len(layers) > 1 else layers[0][name]

    def stacked(self, x: mx.array, first: AsIs | None, added: Added = NOTHING) -> mx.array:
        """As ``PackedGroup.stacked``."""
        x, weight = first(x) if first else x, self.arrays["weight"]
        if "scales" not in self.arrays:
            return added(x @ weight.T)
        return added(mx.quantized_matmul(x, weight, self.arrays["scales"],
                                         self.arrays.get("biases"), **self.form))


def _stack(layers: list[nn.Module], name: str) -> mx.array:
    whole = mx.concatenate([layer[name] for layer in layers])
    start = 0
    for layer in layers:
        end = start + len(layer[name])
        layer[name] = whole[start:end]
        start = end
    mx.eval(whole, *(layer[name] for layer in layers))
    mx.clear_cache()
    return whole


@dataclass(frozen=True, eq=False)
class Joined:
    """The product, the row at which each layer's part of it starts, and the biases or none."""

    product: PackedGroup | Stacked
    starts: tuple[int, ...]
    bias: mx.array | None

    def __call__(self, x: mx.array, first: AsIs | None = None,
                 residual: mx.array | None = None) -> mx.array:
        """All layers' outputs (tokens, m) of ``x`` (tokens, n), to which ``first`` is done before,
        or what a packed group does by itself; ``residual`` is added."""
        return self.product.stacked(x, first, Added(self.bias, residual))


def join(layers: list[nn.Module]) -> Joined | None:
    """Layers that read one input; None where no one product has all of them, and only them."""
    if all(isinstance(layer, PackedLinear) for layer in layers):
        group = layers[0].group
        if len(layers) != group.siblings or any(layer.group is not group for layer in layers):
            return None
        starts = tuple(group.bounds[layer.index] for layer in layers)
        dtype = group.replica_out.dtype
        return Joined(group, starts, _biases(sorted(layers, key=lambda layer: layer.index), dtype))
    if any(type(layer) not in (nn.Linear, nn.QuantizedLinear) for layer in layers):
        return None
    kinds = {(type(layer), *(getattr(layer, key, None) for key in _FORM), layer.weight.dtype,
              layer.get("scales", layer.weight).dtype) for layer in layers}
    if len(kinds) != 1:
        return None
    ends = itertools.accumulate((rows_of(layer) for layer in layers), initial=0)
    dtype = layers[0].get("scales", layers[0].weight).dtype
    return Joined(Stacked(layers), tuple(ends)[:-1], _biases(layers, dtype))


def _biases(layers: list[nn.Module], dtype: mx.Dtype) -> mx.array | None:
    """The layers' biases one behind the other, zeros where one has none."""
    if not any("bias" in layer for layer in layers):
        return None
    parts = [layer.bias if "bias" in layer else mx.zeros(rows_of(layer), dtype) for layer in layers]
    return mx.concatenate(parts)


def rows_of(layer: nn.Module) -> int:
    return layer.rows if isinstance(layer, PackedLinear) else shape_of(layer)[-2]
