"""Improve a quantised matrix for its inputs: move codes one by one, then scales all at once.

Both steps lower E‖(Ŵ − W) x‖² = Σ eᵢ H eᵢᵀ and neither can raise it. Codes
move by cyclic coordinate descent, which unlike GPTQ's sweep sees the errors of
later columns too (QuantEase, Behdin et al. 2023, https://arxiv.org/abs/2309.01885).
For fixed codes a row of Ŵ is linear in its scales and biases; conjugate gradients
go towards the best ones of all rows at once, in products that a GPU is made for.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import mlx.core as mx

from mlxquant.codes.affine import Affine, expand
from mlxquant.codes.spec import Whole
from mlxquant.kernels.column_sweep import move_columns
from mlxquant.quantise.envelope import Replicas

_STEPS = 6  # of conjugate gradients: more gain nothing that rounding the scales would keep
_RIDGE = 1e-6
_Codes = TypeVar("_Codes", Affine, Replicas)


def refine(weight: mx.array, start: Affine, hessian: mx.array, rounds: int,
           dtype: mx.Dtype = mx.float16) -> Affine:
    """``start`` after ``rounds`` of both steps, for ``weight`` (m, n) and a damped ``hessian``
    (n, n), both float32.

    Scales and biases stay rounded to ``dtype``. Where one group holds the whole matrix there are
    no rows to fit: its codes move, its scale stays.
    """
    for _ in range(rounds):
        start = refit(weight, move_codes(weight, start, hessian), hessian, dtype)
    return start


def row_errors(weight: mx.array, made: Affine | Replicas, hessian: mx.array) -> mx.array:
    """eᵢ H eᵢᵀ of every row, (m,)."""
    error = made.dequantise() - weight
    return ((error @ hessian) * error).sum(1)


def move_codes(weight: mx.array, start: _Codes, hessian: mx.array) -> _Codes:
    """Every code moved once to the level that is best with all others as they are."""
    codes = move_columns(weight, start.codes.astype(mx.float32), *start.grid(), hessian,
                         start.bits.levels)
    return replace(start, codes=codes.astype(mx.uint8))


def refit(weight: mx.array, start: Affine, hessian: mx.array,
          dtype: mx.Dtype = mx.float16) -> Affine:
    """Scales and biases that lower the loss for the codes, towards its minimum; a row that rounding
    makes worse is kept."""
    if start.spec.group_size is Whole.MATRIX:
        return start
    scales, biases = (x.astype(dtype).astype(mx.float32)
                      for x in _descend(weight, start, hessian))
    moved = replace(start, scales=scales, biases=biases)
    better = (row_errors(weight, moved, hessian) < row_errors(weight, start, hessian))[:, None]
    return replace(start, scales=mx.where(better, scales, start.scales),
                   biases=mx.where(better, biases, start.biases))


def _descend(weight: mx.array, start: Affine, hessian: mx.array) -> mx.array:
    """Scales and biases (2, m, G), not rounded, by conjugate gradients: every row has a system and
    step lengths of its own; each is scaled by the 2 × 2 blocks of its single groups."""
    codes, groups = start.codes.astype(mx.float32), start.scales.shape[1]
    mirrored, middle = start.spec.mirrored, (start.spec.bits.levels - 1) / 2

    def change(value: mx.array) -> mx.array:
        """What scales and biases (2, m, G) do to Ŵ (m, n)."""
        scales, biases = value
        if mirrored:  # the biases follow from the scales
            return expand(scales, start.group) * (codes - middle)
        return expand(scales, start.group) * codes + expand(biases, start.group)

    def pull_back(gradient: mx.array) -> mx.array:
        """From a derivative by Ŵ (m, n) to those by scales and biases."""
        def per_group(x: mx.array) -> mx.array:
            return x.reshape(len(codes), groups, -1).sum(2)

        if mirrored:
            by_scale = per_group(gradient * (codes - middle))
            return mx.stack([by_scale, mx.zeros_like(by_scale)])
        return mx.stack([per_group(gradient * codes), per_group(gradient)])

    def dot(a: mx.array, b: mx.array) -> mx.array:
        return (a * b).sum((0, 2), keepdims=True)

    scaled = _preconditioner(codes - middle if mirrored else codes, groups, hessian, mirrored)
    value = mx.stack([start.scales, start.biases])
    residual = -pull_back((start.dequantise() - weight) @ hessian)
    step = along = scaled(residual)
    strength = dot(residual, along)
    for _ in range(_STEPS):
        moved = change(step)
        felt = moved @ hessian
        length = strength / mx.maximum((felt * moved).sum(1)[None, :, None], 1e-30)
        value, residual = value + length * step, residual - length * pull_back(felt)
        along = scaled(residual)
        following = dot(residual, along)
        step, strength = along + following / mx.maximum(strength, 1e-30) * step, following
        mx.eval(value, residual, step, strength)
    if mirrored:
        return mx.stack([value[0], -middle * value[0]])
    return value


def _preconditioner(codes: mx.array, groups: int, hessian: mx.array,
                    mirrored: bool) -> Callable[[mx.array], mx.array]:
    """Divides (2, m, G) by what each group's scale and bias would feel if no other were there."""
    rows, group = len(codes), codes.shape[1] // groups
    inside = mx.stack([hessian[g * group:(g + 1) * group, g * group:(g + 1) * group]
                       for g in range(groups)])
    parts = codes.reshape(rows, groups, group)
    seen = (parts.transpose(1, 0, 2) @ inside).transpose(1, 0, 2)
    by_scale = mx.maximum((seen * parts).sum(2), 1e-20)
    if mirrored:
        return lambda x: mx.stack([x[0] / by_scale, x[1]])
    both, by_bias = seen.sum(2), mx.maximum(inside.sum((1, 2)), 1e-20)
    by_scale, by_bias = by_scale * (1 + _RIDGE), by_bias * (1 + _RIDGE)
    determinant = mx.maximum(by_scale * by_bias - both * both, 1e-6 * by_scale * by_bias)
    return lambda x: mx.stack([by_bias * x[0] - both * x[1], by_scale * x[1] - both * x[0]]
                              ) / determinant
