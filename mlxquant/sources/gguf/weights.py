"""A tensor of a GGUF file as MLX arrays: repacked, kept as numbers, or decoded and rounded anew."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache

import gguf
import mlx.core as mx
import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type

from mlxquant.base.errors import BadValue, Unsupported
from mlxquant.codes import rtn
from mlxquant.codes.spec import Spec
from mlxquant.codes.width import Width
from mlxquant.sources.gguf import repack
from mlxquant.sources.gguf.repack import Groups, Packed

PLAIN = {Type.F32: np.float32, Type.F16: np.float16, Type.BF16: np.uint16}
WIDTHS = (2, 3, 4, 5, 6, 8)
UNROUNDED = 16  # asks for types without a place in MLX as 16-bit numbers
_UNEVEN = (Type.IQ4_NL, Type.IQ4_XS)  # exact in 8 bits, twice as many as the file's codes have
_CHUNK = 1 << 22  # values that are decoded at once


@dataclass(frozen=True)
class TensorPlan:
    """How a tensor will be stored: ``bits`` of codes in groups of 32, or 16 of plain numbers;
    ``repacked`` codes are the file's own, others are found anew."""

    bits: int = UNROUNDED
    repacked: bool = False

    @property
    def plain(self) -> bool:
        return self.bits == UNROUNDED


@cache
def known() -> list[Type]:
    """The types that can be imported: the ``gguf`` package has decoders for them."""
    found = []
    for type_ in Type:
        with suppress(NotImplementedError):
            gguf.dequantize(np.zeros((1, GGML_QUANT_SIZES[type_][1]), np.uint8), type_)
            found.append(type_)
    return found


def width_for(type_: Type) -> int:
    """The width of a type that is rounded anew: the narrowest that has its bits per weight."""
    block, block_bytes = GGML_QUANT_SIZES[type_]
    return next((width for width in WIDTHS if width >= 8 * block_bytes / block), WIDTHS[-1])


def plan(name: str, type_: Type, quantisable: bool, bits: int | None = None) -> TensorPlan:
    """How a tensor is stored; ``bits`` is the width asked for where the file's codes cannot stay.

    Raises ``Unsupported`` for a type without a decoder and ``BadValue`` for another width.
    """
    if bits not in (None, UNROUNDED, *WIDTHS):
        allowed = ", ".join(map(str, (*WIDTHS, UNROUNDED)))
        raise BadValue(f"bits is {bits}, allowed are {allowed}")
    if type_ not in known():
        raise Unsupported(f"tensor {name} has type {type_.name}; types that can be imported: "
                          f"{', '.join(t.name for t in known())}")
    if type_ in PLAIN or not quantisable:
        return TensorPlan()
    if type_ in repack.LAYOUTS and (type_ not in _UNEVEN or bits == 8):
        return TensorPlan(repack.LAYOUTS[type_].bits, repacked=True)
    return TensorPlan(bits or width_for(type_))


def plain(type_: Type, blocks: np.ndarray, dtype: mx.Dtype, offset: float = 0.0,
          ) -> tuple[mx.array, float, float]:
    """Values (rows, n) plus ``offset`` in ``dtype``, and the sums of squares of the rounding errors
    and of all values (both 0 where the values are exact)."""
    if type_ in PLAIN:
        values = mx.array(blocks.view(PLAIN[type_]))
        values = values.view(mx.bfloat16) if type_ == Type.BF16 else values
    else:
        values = mx.concatenate([mx.array(part) for part in _decoded(type_, blocks)])
    if offset:
        values = values.astype(mx.float32) + offset
    if values.dtype == dtype:
        return values, 0.0, 0.0
    wide, values = values.astype(mx.float32), values.astype(dtype)
    lost = float(mx.square(wide - values.astype(mx.float32)).sum().item())
    return values, lost, float(mx.square(wide).sum().item()) if lost else 0.0


def codes(name: str, type_: Type, blocks: np.ndarray, plan: TensorPlan) -> Packed:
    """Raw blocks (rows, row bytes) as codes according to ``plan``, with the errors of rounding;
    raises ``Unsupported`` for scales or biases outside float16."""
    if plan.repacked:
        return repack.repacked(name, type_, blocks)
    spec = Spec(bits=Width.of(plan.bits), group_size=repack.GROUP, method="rtn")
    parts = []
    for values in _decoded(type_, blocks):
        weight = mx.array(values)
        made = rtn.quantise(weight, spec)
        groups = Groups(*(np.array(part) for part in (made.codes, made.scales, made.biases)))
        parts.append(replace(repack.packed(name, groups, plan.bits),
                             lost=float(mx.square(made.dequantise() - weight).sum().item()),
                             whole=float(mx.square(weight).sum().item())))
    return repack.joined(parts)


def _decoded(type_: Type, blocks: np.ndarray) -> Iterator[np.ndarray]:
    """The values, float32, some rows at a time."""
    block, block_bytes = GGML_QUANT_SIZES[type_]
    rows = max(1, _CHUNK // (blocks.shape[1] // block_bytes * block))
    # What is not finite is refused where it is stored.
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, len(blocks), rows):
            yield gguf.dequantize(blocks[start:start + rows], type_)
