"""Rotate an input, scale it for every replica, and lay it out as a matrix kernel reads it, in one
dispatch.

    z = H (s ∘ x) / √block      X[u = token · K + k] = a_k ∘ z,   or grouped, X[u = token] = c ∘ z

x (tokens, n) of any float type; s signs, H the Walsh–Hadamard matrix in blocks. A simdgroup has a
block (64 inputs or more) of one token in its registers: strides below 32 are shuffles between
lanes, longer ones stay in a lane. It reads x, s and A and writes X, each once; at this size the
time is the launch.

x may first be normed or gated (``first_step.py``). For a norm every simdgroup sums the squares of
the whole row itself: the row is in the caches, while a sum shared by all simdgroups would take a
dispatch of its own.

A token of a mixture goes to several experts, each with its own A and c: then X holds a vector for
each pair of a token and an expert, instead of one for each token.

``Layout``: a matrix kernel's lane decodes ``run`` neighbouring inputs, ``lanes`` of them make a
block of inputs, and X is [block][piece of the run][u][lane][element], so that the lanes' loads of a
piece are neighbours. A kernel that decodes a code to its level plus an offset (``code_order.py``)
subtracts Σ offset · X of a chunk, or of each group in it; these sums lie behind X: [block]
[group in chunk][u][lane].
"""

from dataclasses import dataclass

import mlx.core as mx

from mlxquant.codes.width import Width
from mlxquant.kernels import backend, code_order
from mlxquant.kernels.first_step import AS_IS, AsIs, Gate, Norm
from mlxquant.kernels.matrix import Scales, float_bits, sizes

LARGEST_BLOCK = 1024  # of a rotation: 32 registers a lane

_BODY = """
    const int n = sizes[0], padded = sizes[1], tokens = sizes[2];
    const int lane = thread_index_in_simdgroup;
    const int span = thread_position_in_grid.x / 32, token = thread_position_in_grid.y;
    const int row = token / sizes[4], expert = EXPERT(token);
    const bool norm = sizes[7] == 1, gate = sizes[7] == 2;
    const float offset = pair_offset(sizes[5], sizes[6], lane / 2);  // of decoded codes
    float inverse = 1.0f;  // of the row's root mean square
    if (norm) {
        float sum = 0.0f;
        for (int start = lane; start < n; start += 32 * 16) {
            UNROLL for (int i = 0; i < 16; ++i) {  // loads that do not wait for each other
                const int at = start + 32 * i;
                const float value = at < n ? static_cast<float>(x[row * n + at]) : 0.0f;
                sum += value * value;
            }
        }
        inverse = rsqrt(simd_sum(sum) / float(n) + as_type<float>(sizes[3]));
    }
    float z[SPAN / 32];
    UNROLL for (int i = 0; i < SPAN / 32; ++i) {
        const int column = span * SPAN + 32 * i + lane;
        z[i] = 0.0f;
        if (column < n) {
            z[i] = static_cast<float>(x[(gate ? 2 : 1) * row * n + column]);
            if (norm) {
                z[i] = static_cast<float>(static_cast<T>(z[i] * inverse));
                const float weight = static_cast<float>(norm_weight[column]);
                z[i] = static_cast<float>(static_cast<T>(z[i] * weight));
            }
            if (gate) {
                const float up = static_cast<float>(x[(2 * row + 1) * n + column]);
                // Fast math assumes that there is no infinity.
                const float silu = z[i] / (1.0f + exp(min(-z[i], 80.0f)));
                z[i] = static_cast<float>(static_cast<T>(silu * up));
            }
            if (ROTATION && ((signs[column / 8] >> (column % 8)) & 1)) z[i] = -z[i];
        }
    }
    UNROLL for (int stride = 1; stride < 32; stride *= 2) {
        if (stride < ROTATION) {
            UNROLL for (int i = 0; i < SPAN / 32; ++i) {
                const float other = simd_shuffle_xor(z[i], stride);
                z[i] = lane & stride ? other - z[i] : z[i] + other;
            }
        }
    }
    UNROLL for (int stride = 32; stride < SPAN; stride *= 2) {
        if (stride < ROTATION) {
            UNROLL for (int i = 0; i < SPAN / 32; ++i) {
                if (!(i & (stride / 32))) {
                    const float low = z[i], high = z[i | (stride / 32)];
                    z[i] = low + high;
                    z[i | (stride / 32)] = low - high;
                }
            }
        }
    }
    UNROLL for (int i = 0; i < SPAN / 32; ++i) {
        const int column = span * SPAN + 32 * i + lane;
        if (column >= padded) continue;
        const int inside = column % (LANES * RUN);
        const int piece = column / (LANES * RUN) * (RUN / PIECE) + inside % RUN / PIECE;
        const int element = inside / RUN * PIECE + inside % PIECE;
        const int given = EXPAND ? tokens * K : tokens, first = EXPAND ? token * K : token;
        const int vectors = given + (BEHIND ? K : 0);
        float value = z[i];
        if (ROTATION) value *= rsqrt(float(ROTATION));
        if (GROUP && column < n) value *= column_scale[expert * n + column];
        const int group = (expert * n + column) / (GROUP ? GROUP : 1);
        if (BEHIND && token == 0) {
            UNROLL for (int k = 0; k < K; ++k)
                prepared[(piece * vectors + given + k) * LANES * PIECE + element]
                    = static_cast<O>(column < n ? replica_in[group * K + k] : 0.0f);
        }
        UNROLL for (int k = 0; k < (EXPAND ? K : 1); ++k) {
            float scaled = value;
            if (EXPAND && column < n) scaled *= replica_in[group * K + k];
            prepared[(piece * vectors + first + k) * LANES * PIECE + element]
                = static_cast<O>(scaled);
            if (SUMS) {
                float sum = offset * scaled;
                UNROLL for (int stride = 1; stride < SHARED; stride *= 2)
                    sum += simd_shuffle_xor(sum, stride);
                const int chunk = column / 32;
                const int at = (chunk / 32 * (32 / SHARED) + lane / SHARED) * vectors + first + k;
                if (lane % SHARED == 0) prepared[vectors * padded + at * 32 + chunk % 32] = sum;
            }
        }
    }
"""
_KERNEL = backend.Kernel(
    "prepare_input", ["x", "norm_weight", "replica_in", "column_scale", "signs", "sizes"],
    ["prepared"], _BODY, code_order.DECODE)
