"""Round to nearest, without looking at the data.

Each group's grid holds zero and the group's largest weight exactly, as the
stock quantiser's does. Searching clipped ranges for the least squared error,
the usual advice, was measured to lose: a clipped outlier is a clipped channel,
and small weights that all err to one side add up (``benchmarks/LOG.md``).
Symmetric grids, ternary and one bit have no place for both ends and zero, and
are fitted by least squares.
"""

import mlx.core as mx

from mlxquant.quant.affine import Affine, expand, fit, nearest
from mlxquant.quant.spec import Spec
from mlxquant.quant.statistics import Statistics


def quantise(weight: mx.array, statistics: Statistics | None, spec: Spec,
             dtype: mx.Dtype = mx.float16) -> Affine:
    """Quantise ``weight`` (m, n); the statistics are not used."""
    if spec.symmetric or spec.levels < 4 or spec.group_size == -1:
        return fit(weight, spec, None, dtype)
    rows, columns = weight.shape
    group = spec.group_for(columns)
    weight = weight.astype(mx.float32)
    scales, biases = (x.astype(dtype).astype(mx.float32)
                      for x in _grid(weight.reshape(rows, -1, group), spec.levels))
    codes = nearest(weight, expand(scales, group), expand(biases, group), spec.levels)
    result = Affine(codes.astype(mx.uint8), scales, biases, spec)
    mx.eval(result.codes, result.scales, result.biases)
    return result


def _grid(groups: mx.array, levels: int) -> tuple[mx.array, mx.array]:
    """(scale, bias), each (m, n / group), of grids with zero and the largest weight among their levels."""
    low, high = groups.min(-1), groups.max(-1)
    edge = mx.maximum(high, -low)
    step = (high - low) / (levels - 1)
    whole = mx.maximum(mx.round(edge / mx.maximum(step, 1e-12)), 1)  # steps from zero to the edge
    scale = edge / whole
    return scale, mx.where(-low > high, -edge, edge - scale * (levels - 1))
