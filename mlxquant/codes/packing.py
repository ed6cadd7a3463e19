"""How the codes of a replicated layer are packed on disk, at every width.

Codes of 2, 4, 8 or 16 levels are packed as MLX's bit stream (``affine.pack``). Ternary codes would
waste a fifth of two bits; five of them share a byte instead (1.6 bits a code), as the base-3 digits
of a number below 3⁵ = 243, the first code least significant. Stacks of matrices pack row by row.
"""

import mlx.core as mx

from mlxquant.codes import affine
from mlxquant.codes.width import Width

_DIGITS = 5
_POWERS = [3**digit for digit in range(_DIGITS)]


def empty_codes(shape: tuple[int, ...], width: Width) -> mx.array:
    """Packed zeros for codes of a shape (…, n), of b bits each: (…, ⌈n·b / 32⌉) uint32, or for
    ternary (…, ⌈n / 5⌉) uint8."""
    *rows, columns = shape
    if width is Width.TERNARY:
        return mx.zeros((*rows, -(-columns // _DIGITS)), mx.uint8)
    return mx.zeros((*rows, -(-columns * width.code_bits // 32)), mx.uint32)


def pack_codes(codes: mx.array, width: Width) -> mx.array:
    """Codes (…, n), each the index of a level, packed as in ``empty_codes``."""
    *rows, columns = codes.shape
    if width is not Width.TERNARY:
        return affine.pack(codes.reshape(-1, columns), width.code_bits).reshape(*rows, -1)
    padded = mx.pad(codes.astype(mx.uint8).reshape(-1, columns), [(0, 0), (0, -columns % _DIGITS)])
    digits = padded.reshape(*rows, -1, _DIGITS) * mx.array(_POWERS, mx.uint8)
    return digits.sum(-1).astype(mx.uint8)


def unpack_codes(packed: mx.array, width: Width, columns: int) -> mx.array:
    """The inverse of ``pack_codes``: codes (…, columns) as uint8."""
    *rows, size = packed.shape
    if width is not Width.TERNARY:
        codes = affine.unpack(packed.reshape(-1, size), width.code_bits, columns)
        return codes.reshape(*rows, columns)
    digits = packed[..., None] // mx.array(_POWERS, mx.uint8) % 3
    return digits.reshape(*rows, -1)[..., :columns]
