"""Repack GGUF blocks whose values are affine in groups of 32: codes are kept, nothing is refitted.

MLX dequantises a code q of a group as scale·q + bias. Scales of Q4_0, Q4_1, Q5_0, Q5_1,
Q8_0, TQ1_0, TQ2_0 and MXFP4 are halves or powers of two, and so are their biases: exact
in float16. Q4_K, Q5_K and IQ4_XS multiply a float16 by a 6-bit integer, IQ1_S by a 4-bit one;
float16 rounds the product by at most 2⁻¹¹ of its value, which is measured and reported.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import quants

from mlxquant.base.errors import Unsupported
from mlxquant.codes.affine import pack_words

GROUP = 32
_CHUNK = 1 << 18  # bytes repacked at once, which a core's cache holds


@dataclass(frozen=True)
class Groups:
    """Codes (rows, n) uint8; scales and biases (rows, n / 32), as exact as float32 holds them."""

    codes: np.ndarray
    scales: np.ndarray
    biases: np.ndarray


@dataclass(frozen=True)
class Packed:
    """A matrix as MLX stores it: codes (rows, n·bits/32) uint32, scales and biases (rows, n/32)
    float16; ``lost`` and ``whole`` are the sums of squares of the rounding errors and of all
    values."""

    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    bits: int
    lost: float = 0.0
    whole: float = 0.0


def repacked(name: str, type_: Type, blocks: np.ndarray) -> Packed:
    """Raw blocks (rows, row bytes) of tensor ``name`` in MLX's form; raises as ``packed`` does."""
    layout = LAYOUTS[type_]
    step = max(1, _CHUNK // blocks.shape[1])
    parts = [blocks[start:start + step] for start in range(0, len(blocks), step)]
    with ThreadPoolExecutor() as pool:  # NumPy lets other threads run
        return joined(list(pool.map(lambda p: packed(name, layout.read(p), layout.bits), parts)))


def packed(name: str, groups: Groups, bits: int) -> Packed:
    """Groups of tensor ``name`` in MLX's form; raises ``Unsupported`` for a scale or bias that
    float16 does not hold."""
    with np.errstate(over="ignore"):  # looked for below
        scales, biases = groups.scales.astype(np.float16), groups.biases.astype(np.float16)
    if not np.isfinite(scales).all() or not np.isfinite(biases).all():
        raise Unsupported(f"tensor {name} has a scale or offset outside float16")
    lost, whole = _loss(groups, scales, biases)
    return Packed(pack_words(groups.codes, bits), scales, biases, bits, lost, whole)


def joined(parts: list[Packed]) -> Packed:
    """Matrices concatenated by rows."""
    weight, scales, biases = (np.concatenate([getattr(p, key) for p in parts])
                              for key in ("weight", "scales", "biases"))
    return Packed(weight, scales, biases, parts[0].bits,
                  sum(p.lost for p in parts), sum(p.whole for p in parts))


def _loss(groups: Groups, scales: np.ndarray, biases: np.ndarray) -> tuple[float, float]:
    """(``lost``, ``whole``) of rounding scales and biases: Σ (Δs·q + Δb)² needs only Σq and Σq² of
    a group."""
    off_scale, off_bias = groups.scales - scales, groups.biases - biases
    if not off_scale.any() and not off_bias.any():
        return 0.0, 0.0
    codes = groups.codes.reshape(*groups.scales.shape, GROUP).astype(np.float32)
    first = codes @ np.ones(GROUP, np.float32)  # exact, as sums stay below 2²⁴
    second = np.einsum("...i,...i->...", codes, codes)

    def squares(scale: np.ndarray, bias: np.ndarray) -> float:
        s, b = scale.astype(np.float64), bias.astype(np.float64)
        return float((s * s * second + 2 * s * b * first + GROUP * b * b).sum())

    return squares(off_scale, off_bias), squares(groups.scales, groups.biases)


def _split(blocks: np.ndarray, *widths: int) -> list[np.ndarray]:
    """The parts of each block, which lie side by side: (rows, blocks, width) each."""
    parts = blocks.reshape(len(blocks), -1, sum(widths))
    ends = np.cumsum(widths)
    return [parts[..., end - width:end] for end, width in zip(ends, widths)]


def _halves(data: np.ndarray) -> np.ndarray:
    """Bytes (rows, blocks, 2) as float32 (rows, blocks)."""
    return np.ascontiguousarray(data).view(np.float16)[..., 0].astype(np.float32)


def _nibbles(data: np.ndarray) -> np.ndarray:
    """Element i is the low and i + half the high part of byte i."""
    return np.concatenate([data & 15, data >> 4], axis=-1)


def _groups(codes: np.ndarray, scales: np.ndarray, biases: np.ndarray) -> Groups:
    rows = len(codes)
    return Groups(np.ascontiguousarray(codes.reshape(rows, -1)), scales.reshape(rows, -1),
                  biases.reshape(rows, -1))


def _nibbled(zero: int | None, fifth: bool = False) -> Callable[[np.ndarray], Groups]:
    """Blocks of 32: float16 scale; float16 bias, or else ``zero`` is the code of 0; ``fifth``:
    4 bytes, bit i is code i's top bit; 16 bytes of nibbles."""

    def read(blocks: np.ndarray) -> Groups:
        d, *m, high, low = _split(blocks, 2, *([2] if zero is None else []), 4 * fifth, 16)
        scales, codes = _halves(d), _nibbles(low)
        if fifth:
            bits = np.unpackbits(np.ascontiguousarray(high), axis=-1, bitorder="little")
            codes = codes | bits << 4
        return _groups(codes, scales, _halves(m[0]) if zero is None else -zero * scales)

    return read


def _q8_0(blocks: np.ndarray) -> Groups:
    d, q = _split(blocks, 2, 32)
    scales = _halves(d)
    return _groups(q ^ np.uint8(128), scales, -128 * scales)  # two's complement to offset binary


def _k_scales(d: np.ndarray, lowest: np.ndarray, bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scale and bias, (rows, blocks, 8) each, of the eight groups of a K block."""
    rows, count, _ = bits.shape
    scale, low = (part.reshape(rows, count, 8).astype(np.float32) for part in
                  quants.Q4_K.get_scale_min(np.ascontiguousarray(bits).reshape(-1, 12)))
    return _halves(d)[..., None] * scale, -(_halves(lowest)[..., None] * low)


def _q4_k(blocks: np.ndarray) -> Groups:
    d, lowest, bits, q = _split(blocks, 2, 2, 12, 128)
    codes = _nibbles(q.reshape(*q.shape[:2], 4, 32))
    return _groups(codes, *_k_scales(d, lowest, bits))


def _q5_k(blocks: np.ndarray) -> Groups:
    d, lowest, bits, high, q = _split(blocks, 2, 2, 12, 32, 128)
    low = _nibbles(q.reshape(*q.shape[:2], 4, 32)).reshape(*q.shape[:2], 8, 32)
    fifth = high[..., None, :] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return _groups(low | fifth << 4, *_k_scales(d, lowest, bits))


def _on_grid(type_: Type, grid: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
             ) -> Callable[[np.ndarray], Groups]:
    """For types whose codes are hard to extract but whose values lie on a known ``grid`` (scales,
    biases): each code is computed from the value that ``gguf`` decodes."""

    def read(blocks: np.ndarray) -> Groups:
        scales, biases = grid(blocks)
        values = gguf.dequantize(blocks, type_).reshape(*scales.shape, GROUP)
        safe = np.where(scales == 0, np.float32(1), scales)
        codes = np.rint((values - biases[..., None]) / safe[..., None]).astype(np.uint8)
        return _groups(codes, scales, biases)

    return read


def _ternary(place: int, size: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """−d, 0 and d for 256 values; d is the half at byte ``place`` of a block of ``size`` bytes."""

    def grid(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        d = _halves(_split(blocks, place, 2, size - place - 2)[1]).repeat(8, axis=1)
        return d, -d

    return grid


def _mxfp4(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """−12 to 12 steps of a power of two: 25 levels, which 5 bits hold."""
    step = quants.MXFP4.e8m0_to_fp32_half(blocks.reshape(len(blocks), -1, 17)[..., 0])
    return step, -16 * step


def _iq1_s(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """−1, 0 and 1 steps, all of a group moved by an eighth of a step up or down."""
    d, _, high = _split(blocks, 2, 32, 16)
    high = np.ascontiguousarray(high).view(np.uint16)
    step = _halves(d)[..., None] * (2 * (high >> 12 & 7) + 1)
    step, down = (part.reshape(len(blocks), -1) for part in (step, high >> 15))
    return step, step * (np.float32(-0.875) - np.float32(0.25) * down)


def _iq4_nl(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    step = _halves(_split(blocks, 2, 16)[0])
    return step, -128 * step


def _iq4_xs(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    d, high, low, _ = _split(blocks, 2, 2, 4, 128)
    low = np.stack([low & 15, low >> 4], axis=-1).reshape(*low.shape[:2], 8)
    high = np.ascontiguousarray(high).view(np.uint16) >> np.arange(0, 16, 2, dtype=np.uint16) & 3
    step = _halves(d)[..., None] * ((low | high << 4).astype(np.float32) - 32)
    step = step.reshape(len(blocks), -1)
    return step, -128 * step


@dataclass(frozen=True)
class Grouping:
    """How a type becomes groups, and the width that takes."""

    bits: int
    read: Callable[[np.ndarray], Groups]


LAYOUTS = {
    Type.Q4_0: Grouping(4, _nibbled(8)), Type.Q4_1: Grouping(4, _nibbled(None)),
    Type.Q5_0: Grouping(5, _nibbled(16, fifth=True)),
    Type.Q5_1: Grouping(5, _nibbled(None, fifth=True)),
    Type.Q8_0: Grouping(8, _q8_0), Type.Q4_K: Grouping(4, _q4_k), Type.Q5_K: Grouping(5, _q5_k),
    Type.TQ1_0: Grouping(2, _on_grid(Type.TQ1_0, _ternary(52, 54))),
    Type.TQ2_0: Grouping(2, _on_grid(Type.TQ2_0, _ternary(64, 66))),
    Type.MXFP4: Grouping(5, _on_grid(Type.MXFP4, _mxfp4)),
    Type.IQ1_S: Grouping(2, _on_grid(Type.IQ1_S, _iq1_s)),
    # Their 16 levels are uneven, but whole numbers: 8-bit codes hold them, where 8 bits are asked.
    Type.IQ4_NL: Grouping(8, _on_grid(Type.IQ4_NL, _iq4_nl)),
    Type.IQ4_XS: Grouping(8, _on_grid(Type.IQ4_XS, _iq4_xs)),
}
