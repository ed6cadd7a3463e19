"""Improve a quantised matrix for its inputs: move codes one by one, then scales all at once.

Both steps lower E‖(Ŵ − W) x‖² = Σ eᵢ H eᵢᵀ and neither can raise it. Codes
move by cyclic coordinate descent, which unlike GPTQ's sweep sees the errors of
later columns too (QuantEase, Behdin et al. 2023, https://arxiv.org/abs/2309.01885).
For fixed codes a row of Ŵ is linear in its scales and biases, and the best ones
solve a system of 2G equations for its G groups.
"""

import mlx.core as mx
import numpy as np

from mlxquant.codes.affine import Affine, expand
from mlxquant.codes.spec import Whole
from mlxquant.kernels.column_sweep import move_columns
from mlxquant.quantise.envelope import Replicas

_CHUNK = 1 << 26  # entries of the systems that are held at once
_RIDGE = 1e-6


def refine(weight: mx.array, start: Affine, hessian: mx.array, rounds: int,
           dtype: mx.Dtype = mx.float16) -> Affine:
    """``start`` after ``rounds`` of both steps; ``weight`` (m, n), ``hessian`` (n, n) float32, damped.

    Scales and biases stay rounded to ``dtype``. A matrix of one group (per
    tensor) has no rows to fit: its codes move, its scale stays.
    """
    result = start
    for _ in range(rounds):
        result = refit(weight, move_codes(weight, result, hessian), hessian, dtype)
    return result


def row_errors(weight: mx.array, made: Affine | Replicas, hessian: mx.array) -> mx.array:
    """eᵢ H eᵢᵀ of every row (m,)."""
    error = made.dequantise() - weight
    return ((error @ hessian) * error).sum(1)


def move_codes(weight: mx.array, start: Affine, hessian: mx.array) -> Affine:
    """Every code once to the level that is best with all others as they are."""
    scales, biases = expand(start.scales, start.group), expand(start.biases, start.group)
    codes = move_columns(weight, start.codes.astype(mx.float32), scales, biases, hessian, start.spec.bits.levels)
    return Affine(codes.astype(mx.uint8), start.scales, start.biases, start.spec)


def refit(weight: mx.array, start: Affine, hessian: mx.array, dtype: mx.Dtype = mx.float16) -> Affine:
    """Scales and biases that minimise the loss for the codes; a row that rounding makes worse is kept."""
    if start.spec.group_size is Whole.MATRIX:
        return start
    at_once = max(1, _CHUNK // (2 * start.scales.shape[1]) ** 2)
    solved = [_solve(weight[i:i + at_once], start.rows(slice(i, i + at_once)), hessian)
              for i in range(0, len(weight), at_once)]
    scales, biases = (mx.array(np.concatenate(part).astype(np.float32)).astype(dtype).astype(mx.float32)
                      for part in zip(*solved))
    moved = Affine(start.codes, scales, biases, start.spec)
    better = (row_errors(weight, moved, hessian) < row_errors(weight, start, hessian))[:, None]
    return Affine(start.codes, mx.where(better, scales, start.scales),
                  mx.where(better, biases, start.biases), start.spec)


def _solve(weight: mx.array, start: Affine, hessian: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """The best scales and biases, each (m, G) in float64, not yet rounded."""
    groups = start.scales.shape[1]
    matrix, target = _systems(weight, start, hessian)
    if start.spec.mirrored:  # the biases follow from the scales
        tied = np.concatenate([np.eye(groups), -(start.spec.bits.levels - 1) / 2 * np.eye(groups)])
        matrix, target = tied.T @ matrix @ tied, target @ tied
    matrix += _RIDGE * np.einsum("mii->m", matrix)[:, None, None] / matrix.shape[1] * np.eye(matrix.shape[1])
    found = np.linalg.solve(matrix, target[..., None])[..., 0]
    if start.spec.mirrored:
        found = found @ tied.T
    return found[:, :groups], found[:, groups:]


def _systems(weight: mx.array, start: Affine, hessian: mx.array) -> tuple[np.ndarray, np.ndarray]:
    """Normal equations of every row, (m, 2G, 2G) and (m, 2G) in float64: scales first, then biases."""
    codes = start.codes.astype(mx.float32)
    rows, groups, group = len(codes), start.scales.shape[1], start.group

    def per_group(x: mx.array) -> mx.array:
        return x.reshape(rows, groups, group).sum(2)

    by_scale, by_bias = [], []
    for g in range(groups):
        inside = slice(g * group, (g + 1) * group)
        seen = codes[:, inside] @ hessian[inside]
        by_scale.append(per_group(seen * codes))
        by_bias.append(per_group(seen))
    wanted = weight @ hessian
    target = np.array(mx.concatenate([per_group(wanted * codes), per_group(wanted)], axis=1), np.float64)
    matrix = np.empty((rows, 2 * groups, 2 * groups))
    matrix[:, :groups, :groups] = np.array(mx.stack(by_scale, axis=1))
    matrix[:, :groups, groups:] = np.array(mx.stack(by_bias, axis=1))
    matrix[:, groups:, :groups] = matrix[:, :groups, groups:].transpose(0, 2, 1)
    matrix[:, groups:, groups:] = np.array(hessian.reshape(groups, group, groups, group).sum((1, 3)))
    return matrix, target
