"""Rotate an input, scale it for every replica, and lay it out as a matrix kernel reads it: one dispatch.

    z = H (s ∘ x) / √block      X[u = token · K + k] = a_k ∘ z,   or grouped, X[u = token] = c ∘ z

x (tokens, n) of any float type; s signs, H the Walsh–Hadamard matrix in blocks. A simdgroup has a block (64 inputs
or more) of one token in its registers: strides below 32 are shuffles between lanes, longer ones stay in a lane. It
reads x, s and A and writes X, each once; at this size the time is the launch.

x may first be normed or gated (``first_step.py``). Of a norm every simdgroup sums the whole row's squares itself: the
row is in the caches, where a sum shared by all would take a dispatch of its own.

``Layout``: a matrix kernel's lane decodes ``run`` neighbouring inputs, ``lanes`` of them make a block of inputs, and X
is [block][piece of the run][u][lane][element], so that the lanes' loads of a piece are neighbours.
"""

import functools
import struct
from dataclasses import dataclass

import mlx.core as mx

from mlxquant.codes import hadamard
from mlxquant.kernels import backend
from mlxquant.kernels.first_step import AS_IS, AsIs, Gate, Norm

LARGEST_BLOCK = 1024  # of a rotation: 32 registers a lane

_BODY = """
    const int n = sizes[0], padded = sizes[1], tokens = sizes[2];
    const int lane = thread_index_in_simdgroup;
    const int span = thread_position_in_grid.x / 32, token = thread_position_in_grid.y;
    float inverse = 1.0f;  // of the row's root mean square
    if (NORM) {
        float sum = 0.0f;
        for (int start = lane; start < n; start += 32 * 16) {
            UNROLL for (int i = 0; i < 16; ++i) {  // loads that do not wait for each other
                const int at = start + 32 * i;
                const float value = at < n ? static_cast<float>(x[token * n + at]) : 0.0f;
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
            z[i] = static_cast<float>(x[(GATE ? 2 : 1) * token * n + column]);
            if (NORM) {
                z[i] = static_cast<float>(static_cast<T>(z[i] * inverse));
                z[i] = static_cast<float>(static_cast<T>(z[i] * static_cast<float>(norm_weight[column])));
            }
            if (GATE) {
                const float up = static_cast<float>(x[(2 * token + 1) * n + column]);
                const float silu = z[i] / (1.0f + exp(min(-z[i], 80.0f)));  // fast math assumes no infinity
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
        const int vectors = EXPAND ? tokens * K : tokens, first = EXPAND ? token * K : token;
        float value = z[i];
        if (ROTATION) value *= rsqrt(float(ROTATION));
        if (GROUP && column < n) value *= column_scale[column];
        UNROLL for (int k = 0; k < (EXPAND ? K : 1); ++k) {
            float scaled = value;
            if (EXPAND && column < n) scaled *= replica_in[column / (GROUP ? GROUP : 1) * K + k];
            prepared[(piece * vectors + first + k) * LANES * PIECE + element] = static_cast<O>(scaled);
        }
    }
"""
_THREADS = 128


