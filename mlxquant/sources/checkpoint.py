"""Read and write a model folder: config, safetensors and tokenizer files.

``validate`` proves every header consistent with its file before MLX opens it,
so a truncated or lying file ends in one line, not in garbage weights.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from mlxquant.base import tensor_file
from mlxquant.base.errors import BadCheckpoint, Unsupported
from mlxquant.base.storage import new_folder, state_of, write_json
from mlxquant.base.version import __version__

if TYPE_CHECKING:
    import mlx.core as mx

SHARD_BYTES = 1 << 30
MAKING = "making.json"  # seconds and memory that making the folder took; not part of the model
_INDEX = "model.safetensors.index.json"
_SIDE = (".json", ".jinja", ".txt", ".model", ".tiktoken")
# Of these, the files that decide what is read and written as text.
_TEXTUAL = ("*token*", "vocab*", "merges.txt", "*template*", "*.jinja", "*.model",
            "generation_config.json")
# Bytes of a value, for the types that MLX reads.
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E8M0": 1, "U16": 2, "I16": 2,
               "F16": 2, "BF16": 2, "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8}


@dataclass(frozen=True)
class TensorHeader:
    """One entry of a safetensors header: where ``file`` holds a tensor."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder; raises ``BadCheckpoint`` or ``Unsupported``."""
    if not (folder / "config.json").exists() and (folder / "adapter_config.json").exists():
        raise Unsupported(f"{folder} holds an adapter, no model: fuse it into the model that it "
                          "was trained on (mlx_lm.fuse does that)")
    return read_object(folder / "config.json", "model_type")


def validate(folder: Path) -> dict[str, TensorHeader]:
    """The header of every tensor of a model folder by name. Raises ``BadCheckpoint``: no config or
    weights, a shard missing, a link or an index that leads outside, a header that contradicts its
    file."""
    _side_files(folder)
    config = read_config(folder)
    if "quantization" not in config and "quant_method" not in config.get(
            "quantization_config", "quant_method"):
        raise BadCheckpoint(f"{folder / 'config.json'}: quantization_config lacks quant_method")
    tensors: dict[str, TensorHeader] = {}
    for file in weight_files(folder):
        headers = _read_header(file)
        for name in headers.keys() & tensors.keys():
            raise BadCheckpoint(f"tensor {name} is in both {tensors[name].file} and {file.name}")
        tensors |= headers
    if (folder / _INDEX).exists():
        _check_index(folder / _INDEX, tensors)
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The ``model*.safetensors`` files of a folder, sorted; raises ``BadCheckpoint``."""
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise BadCheckpoint(f"{folder} holds no model*.safetensors file")
    _require_inside(folder, files)
    return files


def fingerprint(folder: Path) -> str:
    """A text that changes whenever a model's outputs may, or what it writes as text: the state of
    its weight files, its configuration, tokenizer and templates, and this version of the package.
    """
    # No others: one may be the log of this very run, or what another run found.
    others = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest())
              for file in sorted(_side_files(folder))
              if any(fnmatchcase(file.name, pattern) for pattern in _TEXTUAL)]
    config = (folder / "config.json").read_text(encoding="utf-8")
    return repr((state_of(weight_files(folder)), config, others, __version__))


@dataclass
class KnownFolder:
    """The model in ``folder``, whose files must stay as they are from here on, while a job reads
    them. ``made`` is where the job keeps what it has made so far, if anything: where the files
    change, that is removed, since a new run could not go on with it."""

    folder: Path
    made: Path | None = None

    def __post_init__(self) -> None:
        self._state = fingerprint(self.folder)

    def check(self) -> None:
        """Raise ``BadCheckpoint`` if the files have changed."""
        try:
            same = fingerprint(self.folder) == self._state
        except (BadCheckpoint, OSError):
            same = False
        if not same:
            if self.made:
                shutil.rmtree(self.made, ignore_errors=True)
            raise BadCheckpoint(f"{self.folder} changed while it was read; nothing was written, "
                                "start again")

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Context in which MLX reads the files: where it finds less in one than there was, the
        change is what is told."""
        try:
            yield
        except (RuntimeError, ValueError):
            self.check()
            raise


def folder_bytes(folder: Path) -> int:
    """Size of all files directly in a model folder: what it takes on disk."""
    return sum(p.stat().st_size for p in folder.iterdir() if p.is_file())


def side_files(folder: Path) -> dict[str, bytes]:
    """Tokenizer and other files that go with the weights, by name: all but config, index and
    the record of how long the making took."""
    return {p.name: p.read_bytes() for p in _side_files(folder)
            if p.name not in ("config.json", _INDEX, MAKING)}


def _side_files(folder: Path) -> list[Path]:
    files = [p for p in folder.iterdir() if p.suffix in _SIDE and (p.is_file() or p.is_symlink())]
    _require_inside(folder, files)
    return files


