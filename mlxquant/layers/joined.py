"""Linear layers that read one input, as one product: a packed group, or MLX's own, stacked."""

import itertools
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlxquant.kernels.first_step import AsIs
from mlxquant.kernels.matrix import NOTHING, Added
from mlxquant.layers.packed import PackedGroup, PackedLinear

_FORM = ("bits", "group_size", "mode")  # of MLX's quantised layers, that they must share


class Stacked:
    """Layers of MLX, alike but for their rows. Their arrays become views of the stacked ones, so
    that nothing is held twice."""

    def __init__(self, layers: list[nn.Module]):
        self.form = {key: getattr(layers[0], key) for key in _FORM if hasattr(layers[0], key)}
        self.bounds = (0, *itertools.accumulate(len(layer.weight) for layer in layers))
        self.arrays: dict[str, mx.array] = {}
        for name in ("weight", "scales", "biases"):
            if layers[0].get(name) is not None:
                self.arrays[name] = (self._stack(layers, name) if len(layers) > 1
                                     else layers[0][name])

    def _stack(self, layers: list[nn.Module], name: str) -> mx.array:
        whole = mx.concatenate([layer[name] for layer in layers])
        for layer, start, end in zip(layers, self.bounds, self.bounds[1:]):
            layer[name] = whole[start:end]
        mx.eval(whole, *(layer[name] for layer in layers))
        mx.clear_cache()
        return whole

    def stacked(self, x: mx.array, first: AsIs | None, added: Added = NOTHING) -> mx.array:
        """As ``PackedGroup.stacked``."""
        x, weight = first(x) if first else x, self.arrays["weight"]
        if "scales" not in self.arrays:
            return added(x @ weight.T)
        return added(mx.quantized_matmul(x, weight, self.arrays["scales"],
                                         self.arrays.get("biases"), **self.form))


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
    kinds = {(type(layer), *(getattr(layer, key, None) for key in _FORM),
              *(layer[name].dtype for name in ("weight", "scales") if name in layer))
             for layer in layers}
    product: PackedGroup | Stacked
    if len(kinds) == 1 and type(layers[0]) in (nn.Linear, nn.QuantizedLinear):
        product, places = Stacked(layers), list(range(len(layers)))
    elif all(isinstance(layer, PackedLinear) for layer in layers):
        product, places = layers[0].group, [layer.index for layer in layers]
        if (len(layers) + 1 != len(product.bounds)
                or any(layer.group is not product for layer in layers)):
            return None
    else:
        return None
    bias, bounds = None, product.bounds
    if given := {place: layer.bias for place, layer in zip(places, layers) if "bias" in layer}:
        dtype = next(iter(given.values())).dtype
        bias = mx.concatenate([given.get(i, mx.zeros(bounds[i + 1] - bounds[i], dtype))
                               for i in range(len(layers))])
    return Joined(product, tuple(bounds[place] for place in places), bias)
