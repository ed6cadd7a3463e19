"""Read a buffer once and compute almost nothing: this measures the memory's read bandwidth.

    out_t = previous_(t mod 8) ^ the words of the V vectors of 16 bytes that thread t reads

Neighbouring threads read neighbouring vectors, and each has 8 reads under way before it
uses the first: one that waits for every read would measure latency. Xor costs nothing
and lets no compiler leave a read out; ``previous``, the last buffer's result, makes
launches wait for one another. The kernel reads the buffer and writes 4 bytes per thread,
1 / (4 V) of the bytes read.
"""

import mlx.core as mx
import numpy as np

from mlxquant.kernels import backend

_BODY = """
    int at = thread_position_in_grid.x;
    if (at >= COUNT) return;
    auto vector = reinterpret_cast<DEVICE const uint4*>(data)
        + (at / WIDTH) * (WIDTH * VECTORS) + at % WIDTH;
    unsigned int total = previous[at % 8];
    for (int i = 0; i < VECTORS; i += 8) {
        uint4 held[8];
        UNROLL for (int j = 0; j < 8; ++j) held[j] = vector[(i + j) * WIDTH];
        UNROLL for (int j = 0; j < 8; ++j) total ^= held[j].x ^ held[j].y ^ held[j].z ^ held[j].w;
    }
    out[at] = total;
"""
_KERNEL = backend.Kernel("read_ceiling", ["data", "previous"], ["out"], _BODY)
WIDTH = 256  # threads that read neighbouring vectors


def words(vectors: int) -> int:
    """Words of 4 bytes that one group of threads reads: buffers must be a multiple of it."""
    return WIDTH * vectors * 4


def read(data: mx.array, previous: mx.array, vectors: int) -> mx.array:
    """(n / (4 ``vectors``),) uint32 of ``data`` (n,) and ``previous`` (≥ 8,), both uint32.

    A thread reads ``vectors`` vectors of 16 bytes, a multiple of 8.
    """
    count = data.size // (4 * vectors)
    return _KERNEL([data, previous],
                   template=[("COUNT", count), ("WIDTH", WIDTH), ("VECTORS", vectors)],
                   grid=(count, 1, 1), threadgroup=(WIDTH, 1, 1),
                   output_shapes=[(count,)], output_dtypes=[mx.uint32])[0]


def reference(data: mx.array, previous: mx.array, vectors: int) -> mx.array:
    """The same in ``mx`` operations."""
    parts = data.reshape(-1, vectors, WIDTH, 4)
    total = mx.tile(previous[:8], data.size // (32 * vectors))
    for i in range(vectors):
        for j in range(4):
            total = total ^ parts[:, i, :, j].reshape(-1)
    return total


def trusted() -> bool:
    """Whether the kernel may be used here: on a GPU, where it gave what the reference gives."""
    return backend.has_gpu() and backend.trusted("read_ceiling", disagreement, 0.0)


def disagreement() -> float:
    """Share of words in a small random case that differ from the reference."""
    data = mx.array(np.random.default_rng(0).integers(0, 1 << 32, words(16) * 3, np.uint32))
    return (read(data, data, 16) != reference(data, data, 16)).astype(mx.float32).mean().item()
