"""A GGUF reader that trusts nothing: every count, length and offset is held
against the size of the file before it is used.

The ``gguf`` package's reader believes array lengths and tensor counts, so a
lying header can keep it looping; its tables of types are used here. Bytes are
read, never mapped: a mapped file that someone truncates kills the process.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import re
import struct
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from mlxquant.base.errors import BadCheckpoint, Unsupported

_SCALARS = {
    GGUFValueType.UINT8: "B", GGUFValueType.INT8: "b", GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h", GGUFValueType.UINT32: "I", GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f", GGUFValueType.BOOL: "?", GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q", GGUFValueType.FLOAT64: "d",
}
_MAX_DIMENSIONS = 4
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.IGNORECASE)


@dataclass(frozen=True)
class GGUFTensor:
    """Where ``path`` holds a tensor: ``shape`` is rows first, ``begin`` and ``bytes`` its place."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    path: Path
    begin: int

    @property
    def row_bytes(self) -> int:
        block, block_bytes = GGML_QUANT_SIZES[self.type]
        return self.shape[-1] // block * block_bytes

    @property
    def bytes(self) -> int:
        return prod(self.shape[:-1]) * self.row_bytes

    def read(self) -> np.ndarray:
        """The raw blocks, (rows, row bytes) uint8; raises ``BadCheckpoint`` if the file shrank."""
        data = np.fromfile(self.path, np.uint8, self.bytes, offset=self.begin)
        if data.size < self.bytes:
            raise BadCheckpoint(f"{self.path} changed while it was read: tensor {self.name} is cut short")
        return data.reshape(-1, self.row_bytes)


@dataclass(frozen=True)
class GGUFModel:
    """Metadata and tensors, by name, of a file or of all parts of a split one."""

    path: Path
    metadata: dict
    tensors: dict[str, GGUFTensor]
    files: list[Path] = field(default_factory=list)

    def state(self) -> list[tuple[str, int, int]]:
        """Name, size and time of every file: what changes when a file does."""
        return [(p.name, s.st_size, s.st_mtime_ns) for p in self.files for s in [p.stat()]]


def open_model(path: Path) -> GGUFModel:
    """Read the headers of ``path`` and, where it is a part of a split model, of all parts.

    Raises ``BadCheckpoint`` where a file is truncated, missing or contradicts itself.
    """
    files = part_files(path)
    headers = [_Header(file) for file in files]
    metadata, tensors = headers[0].metadata, {}
    for file, header in zip(files, headers):
        count = header.metadata.get("split.count", 1)
        if count != len(files):
            raise BadCheckpoint(f"{file} says it is one of {count} parts, its name says {len(files)}")
        for name, tensor in header.tensors.items():
            if name in tensors:
                raise BadCheckpoint(f"tensor {name} is in both {tensors[name].path.name} and {file.name}")
            tensors[name] = tensor
    promised = metadata.get("split.tensors.count", len(tensors))
    if promised != len(tensors):
        raise BadCheckpoint(f"{path} promises {promised} tensors in {len(files)} parts, they hold {len(tensors)}")
    return GGUFModel(path, metadata, tensors, files)


def part_files(path: Path) -> list[Path]:
    """``path``, or all parts (NAME-00001-of-0000N.gguf) of the split model that it is one of."""
    match = _PART.fullmatch(path.name)
    if not match:
        return [path]
    count = int(match[3])
    files = [path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}{match[4]}")
             for number in range(1, count + 1)]
    if path not in files:
        raise BadCheckpoint(f"{path}: part {int(match[2])} of {count} cannot be")
    for file in files:
        if not file.exists():
            raise BadCheckpoint(f"{path} is one of {count} parts, {file.name} is missing")
    return files


class _Header:
    """Metadata (a dict) and tensors (by name) of one file."""

    def __init__(self, path: Path):
        self.path = path
        with path.open("rb") as self._file:
            self._size, self._position = path.stat().st_size, 0
            if self._size < 24:
                raise self._bad("it is too short to be a GGUF file")
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
        if self._position + length > self._size:
            raise self._bad(f"{length} bytes wanted, {self._size - self._position} left")
        data = self._file.read(length)
        if len(data) < length:
            raise self._bad("it shrank while it was read")
        self._position += length
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
            return np.frombuffer(values, f"<{code}")
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
        size = prod(shape[:-1]) * (shape[-1] // block * block_bytes)
        if size == 0 or begin + size > self._size:
            raise self._bad(f"tensor {name} of shape {list(shape)} ({type_.name}) spans bytes "
                            f"{begin} to {begin + size} of a file of {self._size}")
        return GGUFTensor(name, type_, shape, self.path, begin)
