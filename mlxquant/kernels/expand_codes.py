"""Expand replicated codes to a matrix, for prompts: then one product serves every token.

    W_ij = C_ij Σ_k b_ik a_jk        (what takes R x)

A thread has one pair of inputs in several rows, so that lanes write neighbours and A stays in registers. It reads
the codes, A and B and writes 2 bytes a weight, which is most of its time.
"""

import functools

import mlx.core as mx

from mlxquant.kernels import backend, code_order
from mlxquant.kernels.prepare_input import Scales, sizes

_BODY = """
    const int rows = sizes[0], chunks = sizes[1], n = sizes[2];
    const int pair = thread_position_in_grid.x, row0 = thread_position_in_grid.y * ROWS;
    const int chunk = pair / 16, p = pair % 16, column = 2 * pair;
    if (column >= n || row0 >= rows) return;
    const bool whole = column + 1 < n;
    float a[2][K];
    UNROLL for (int k = 0; k < K; ++k) {
        UNROLL for (int i = 0; i < 2; ++i) {
            const int j = whole ? column + i : column;
            a[i][k] = replica_in[j / (GROUP ? GROUP : 1) * K + k] * (GROUP ? column_scale[j] : 1.0f);
        }
    }
    for (int row = row0; row < min(row0 + ROWS, rows); ++row) {
        const int at = (row * chunks + chunk) * BITS;
        uint words[4];
        UNROLL for (int i = 0; i < BITS; ++i) words[i] = codes[at + i];
        const float2 level = decode_floats<BITS, LEVELS>(pair_word<BITS>(words, p), pair_shift<BITS>(p));
        float first = 0.0f, second = 0.0f;
        UNROLL for (int k = 0; k < K; ++k) {
            const float b = static_cast<float>(replica_out[row * K + k]);
            first += b * a[0][k];
            second += b * a[1][k];
        }
        const float unit = LEVELS == 2 ? 2.0f : 1.0f;
        const auto to = static_cast<size_t>(row) * n + column;
        weight[to] = static_cast<T>(unit * level.x * first);
        if (whole) weight[to + 1] = static_cast<T>(unit * level.y * second);
    }
"""
_ROWS, _THREADS = 8, 128


def expand(codes: mx.array, replica_out: mx.array, scales: Scales, levels: int, dtype: mx.Dtype) -> mx.array:
    """W (m, n) in ``dtype`` of ``codes`` (m, chunks, b) in kernels' order and B (m, K)."""
    rows, chunks, bits = codes.shape
    pairs = -(-scales.inputs // 2)
    return _kernel()(
        inputs=[codes, replica_out, scales.replica_in, scales.column_scale, sizes(rows, chunks, scales.inputs)],
        template=[("T", dtype), ("BITS", bits), ("LEVELS", levels), ("K", scales.replicas), ("GROUP", scales.group),
                  ("ROWS", _ROWS)],
        grid=(-(-pairs // _THREADS) * _THREADS, -(-rows // _ROWS), 1), threadgroup=(_THREADS, 1, 1),
        output_shapes=[(rows, scales.inputs)], output_dtypes=[dtype])[0]


@functools.cache
def _kernel():
    return backend.build("expand_codes", ["codes", "replica_out", "replica_in", "column_scale", "sizes"], ["weight"],
                         _BODY, code_order.DECODE)
