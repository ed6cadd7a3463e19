"""Expand replicated codes to a matrix, for prompts: then one product serves every token.

    W_ij = C_ij Σ_k b_ik a_jk        (the matrix that multiplies R x)

A thread has one pair of inputs in several rows, so that lanes write neighbours and A stays in
registers. It reads the codes, A and B and writes 2 bytes a weight, which is most of its time.
"""

import mlx.core as mx

from mlxquant.kernels import backend, code_order
from mlxquant.kernels.matrix import Matrix, sizes

_BODY = """
    const int rows = sizes[0], chunks = sizes[1], n = sizes[2];
    const int pair = thread_position_in_grid.x, row0 = thread_position_in_grid.y * ROWS;
    const int expert = thread_position_in_grid.z;
    const int chunk = pair / 16, p = pair % 16, column = 2 * pair;
    if (column >= n || row0 >= rows) return;
    const bool whole = column + 1 < n;
    const uint mask = ((1u << BITS) - 1u) * 0x10001u;
    const float offset = pair_offset(BITS, LEVELS, p);
    const auto own = codes + static_cast<size_t>(expert) * rows * chunks * BITS;
    float a[2][K];
    UNROLL for (int k = 0; k < K; ++k) {
        UNROLL for (int i = 0; i < 2; ++i) {
            const int j = expert * n + (whole ? column + i : column);
            const float c = GROUP ? column_scale[j] : 1.0f;
            a[i][k] = replica_in[j / (GROUP ? GROUP : 1) * K + k] * c;
        }
    }
    for (int row = row0; row < min(row0 + ROWS, rows); ++row) {
        const int at = (row * chunks + chunk) * BITS, out = expert * rows + row;
        uint words[4];
        UNROLL for (int i = 0; i < BITS; ++i) words[i] = own[at + i];
        const float2 level = pair_floats<BITS>(words, p, mask);
        float first = 0.0f, second = 0.0f;
        UNROLL for (int k = 0; k < K; ++k) {
            const float b = static_cast<float>(replica_out[out * K + k]);
            first += b * a[0][k];
            second += b * a[1][k];
        }
        const float unit = LEVELS == 2 ? 2.0f : 1.0f;
        const auto to = static_cast<size_t>(out) * n + column;
        weight[to] = static_cast<T>(unit * (level.x - offset) * first);
        if (whole) weight[to + 1] = static_cast<T>(unit * (level.y - offset) * second);
    }
"""
_KERNEL = backend.Kernel(
    "expand_codes", ["codes", "replica_out", "replica_in", "column_scale", "sizes"],
    ["weight"], _BODY, code_order.DECODE)
_ROWS, _THREADS = 8, 128


def expand(matrix: Matrix, dtype: mx.Dtype) -> mx.array:
    """``matrix.dense()`` in ``dtype``: (m, n), or (E, m, n) of experts."""
    scales, rows = matrix.scales, matrix.rows
    spec, inputs, stack = scales.spec, scales.inputs, scales.experts or 1
    pairs = -(-inputs // 2)
    return _KERNEL(
        inputs=[matrix.codes, matrix.replica_out, *scales.for_kernel()[:2],
                sizes(rows, matrix.chunks, inputs)],
        template=[("T", dtype), ("B", matrix.replica_out.dtype), ("BITS", matrix.code_bits),
                  ("LEVELS", spec.bits.levels), ("K", spec.replicas),
                  ("GROUP", spec.replica_group), ("ROWS", _ROWS)],
        grid=(-(-pairs // _THREADS) * _THREADS, -(-rows // _ROWS), stack),
        threadgroup=(_THREADS, 1, 1), output_shapes=[(*matrix.replica_out.shape[:-1], inputs)],
        output_dtypes=[dtype])[0]
