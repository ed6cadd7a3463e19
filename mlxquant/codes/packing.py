"""Codes of symmetric levels as they lie on disk, at every width of a replicated layer.

A power of two of levels packs as MLX's bit stream, see ``affine.pack``. Three
levels would waste a fifth of two bits: five of them share a byte instead,
1.6 bits a code, as the digits of a number below 3⁵ = 243, the first code the
least significant.
"""

import mlx.core as mx

from mlxquant.codes import affine
from mlxquant.codes.width import Width

_DIGITS = 5
_POWERS = [3**digit for digit in range(_DIGITS)]


def empty_codes(rows: int, columns: int, width: Width) -> mx.array:
    """Packed zeros of b bits: (rows, ⌈columns·b / 32⌉) uint32, ternary (rows, ⌈columns / 5⌉) uint8."""
    if width is Width.TERNARY:
        return mx.zeros((rows, -(-columns // _DIGITS)), mx.uint8)
    return mx.zeros((rows, -(-columns * width.code_bits // 32)), mx.uint32)


def pack_codes(codes: mx.array, width: Width) -> mx.array:
    """Codes (rows, columns), each the index of a level, packed as in ``empty_codes``."""
    if width is not Width.TERNARY:
        return affine.pack(codes, width.code_bits)
    rows, columns = codes.shape
    padded = mx.pad(codes.astype(mx.uint8), [(0, 0), (0, -columns % _DIGITS)])
    digits = padded.reshape(rows, -1, _DIGITS) * mx.array(_POWERS, mx.uint8)
    return digits.sum(-1).astype(mx.uint8)


def unpack_codes(packed: mx.array, width: Width, columns: int) -> mx.array:
    """The inverse of ``pack_codes``: codes (rows, columns) as uint8."""
    if width is not Width.TERNARY:
        return affine.unpack(packed, width.code_bits, columns)
    digits = packed[..., None] // mx.array(_POWERS, mx.uint8) % 3
    return digits.reshape(len(packed), -1)[:, :columns]
