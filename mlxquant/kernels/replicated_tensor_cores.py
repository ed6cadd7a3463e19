"""Replicated codes times up to eight tokens on NVIDIA's tensor cores: K replicas' arithmetic at
the price of one.

    P[i, u] = Σ_j C_ij X_uj,  u = (t, k)        y[t, i] = Σ_k b_ik P[i, (t, k)]

The same product as ``replicated_matvec.py``. An ``mma.m16n8k16`` takes 16 rows of decoded codes and
8 vectors u, so eight uses of a code cost what one does. The order of the summed-over inputs is
free: a lane decodes runs of neighbouring inputs of the rows g and g + 8 straight into its part of
the operand, two codes by one mask: (word >> s) & 0x00030003 | 0x64006400 is 1024 + code in both
halves of a float16 pair; one multiply-add subtracts 1024 and makes it 2·code − (levels − 1),
exactly. As the mantissa has room (10 bits, bfloat16 7), codes are masked in place, at any bit from
1 up (at bit 0 the constant to subtract is inexact), and the multiply-add also divides by 2^bit: one
shift serves several pairs. Sums are float32.

Warps of a block share its 16 rows and take blocks of inputs in turn, with a ring of asynchronous
copies under way in each; their sums, times B, meet in shared memory. Based on the operand layouts
of PTX's ``mma``; the idea of decoding into them is Marlin's (arXiv 2408.11743).
"""

import mlx.core as mx

from mlxquant.codes.spec import ReplicaShape
from mlxquant.kernels import backend, code_order
from mlxquant.kernels.matrix import NOTHING, Added, Matrix, sizes
from mlxquant.kernels.prepare_input import Layout


def _pair(scalar: str, pair: str, both: str, operand: str, power: str, mantissa: int) -> str:
    """What the kernel needs to know of a 16-bit type: its pairs, a power of two that codes fit
    into, its product."""
    return f"""
template <> struct Pair<{scalar}> {{
    using type = {pair};
    static constexpr uint power = {power}u;
    static constexpr int mantissa = {mantissa};
    static __device__ type both(float x) {{ return {both}(x); }}
    static __device__ void multiply(float (&c)[4], const uint (&a)[4], uint b0, uint b1) {{
        asm("mma.sync.aligned.m16n8k16.row.col.f32.{operand}.{operand}.f32 "
            "{{%0,%1,%2,%3}}, {{%4,%5,%6,%7}}, {{%8,%9}}, {{%0,%1,%2,%3}};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }}
}};
"""


