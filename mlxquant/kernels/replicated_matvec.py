"""Replicated codes times a few tokens: each code is read and decoded once for all of them.

    y[t, i] = Σ_k b_ik Σ_j C_ij X_(t,k),j               plain:   X_(t,k) = a_k ∘ R x_t
    y[t, i] = Σ_j (Σ_k b_ik a_jk) C_ij X_t,j            folded:  X_t = R x_t
    y[t, i] = Σ_g (Σ_k b_ik α_gk) Σ_(j in g) C_ij X_t,j   grouped: X_t = c ∘ R x_t

A simdgroup has a few rows; its lanes take the chunks of a row in turn (``code_order.py``), so that
the lanes' loads are neighbours, and no two simdgroups share a row: the only reduction is one
``simd_sum`` per row and token; then a bias and the residual stream are added. Beside reading its b
bits, a weight costs half an AND, half an OR and for T tokens T · K multiply-adds, grouped
T + (K + T) / G. For several tokens plain replicas are folded into the weights: K + 2 + T. Codes
decode to their level plus an offset: for each chunk, or group, Σ offset · X, which is stored behind
X, is subtracted. Where replicas are folded, and in float32, where that would cost precision, the
offset is subtracted from each code.

X is float32: float16 would raise the error from 2.1e-4 to 3.1e-4 and save no time, and a bfloat16
model's values may exceed its range. X is read from the caches once for all rows of a simdgroup,
whose loads of codes are under way together. The kernel must move the codes, B and X once.

For a mixture only the chosen experts' codes are read: each pair of a token and an expert then
counts as a token, and is multiplied by that expert's matrix.
"""

import mlx.core as mx

from mlxquant.codes.spec import ReplicaShape
from mlxquant.kernels import backend, code_order
from mlxquant.kernels.matrix import NOTHING, Added, Matrix, sizes
from mlxquant.kernels.prepare_input import Layout

