"""GGUF files become ordinary MLX checkpoints: ``reader`` → ``model`` (``config``, ``weights``) → a model folder.

An import is made once per file and kept in the cache, so that everything
downstream sees one kind of model folder.
"""

import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mlxquant.base.errors import BadCheckpoint
from mlxquant.base.storage import cache_dir, exclusive, refuse_existing, require_space
from mlxquant.sources import checkpoint
from mlxquant.sources.gguf import model, tokenizer
from mlxquant.sources.gguf.reader import open_model, part_files

Progress = Callable[[int, int, float], None]  # bytes of tensors read, of how many, gigabytes
_FORMAT = 3  # part of the cache key: raise it when the written folder changes


@dataclass(frozen=True)
class Outcome:
    """Where the import is, bytes of tensors read, and ``record`` (``model.Imported.record``) of what was rounded."""

    folder: Path
    bytes: int
    seconds: float
    record: dict


def import_cached(path: Path, progress: Progress = lambda *_: None) -> Path:
    """The model folder made from a GGUF file; raises ``BadCheckpoint`` or ``Unsupported``."""
    with path.open("rb") as file:  # known by this, whatever it is called
        if file.read(4) != b"GGUF":
            raise BadCheckpoint(f"{path} is neither a folder nor a GGUF file")
    files = part_files(path.absolute())  # a link's own name tells of parts, not its target's
    state = [(p.name, s.st_size, s.st_mtime_ns) for p in files for s in [p.stat()]]
    digest = hashlib.sha256(f"{_FORMAT}:{files[0]}:{state}".encode()).hexdigest()[:12]
    folder = cache_dir("imports", f"{files[0].stem}-{digest}")
    if folder.exists():
        return folder
    with exclusive(folder, wait=True):
        if folder.exists():  # another process was quicker
            return folder
        print(f"Importing {path.name}, once", file=sys.stderr)
        outcome = import_file(path, folder, progress=progress)
        if anew := [r for r in outcome.record["rounded"].values() if not r["repacked"] and r["bits"] < 16]:
            print(f"{len(anew)} of {outcome.record['tensors']} tensors had no exact place and were rounded anew, "
                  f"relative error {outcome.record['error']:.1e}; `mlxquant import` shows each", file=sys.stderr)
    return folder


def import_file(path: Path, folder: Path, bits: int | None = None,
                progress: Progress = lambda *_: None) -> Outcome:
    """Write the GGUF file at ``path``, or the split model it is a part of, as the model folder ``folder``.

    Codes that MLX has a place for move as they are; other types are decoded and rounded to ``bits``
    (2, 3, 4, 5, 6, 8; 16 keeps them as numbers; default: by type). Raises ``BadCheckpoint``, ``Unsupported``,
    ``BadValue`` or ``TooLarge``.
    """
    start = time.perf_counter()
    refuse_existing(folder)
    file = open_model(path)
    before = file.state()
    imported, others = model.read(file, bits), tokenizer.files(file)
    require_space(folder, imported.stored_bytes(), f"importing {path.name}")

    def tensors():
        total = sum(source.tensor.bytes for source in imported.sources.values())
        done = 0
        for name, array in imported.tensors():
            yield name, array
            if name in imported.sources:
                done += imported.sources[name].tensor.bytes
                progress(done, total, done / 1e9)
        if file.state() != before:
            raise BadCheckpoint(f"{path} changed while it was imported")

    def config() -> dict:  # asked for when all tensors are written
        return imported.config | {"mlxquant_import": {"file": path.name, **imported.record()}}

    checkpoint.write(folder, config, tensors(), others)
    return Outcome(folder, sum(source.tensor.bytes for source in imported.sources.values()),
                   time.perf_counter() - start, imported.record())