_HEADER = code_order.DECODE + """
template <class T> struct Pair;
""" + _pair("__half", "__half2", "__float2half2_rn", "f16", "0x64006400", 10) + _pair(
    "__nv_bfloat16", "__nv_bfloat162", "__float2bfloat162_rn", "bf16", "0x43004300", 7) + """
// 2·code − top of pair p of a chunk, in both halves.
template <class T, int BITS, int LEVELS>
inline __device__ uint decode_pair(const uint* words, int p) {
    using P = Pair<T>;
    const uint word = pair_word<BITS>(words, p);
    const int shift = pair_shift(BITS, p), room = P::mantissa / BITS * BITS;
    const int at = shift % room ? shift % room : 1, mask = ((1 << BITS) - 1) << at;
    const uint moved = at > shift ? word << (at - shift) : word >> (shift - at);
    uint coded = (moved & (mask | mask << 16)) | P::power;
    const float scale = 2.0f / (1 << at), offset = (1 << P::mantissa) * scale + (LEVELS - 1);
    const auto level = __hfma2(reinterpret_cast<typename P::type&>(coded), P::both(scale),
                               P::both(-offset));
    return reinterpret_cast<const uint&>(level);
}
// Copies the codes of a run into shared memory without waiting: what is loaded into registers, the
// compiler moves down to its first use, and waits there for memory. A lane reads back only what it
// copied itself.
template <int WORDS> inline __device__ void copy_run(uint* to, const uint* from) {
    const uint at = static_cast<uint>(__cvta_generic_to_shared(to));
    if constexpr (WORDS == 4) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(at), "l"(from));
    } else {
        UNROLL for (int i = 0; i < WORDS; ++i)
            asm volatile("cp.async.ca.shared.global [%0], [%1], 4;"
                         :: "r"(at + 4 * i), "l"(from + i));
    }
}
"""
_BODY = """
    constexpr int WORDS = RUN / 32 * BITS, TILES = (TOKENS * K + 7) / 8, STRIDE = TILES * 8 + 1;
    constexpr int BATCH = TILES <= 2 ? 4 : TILES <= 4 ? 2 : 1, CHAINS = TILES <= 2 ? 2 : 1;
    __shared__ float shared[WARPS][16][STRIDE];
    __shared__ alignas(16) uint ring[WARPS][AHEAD][2][32][4];
    const int rows = sizes[0], runs = sizes[1], added = sizes[2], blocks = (runs + 3) / 4;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, quad = lane & 3;
    const int row0 = blockIdx.x * 16, vectors = TOKENS * K;
    const int low = min(row0 + g, rows - 1), high = min(row0 + g + 8, rows - 1);
    const uint* first_row = codes + static_cast<long long>(low) * runs * WORDS;
    const uint* second_row = codes + static_cast<long long>(high) * runs * WORDS;
    const auto inputs = reinterpret_cast<const uint4*>(prepared) + quad;
    int vector[TILES];  // sums of vectors that are none go nowhere
    UNROLL for (int tile = 0; tile < TILES; ++tile) vector[tile] = min(tile * 8 + g, vectors - 1);
    float sums[CHAINS][TILES][4] = {};

    const auto copy = [&](int stage, int block) {
        if (block < blocks) {
            const int run = min(block * 4 + quad, runs - 1);  // X is zero where there is none
            copy_run<WORDS>(ring[warp][stage][0][lane], first_row + run * WORDS);
            copy_run<WORDS>(ring[warp][stage][1][lane], second_row + run * WORDS);
        }
        asm volatile("cp.async.commit_group;" ::: "memory");
    };
    const auto use = [&](const uint (&words)[2][4], int block) {
        const auto at = inputs + block * (RUN / 8) * vectors * 4;
        UNROLL for (int piece0 = 0; piece0 < RUN / 8; piece0 += BATCH) {
            uint4 x[BATCH][TILES];  // before their first use: a load takes longer than a product
            UNROLL for (int i = 0; i < BATCH; ++i)
                UNROLL for (int tile = 0; tile < TILES; ++tile)
                    x[i][tile] = __ldg(at + ((piece0 + i) * vectors + vector[tile]) * 4);
            UNROLL for (int i = 0; i < BATCH; ++i) {
                const int chunk = (piece0 + i) / 4 * BITS, pair = (piece0 + i) % 4 * 4;
                uint a[2][4];
                UNROLL for (int half = 0; half < 2; ++half)
                    UNROLL for (int j = 0; j < 4; ++j)  // rows g and g + 8, then the next pair
                        a[half][j] = decode_pair<T, BITS, LEVELS>(
                            words[j % 2] + chunk, pair + 2 * half + j / 2);
                UNROLL for (int tile = 0; tile < TILES; ++tile) {
                    Pair<T>::multiply(sums[0][tile], a[0], x[i][tile].x, x[i][tile].y);
                    Pair<T>::multiply(sums[CHAINS - 1][tile], a[1], x[i][tile].z, x[i][tile].w);
                }
            }
        }
    };
    UNROLL for (int stage = 0; stage < AHEAD; ++stage) copy(stage, warp + stage * WARPS);
    int stage = 0;
    for (int block = warp; block < blocks; block += WARPS) {
        asm volatile("cp.async.wait_group %0;" :: "n"(AHEAD - 1) : "memory");
        uint words[2][4];
        UNROLL for (int row = 0; row < 2; ++row) {
            const uint4 run = *reinterpret_cast<const uint4*>(ring[warp][stage][row][lane]);
            words[row][0] = run.x, words[row][1] = run.y;
            words[row][2] = run.z, words[row][3] = run.w;
        }
        copy(stage, block + AHEAD * WARPS);
        use(words, block);
        stage = stage + 1 == AHEAD ? 0 : stage + 1;
    }
    UNROLL for (int tile = 0; tile < TILES; ++tile) {
        UNROLL for (int i = 0; i < 4; ++i) {
            const int u = tile * 8 + quad * 2 + i % 2;
            if (u < vectors) {
                const float b = static_cast<float>(replica_out[(i < 2 ? low : high) * K + u % K]);
                float sum = sums[0][tile][i];
                if (CHAINS == 2) sum += sums[CHAINS - 1][tile][i];
                shared[warp][i < 2 ? g : g + 8][u] = b * sum;
            }
        }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 16 * TOKENS; i += WARPS * 32) {
        const int row = i % 16, token = i / 16;
        float y = 0.0f;
        for (int w = 0; w < WARPS; ++w)
            for (int k = 0; k < K; ++k) y += shared[w][row][token * K + k];
        if (row0 + row < rows) {
            const long long at = (long long)token * rows + row0 + row;
            if (LEVELS != 2) y *= 0.5f;
            if (added & 1) y += static_cast<float>(bias[row0 + row]);
            if (added & 2) y += static_cast<float>(residual[at]);
            out[at] = static_cast<T>(y);
        }
    }
"""
MOST_USES = 64  # of a code: more tokens than 64 / K are dearer than expanding the codes
_KERNEL = backend.Kernel(
    "replicated_tensor_cores", ["prepared", "codes", "replica_out", "sizes", "bias", "residual"],
    ["out"], _BODY, _HEADER)
