"""A GGUF reader that trusts nothing: every count, length and offset is held
against the size of the file before it is used.

The ``gguf`` package's reader believes array lengths and tensor counts, so a
lying header can keep it looping; its tables of types are used here.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from mlxquant.errors import BadCheckpoint, Unsupported

_SCALARS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h", GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f", GGUFValueType.BOOL: "?", GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d",
}
_MAX_DIMENSIONS = 4


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor in the file: ``shape`` is rows first, ``data`` its raw blocks (rows, row bytes)."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    data: np.ndarray


class GGUFFile:
    """Metadata (a dict) and tensors (by name) of one GGUF file, memory-mapped.

    Raises ``BadCheckpoint`` where the file is truncated or contradicts itself.
    """

    def __init__(self, path: Path):
        self.path = path
        self._position = 0
        with path.open("rb") as file:
            if path.stat().st_size < 24:
                raise self._bad("it is too short to be a GGUF file")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if self._take(4) != b"GGUF":
            raise self._bad("it does not start with GGUF")
        version = self._scalar("I")
        if version not in (2, 3):
            raise self._bad(f"version {version} is not 2 or 3 (or the file is big-endian)")
        tensor_count, field_count = self._scalar("Q"), self._scalar("Q")
        self.metadata = self._metadata(field_count)
        self.tensors = self._tensors(tensor_count)

    def _bad(self, reason: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self.path} is truncated or corrupt at byte {self._position}: {reason}")

    def _take(self, length: int) -> bytes:
        end = self._position + length
        if end > len(self._map):
            raise self._bad(f"{length} bytes wanted, {len(self._map) - self._position} left")
        data = self._map[self._position:end]
        self._position = end
        return data

    def _scalar(self, code: str):
        return struct.unpack(f"<{code}", self._take(struct.calcsize(f"<{code}")))[0]

    def _string(self) -> str:
        try:
            return self._take(self._scalar("Q")).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._bad(f"a string is not UTF-8: {error}") from error

    def _metadata(self, count: int) -> dict:
        fields = {}
        for _ in range(count):  # each turn consumes bytes, so a false count runs out of file
            key = self._string()
            if key in fields:
                raise self._bad(f"duplicate metadata key {key}")
            fields[key] = self._value(self._scalar("I"))
        return fields

    def _value(self, kind: int, depth: int = 0):
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind != GGUFValueType.ARRAY or depth > 3:
            raise self._bad(f"unknown metadata type {kind}")
        kind, length = self._scalar("I"), self._scalar("Q")
        if kind in _SCALARS:
            code = _SCALARS[kind]
            values = self._take(length * struct.calcsize(f"<{code}"))
            return [value for value, in struct.iter_unpack(f"<{code}", values)]
        return [self._value(kind, depth + 1) for _ in range(length)]

    def _tensors(self, count: int) -> dict[str, GGUFTensor]:
        entries = [self._tensor_entry() for _ in range(count)]
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment % 8:
            raise self._bad(f"alignment {alignment} is no positive multiple of 8")
        start = -(-self._position // alignment) * alignment
        tensors = {}
        for name, kind, shape, offset in entries:
            if name in tensors:
                raise self._bad(f"duplicate tensor {name}")
            tensors[name] = self._tensor(name, kind, shape, start + offset)
        return tensors

    def _tensor_entry(self) -> tuple[str, int, tuple[int, ...], int]:
        name, dimensions = self._string(), self._scalar("I")
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._bad(f"tensor {name} has {dimensions} dimensions, allowed are 1 to "
                            f"{_MAX_DIMENSIONS}")
        shape = tuple(self._scalar("Q") for _ in range(dimensions))[::-1]
        return name, self._scalar("I"), shape, self._scalar("Q")

    def _tensor(self, name: str, kind: int, shape: tuple[int, ...], begin: int) -> GGUFTensor:
        try:
            type_ = GGMLQuantizationType(kind)
        except ValueError as error:
            raise Unsupported(f"{self.path}: tensor {name} has unknown type number {kind}") from error
        block, block_bytes = GGML_QUANT_SIZES[type_]
        if shape[-1] % block:
            raise self._bad(f"tensor {name}: rows of {shape[-1]} do not divide into "
                            f"{type_.name} blocks of {block}")
        row_bytes = shape[-1] // block * block_bytes
        size = prod(shape[:-1]) * row_bytes
        if size == 0 or begin + size > len(self._map):
            raise self._bad(f"tensor {name} of shape {list(shape)} ({type_.name}) spans bytes "
                            f"{begin} to {begin + size} of a file of {len(self._map)}")
        data = np.frombuffer(self._map, np.uint8, size, begin).reshape(-1, row_bytes)
        return GGUFTensor(name, type_, shape, data)