_THREADS = 128


@dataclass(frozen=True)
class Layout:
    """How a matrix kernel reads X. ``expand``: X holds a_k ∘ z for all k, not z (or c ∘ z);
    ``behind``: A's K columns follow as further vectors; ``sums``: inputs in each Σ offset · X
    stored behind X, 0 for no sums."""

    lanes: int
    run: int
    piece: int
    dtype: mx.Dtype
    expand: bool
    sums: int = 0
    behind: bool = False

    @property
    def block(self) -> int:
        """Inputs in a block."""
        return self.lanes * self.run

    def padded(self, inputs: int) -> int:
        return -(-inputs // self.block) * self.block

    def stored(self, inputs: int) -> int:
        """Numbers of one vector, with its sums."""
        padded = self.padded(inputs)
        return padded + (padded // self.sums if self.sums else 0)


def prepare(x: mx.array, scales: Scales, layout: Layout, first: AsIs = AS_IS,
            experts: mx.array | None = None) -> mx.array:
    """X of ``x`` (tokens, n), flat, in ``layout``; inputs beyond n are zero. The step ``first`` is
    applied to x before. With ``experts`` (pairs,) each row of x is used for the next pairs / tokens
    entries of ``experts``, and X holds the pairs in place of the tokens."""
    inputs, spec = scales.inputs, scales.spec
    pairs = len(x) if experts is None else len(experts)
    norm = first if isinstance(first, Norm) else Norm(x, 0.0)  # an array that is not read
    padded = layout.padded(inputs)
    span = max(64, spec.rotation_block)
    vectors = pairs * (spec.replicas if layout.expand else 1) + spec.replicas * layout.behind
    spans = -(-padded // span)
    return _KERNEL(
        inputs=[x, norm.weight, *scales.for_kernel(),
                sizes(inputs, padded, pairs, float_bits(norm.eps), pairs // len(x),
                      spec.bits.code_bits, spec.bits.levels,
                      1 if first is norm else 2 * isinstance(first, Gate))],
        template=[("O", layout.dtype), ("T", first.dtype(x)), ("X", x.dtype),
                  ("W", norm.weight.dtype), ("SPAN", span), ("ROTATION", spec.rotation_block),
                  ("K", spec.replicas if layout.expand or layout.behind else 1),
                  ("GROUP", spec.replica_group), ("EXPAND", layout.expand),
                  ("BEHIND", layout.behind), ("LANES", layout.lanes), ("RUN", layout.run),
                  ("PIECE", layout.piece), ("SUMS", layout.sums > 0),
                  ("SHARED", layout.sums or 32)],
        grid=(-(-spans * 32 // _THREADS) * _THREADS, pairs, 1), threadgroup=(_THREADS, 1, 1),
        output_shapes=[(vectors * layout.stored(inputs),)],
        output_dtypes=[layout.dtype], experts=experts)[0]


def reference(x: mx.array, scales: Scales, layout: Layout, first: AsIs = AS_IS,
              experts: mx.array | None = None) -> mx.array:
    """The same in ``mx`` operations."""
    inputs, envelope = scales.inputs, scales.envelope()
    z = scales.rotated(first(x))
    if experts is not None:
        z, envelope = mx.repeat(z, len(experts) // len(z), axis=0), envelope[experts]
    if layout.expand:
        z = z[:, None] * envelope.swapaxes(-1, -2)
    elif scales.column_scale is not None:
        z = z * (scales.column_scale if experts is None else scales.column_scale[experts])
    if layout.behind:
        z = mx.concatenate([z, envelope.T])
    z = mx.pad(z.reshape(-1, inputs), [(0, 0), (0, layout.padded(inputs) - inputs)])
    parts = z.reshape(len(z), -1, layout.lanes, layout.run // layout.piece, layout.piece)
    return with_sums(parts.transpose(1, 3, 0, 2, 4).astype(layout.dtype), layout, scales.spec.bits)


def with_sums(x: mx.array, layout: Layout, bits: Width) -> mx.array:
    """X (blocks, pieces, u, lanes, elements), flat, and behind it the sums that ``layout`` wants
    for codes of ``bits``."""
    if not layout.sums:
        return x.reshape(-1)
    runs = x.transpose(0, 2, 3, 1, 4).reshape(len(x), x.shape[2], layout.lanes, layout.run)
    sums = (runs * code_order.offsets(bits)).reshape(*runs.shape[:3], -1, layout.sums).sum(-1)
    return mx.concatenate([x.reshape(-1), sums.transpose(0, 3, 1, 2).reshape(-1)])