_ROWS = 16
_MANY_ROWS = 8192


def layout(spec: ReplicaShape, dtype: mx.Dtype, _tokens: int = 1) -> Layout:
    """How this kernel reads its prepared input, of however many tokens: every a_k ∘ z, in the
    activations' 16 bits."""
    return Layout(lanes=4, run=code_order.RUN[spec.bits.code_bits], piece=8, dtype=dtype,
                  expand=True)


def fits(matrix: Matrix, tokens: int, dtype: mx.Dtype) -> bool:
    """Whether this kernel serves a call: on CUDA, in 16 bits, for few enough tokens, and for one
    matrix."""
    return (dtype != mx.float32 and tokens * matrix.scales.spec.replicas <= MOST_USES
            and matrix.scales.experts is None and backend.is_cuda())


def multiply(prepared: mx.array, matrix: Matrix, tokens: int, dtype: mx.Dtype,
             experts: None = None, added: Added = NOTHING) -> mx.array:
    """y (tokens, m) in ``dtype``, float16 or bfloat16; as ``replicated_matvec.multiply``."""
    spec, rows, bits = matrix.scales.spec, matrix.rows, matrix.code_bits
    run = code_order.RUN[bits]
    runs = matrix.chunks * code_order.CHUNK // run
    # Warps that share 16 rows, and blocks of inputs that each warp copies ahead: of seven settings
    # tried on an H100 the fastest (``benchmarks/LOG.md``); few rows leave the chip room for more.
    warps, ahead = min(4, -(-runs // 4)), 2 if rows >= _MANY_ROWS else 4
    return _KERNEL(
        inputs=[prepared, matrix.codes, matrix.replica_out, sizes(rows, runs, added.flags),
                *added.inputs(dtype)],
        template=[("T", dtype), ("B", matrix.replica_out.dtype), ("BITS", bits),
                  ("LEVELS", spec.bits.levels), ("K", spec.replicas), ("RUN", run),
                  ("TOKENS", tokens), ("WARPS", warps), ("AHEAD", ahead), *added.types(dtype)],
        grid=(-(-rows // _ROWS) * warps * 32, 1, 1), threadgroup=(warps * 32, 1, 1),
        output_shapes=[(tokens, rows)], output_dtypes=[dtype])[0]
