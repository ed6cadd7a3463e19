"""Round a block of columns one by one, each making up for the errors of those before it.

    t_j = wanted_j − Σ_{i<j} e_i F_ij      code_j = nearest level to t_j
    e_j = scale_j · code_j + bias_j − weight_j

Rows are independent; within a row each column depends on those before it. In ``mx`` operations
this takes some six launches a column, and at this size launches take all the time. The kernel
gives every row a simdgroup and takes one launch a block: each lane keeps the targets of its own
columns, and the error of the column just rounded goes to all lanes. It reads four floats and
writes two per weight; F (64 × 64) stays in cache.
"""

import mlx.core as mx
import numpy as np

from mlxquant.kernels import backend
from mlxquant.kernels.matrix import sizes

_BODY = """
    const int row = int(threadgroup_position_in_grid.x) * SIMDGROUPS
        + int(simdgroup_index_in_threadgroup);
    const int lane = thread_index_in_simdgroup;
    const float last = float(sizes[1]);  // read, not compiled in: one kernel for every width
    if (row >= sizes[0]) return;  // a whole simdgroup
    float target[PARTS], scale[PARTS], bias[PARTS], given[PARTS], kept[PARTS];
    UNROLL for (int p = 0; p < PARTS; ++p) {
        const int at = row * WIDTH + min(lane + 32 * p, WIDTH - 1);
        target[p] = wanted[at]; scale[p] = scales[at]; bias[p] = biases[at]; given[p] = weight[at];
        kept[p] = 0.0f;
    }
    UNROLL for (int p = 0; p < PARTS; ++p) {
        for (int j = 32 * p; j < min(32 * p + 32, WIDTH); ++j) {
            float code = rint((target[p] - bias[p]) / (scale[p] == 0.0f ? 1.0f : scale[p]));
            code = code < 0.0f ? 0.0f : code > last ? last : code;
            if (lane == j - 32 * p) kept[p] = code;
            const float error = simd_broadcast(scale[p] * code + bias[p] - given[p], j - 32 * p);
            UNROLL for (int q = 0; q < PARTS; ++q)
                target[q] -= error * feedback[j * WIDTH + min(lane + 32 * q, WIDTH - 1)];
        }
    }
    UNROLL for (int p = 0; p < PARTS; ++p) {
        const int at = row * WIDTH + lane + 32 * p;
        if (lane + 32 * p < WIDTH) {
            codes[at] = kept[p];
            errors[at] = scale[p] * kept[p] + bias[p] - given[p];
        }
    }
"""
_KERNEL = backend.Kernel(
    "column_sweep", ["weight", "wanted", "scales", "biases", "feedback", "sizes"],
    ["codes", "errors"], _BODY)
_SIMDGROUPS = 4
TIES = 0.01  # share of codes that may differ: a tie may round either way, and changes later columns
BLOCK = 64  # columns that are rounded in one launch
_FAR = 512


def round_columns(weight: mx.array, wanted: mx.array, scales: mx.array, biases: mx.array,
                  feedback: mx.array, levels: int) -> tuple[mx.array, mx.array]:
    """(codes, errors) of a block of columns, all (m, w) float32 like the first four inputs.

    Only entries of ``feedback`` (w, w) above the diagonal have an effect. The kernel runs on a GPU
    where it agreed with the reference on a small case; elsewhere the reference runs.
    """
    trusted = backend.has_gpu() and backend.trusted("column_sweep", disagreement, TIES)
    run = _launch if trusted else reference
    return run(weight, wanted, scales, biases, feedback, levels)


def sweep_columns(weight: mx.array, scales: mx.array, biases: mx.array, factor: mx.array,
                  levels: int) -> mx.array:
    """Codes (m, n) float32 of ``weight`` (m, n), given elementwise scales and biases (m, n) and the
    upper triangular ``factor`` V (n, n) of H = V Vᵀ: column j is rounded from
    w_j − Σ_{i<j} e_i V_ij / V_jj."""
    return _sweep(weight, weight, scales, biases, factor, levels)


def move_columns(weight: mx.array, codes: mx.array, scales: mx.array, biases: mx.array,
                 hessian: mx.array, levels: int) -> mx.array:
    """``codes`` (m, n) after one pass of coordinate descent over the columns: each moves to the
    level with the least loss while all other columns are fixed.

    The best value of column j is v_j − slope_j / H_jj, where a change e_i of an earlier column
    moved the slope by e_i H_ij. This is the same sweep with other inputs.
    """
    values, curvature = scales * codes + biases, hessian.diagonal()
    best = values - (values - weight) @ hessian / curvature  # half the loss's gradient
    return _sweep(values, best, scales, biases, hessian, levels)


def _sweep(weight: mx.array, wanted: mx.array, scales: mx.array, biases: mx.array,
           matrix: mx.array, levels: int) -> mx.array:
    """Codes (m, n) as if ``round_columns`` took all columns at once, with M_ij / M_jj of ``matrix``
    M (n, n) as feedback. Columns after the current ``_FAR`` are corrected once per ``_FAR``."""
    diagonal, found, columns = matrix.diagonal(), [], weight.shape[1]
    for start in range(0, columns, _FAR):
        stop, errors = min(start + _FAR, columns), []
        feedback = matrix[start:stop, start:] / diagonal[start:]
        near, wanted = wanted[:, :_FAR], wanted[:, _FAR:]
        for at in range(start, stop, BLOCK):
            inside = slice(at, min(at + BLOCK, stop))
            width, own = inside.stop - at, slice(at - start, inside.stop - start)
            codes, error = round_columns(weight[:, inside], near[:, :width], scales[:, inside],
                                         biases[:, inside], feedback[own, own], levels)
            if inside.stop < stop:  # MLX 0.32.4 writes freed memory at an empty product
                near = mx.addmm(near[:, width:], error, feedback[own, own.stop:stop - start],
                                alpha=-1)
            found.append(codes)
            errors.append(error)
            mx.async_eval(near, codes, error)
        if stop < columns:
            wanted = mx.addmm(wanted, mx.concatenate(errors, axis=1), feedback[:, stop - start:],
                              alpha=-1)
        mx.eval(wanted, codes)
    return mx.concatenate(found, axis=1)


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


def _launch(weight: mx.array, wanted: mx.array, scales: mx.array, biases: mx.array,
            feedback: mx.array, levels: int) -> tuple[mx.array, mx.array]:
    rows, width = weight.shape
    return tuple(_KERNEL(
        inputs=[weight, wanted, scales, biases, feedback, sizes(rows, levels - 1)],
        template=[("WIDTH", width), ("PARTS", -(-width // 32)), ("SIMDGROUPS", _SIMDGROUPS)],
        grid=(-(-rows // _SIMDGROUPS) * _SIMDGROUPS * 32, 1, 1),
        threadgroup=(_SIMDGROUPS * 32, 1, 1),
        output_shapes=[weight.shape, weight.shape], output_dtypes=[mx.float32, mx.float32]))


def disagreement() -> float:
    """Share of codes in a random case that the kernel rounds otherwise than the reference."""
    random = np.random.default_rng(0)
    weight, scales = (mx.array(random.normal(size=(70, 64)).astype(np.float32)) for _ in range(2))
    scales = mx.abs(scales) + 0.1
    feedback = mx.array(np.triu(random.normal(size=(64, 64)), 1).astype(np.float32) / 64)
    case = (weight, weight, scales, -1.5 * scales, feedback, 4)
    return (_launch(*case)[0] != reference(*case)[0]).astype(mx.float32).mean().item()
