"""GGUF files become ordinary MLX checkpoints: ``reader`` → ``repack`` → a model folder.

An import is made once per file and kept in the cache, so that everything
downstream sees one kind of model folder.
"""

import hashlib
import sys
from pathlib import Path

from mlxquant import checkpoint
from mlxquant.gguf import llama, tokenizer
from mlxquant.gguf.reader import GGUFFile
from mlxquant.storage import cache_dir, require_space

_FORMAT = 1  # part of the cache key: raise it when the written folder changes


def import_cached(path: Path) -> Path:
    """The model folder made from a GGUF file; raises ``BadCheckpoint`` or ``Unsupported``."""
    path = path.resolve()
    state = path.stat()
    key = f"{_FORMAT}:{path}:{state.st_size}:{state.st_mtime_ns}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:12]
    folder = cache_dir("imports", f"{path.stem}-{digest}")
    if not folder.exists():
        print(f"Importing {path.name}, once", file=sys.stderr)
        import_file(path, folder)
    return folder


def import_file(path: Path, folder: Path) -> None:
    """Write the GGUF file at ``path`` as the model folder ``folder``, without requantising."""
    file = GGUFFile(path)
    require_space(folder, path.stat().st_size, f"importing {path.name}")
    model = llama.read(file)
    checkpoint.write(folder, model.config, model.tensors(), tokenizer.files(file))
