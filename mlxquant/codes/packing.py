"""Codes of symmetric levels as they lie on disk, at every width of a replicated layer.

A power of two of levels packs as MLX's bit stream, see ``affine.pack``. Three
levels would waste a fifth of two bits: five of them share a byte instead,
1.6 bits a code, as the digits of a number below 3⁵ = 243, the first code the
least significant.
"""

import mlx.core as mx

from mlxquant.codes import affine

_DIGITS = 5
_POWERS = [3**digit for digit in range(_DIGITS)]


def empty_codes(rows: int, columns: int, bits: int | str) -> mx.array:
    """Packed zeros: (rows, ⌈columns·bits / 32⌉) uint32, or (rows, ⌈columns / 5⌉) uint8 for ternary."""
    if bits == "ternary":
        return mx.zeros((rows, -(-columns // _DIGITS)), mx.uint8)
    return mx.zeros((rows, -(-columns * bits // 32)), mx.uint32)


def pack_codes(codes: mx.array, bits: int | str) -> mx.array:
    """Codes (rows, columns), each an index into ``level_values(bits)``, packed as in ``empty_codes``."""
    if bits != "ternary":
        return affine.pack(codes, bits)
    rows, columns = codes.shape
    padded = mx.pad(codes.astype(mx.uint8), [(0, 0), (0, -columns % _DIGITS)])
    digits = padded.reshape(rows, -1, _DIGITS) * mx.array(_POWERS, mx.uint8)
    return digits.sum(-1).astype(mx.uint8)


def unpack_codes(packed: mx.array, bits: int | str, columns: int) -> mx.array:
    """The inverse of ``pack_codes``: codes (rows, columns) as uint8."""
    if bits != "ternary":
        return affine.unpack(packed, bits, columns)
    digits = packed[..., None] // mx.array(_POWERS, mx.uint8) % 3
    return digits.reshape(len(packed), -1)[:, :columns]


def level_count(bits: int | str) -> int:
    """Number of values a code can take."""
    return 3 if bits == "ternary" else 2**bits


def level_grid(bits: int | str) -> tuple[float, float]:
    """(lowest level, distance between levels): code c stands for lowest + distance · c.

    Levels are symmetric and 1 apart; at one bit they are ±1, like a sign, 2 apart.
    """
    if bits == 1:
        return -1.0, 2.0
    return -(level_count(bits) - 1) / 2, 1.0


def level_values(bits: int | str) -> mx.array:
    """What the codes of ``bits`` stand for, in ascending order, in float32."""
    lowest, distance = level_grid(bits)
    return lowest + distance * mx.arange(level_count(bits))
