"""Replicated layers for a layer's inputs: fit the scalings, sweep the codes, then improve both.

The scalings come from ``envelope.py``. With them fixed, the codes are found by GPTQ's sweep, every
weight on its own grid. Rounds then move codes and fit B and A to them under the whole
H = E[x xᵀ], of which the first fit used only the diagonal: a row of B solves K equations; A, which
all rows share, takes conjugate gradient steps. A step that does not lower E‖(Ŵ − W) x‖² with
rounded scales is not taken.
"""

from dataclasses import replace

import mlx.core as mx

from mlxquant.codes.spec import Spec
from mlxquant.codes.statistics import Statistics
from mlxquant.quantise import envelope
from mlxquant.quantise.envelope import Replicas
from mlxquant.quantise.refine import Maps, conjugate_gradients, move_codes, row_errors
from mlxquant.quantise.settings import Settings

_GRADIENT_STEPS = 8
AT_ONCE = 1 << 25  # numbers in one array: rows are independent, and a few at a time take less


def start(weight: mx.array, statistics: Statistics, spec: Spec, settings: Settings) -> Replicas:
    """Scalings for the sweep, with the codes nearest to each weight."""
    first = settings.leading() if settings.leading else None
    return envelope.fit(weight, spec.replica_shape(0), statistics.hessian.diagonal(),
                        settings.rounds, first).rounded(settings.dtype)


def refine(weight: mx.array, found: Replicas, hessian: mx.array, dtype: mx.Dtype) -> Replicas:
    """``found`` after a round of all steps, for ``weight`` (m, n) and a damped ``hessian``."""
    found = move_codes(weight, found, hessian)
    found = fit_outputs(weight, found, hessian, dtype)
    return fit_inputs(weight, found, hessian, dtype)


def fit_outputs(weight: mx.array, found: Replicas, hessian: mx.array, dtype: mx.Dtype) -> Replicas:
    """B for fixed codes and A, under all of H; a row that rounding makes worse keeps its own."""
    rows = max(1, AT_ONCE // (weight.shape[1] * found.replica_out.shape[1]))
    parts = [slice(start, start + rows) for start in range(0, len(weight), rows)]
    solved = [_solved(weight[part], found.rows(part), hessian) for part in parts]
    moved = replace(found, replica_out=mx.concatenate(solved)).rounded(dtype)
    better = (row_errors(weight, moved, hessian) < row_errors(weight, found, hessian))[:, None]
    return replace(found, replica_out=mx.where(better, moved.replica_out, found.replica_out))


def _solved(weight: mx.array, found: Replicas, hessian: mx.array) -> mx.array:
    """The B (m, K) that is best for some rows: K equations for each."""
    inside = found.inputs().T
    scaled = found.levels() * inside[:, None]  # (K, m, n)
    seen = scaled @ hessian
    matrix = mx.stack([(seen * part).sum(2) for part in scaled])
    solved = envelope.solve(matrix.transpose(2, 1, 0), (seen * weight).sum(2).T)
    mx.eval(solved)
    return solved


def fit_inputs(weight: mx.array, found: Replicas, hessian: mx.array, dtype: mx.Dtype) -> Replicas:
    """A, and then the inputs' factors where it is grouped, for fixed codes and B."""
    for name in ("replica_in", "column_scale"):
        if getattr(found, name) is not None:
            moved = replace(found, **{name: _descend(weight, found, hessian, name)}).rounded(dtype)
            if row_errors(weight, moved, hessian).sum() < row_errors(weight, found, hessian).sum():
                found = moved
    return found


def _descend(weight: mx.array, found: Replicas, hessian: mx.array, name: str) -> mx.array:
    """One of the scales, of which Ŵ is a linear function, after conjugate gradient steps.

    Scaled by the curvature that each entry has by itself with inputs uncorrelated.
    """
    levels, out = found.levels(), found.replica_out

    def change(step: mx.array) -> mx.array:
        return replace(found, **{name: step}).dequantise()

    def pull_back(gradient: mx.array) -> mx.array:
        by_input = (gradient * levels).T @ out  # by A (n, K)
        if name == "column_scale":
            return (by_input * replace(found, column_scale=None).inputs()).sum(1)
        if found.column_scale is not None:
            by_input = by_input * found.column_scale[:, None]
        return found.per_group(by_input)

    curvature = _curvature(found, hessian, name)
    return conjugate_gradients(getattr(found, name), found.dequantise() - weight, hessian,
                               Maps(change, pull_back, lambda x: x / curvature), _GRADIENT_STEPS)


def _curvature(found: Replicas, hessian: mx.array, name: str) -> mx.array:
    """Second derivative by each entry of the scales, had H only its diagonal."""
    levels = found.levels()
    energy = levels * levels * hessian.diagonal()
    if name == "column_scale":
        outer = replace(found, column_scale=None).scales()
        return mx.maximum((energy * outer * outer).sum(0), 1e-20)
    by_input = energy.T @ mx.square(found.replica_out)
    if found.column_scale is not None:
        by_input = by_input * mx.square(found.column_scale)[:, None]
    return mx.maximum(found.per_group(by_input), 1e-20)
