"""Compute linear layers that read one input in few products: packed groups, or MLX's, stacked."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxquant.kernels.first_step import AsIs
from mlxquant.kernels.matrix import NOTHING, Added
from mlxquant.layers.packed import PackedGroup, PackedLinear

_FORM = ("bits", "group_size", "mode")  # what MLX's quantised layers must share to be stacked


class Stacked:
    """Layers of MLX that differ in their rows only. Their arrays become views of the stacked ones,
    so that nothing is held twice."""

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
class Product:
    """One product, and the biases of its rows or none."""

    product: PackedGroup | Stacked
    bias: mx.array | None

    def __call__(self, x: mx.array, first: AsIs | None, residual: mx.array | None) -> mx.array:
        return self.product.stacked(x, first, Added(self.bias, residual))


@dataclass(frozen=True, eq=False)
class Joined:
    """Layers that read one input, with one product for each format in which they are stored.
    ``places`` are, for each layer, (index of its product, first row in it, end row)."""

    products: tuple[Product, ...]
    places: tuple[tuple[int, int, int], ...]

    @property
    def starts(self) -> tuple[int, ...]:
        return tuple(start for _, start, _ in self.places)

    def __call__(self, x: mx.array, first: AsIs | None = None,
                 residual: mx.array | None = None) -> list[mx.array]:
        """For each layer the array that holds its outputs for ``x`` (tokens, n). ``first``, or else
        a packed group's own first step, is applied to x before; ``residual`` is added."""
        made = [product(x, first, residual) for product in self.products]
        return [made[product] for product, _, _ in self.places]

    def whole(self, x: mx.array, first: AsIs | None = None,
              residual: mx.array | None = None) -> mx.array:
        """All layers' outputs (tokens, m), concatenated."""
        made = self(x, first, residual)
        ordered = all(a[2] == b[1] for a, b in itertools.pairwise(self.places))
        if len(self.products) == 1 and ordered:
            return made[0]
        return mx.concatenate([array[:, start:end] for array, (_, start, end)
                               in zip(made, self.places)], axis=-1)


def join(layers: list[nn.Module]) -> Joined | None:
    """Join ``layers``, which read one input; None where one is of another kind, or belongs to a
    packed group that has further siblings."""
    kinds: dict[Any, list[int]] = {}
    for index, layer in enumerate(layers):
        kinds.setdefault(_kind(layer), []).append(index)
    products, places = list[Product](), dict[int, tuple[int, int, int]]()
    for number, indices in enumerate(kinds.values()):
        alike = [layers[index] for index in indices]
        product: PackedGroup | Stacked
        if isinstance(alike[0], PackedLinear):
            product, rows = alike[0].group, [layer.index for layer in alike]
            if len(alike) != product.siblings:
                return None
        elif type(alike[0]) in (nn.Linear, nn.QuantizedLinear):
            product, rows = Stacked(alike), list(range(len(alike)))
        else:
            return None
        products.append(Product(product, _bias(product.bounds, dict(zip(rows, alike)))))
        places |= {index: (number, *product.bounds[row:row + 2])
                   for index, row in zip(indices, rows)}
    return Joined(tuple(products), tuple(places[index] for index in range(len(layers))))


def _kind(layer: nn.Module) -> Any:
    """A key that is equal for layers that one product can compute."""
    if isinstance(layer, PackedLinear):
        return id(layer.group)
    return (type(layer), *(getattr(layer, key, None) for key in _FORM),
            *(layer[name].dtype for name in ("weight", "scales") if name in layer))


def _bias(bounds: Sequence[int], layers: dict[int, nn.Module]) -> mx.array | None:
    """The biases of all rows of a product, by the places of its layers."""
    given = {place: layer.bias for place, layer in layers.items() if "bias" in layer}
    if not given:
        return None
    dtype = next(iter(given.values())).dtype
    return mx.concatenate([given.get(i, mx.zeros(end - start, dtype))
                           for i, (start, end) in enumerate(itertools.pairwise(bounds))])