_HEADER = code_order.DECODE + """
template <int BITS>
FUNCTION void load_chunk(const DEVICE uint* codes, int at, THREAD uint (&words)[4]) {
    if (BITS == 2) {
        const auto two = reinterpret_cast<const DEVICE uint2*>(codes)[at];
        words[0] = two.x; words[1] = two.y;
    } else if (BITS == 4) {
        const auto four = reinterpret_cast<const DEVICE uint4*>(codes)[at];
        words[0] = four.x; words[1] = four.y; words[2] = four.z; words[3] = four.w;
    } else {
        UNROLL for (int i = 0; i < BITS; ++i) words[i] = codes[at * BITS + i];
    }
}
template <int K> FUNCTION void load_scales(const DEVICE float* from, THREAD float (&scales)[K]) {
    UNROLL for (int k = 0; k < K; k += K % 4 ? 1 : 4) {
        if (K % 4) {
            scales[k] = from[k];
        } else {
            const auto four = *reinterpret_cast<const DEVICE float4*>(from + k);
            scales[k] = four.x; scales[(k + 1) % K] = four.y;
            scales[(k + 2) % K] = four.z; scales[(k + 3) % K] = four.w;
        }
    }
}
"""
_BODY = """
    constexpr int USES = GROUP || FOLD ? TOKENS : TOKENS * K;
    const int rows = sizes[0], chunks = sizes[1], groups = sizes[3];
    const int pairs = PAIRS ? sizes[2] : 1;  // else strides of X are constants: no adding
    const uint mask = uint(sizes[4]);  // were it constant, NVIDIA's would take two operations
    const int added = sizes[5];
    const int lane = thread_index_in_simdgroup, simdgroup = simdgroup_index_in_threadgroup;
    const int row0 = (int(threadgroup_position_in_grid.x) * SIMDGROUPS + simdgroup) * ROWS;
    const int pair = PAIRS ? int(threadgroup_position_in_grid.y) : 0, expert = EXPERT(pair);
    const int vectors = pairs * USES + (FOLD ? K : 0), blocks = (chunks + 31) / 32;
    if (row0 >= rows) return;  // a whole simdgroup
    const auto own = codes + static_cast<size_t>(expert) * rows * chunks * BITS;
    auto inputs = reinterpret_cast<const DEVICE float4*>(prepared) + pair * USES * 32 + lane;
    auto offsets = prepared + blocks * 1024 * vectors + pair * USES * 32 + lane;
    float sums[ROWS][USES], y[ROWS][TOKENS], out_scales[ROWS][K];
    int start[ROWS];
    UNROLL for (int r = 0; r < ROWS; ++r) {
        const int row = min(row0 + r, rows - 1);
        start[r] = row * chunks;
        UNROLL for (int u = 0; u < USES; ++u) sums[r][u] = 0.0f;
        UNROLL for (int t = 0; t < TOKENS; ++t) y[r][t] = 0.0f;
        UNROLL for (int k = 0; k < (GROUP || FOLD ? K : 0); ++k)
            out_scales[r][k] = static_cast<float>(replica_out[(expert * rows + row) * K + k]);
    }
    for (int block = 0; block < blocks; ++block) {
        const int chunk = min(block * 32 + lane, chunks - 1);  // X is zero beyond
        uint words[ROWS][4];
        UNROLL for (int r = 0; r < ROWS; ++r) load_chunk<BITS>(own, start[r] + chunk, words[r]);
        UNROLL for (int piece = 0; piece < 8; ++piece) {
            const bool starts = piece % (SHARED / 4) == 0, ends = (piece + 1) % (SHARED / 4) == 0;
            if (starts) {
                UNROLL for (int u = 0; u < USES; ++u) {
                    const float offset = EXACT ? 0.0f : offsets[u * 32];
                    UNROLL for (int r = 0; r < ROWS; ++r)
                        sums[r][u] = GROUP ? -offset : sums[r][u] - offset;
                }
                offsets += vectors * 32;
            }
            float2 low[ROWS], high[ROWS];
            UNROLL for (int r = 0; r < ROWS; ++r) {
                low[r] = pair_floats<BITS>(words[r], 2 * piece, mask);
                high[r] = pair_floats<BITS>(words[r], 2 * piece + 1, mask);
                if (EXACT) {
                    low[r].x -= pair_offset(BITS, LEVELS, 2 * piece);
                    low[r].y -= pair_offset(BITS, LEVELS, 2 * piece);
                    high[r].x -= pair_offset(BITS, LEVELS, 2 * piece + 1);
                    high[r].y -= pair_offset(BITS, LEVELS, 2 * piece + 1);
                }
            }
            if (FOLD) {
                UNROLL for (int r = 0; r < ROWS; ++r) {
                    float scale[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                    UNROLL for (int k = 0; k < K; ++k) {
                        const auto a = inputs[(USES + k) * 32];
                        scale[0] += out_scales[r][k] * a.x;
                        scale[1] += out_scales[r][k] * a.y;
                        scale[2] += out_scales[r][k] * a.z;
                        scale[3] += out_scales[r][k] * a.w;
                    }
                    low[r].x *= scale[0]; low[r].y *= scale[1];
                    high[r].x *= scale[2]; high[r].y *= scale[3];
                }
            }
            UNROLL for (int u = 0; u < USES; ++u) {
                const auto x = inputs[u * 32];
                UNROLL for (int r = 0; r < ROWS; ++r) {
                    sums[r][u] += low[r].x * x.x;  // one by one: each is one operation then
                    sums[r][u] += low[r].y * x.y;
                    sums[r][u] += high[r].x * x.z;
                    sums[r][u] += high[r].y * x.w;
                }
            }
            inputs += vectors * 32;
            if (GROUP && ends) {
                const int group = (block * 1024 + lane * 32 + piece * 4) / (GROUP ? GROUP : 1);
                float in_scales[K];
                load_scales<K>(replica_in + (expert * groups + min(group, groups - 1)) * K,
                               in_scales);
                UNROLL for (int r = 0; r < ROWS; ++r) {
                    float scale = 0.0f;
                    UNROLL for (int k = 0; k < K; ++k) scale += out_scales[r][k] * in_scales[k];
                    UNROLL for (int t = 0; t < TOKENS; ++t) y[r][t] += scale * sums[r][t];
                }
            }
        }
    }
    UNROLL for (int r = 0; r < ROWS; ++r) {
        const int row = expert * rows + min(row0 + r, rows - 1);
        UNROLL for (int t = 0; t < TOKENS; ++t) {
            if (FOLD) y[r][t] = sums[r][t];
            UNROLL for (int k = 0; k < (GROUP || FOLD ? 0 : K); ++k)
                y[r][t] += static_cast<float>(replica_out[row * K + k])
                    * sums[r][(t * K + k) % USES];
            float whole = simd_sum(y[r][t]);
            if (lane == 0 && row0 + r < rows) {
                const int at = (pair + t) * rows + row0 + r;
                if (LEVELS == 2) whole *= 2.0f;
                if (added & 1) whole += static_cast<float>(bias[row]);
                if (added & 2) whole += static_cast<float>(residual[at]);
                out[at] = static_cast<T>(whole);
            }
        }
    }
"""
_KERNEL = backend.Kernel(
    "replicated_matvec",
    ["prepared", "codes", "replica_out", "replica_in", "sizes", "bias", "residual"],
    ["out"], _BODY, _HEADER)
