"""Round to nearest, without looking at the data.

Each group's grid holds zero and the group's largest weight exactly, as the stock quantiser's does.
Searching clipped ranges for the least squared error, the usual advice, was measured to lose: a
clipped outlier is a clipped channel, and small weights that all err to one side add up
(``benchmarks/LOG.md``). Symmetric, ternary and one-bit grids cannot hold zero and both ends of the
range; they, and one grid for a whole matrix, are fitted by least squares.
"""

import mlx.core as mx

from mlxquant.codes.affine import Affine, expand, fit, nearest
from mlxquant.codes.spec import Spec, Whole

_CHUNK = 1 << 24  # weights that are rounded at once


def quantise(weight: mx.array, spec: Spec, dtype: mx.Dtype = mx.float16) -> Affine:
    """Quantise ``weight`` (m, n); raises ``BadValue`` if the groups do not divide n."""
    if spec.symmetric or spec.bits.levels < 4 or spec.group_size is Whole.MATRIX:
        return fit(weight, spec, None, dtype)
    rows, columns = weight.shape
    group, at_once = spec.group_for(columns), max(1, _CHUNK // columns)
    parts = [_round(weight[start:start + at_once], group, spec.bits.levels, dtype)
             for start in range(0, rows, at_once)]
    codes, scales, biases = (mx.concatenate(part) for part in zip(*parts))
    mx.eval(codes, scales, biases)
    return Affine(codes, scales, biases, spec)


def _round(weight: mx.array, group: int, levels: int,
           dtype: mx.Dtype) -> tuple[mx.array, mx.array, mx.array]:
    """Codes, scales and biases of some rows; what that takes in between is free afterwards."""
    weight = weight.astype(mx.float32)
    scales, biases = (x.astype(dtype).astype(mx.float32)
                      for x in _grid(weight.reshape(len(weight), -1, group), levels))
    codes = nearest(weight, expand(scales, group), expand(biases, group), levels).astype(mx.uint8)
    mx.eval(codes, scales, biases)
    return codes, scales, biases


def _grid(groups: mx.array, levels: int) -> tuple[mx.array, mx.array]:
    """(scale, bias), each (m, n / group), of grids that hold zero and the largest weight."""
    low, high = groups.min(-1), groups.max(-1)
    edge = mx.maximum(high, -low)
    step = (high - low) / (levels - 1)
    whole = mx.maximum(mx.round(edge / mx.maximum(step, 1e-12)), 1)  # steps from zero to the edge
    scale = edge / whole
    return scale, mx.where(-low > high, -edge, edge - scale * (levels - 1))
