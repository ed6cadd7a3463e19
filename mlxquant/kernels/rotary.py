"""Prepare queries, keys and values for attention in one dispatch: norms of heads, rotary
embedding, and the write into the KV cache.

    (a, b) of pair p at position t:  (a cos θ − b sin θ, a sin θ + b cos θ),  θ = t · steps[p]

Pairs are (p, p + dims/2), or (2p, 2p + 1) where ``traditional``; what lies beyond ``dims`` of a
head stays as it is. Queries and keys may be normed before (RMSNorm over a head). A simdgroup has
one head. It rounds where MLX's own operations do: after the norm, its weight, and the rotation.

Keys and values are written **into the arrays that are given**, where MLX would launch a copy for
each: a kernel's inputs are buffers like its outputs. That is safe as long as nothing else refers to
the arrays (``layers/in_place.py`` ensures this), and later readers use the results of ``depends``.
Based on RoFormer (https://arxiv.org/abs/2104.09864).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from mlxquant.kernels import backend
from mlxquant.kernels.first_step import Norm
from mlxquant.kernels.matrix import float_bits, sizes

_BODY = """
    constexpr int PAIRS = SIZE / 2, EACH = (PAIRS + 31) / 32;
    const int queries = sizes[0], stored = sizes[1], capacity = sizes[2], position = place[0];
    const int lane = thread_index_in_simdgroup, head = thread_position_in_grid.x / 32;
    if (head >= queries + 2 * stored) return;  // a whole simdgroup
    const bool query = head < queries, value = head >= queries + stored;
    const int own = query ? head : (head - queries) % stored;
    const auto from = (query ? q : value ? v : k) + sizes[query ? 3 : value ? 5 : 4] + own * SIZE;
    float a[EACH], b[EACH], sum = 0.0f;
    UNROLL for (int i = 0; i < EACH; ++i) {
        const int pair = 32 * i + lane;
        const bool far = !TRADITIONAL && pair < DIMS / 2;
        const int first = far ? pair : 2 * pair, second = far ? pair + DIMS / 2 : 2 * pair + 1;
        a[i] = pair < PAIRS ? static_cast<float>(from[first]) : 0.0f;
        b[i] = pair < PAIRS ? static_cast<float>(from[second]) : 0.0f;
        sum += a[i] * a[i] + b[i] * b[i];
    }
    float inverse = 1.0f;  // of the head's root mean square
    if (NORM) inverse = rsqrt(simd_sum(sum) / float(SIZE) + as_type<float>(sizes[query ? 6 : 7]));
    const size_t row = (static_cast<size_t>(own) * capacity + position) * SIZE;
    const auto to = query ? out + own * SIZE
        : (value ? const_cast<DEVICE T*>(values) : const_cast<DEVICE T*>(keys)) + row;
    UNROLL for (int i = 0; i < EACH; ++i) {
        const int pair = 32 * i + lane;
        if (pair >= PAIRS) continue;
        const bool far = !TRADITIONAL && pair < DIMS / 2;
        const int first = far ? pair : 2 * pair, second = far ? pair + DIMS / 2 : 2 * pair + 1;
        if (NORM && !value) {
            const auto weight = query ? query_weight : key_weight;
            a[i] = static_cast<float>(static_cast<T>(a[i] * inverse));
            b[i] = static_cast<float>(static_cast<T>(b[i] * inverse));
            a[i] = static_cast<float>(static_cast<T>(a[i] * static_cast<float>(weight[first])));
            b[i] = static_cast<float>(static_cast<T>(b[i] * static_cast<float>(weight[second])));
        }
        if (!value && pair < DIMS / 2) {
            const float angle = float(position) * steps[pair];
            const float c = cos(angle), s = sin(angle), turned = a[i] * c - b[i] * s;
            b[i] = a[i] * s + b[i] * c;
            a[i] = turned;
        }
        to[first] = static_cast<T>(a[i]);
        to[second] = static_cast<T>(b[i]);
    }
"""
_KERNEL = backend.Kernel(
    "rotary", ["q", "k", "v", "keys", "values", "steps", "query_weight", "key_weight", "place",
               "sizes"], ["out"], _BODY)
_THREADS = 128


@dataclass(frozen=True, eq=False)
class Rotary:
    """The heads of a layer, ``size`` numbers each: ``queries`` query heads, ``stored`` key heads
    and as many value heads, which begin in their arrays at ``starts`` (queries, keys, values).
    ``steps`` (dims/2,) are radians a position, in float32. ``norms`` are those of queries and keys,
    or None."""

    queries: int
    stored: int
    size: int
    starts: tuple[int, ...]
    steps: mx.array
    traditional: bool = False
    norms: tuple[Norm, Norm] | None = None

    @property
    def dims(self) -> int:
        return 2 * len(self.steps)


def turn(qkv: Sequence[mx.array], keys: mx.array, values: mx.array, place: mx.array,
         rotary: Rotary) -> list[mx.array]:
    """Queries (1, heads, 1, size), and ``keys`` and ``values`` (1, heads, capacity, size) after a
    token's keys and values have been written at position ``place[0]``. ``qkv`` are the arrays
    (1, m) that hold the token's queries, keys and values, mostly one array three times. The given
    ``keys`` and ``values`` are overwritten; afterwards only the returned arrays may be read."""
    dtype = qkv[0].dtype
    query_weight, key_weight = ([norm.weight for norm in rotary.norms] if rotary.norms
                                else qkv[:2])  # which are not read
    epsilons = [float_bits(norm.eps) for norm in rotary.norms or ()]
    heads = rotary.queries + 2 * rotary.stored
    queries: mx.array = _KERNEL(
        inputs=[*qkv, keys, values, rotary.steps, query_weight, key_weight, place,
                sizes(rotary.queries, rotary.stored, keys.shape[2], *rotary.starts, *epsilons)],
        template=[("T", dtype), ("KEPT", keys.dtype), ("W", query_weight.dtype),
                  ("SIZE", rotary.size), ("DIMS", rotary.dims),
                  ("TRADITIONAL", rotary.traditional), ("NORM", bool(rotary.norms))],
        grid=(-(-heads * 32 // _THREADS) * _THREADS, 1, 1), threadgroup=(_THREADS, 1, 1),
        output_shapes=[(1, rotary.queries, 1, rotary.size)], output_dtypes=[dtype])[0]
    return [queries, *mx.depends([keys, values], [queries])]


def reference(qkv: Sequence[mx.array], keys: mx.array, values: mx.array, place: mx.array,
              rotary: Rotary) -> list[mx.array]:
    """The same in ``mx`` operations, which leave the given arrays as they are."""
    made = []
    counts = rotary.queries, rotary.stored, rotary.stored
    for i, (whole, start, heads) in enumerate(zip(qkv, rotary.starts, counts)):
        part = whole[:, start:start + heads * rotary.size].reshape(1, heads, 1, rotary.size)
        if i < 2:
            part = rotary.norms[i](part) if rotary.norms else part
            part = mx.fast.rope(part, rotary.dims, traditional=rotary.traditional, base=None,
                                scale=1.0, offset=place[0], freqs=1 / rotary.steps)
        made.append(part)
    queries, *new = made
    return [queries, *(mx.slice_update(old, part, place[:1], axes=[2])
                       for old, part in zip((keys, values), new))]
