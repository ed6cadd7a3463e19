"""Replicated codes times a few tokens: each code is read and decoded once, and used K times for
every token.

    y[t, i] = Σ_k b_ik Σ_j C_ij X_(t,k),j               plain:   X_(t,k) = a_k ∘ R x_t
    y[t, i] = Σ_k b_ik Σ_g α_gk Σ_(j in g) C_ij X_t,j   grouped: X_t = c ∘ R x_t, and the replicas
                                                                 share sums

A simdgroup has a few rows; its lanes take the chunks of a row in turn (``code_order.py``), so that
the lanes' loads are neighbours, and no two simdgroups share a row: nothing but one ``simd_sum`` per
row and token. A weight costs, beside its b bits, an AND, an OR, a subtraction and K multiply-adds,
grouped 1 + K/G; X, in float32, is read from the caches. It must move the codes, B and X once.

Of a mixture only the chosen experts' codes are read: a token is then a pair of a token and an
expert, and each goes through the matrix of its own.
"""

import functools
from collections.abc import Callable

import mlx.core as mx

from mlxquant.kernels import backend, code_order
from mlxquant.kernels.matrix import Matrix, at_least, sizes
from mlxquant.kernels.prepare_input import Layout

_RUN = code_order.CHUNK
_BODY = """
    const int rows = sizes[0], chunks = sizes[1], tokens = sizes[2], groups = sizes[3];
    const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
    const int row0 = (int(threadgroup_position_in_grid.x) * SIMDGROUPS + simdgroup) * ROWS;
    const int token0 = int(threadgroup_position_in_grid.y) * TOKENS;
    const int vectors = GROUP ? tokens : tokens * K;
    const int first = GROUP ? token0 : token0 * K, last = vectors - 1;
    if (row0 >= rows) return;  // a whole simdgroup
    const int expert = EXPERT(token0);
    const auto own = codes + static_cast<size_t>(expert) * rows * chunks * BITS;
    const auto inputs = reinterpret_cast<const DEVICE float4*>(prepared);
    float sums[ROWS][TOKENS * K];
    UNROLL for (int r = 0; r < ROWS; ++r)
        UNROLL for (int u = 0; u < TOKENS * K; ++u) sums[r][u] = 0.0f;

    for (int chunk = lane; chunk < chunks; chunk += 32) {
        uint words[ROWS][4];
        UNROLL for (int r = 0; r < ROWS; ++r) {
            const int at = min(row0 + r, rows - 1) * chunks + chunk;
            if (BITS == 2) {
                const auto two = reinterpret_cast<const DEVICE uint2*>(own)[at];
                words[r][0] = two.x; words[r][1] = two.y;
            } else if (BITS == 4) {
                const auto four = reinterpret_cast<const DEVICE uint4*>(own)[at];
                words[r][0] = four.x; words[r][1] = four.y;
                words[r][2] = four.z; words[r][3] = four.w;
            } else {
                UNROLL for (int i = 0; i < BITS; ++i) words[r][i] = own[at * BITS + i];
            }
        }
        float partial[ROWS][TOKENS];
        UNROLL for (int piece = 0; piece < 8; ++piece) {
            float2 low[ROWS], high[ROWS];
            UNROLL for (int r = 0; r < ROWS; ++r) {
                low[r] = decode_pair_floats<BITS, LEVELS>(words[r], 2 * piece);
                high[r] = decode_pair_floats<BITS, LEVELS>(words[r], 2 * piece + 1);
            }
            const int at = ((chunk >> 5) * 8 + piece) * vectors;
            if (GROUP) {
                const int inside = piece % (SHARED / 4);
                const bool starts = inside == 0, ends = inside == SHARED / 4 - 1;
                UNROLL for (int t = 0; t < TOKENS; ++t) {
                    const float4 x = inputs[(at + min(first + t, last)) * 32 + lane];
                    UNROLL for (int r = 0; r < ROWS; ++r) {
                        const float old = starts ? 0.0f : partial[r][t];
                        partial[r][t] = old + low[r].x * x.x + low[r].y * x.y
                            + high[r].x * x.z + high[r].y * x.w;
                    }
                }
                if (ends) {
                    const int group = (chunk * 32 + piece * 4) / (GROUP ? GROUP : 1);
                    const int alphas = (expert * groups + min(group, groups - 1)) * K;
                    UNROLL for (int k = 0; k < K; ++k) {
                        const float alpha = replica_in[alphas + k];
                        UNROLL for (int r = 0; r < ROWS; ++r)
                            UNROLL for (int t = 0; t < TOKENS; ++t)
                                sums[r][t * K + k] += alpha * partial[r][t];
                    }
                }
            } else {
                UNROLL for (int u = 0; u < TOKENS * K; ++u) {
                    const float4 x = inputs[(at + min(first + u, last)) * 32 + lane];
                    UNROLL for (int r = 0; r < ROWS; ++r)
                        sums[r][u] += low[r].x * x.x + low[r].y * x.y
                            + high[r].x * x.z + high[r].y * x.w;
                }
            }
        }
    }
    UNROLL for (int r = 0; r < ROWS; ++r) {
        const int row = expert * rows + min(row0 + r, rows - 1);
        UNROLL for (int t = 0; t < TOKENS; ++t) {
            float y = 0.0f;
            UNROLL for (int k = 0; k < K; ++k)
                y += static_cast<float>(replica_out[row * K + k]) * sums[r][t * K + k];
            y = simd_sum(y);
            if (lane == 0 && row0 + r < rows && token0 + t < tokens)
                out[(token0 + t) * rows + row0 + r] = static_cast<T>(LEVELS == 2 ? 2.0f * y : y);
        }
    }
"""
_INPUTS = ["prepared", "codes", "replica_out", "replica_in", "sizes"]
_SIMDGROUPS = 2
_USES = 16  # of a decoded code, in registers; more tokens take another pass


