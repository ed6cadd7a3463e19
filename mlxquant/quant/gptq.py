"""GPTQ: quantise column by column, push each column's error to the later ones.

Frantar et al. 2023, https://arxiv.org/abs/2210.17323. With H = E[x xᵀ] and U
the upper Cholesky factor of its inverse, quantising column j with error e
changes a later column k by −e·U[j, k] / U[j, j]. Columns are swept in blocks:
inside a block one by one, after it all later columns in one product.

Scales are fixed before the sweep, by least squares weighted with diag(H), so
columns may be taken in any order while groups stay where they are.

``correct`` moves the target first: with the float model's inputs x̃ and the
quantised prefix's x, the weight that reproduces W x̃ from x is
W E[x̃ xᵀ] H⁻¹ (QEP, https://arxiv.org/abs/2504.09629, with its damping α; the
same asymmetry as GPTAQ, https://arxiv.org/abs/2504.02692).
"""

import mlx.core as mx
import numpy as np

from mlxquant.quant.affine import Affine, expand, fit, nearest
from mlxquant.quant.spec import Spec
from mlxquant.quant.statistics import Statistics

DAMPING = 0.01
CORRECTION = 0.5
_BLOCK = 64


def quantise(weight: mx.array, statistics: Statistics, spec: Spec, dtype: mx.Dtype = mx.float16, *,
             correction: float = 0.0) -> Affine:
    """Quantise ``weight`` (m, n) for inputs with these statistics.

    ``correction`` between 0 and 1 is how far the target moves to make up for
    the error of earlier layers; it needs ``statistics.cross``.
    """
    hessian = np.array(statistics.hessian, np.float64)
    if correction:
        weight = correct(weight, statistics, correction)
    importance = statistics.hessian.diagonal()
    start = fit(weight, spec, importance, dtype)
    group = start.group
    scales, biases = expand(start.scales, group), expand(start.biases, group)
    order = _order(hessian, spec)
    factor = inverse_factor(hessian[np.ix_(order, order)] if spec.act_order else hessian)
    back = np.argsort(order)
    codes = sweep(weight.astype(mx.float32)[:, mx.array(order)], scales[:, mx.array(order)],
                  biases[:, mx.array(order)], mx.array(factor.astype(np.float32)), spec.levels)
    codes = codes[:, mx.array(back)].astype(mx.uint8)
    mx.eval(codes)
    return Affine(codes, start.scales, start.biases, spec)


def correct(weight: mx.array, statistics: Statistics, amount: float) -> mx.array:
    """``weight`` moved towards reproducing the float model's outputs from the quantised inputs."""
    hessian = damped(np.array(statistics.hessian, np.float64))
    gap = np.array(statistics.cross, np.float64) - np.array(statistics.hessian, np.float64)
    change = np.linalg.solve(hessian, gap.T).T  # gap · H⁻¹, for H symmetric
    return weight + amount * (weight.astype(mx.float32) @ mx.array(change.astype(np.float32)))


def damped(hessian: np.ndarray) -> np.ndarray:
    """H with a hundredth of its mean diagonal added, and dead inputs made harmless."""
    diagonal = hessian.diagonal()
    floor = DAMPING * max(diagonal.mean(), 1e-12)
    return hessian + floor * np.eye(len(hessian))


def inverse_factor(hessian: np.ndarray) -> np.ndarray:
    """Upper U with H⁻¹ = Uᵀ U, in float64.

    Reversing rows and columns turns a lower Cholesky factor into H = V Vᵀ with
    V upper, and U = V⁻¹: one factorisation instead of two.
    """
    lower = np.linalg.cholesky(damped(hessian)[::-1, ::-1])
    return np.linalg.inv(lower[::-1, ::-1])


def sweep(weight: mx.array, scales: mx.array, biases: mx.array, factor: mx.array,
          levels: int) -> mx.array:
    """Codes (m, n) float32 of ``weight`` (m, n), given elementwise scales and biases (m, n)
    and the factor of the inverse Hessian (n, n)."""
    columns = weight.shape[1]
    blocks = []
    for start in range(0, columns, _BLOCK):
        stop = min(start + _BLOCK, columns)
        inside = slice(start, stop)
        codes, errors = _sweep_block(weight[:, :stop - start], scales[:, inside], biases[:, inside],
                                     factor[inside, inside], levels)
        weight = weight[:, stop - start:] - errors @ factor[inside, stop:]
        blocks.append(codes)
        mx.eval(weight, codes)
    return mx.concatenate(blocks, axis=1)


def _sweep_block(weight: mx.array, scales: mx.array, biases: mx.array, factor: mx.array,
                 levels: int) -> tuple[mx.array, mx.array]:
    """Sweep the columns of one block; returns its codes and the scaled errors for later blocks."""
    codes, errors = [], []
    for j in range(weight.shape[1]):
        column, scale, bias = (x[:, j:j + 1] for x in (weight, scales, biases))
        code = nearest(column, scale, bias, levels)
        error = (column - (scale * code + bias)) / factor[j, j]
        weight = weight - error * factor[j:j + 1]
        codes.append(code)
        errors.append(error)
    return mx.concatenate(codes, axis=1), mx.concatenate(errors, axis=1)


def _order(hessian: np.ndarray, spec: Spec) -> np.ndarray:
    """Columns in the order of the sweep: as they are, or the most active first."""
    diagonal = hessian.diagonal()
    return np.argsort(-diagonal, kind="stable") if spec.act_order else np.arange(len(diagonal))
