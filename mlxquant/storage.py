"""Where files are kept, and how they are written: whole or not at all."""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

from mlxquant.errors import MlxquantError, TooLarge


def cache_dir(*parts: str) -> Path:
    """Folder for what can be fetched or computed again (``MLXQUANT_CACHE`` moves it)."""
    root = os.environ.get("MLXQUANT_CACHE")
    if not root:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlxquant"
    return Path(root).joinpath(*parts)


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise ``TooLarge`` unless ``needed`` bytes are free on the disk of ``folder``."""
    existing = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise TooLarge(f"{purpose} needs {needed / 1e9:.2f} GB on the disk of {existing}, "
                       f"which has {free / 1e9:.2f} GB free")


def refuse_existing(target: Path) -> None:
    """Raise ``MlxquantError`` where ``target`` is a file or a folder that holds something."""
    if target.is_file() or target.is_dir() and any(target.iterdir()):
        raise MlxquantError(f"{target} already exists; choose another output path or remove it")


def working_folder(output: Path, job: str, record: dict) -> Path:
    """``OUT.partial``, where a long job that makes ``output`` keeps its state.

    ``job`` identifies it; ``record`` is for people. Raises ``MlxquantError`` where the
    folder belongs to another job.
    """
    partial = output.with_name(f"{output.name}.partial")
    marker = partial / "job.json"
    if not partial.exists():
        write_json(marker, {"job": job, **record})
    elif not marker.exists() or json.loads(marker.read_text())["job"] != job:
        raise MlxquantError(f"{partial} holds the unfinished work of another job; "
                            "remove it or choose another output path")
    return partial


@contextmanager
def new_folder(target: Path):
    """Yield a scratch folder that becomes ``target`` if the block succeeds.

    The scratch folder sits beside the target, so the last step is one rename;
    on any failure, Ctrl-C included, it is removed and ``target`` is untouched.
    Raises ``MlxquantError`` where ``target`` already holds something.
    """
    refuse_existing(target)
    scratch = _scratch(target, tempfile.mkdtemp)
    try:
        yield scratch
        for path in scratch.iterdir():
            _sync(path)
        _give_default_mode(scratch, 0o777)
        if target.is_dir():
            target.rmdir()
        scratch.rename(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


@contextmanager
def new_file(target: Path):
    """Yield a scratch path that replaces ``target`` if the block succeeds."""

    def make(**where) -> str:
        handle, name = tempfile.mkstemp(**where)
        os.close(handle)
        return name

    scratch = _scratch(target, make)
    try:
        yield scratch
        _sync(scratch)
        _give_default_mode(scratch, 0o666)
        os.replace(scratch, target)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def write_json(target: Path, value) -> None:
    """Write ``value`` as indented JSON, replacing ``target`` in one step."""
    with new_file(target) as scratch:
        scratch.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_arrays(target: Path, arrays: dict, metadata: dict[str, str]) -> None:
    """Write MLX arrays as safetensors, replacing ``target`` in one step."""
    import mlx.core as mx

    with new_file(target) as scratch:
        named = scratch.with_suffix(".safetensors")  # the only ending that MLX writes
        mx.save_safetensors(str(named), arrays, metadata)
        named.replace(scratch)


def _scratch(target: Path, make) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        return Path(make(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    except OSError as error:
        raise MlxquantError(f"cannot write {target}: {error.strerror}") from error


def _give_default_mode(path: Path, mode: int) -> None:
    """Undo the private mode that ``tempfile`` gives."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(mode & ~umask)


def _sync(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())
