"""Improve a quantised matrix for its inputs: move codes one by one, then scales all at once.

Both steps lower E‖(Ŵ − W) x‖² = Σ eᵢ H eᵢᵀ and neither can raise it. Codes move by cyclic
coordinate descent, which unlike GPTQ's sweep sees the errors of later columns too (QuantEase,
Behdin et al. 2023, https://arxiv.org/abs/2309.01885). For fixed codes a row of Ŵ is linear in its
scales and biases; conjugate gradients go towards the best ones of all rows at once, in products
that a GPU is made for.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import mlx.core as mx

from mlxquant.codes.affine import Affine, expand
from mlxquant.codes.spec import Whole
from mlxquant.kernels.column_sweep import move_columns
from mlxquant.quantise.envelope import Replicas

_STEPS = 6  # of conjugate gradients: more gain nothing that rounding the scales would keep
_RIDGE = 1e-6
_Codes = TypeVar("_Codes", Affine, Replicas)


@dataclass(frozen=True)
class Maps:
    """The linear map from scales to Ŵ (m, n): ``change`` applies it, ``pull_back`` its transpose (a
    gradient by Ŵ to one by the scales), ``scaled`` the preconditioner. ``total`` and
    ``total_change`` sum an array of the scales' shape, and of Ŵ's, over all entries that share one
    step length."""

    change: Callable[[mx.array], mx.array]
    pull_back: Callable[[mx.array], mx.array]
    scaled: Callable[[mx.array], mx.array]
    total: Callable[[mx.array], mx.array] = mx.sum
    total_change: Callable[[mx.array], mx.array] = mx.sum


def refine(weight: mx.array, start: Affine, hessian: mx.array, dtype: mx.Dtype) -> Affine:
    """``start`` after a round of both steps, for ``weight`` (m, n) and a damped ``hessian`` (n, n),
    both float32.

    Scales and biases stay rounded to ``dtype``. Where one group holds the whole matrix there are
    no rows to fit: its codes move, its scale stays.
    """
    return refit(weight, move_codes(weight, start, hessian), hessian, dtype)


def row_errors(weight: mx.array, made: Affine | Replicas, hessian: mx.array) -> mx.array:
    """eᵢ H eᵢᵀ of every row, (m,)."""
    error = made.dequantise() - weight
    return ((error @ hessian) * error).sum(1)


def move_codes(weight: mx.array, start: _Codes, hessian: mx.array) -> _Codes:
    """``start`` after every code in turn moved to the best level while all others are fixed."""
    codes = move_columns(weight, start.codes.astype(mx.float32), *start.grid(), hessian,
                         start.bits.levels)
    return replace(start, codes=codes.astype(mx.uint8))


def refit(weight: mx.array, start: Affine, hessian: mx.array, dtype: mx.Dtype) -> Affine:
    """``start`` with scales and biases moved towards the least loss for its codes; a row whose loss
    they raise, once rounded, keeps its old ones."""
    if start.spec.group_size is Whole.MATRIX:
        return start
    scales, biases = (x.astype(dtype).astype(mx.float32)
                      for x in _descend(weight, start, hessian))
    moved = replace(start, scales=scales, biases=biases)
    better = (row_errors(weight, moved, hessian) < row_errors(weight, start, hessian))[:, None]
    return replace(start, scales=mx.where(better, scales, start.scales),
                   biases=mx.where(better, biases, start.biases))


def conjugate_gradients(value: mx.array, error: mx.array, hessian: mx.array, maps: Maps,
                        steps: int) -> mx.array:
    """Scales ``value``, of which Ŵ is a linear function, after ``steps`` towards the least
    Σ eᵢ H eᵢᵀ, from the error (m, n) that they now make."""
    residual = -maps.pull_back(error @ hessian)
    step = along = maps.scaled(residual)
    strength = maps.total(residual * along)
    for _ in range(steps):
        moved = maps.change(step)
        felt = moved @ hessian
        length = strength / mx.maximum(maps.total_change(moved * felt), 1e-30)
        value, residual = value + length * step, residual - length * maps.pull_back(felt)
        along = maps.scaled(residual)
        following = maps.total(residual * along)
        step, strength = along + following / mx.maximum(strength, 1e-30) * step, following
        mx.eval(value, residual, step, strength)
    return value


def _descend(weight: mx.array, start: Affine, hessian: mx.array) -> mx.array:
    """Scales and biases (2, m, G), not rounded, by conjugate gradients: every row has a system and
    step lengths of its own; each is scaled by the 2 × 2 blocks of its single groups."""
    codes, groups = start.codes.astype(mx.float32), start.scales.shape[1]
    mirrored, middle = start.spec.mirrored, (start.bits.levels - 1) / 2
    if mirrored:  # the biases follow from the scales
        codes = codes - middle

    def change(value: mx.array) -> mx.array:
        scaled = expand(value[0], start.group) * codes
        return scaled if mirrored else scaled + expand(value[1], start.group)

    def pull_back(gradient: mx.array) -> mx.array:
        parts = [gradient * codes] if mirrored else [gradient * codes, gradient]
        return mx.stack([part.reshape(len(codes), groups, -1).sum(2) for part in parts])

    maps = Maps(change, pull_back, _preconditioner(codes, groups, hessian, mirrored),
                lambda x: x.sum((0, 2), keepdims=True), lambda x: x.sum(1)[None, :, None])
    value = start.scales[None] if mirrored else mx.stack([start.scales, start.biases])
    found = conjugate_gradients(value, start.dequantise() - weight, hessian, maps, _STEPS)
    return mx.stack([found[0], -middle * found[0]]) if mirrored else found


def _preconditioner(codes: mx.array, groups: int, hessian: mx.array,
                    mirrored: bool) -> Callable[[mx.array], mx.array]:
    """Divides by the curvature that each group's scale and bias have if no other group moves."""
    rows, columns = codes.shape
    group = columns // groups
    inside = mx.stack([hessian[g:g + group, g:g + group] for g in range(0, columns, group)])
    parts = codes.reshape(rows, groups, group)
    seen = (parts.transpose(1, 0, 2) @ inside).transpose(1, 0, 2)
    by_scale = mx.maximum((seen * parts).sum(2), 1e-20)
    if mirrored:
        return lambda x: x / by_scale
    both, by_bias = seen.sum(2), mx.maximum(inside.sum((1, 2)), 1e-20)
    by_scale, by_bias = by_scale * (1 + _RIDGE), by_bias * (1 + _RIDGE)
    determinant = mx.maximum(by_scale * by_bias - both * both, 1e-6 * by_scale * by_bias)
    return lambda x: mx.stack([by_bias * x[0] - both * x[1], by_scale * x[1] - both * x[0]]
                              ) / determinant
