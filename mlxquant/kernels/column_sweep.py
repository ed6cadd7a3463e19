"""Round a block of columns one by one, each making up for the errors of those before it.

    t_j = wanted_j − Σ_{i<j} e_i F_ij      code_j = nearest level to t_j
    e_j = scale_j · code_j + bias_j − weight_j

Rows are independent; the columns of one are a chain. As ``mx`` operations that is
some six launches a column, and at this size launches are all the time. The kernel
gives every row a thread and takes one launch a block. It reads four floats and
writes two per weight; F (64 × 64) stays in cache.
"""

import functools
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlxquant.kernels import backend

_BODY = """
    const int row = thread_position_in_grid.x;
    if (row >= ROWS) return;
    float error[WIDTH];
    for (int j = 0; j < WIDTH; ++j) {
        auto at = row * WIDTH + j;
        float target = wanted[at];
        for (int i = 0; i < j; ++i) target -= error[i] * feedback[i * WIDTH + j];
        float scale = scales[at], bias = biases[at];
        float code = rint((target - bias) / (scale == 0.0f ? 1.0f : scale));
        code = code < 0.0f ? 0.0f : code > LEVELS - 1 ? float(LEVELS - 1) : code;
        error[j] = scale * code + bias - weight[at];
        codes[at] = code;
        errors[at] = error[j];
    }
"""
_INPUTS = ["weight", "wanted", "scales", "biases", "feedback"]
_THREADS = 64
TIES = 0.01  # a tie may fall either way, and moves what follows in its row
BLOCK = 64  # columns that are rounded in one launch


def round_columns(weight: mx.array, wanted: mx.array, scales: mx.array, biases: mx.array,
                  feedback: mx.array, levels: int) -> tuple[mx.array, mx.array]:
    """(codes, errors) of a block of columns, all (m, w) float32 like the first four inputs.

    ``feedback`` (w, w) is strictly upper triangular. By the kernel where there is a GPU
    on which it agrees with the reference, which is tried once on a small case.
    """
    trusted = backend.has_gpu() and backend.trusted("column_sweep", disagreement, TIES)
    run = _launch if trusted else reference
    return run(weight, wanted, scales, biases, feedback, levels)


def sweep_columns(weight: mx.array, scales: mx.array, biases: mx.array, feedback: mx.array,
                  levels: int) -> mx.array:
    """Codes (m, n) float32 of ``weight`` (m, n), given elementwise scales and biases (m, n) and the
    strictly upper ``feedback`` (n, n): column j is rounded from w_j − Σ_{i<j} e_i F_ij."""
    codes, errors = [], mx.zeros((len(weight), 0))
    for start in range(0, weight.shape[1], BLOCK):
        inside = slice(start, start + BLOCK)
        wanted = weight[:, inside]
        if start:  # MLX 0.32.4 writes freed memory at an empty product
            wanted = wanted - errors @ feedback[:start, inside]
        block, error = round_columns(weight[:, inside], wanted, scales[:, inside],
                                     biases[:, inside], feedback[inside, inside], levels)
        codes.append(block)
        errors = mx.concatenate([errors, error], axis=1)
        mx.eval(errors, block)
    return mx.concatenate(codes, axis=1)


def move_columns(weight: mx.array, codes: mx.array, scales: mx.array, biases: mx.array,
                 hessian: mx.array, levels: int) -> mx.array:
    """``codes`` (m, n) after each has once moved to the level best with all others as they are.

    The best value v of column j is v_j − slope_j / H_jj, where a change e_i of an earlier
    column moved the slope by e_i H_ij: a sweep with other numbers.
    """
    values = scales * codes + biases
    slope = (values - weight) @ hessian  # half the loss's gradient
    curvature, moved = hessian.diagonal(), []
    feedback = hessian / curvature
    for start in range(0, weight.shape[1], BLOCK):
        inside = slice(start, start + BLOCK)
        best = values[:, inside] - slope[:, inside] / curvature[inside]
        block, changes = round_columns(values[:, inside], best, scales[:, inside],
                                       biases[:, inside], mx.triu(feedback[inside, inside], 1),
                                       levels)
        slope = slope + changes @ hessian[inside]
        moved.append(block)
        mx.eval(slope, block)
    return mx.concatenate(moved, axis=1)


def reference(weight: mx.array, wanted: mx.array, scales: mx.array, biases: mx.array,
              feedback: mx.array, levels: int) -> tuple[mx.array, mx.array]:
    """The same in ``mx`` operations."""
    codes, errors = [], []
    for j in range(weight.shape[1]):
        code, error = _round(*(x[:, j:j + 1] for x in (weight, wanted, scales, biases)), levels)
        wanted = _push(wanted, error, feedback[j:j + 1])
        codes.append(code)
        errors.append(error)
    return mx.concatenate(codes, axis=1), mx.concatenate(errors, axis=1)


@mx.compile
def _round(weight: mx.array, wanted: mx.array, scale: mx.array, bias: mx.array,
           levels: int) -> tuple[mx.array, mx.array]:
    safe = mx.where(scale == 0, 1.0, scale)
    code = mx.clip(mx.round((wanted - bias) / safe), 0, levels - 1)
    return code, scale * code + bias - weight


@mx.compile
def _push(wanted: mx.array, error: mx.array, row: mx.array) -> mx.array:
    return wanted - error * row


@functools.cache
def _kernel() -> Callable[..., list[mx.array]]:
    return backend.build("column_sweep", _INPUTS, ["codes", "errors"], _BODY)


def _launch(weight: mx.array, wanted: mx.array, scales: mx.array, biases: mx.array,
            feedback: mx.array, levels: int) -> tuple[mx.array, mx.array]:
    rows, width = weight.shape
    return tuple(_kernel()(
        inputs=[weight, wanted, scales, biases, feedback],
        template=[("ROWS", rows), ("WIDTH", width), ("LEVELS", levels)],
        grid=(-(-rows // _THREADS) * _THREADS, 1, 1), threadgroup=(_THREADS, 1, 1),
        output_shapes=[weight.shape, weight.shape], output_dtypes=[mx.float32, mx.float32]))


def disagreement() -> float:
    """Share of codes in a random case that the kernel rounds otherwise than the reference."""
    random = np.random.default_rng(0)
    weight, scales = (mx.array(random.normal(size=(70, 64)).astype(np.float32)) for _ in range(2))
    scales = mx.abs(scales) + 0.1
    feedback = mx.array(np.triu(random.normal(size=(64, 64)), 1).astype(np.float32) / 64)
    case = (weight, weight, scales, -1.5 * scales, feedback, 4)
    return (_launch(*case)[0] != reference(*case)[0]).astype(mx.float32).mean().item()