def _require_inside(folder: Path, files: Iterable[Path]) -> None:
    """Refuse links that lead nowhere, or out of a folder that may be a stranger's."""
    # A hub snapshot links into its own repository's blobs; nothing may lead further.
    root = folder.resolve()
    root = root.parent.parent if root.parent.name == "snapshots" else root
    for file in files:
        if not Path(os.path.realpath(file)).is_relative_to(root):  # it endures links in a circle
            raise BadCheckpoint(f"{file} leads outside the model folder")
        if not file.exists():
            raise BadCheckpoint(f"{file} is a link to {file.readlink()}, which is missing; "
                                "download the model again")


def write(folder: Path, config: dict[str, Any] | Callable[[], dict[str, Any]],
          tensors: Iterable[tuple[str, "mx.array"]], others: Mapping[str, str | bytes],
          finish: Callable[[Path], None] = lambda _: None) -> None:
    """Write a model folder, new or empty, in one step, holding at most one shard in memory.

    ``tensors`` may be a generator, and ``config`` a function that is called after its last tensor;
    ``others`` are further files (tokenizer, templates) by name. ``finish`` is called with the
    finished folder before it takes its place. Raises ``BadCheckpoint`` for a tensor with values
    that are not finite.
    """
    with new_folder(folder) as scratch:
        index: dict[str, str] = {}
        for number, shard in enumerate(_shards(tensors), 1):
            file = f"model-{number:05d}.safetensors"
            index |= dict.fromkeys(shard, file)
            tensor_file.write(scratch / file, shard, {"format": "mlx"})
        _name_shards(scratch, index)
        write_json(scratch / "config.json", _tagged(config() if callable(config) else config))
        for name, content in others.items():
            (scratch / name).write_bytes(content.encode() if isinstance(content, str) else content)
        finish(scratch)


def _shards(tensors: Iterable[tuple[str, "mx.array"]]) -> Iterator[dict[str, "mx.array"]]:
    shard: dict[str, mx.array] = {}
    size = 0
    for name, array in tensors:
        if shard and size + array.nbytes > SHARD_BYTES:
            yield shard
            shard, size = {}, 0
        shard[name] = array
        size += array.nbytes
    yield shard


def _name_shards(folder: Path, index: dict[str, str]) -> None:
    """Give the shards the names that other tools expect, now that their number is known."""
    files = sorted(set(index.values()))
    total = sum((folder / file).stat().st_size for file in files)
    final = {f: "model.safetensors" if len(files) == 1 else
             f"model-{n:05d}-of-{len(files):05d}.safetensors" for n, f in enumerate(files, 1)}
    for old, new in final.items():
        (folder / old).rename(folder / new)
    write_json(folder / _INDEX,
               {"metadata": {"total_size": total},
                "weight_map": {name: final[file] for name, file in sorted(index.items())}})


def _tagged(value: Any) -> Any:
    """``value`` with infinite numbers, as some models' limits are, in transformers' spelling."""
    if isinstance(value, float) and math.isinf(value):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, dict):
        return {key: _tagged(part) for key, part in value.items()}
    return [_tagged(part) for part in value] if isinstance(value, (list, tuple)) else value


def read_object(path: Path, *required: str) -> dict[str, Any]:
    """The JSON object in a file, with at least the keys ``required``; raises ``BadCheckpoint``."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_hook=lambda part: (
            float(part["__float__"]) if part.keys() == {"__float__"} else part))
    except FileNotFoundError as error:
        raise BadCheckpoint(f"{path.parent} holds no {path.name}") from error
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise BadCheckpoint(f"{path} is not readable JSON: {error}") from error
    missing = [key for key in required if not isinstance(value, dict) or key not in value]
    if missing or not isinstance(value, dict):
        raise BadCheckpoint(f"{path} lacks {', '.join(missing) or 'an object'}")
    return value


def _read_header(file: Path) -> dict[str, TensorHeader]:
    """The tensors of a safetensors file, whose header is held against the file's size."""
    headers = {}
    try:
        with safe_open(file, framework="numpy") as opened:
            for name in opened.offset_keys():
                part = opened.get_slice(name)
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                if dtype not in _ITEM_BYTES:
                    raise Unsupported(f"{file}: tensor {name} is of type {dtype}, which MLX does "
                                      "not read; store it as F32 or BF16")
                size = prod(shape) * _ITEM_BYTES[dtype]
                headers[name] = TensorHeader(file.name, dtype, shape, size)
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise BadCheckpoint(f"{file} is truncated or no safetensors file: {reason}") from error
    return headers


def _check_index(index: Path, tensors: dict[str, TensorHeader]) -> None:
    weight_map = read_object(index, "weight_map")["weight_map"]
    if not isinstance(weight_map, dict):
        raise BadCheckpoint(f"{index}: weight_map is no object")
    present = {path.name for path in index.parent.iterdir()}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise BadCheckpoint(f"{index} sends tensor {name} outside its folder: {file!r}")
        if file not in present:
            raise BadCheckpoint(f"{index} names {file}, which is missing")
        if name not in tensors:
            raise BadCheckpoint(f"{index} promises tensor {name}, which {file} does not hold")
