"""GGUF blocks to MLX affine groups, exactly: the codes move, nothing is rounded.

MLX dequantises a code q of a group as scale·q + bias, which holds ggml's
Q4_0, d·(q − 8), Q4_1, d·q + m, and Q8_0, d·q, with groups of 32. The factors
8 and 128 are powers of two, so the float16 biases are exact too.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Type

from mlxquant.errors import Unsupported
from mlxquant.gguf.reader import GGUFTensor

GROUP = 32
BITS = {Type.Q4_0: 4, Type.Q4_1: 4, Type.Q8_0: 8}
PLAIN = {Type.F32: np.float32, Type.F16: np.float16, Type.BF16: np.uint16}


@dataclass(frozen=True)
class Affine:
    """An MLX affine matrix: codes (rows, n·bits/32) uint32, scales and biases (rows, n/32) float16."""

    weight: np.ndarray
    scales: np.ndarray
    biases: np.ndarray
    bits: int


def check(tensor: GGUFTensor) -> None:
    """Raise ``Unsupported`` for a type that has no exact place in MLX."""
    if tensor.type not in BITS and tensor.type not in PLAIN:
        allowed = ", ".join(t.name for t in [*PLAIN, *BITS])
        raise Unsupported(f"tensor {tensor.name} has type {tensor.type.name}; "
                          f"types that can be imported: {allowed}")


def affine(tensor: GGUFTensor) -> Affine:
    """Repack a Q4_0, Q4_1 or Q8_0 tensor; raises ``Unsupported`` if a float16 bias overflows."""
    rows = len(tensor.data)
    if tensor.type == Type.Q8_0:
        blocks = tensor.data.reshape(rows, -1, 2 + GROUP)
        scales = _halves(blocks[..., :2])
        biases = _shifted(scales, -128)
        codes = blocks[..., 2:] ^ np.uint8(128)  # two's complement to offset binary
    else:
        header = 2 if tensor.type == Type.Q4_0 else 4
        blocks = tensor.data.reshape(rows, -1, header + GROUP // 2)
        scales = _halves(blocks[..., :2])
        biases = _shifted(scales, -8) if header == 2 else _halves(blocks[..., 2:4])
        codes = _interleave_nibbles(blocks[..., header:])
    if not np.isfinite(scales).all() or not np.isfinite(biases).all():
        raise Unsupported(f"tensor {tensor.name} has a scale or offset outside float16")
    weight = np.ascontiguousarray(codes.reshape(rows, -1)).view(np.uint32)
    return Affine(weight, scales, biases, BITS[tensor.type])


def plain(tensor: GGUFTensor, dtype: mx.Dtype) -> mx.array:
    """An F32, F16 or BF16 tensor in ``dtype``; raises ``Unsupported`` if a value overflows it."""
    values = mx.array(np.ascontiguousarray(tensor.data).view(PLAIN[tensor.type]))
    if tensor.type == Type.BF16:
        values = values.view(mx.bfloat16)
    values = values.astype(dtype).reshape(tensor.shape)
    if not mx.isfinite(values).all().item():
        raise Unsupported(f"tensor {tensor.name} has values outside {dtype}")
    return values


def _halves(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data).view(np.float16)[..., 0]


def _shifted(scales: np.ndarray, factor: int) -> np.ndarray:
    with np.errstate(over="ignore", invalid="ignore"):  # the caller looks for what is not finite
        return scales * np.float16(factor)


def _interleave_nibbles(data: np.ndarray) -> np.ndarray:
    """ggml keeps element i low and i+16 high in byte i; MLX keeps neighbours in one byte."""
    codes = np.concatenate([data & 15, data >> 4], axis=-1)
    return codes[..., 0::2] | codes[..., 1::2] << 4
