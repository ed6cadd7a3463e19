"""A linear layer of affine codes with any group size; MLX's kernels have only 32, 64 and 128."""

import mlx.core as mx
import mlx.nn as nn

from mlxquant.codes.affine import Affine, expand, unpack
from mlxquant.codes.spec import Whole, group_size_of


class GroupedLinear(nn.Module):
    """y = x Wᵀ with W = scale·q + bias per group of inputs, per row, or for the whole matrix.

    ``codes`` is (m, ⌈n·bits / 32⌉) uint32, a little-endian bit stream per row;
    ``scales`` and ``biases`` are (m, n / group), or (1, 1) per tensor. There is no
    kernel for it: ``dense.expand`` replaces it when a model is loaded.
    """

    def __init__(self, inputs: int, outputs: int, bits: int, group_size: int | Whole,
                 bias: bool = False):
        super().__init__()
        self.bits, self.group_size = bits, group_size_of(group_size)
        self._inputs = inputs
        shape = (outputs, 1 if isinstance(self.group_size, Whole) else inputs // self.group_size)
        if self.group_size is Whole.MATRIX:
            shape = (1, 1)
        self.codes = mx.zeros((outputs, -(-inputs * bits // 32)), mx.uint32)
        self.scales, self.biases = mx.zeros(shape), mx.zeros(shape)
        if bias:
            self.bias = mx.zeros(outputs)
        self.freeze()

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self._inputs

    def dense(self) -> mx.array:
        """The weight (m, n) in the type of the scales, rounded once, to that."""
        codes = unpack(self.codes, self.bits, self._inputs).astype(mx.float32)
        group, dtype = self._inputs // self.scales.shape[1], self.scales.dtype
        scales, biases = (expand(part.astype(mx.float32), group)
                          for part in (self.scales, self.biases))
        return (scales * codes + biases).astype(dtype)

    def __call__(self, x: mx.array) -> mx.array:
        y = x @ self.dense().T
        return y + self.bias if "bias" in self else y


def tensors_of(affine: Affine, dtype: mx.Dtype) -> dict[str, mx.array]:
    """The layer's parameters for a quantised matrix."""
    one = slice(0, 1) if affine.spec.group_size is Whole.MATRIX else slice(None)
    return {"codes": affine.packed(), "scales": affine.scales[one, one].astype(dtype),
            "biases": affine.biases[one, one].astype(dtype)}
