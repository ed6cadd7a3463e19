"""A GGUF reader that trusts nothing: counts, lengths and offsets are held against the file's size.

The ``gguf`` package's reader believes array lengths and tensor counts, so a lying header can keep
it looping. Bytes are read, never mapped: a mapped file that someone truncates kills the process.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import re
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFReader, GGUFValueType

from mlxquant.base.errors import BadCheckpoint, Unsupported

_SCALARS = {int(kind): np.dtype(type_) for kind, type_ in GGUFReader.gguf_scalar_to_np.items()}
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
            raise BadCheckpoint(f"{self.path} changed while it was read: tensor {self.name} is "
                                "cut short")
        return data.reshape(-1, self.row_bytes)


@dataclass(frozen=True)
class GGUFModel:
    """Metadata and tensors, by name, of a file or of all parts of a split one."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    files: tuple[Path, ...] = ()


def open_model(path: Path) -> GGUFModel:
    """Read the headers of ``path`` and, where it is a part of a split model, of all parts. Raises
    ``BadCheckpoint`` where a file is truncated, missing or contradicts itself."""
    files = part_files(path)
    headers = [_Header(file) for file in files]
    metadata = headers[0].metadata
    tensors: dict[str, GGUFTensor] = {}
    for file, header in zip(files, headers):
        count = header.metadata.get("split.count", 1)
        if count != len(files):
            raise BadCheckpoint(f"{file} says it is one of {count} parts, "
                                f"its name says {len(files)}")
        if twice := tensors.keys() & header.tensors.keys():
            name = min(twice)
            raise BadCheckpoint(f"tensor {name} is in both {tensors[name].path.name} and "
                                f"{file.name}")
        tensors |= header.tensors
    promised = metadata.get("split.tensors.count", len(tensors))
    if promised != len(tensors):
        raise BadCheckpoint(f"{path} promises {promised} tensors in {len(files)} parts, "
                            f"they hold {len(tensors)}")
    return GGUFModel(path, metadata, tensors, files)


def part_files(path: Path) -> tuple[Path, ...]:
    """``path``, or all parts (NAME-00001-of-0000N.gguf) of the split model that it is one of."""
    match = _PART.fullmatch(path.name)
    if not match:
        return (path,)
    files = tuple(path.with_name(f"{match[1]}-{number:05d}-of-{match[3]}{match[4]}")
                  for number in range(1, int(match[3]) + 1))
    if path not in files:
        raise BadCheckpoint(f"{path}: part {int(match[2])} of {len(files)} cannot be")
    for file in files:
        if not file.exists():
            raise BadCheckpoint(f"{path} is one of {len(files)} parts, {file.name} is missing")
    return files


class Fields:
    """Reads positive numbers and booleans from the metadata keys of a file's architecture;
    ``asked`` are the keys that were read, without the architecture's name."""

    def __init__(self, file: GGUFModel) -> None:
        self._file, self.asked = file, set[str]()
        self.prefix = f"{file.metadata['general.architecture']}."

    def __call__(self, key: str, kinds: Any = int, **default: Any) -> Any:
        """The value of ``key``, or a ``default``; raises ``BadCheckpoint`` if it cannot be."""
        self.asked.add(key)
        value: Any = self._file.metadata.get(self.prefix + key, default.get("default"))
        switch = isinstance(value, bool)
        if (value is None and "default" in default) or (switch and kinds is not int):
            return value
        if switch or not isinstance(value, kinds) or not 0 < value < 2**31:
            raise BadCheckpoint(f"{self._file.path}: metadata {self.prefix}{key} is {value!r}, "
                                "a positive number is needed")
        return value


class _Header:
    """Metadata and tensors, by name, of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as self._file:
            self._size, self._position = path.stat().st_size, 0
            if self._size < 24:
                raise self._bad("it is too short to be a GGUF file")
            if self._take(4) != b"GGUF":
                raise self._bad("it does not start with GGUF")
            version = self._integer(4)
            if version not in (2, 3):
                raise self._bad(f"version {version} is not 2 or 3 (or the file is big-endian)")
            tensor_count, field_count = self._integer(8), self._integer(8)
            self.metadata = self._metadata(field_count)
            self.tensors = self._tensors(tensor_count)

    def _bad(self, reason: str) -> BadCheckpoint:
        return BadCheckpoint(f"{self.path} is truncated or corrupt at byte {self._position}: "
                             f"{reason}")

    def _take(self, length: int) -> bytes:
        if self._position + length > self._size:
            raise self._bad(f"{length} bytes wanted, {self._size - self._position} left")
        data = self._file.read(length)
        if len(data) < length:
            raise self._bad("it shrank while it was read")
        self._position += length
        return data

    def _integer(self, length: int) -> int:
        return int.from_bytes(self._take(length), "little")

    def _string(self) -> str:
        try:
            return self._take(self._integer(8)).decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._bad(f"a string is not UTF-8: {error}") from error

    def _metadata(self, count: int) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for _ in range(count):  # each turn consumes bytes, so a false count runs out of file
            key = self._string()
            if key in fields:
                raise self._bad(f"duplicate metadata key {key}")
            fields[key] = self._value(self._integer(4))
        return fields

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind in _SCALARS:
            return self._numbers(kind, 1).item()
        if kind != GGUFValueType.ARRAY or depth > 3:
            raise self._bad(f"unknown metadata type {kind}")
        kind, length = self._integer(4), self._integer(8)
        if kind in _SCALARS:
            return self._numbers(kind, length)
        return [self._value(kind, depth + 1) for _ in range(length)]

    def _numbers(self, kind: int, count: int) -> np.ndarray:
        return np.frombuffer(self._take(count * _SCALARS[kind].itemsize), _SCALARS[kind])

    def _tensors(self, count: int) -> dict[str, GGUFTensor]:
        entries = []
        for _ in range(count):
            name, dimensions = self._string(), self._integer(4)
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                raise self._bad(f"tensor {name} has {dimensions} dimensions, allowed are 1 to "
                                f"{_MAX_DIMENSIONS}")
            shape = tuple(self._integer(8) for _ in range(dimensions))[::-1]
            entries.append((name, shape, self._integer(4), self._integer(8)))
        alignment = self.metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment % 8:
            raise self._bad(f"alignment {alignment} is no positive multiple of 8")
        start = -(-self._position // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise self._bad(f"duplicate tensor {name}")
            tensors[name] = self._tensor(name, shape, kind, start + offset)
        return tensors

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, begin: int) -> GGUFTensor:
        try:
            type_ = GGMLQuantizationType(kind)
        except ValueError as error:
            raise Unsupported(f"{self.path}: tensor {name} has unknown type number "
                              f"{kind}") from error
        tensor, block = GGUFTensor(name, type_, shape, self.path, begin), GGML_QUANT_SIZES[type_][0]
        if shape[-1] % block:
            raise self._bad(f"tensor {name}: rows of {shape[-1]} do not divide into "
                            f"{type_.name} blocks of {block}")
        if tensor.bytes == 0 or begin + tensor.bytes > self._size:
            raise self._bad(f"tensor {name} of shape {list(shape)} ({type_.name}) spans bytes "
                            f"{begin} to {begin + tensor.bytes} of a file of {self._size}")
        return tensor
