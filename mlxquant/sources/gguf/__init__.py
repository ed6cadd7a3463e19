"""GGUF files become MLX checkpoints: ``reader`` → ``model`` (``config``, ``weights``) → folder."""

import hashlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxquant.base.errors import BadCheckpoint
from mlxquant.base.storage import (
    cache_dir,
    exclusive,
    refuse_existing,
    require_space,
    state_of,
)
from mlxquant.sources import checkpoint
from mlxquant.sources.gguf import model, tokenizer
from mlxquant.sources.gguf.reader import open_model, part_files

Progress = Callable[[int, int, float], None]  # bytes of tensors read, of how many, gigabytes
_FORMAT = 4  # part of the cache key: raise it when the written folder changes


@dataclass(frozen=True)
class Outcome:
    """Where the import is, bytes of tensors read, and what was rounded (``Imported.record``)."""

    folder: Path
    bytes: int
    seconds: float
    record: dict[str, Any]


def import_cached(path: Path, progress: Progress = lambda *_: None) -> Path:
    """The model folder made from a GGUF file; raises ``BadCheckpoint`` or ``Unsupported``."""
    with path.open("rb") as file:  # recognised by its content, not by its name
        if file.read(4) != b"GGUF":
            raise BadCheckpoint(f"{path} is neither a folder nor a GGUF file")
    files = part_files(path.absolute())  # a link's own name says which part it is, not its target's
    key = f"{_FORMAT}:{files[0]}:{state_of(files)}".encode()
    folder = cache_dir("imports", f"{files[0].stem}-{hashlib.sha256(key).hexdigest()[:12]}")
    if folder.exists():
        return folder
    with exclusive(folder, wait=True):
        if folder.exists():  # another process was quicker
            return folder
        print(f"Importing {path.name}, once", file=sys.stderr)
        record = import_file(path, folder, progress=progress).record
        anew = [r for r in record["rounded"].values() if not r["repacked"] and r["bits"] < 16]
        if anew:
            print(f"{len(anew)} of {record['tensors']} tensors had no exact place and were rounded "
                  f"anew, relative error {record['error']:.1e}; `mlxquant import` shows each",
                  file=sys.stderr)
    return folder


def import_file(path: Path, folder: Path, bits: int | None = None,
                progress: Progress = lambda *_: None) -> Outcome:
    """Write the GGUF file at ``path``, or the split model it is a part of, as ``folder``.

    Codes that MLX can represent are kept unchanged; other types are decoded and rounded to
    ``bits`` (2, 3, 4, 5, 6, 8; 16 keeps them as numbers; default: by type). Raises
    ``BadCheckpoint``, ``Unsupported``, ``BadValue`` or ``TooLarge``.
    """
    start = time.perf_counter()
    refuse_existing(folder)
    file = open_model(path)
    before = state_of(file.files)
    imported, others = model.read(file, bits), tokenizer.files(file)
    require_space(folder, imported.stored_bytes(), f"importing {path.name}")
    total = sum(source.tensor.bytes for source in imported.sources.values())

    def tensors() -> Iterator[tuple[str, mx.array]]:
        done = 0
        for name, array in imported.tensors():
            yield name, array
            if name in imported.sources:
                done += imported.sources[name].tensor.bytes
                progress(done, total, done / 1e9)
        if state_of(file.files) != before:
            raise BadCheckpoint(f"{path} changed while it was imported")

    def config() -> dict[str, Any]:  # asked for when all tensors are written
        return imported.config | {"mlxquant_import": {"file": path.name, **imported.record()}}

    checkpoint.write(folder, config, tensors(), others)
    return Outcome(folder, total, time.perf_counter() - start, imported.record())