def layout(group: int) -> Layout:
    """How this kernel reads its prepared input: grouped, A apart."""
    return Layout(lanes=32, run=_RUN, piece=4, dtype=mx.float32, expand=not group)


def multiply(prepared: mx.array, matrix: Matrix, tokens: int, dtype: mx.Dtype,
             experts: mx.array | None = None) -> mx.array:
    """y (tokens, m) in ``dtype`` of an input of so many tokens, prepared in ``layout``; with
    ``experts`` (tokens,), the matrix each is to be multiplied by."""
    spec, rows = matrix.scales.spec, matrix.rows
    chosen = [] if experts is None else [at_least(experts)]
    together = 1 if experts is not None else max(1, min(tokens, _USES // spec.replicas))
    height = 4 if together * spec.replicas <= 8 else 2
    blocks = -(-rows // (_SIMDGROUPS * height))
    y: mx.array = _kernel(experts is not None)(
        inputs=[prepared, matrix.codes, matrix.replica_out, matrix.scales.replica_in,
                sizes(rows, matrix.chunks, tokens, matrix.scales.groups), *chosen],
        template=[("T", dtype), ("BITS", matrix.code_bits), ("LEVELS", spec.bits.levels),
                  ("K", spec.replicas), ("GROUP", spec.replica_group),
                  ("SHARED", min(spec.replica_group or _RUN, _RUN)), ("TOKENS", together),
                  ("ROWS", height), ("SIMDGROUPS", _SIMDGROUPS)],
        grid=(blocks * _SIMDGROUPS * 32, -(-tokens // together), 1),
        threadgroup=(_SIMDGROUPS * 32, 1, 1), output_shapes=[(tokens, rows)],
        output_dtypes=[dtype])[0]
    return y


@functools.cache
def _kernel(mixture: bool) -> Callable[..., list[mx.array]]:
    return backend.build("replicated_matvec", _INPUTS, ["out"], _BODY, code_order.DECODE,
                         mixture=mixture)