_SIMDGROUPS = 2


def layout(spec: ReplicaShape, dtype: mx.Dtype, tokens: int = 1) -> Layout:
    """The layout in which this kernel reads the input of ``tokens`` that share a matrix, in a layer
    whose activations are ``dtype``. Where replicas are grouped or folded, A is not multiplied into
    X; sums of offsets are stored where offsets are not subtracted from each code."""
    shared = min(spec.replica_group or code_order.CHUNK, code_order.CHUNK)
    fold = folds(spec, tokens)
    return Layout(lanes=32, run=code_order.CHUNK, piece=4, dtype=mx.float32,
                  expand=not (spec.replica_group or fold), behind=fold,
                  sums=0 if dtype == mx.float32 or fold else shared)


def multiply(prepared: mx.array, matrix: Matrix, tokens: int, dtype: mx.Dtype,
             experts: mx.array | None = None, added: Added = NOTHING) -> mx.array:
    """y (tokens, m) in ``dtype``, plus the terms ``added``, for an input of ``tokens`` that is
    ``prepared`` in ``layout``; ``experts`` (tokens,) name the matrix that multiplies each token."""
    spec, rows, bits = matrix.scales.spec, matrix.rows, matrix.code_bits
    together = tokens if experts is None else 1
    fold, height = folds(spec, together), rows_together(spec, together)
    blocks = -(-rows // (_SIMDGROUPS * height))
    return _KERNEL(
        inputs=[prepared, matrix.codes, matrix.replica_out, matrix.scales.replica_in,
                sizes(rows, matrix.chunks, tokens, matrix.scales.replica_in.shape[-2],
                      ((1 << bits) - 1) * 0x10001,  # a code's bits in both halves of a word
                      added.flags), *added.inputs(dtype)],
        template=[("T", dtype), ("B", matrix.replica_out.dtype),
                  ("EXACT", dtype == mx.float32 or fold), ("BITS", bits),
                  ("LEVELS", spec.bits.levels), ("K", spec.replicas),
                  ("GROUP", spec.replica_group), ("FOLD", fold),
                  ("SHARED", min(spec.replica_group or code_order.CHUNK, code_order.CHUNK)),
                  ("TOKENS", together), ("PAIRS", experts is not None), ("ROWS", height),
                  ("SIMDGROUPS", _SIMDGROUPS), *added.types(dtype)],
        grid=(blocks * _SIMDGROUPS * 32, tokens // together, 1),
        threadgroup=(_SIMDGROUPS * 32, 1, 1), output_shapes=[(tokens, rows)],
        output_dtypes=[dtype], experts=experts)[0]


def folds(spec: ReplicaShape, tokens: int) -> bool:
    """Whether plain replicas are folded into the decoded weights: K + 2 operations a weight and one
    for each token, in place of K for each token."""
    return not spec.replica_group and tokens * (spec.replicas - 1) > spec.replicas + 1


def rows_together(spec: ReplicaShape, tokens: int) -> int:
    """How many rows a simdgroup computes from one read of X: as many as its registers can hold,
    with sums and scales for each row (``benchmarks/LOG.md``)."""
    apart = bool(spec.replica_group) or folds(spec, tokens)
    held = 2 * tokens + spec.replicas if apart else 2 * tokens * spec.replicas
    return 8 if held <= 10 else 6 if held <= 12 else 4 if held <= 20 else 2
