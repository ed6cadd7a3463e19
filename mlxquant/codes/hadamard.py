"""Block Hadamard rotations after a random sign per input.

R = blockdiag(H/√block) · diag(signs), with H the Walsh–Hadamard matrix in Sylvester's order, is
orthogonal: W x = (W Rᵀ)(R x), while an outlier spreads over its block. It costs n·log₂(block)
additions. See QuIP# (https://arxiv.org/abs/2402.04396) and QuaRot
(https://arxiv.org/abs/2404.00456).

Everything here works in the dtype of its input; rotate weights in float32.
"""

import mlx.core as mx
import numpy as np

from mlxquant.base.errors import BadValue

_LARGEST = 8192  # MLX's transform takes no more in float32


def check_block(n: int, block: int) -> None:
    """Raises ``BadValue`` unless ``block`` is a power of two that divides ``n``."""
    allowed = [1 << k for k in range(_LARGEST.bit_length()) if n % (1 << k) == 0]
    if type(block) is not int or block not in allowed:
        raise BadValue(f"rotation_block is {block!r}, allowed for {n} inputs are "
                       f"{', '.join(map(str, allowed))}")


def default_block(n: int) -> int:
    """The largest power of two that divides ``n`` and is not above 64."""
    return min(n & -n, 64)


def random_signs(n: int, seed: int) -> mx.array:
    """``n`` random signs, ±1 in float32; the same for a seed on every back end."""
    return mx.array(1 - 2 * np.random.default_rng(seed).integers(0, 2, n).astype(np.float32))


def rotate(x: mx.array, signs: mx.array, block: int) -> mx.array:
    """R x for every vector on the last axis of ``x`` (…, n), with ``signs`` (n,). For a weight W
    (m, n) this is W Rᵀ, which multiplies R x where W multiplies x.

    Raises ``BadValue`` if ``block`` is no power of two that divides n.
    """
    return _transform(x * signs.astype(x.dtype), block)


def unrotate_weight(weight: mx.array, signs: mx.array, block: int) -> mx.array:
    """The inverse of ``rotate``: W R of ``weight`` (m, n). Raises as ``rotate``."""
    return _transform(weight, block) * signs.astype(weight.dtype)


def rotate_hessian(hessian: mx.array, signs: mx.array, block: int) -> mx.array:
    """R H Rᵀ (n, n): E[x xᵀ] of the rotated inputs, also for an H that is not symmetric. Raises as
    ``rotate``."""
    return rotate(rotate(hessian, signs, block).T, signs, block).T


def pack_signs(signs: mx.array) -> mx.array:
    """Signs (n,) of ±1 as bits in ceil(n / 8) uint8, lowest bit first; a set bit is −1. Raises
    ``BadValue`` for a value that is neither 1 nor −1."""
    values = np.array(signs.astype(mx.float32))
    if not np.isin(values, (-1, 1)).all():
        raise BadValue("rotation_signs hold a value other than the allowed 1 and -1")
    return mx.array(np.packbits(values < 0, bitorder="little"))


def unpack_signs(packed: mx.array, n: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    """The inverse of ``pack_signs``: signs (n,) of ±1 in ``dtype``."""
    bits = (packed[:, None] >> mx.arange(8, dtype=mx.uint8)) & 1
    return 1 - 2 * bits.reshape(-1)[:n].astype(dtype)


def _transform(x: mx.array, block: int) -> mx.array:
    n = x.shape[-1]
    check_block(n, block)
    # MLX 0.32.4 corrupts memory on the CPU where the last axis is no power of two: blocks first.
    blocks = x.reshape(*x.shape[:-1], n // block, block)
    return mx.hadamard_transform(blocks).reshape(x.shape)