@dataclass(frozen=True)
class Layout:
    """How a matrix kernel reads X; ``expand``: whether it wants all of a_k ∘ z, or z and A apart."""

    lanes: int
    run: int
    piece: int
    dtype: mx.Dtype
    expand: bool

    @property
    def block(self) -> int:
        """Inputs in a block."""
        return self.lanes * self.run

    def padded(self, inputs: int) -> int:
        return -(-inputs // self.block) * self.block


@dataclass(frozen=True)
class Scales:
    """What siblings share, as kernels read it: A, c (or none) in float32, signs as bits (or none)."""

    inputs: int
    replicas: int
    group: int
    rotation: int
    replica_in: mx.array
    column_scale: mx.array
    signs: mx.array

    @classmethod
    def of(cls, inputs: int, replicas: int, group: int, rotation: int, replica_in: mx.array,
           column_scale: mx.array | None, signs: mx.array | None) -> "Scales":
        return cls(inputs, replicas, group, rotation, at_least(replica_in.astype(mx.float32).reshape(-1)),
                   at_least(mx.zeros(1) if column_scale is None else column_scale.astype(mx.float32)),
                   at_least(mx.zeros(1, mx.uint8) if signs is None else signs))

    @property
    def nbytes(self) -> int:
        """Bytes that are read for one call."""
        used = [self.replica_in, *[self.column_scale] * bool(self.group), *[self.signs] * bool(self.rotation)]
        return sum(array.nbytes for array in used)


def at_least(array: mx.array) -> mx.array:
    """``array`` (n,), filled up with zeros to what a kernel's buffer must hold."""
    missing = backend.SMALLEST - len(array)
    return mx.pad(array, (0, missing)) if missing > 0 else array


@functools.lru_cache(maxsize=4096)
def sizes(*values: int) -> mx.array:
    """Numbers a kernel reads at run time, so that one compiled kernel serves every shape."""
    with mx.stream(mx.cpu):
        made = mx.array([*values, *[0] * (backend.SMALLEST - len(values))], mx.int32)
        mx.eval(made)
    return made


def prepare(x: mx.array, scales: Scales, layout: Layout, first: AsIs = AS_IS) -> mx.array:
    """X of ``x`` (tokens, n), flat, in ``layout``; inputs beyond n are zero. ``first`` is done to x before."""
    tokens, inputs = len(x), scales.inputs
    norm = first if isinstance(first, Norm) else Norm(x, 0.0)  # an array that is not read
    padded = layout.padded(inputs)
    span = max(64, scales.rotation)
    vectors = tokens * (scales.replicas if layout.expand else 1)
    spans = -(-padded // span)
    return _kernel()(
        inputs=[x, norm.weight, scales.signs, scales.replica_in, scales.column_scale,
                sizes(inputs, padded, tokens, _float_bits(norm.eps))],
        template=[("O", layout.dtype), ("T", first.dtype(x)), ("NORM", first is norm),
                  ("GATE", isinstance(first, Gate)), ("SPAN", span), ("ROTATION", scales.rotation), ("K", scales.replicas),
                  ("GROUP", scales.group), ("EXPAND", layout.expand), ("LANES", layout.lanes),
                  ("RUN", layout.run), ("PIECE", layout.piece)],
        grid=(-(-spans * 32 // _THREADS) * _THREADS, tokens, 1), threadgroup=(_THREADS, 1, 1),
        output_shapes=[(vectors * padded,)], output_dtypes=[layout.dtype])[0]


def reference(x: mx.array, scales: Scales, layout: Layout, first: AsIs = AS_IS) -> mx.array:
    """The same in ``mx`` operations."""
    inputs = scales.inputs
    z = rotated(first(x), scales)
    if scales.group:
        z = z * scales.column_scale[:inputs]
    if layout.expand:
        z = z[:, None] * envelope(scales).T
    z = mx.pad(z.reshape(-1, inputs), [(0, 0), (0, layout.padded(inputs) - inputs)])
    parts = z.reshape(len(z), -1, layout.lanes, layout.run // layout.piece, layout.piece)
    return parts.transpose(1, 3, 0, 2, 4).reshape(-1).astype(layout.dtype)


def rotated(x: mx.array, scales: Scales) -> mx.array:
    """R x (tokens, n) in float32."""
    x = x.astype(mx.float32)
    if not scales.rotation:
        return x
    return hadamard.rotate(x, hadamard.unpack_signs(scales.signs, scales.inputs), scales.rotation)


def envelope(scales: Scales) -> mx.array:
    """A without c, (n, K): one row an input, grouped or not."""
    rows = scales.inputs // (scales.group or 1)
    made = scales.replica_in[:rows * scales.replicas].reshape(rows, scales.replicas)
    return mx.repeat(made, scales.group, axis=0) if scales.group else made


def _float_bits(value: float) -> int:
    """A float32 as the integer of the same bits."""
    return struct.unpack("<i", struct.pack("<f", value))[0]


@functools.cache
def _kernel():
    return backend.build("prepare_input", ["x", "norm_weight", "signs", "replica_in", "column_scale", "sizes"],
                         ["prepared"], _BODY)
