"""Where files are kept, and how they are written: whole or not at all, by one process at a time."""

import contextlib
import errno
import fcntl
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from mlxquant.base import tensor_file
from mlxquant.base.errors import MlxquantError, TooLarge

_Result = TypeVar("_Result")
_held: set[Path] = set()  # outputs that this process holds; a lock would shut out itself too
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
         errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG}


def cache_dir(*parts: str) -> Path:
    """Folder for what can be fetched or computed again (``MLXQUANT_CACHE`` moves it)."""
    above = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("MLXQUANT_CACHE") or above / "mlxquant").joinpath(*parts)


def state_dir(*parts: str) -> Path:
    """Folder for what the user would miss, such as the history of the chat (``MLXQUANT_STATE`` moves it)."""
    above = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return Path(os.environ.get("MLXQUANT_STATE") or above / "mlxquant").joinpath(*parts)


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise ``TooLarge`` unless ``needed`` bytes are free on the disk of ``folder``."""
    existing = next(p for p in [folder, *folder.absolute().parents] if p.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise TooLarge(f"{purpose} needs {needed / 1e9:.2f} GB on the disk of {existing}, "
                       f"which has {free / 1e9:.2f} GB free")


def refuse_existing(target: Path) -> None:
    """Raise ``MlxquantError`` where ``target`` is a file or a folder that holds something."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise MlxquantError(f"{target} already exists; choose another output path or remove it")


def working_folder(output: Path, job: str, record: dict[str, Any]) -> Path:
    """``OUT.partial``, where a long job that makes ``output`` keeps its state.

    ``job`` identifies it; ``record`` is for people. Raises ``MlxquantError`` where the
    folder belongs to another job.
    """
    partial = output.with_name(f"{output.name}.partial")
    marker = partial / "job.json"
    begun = partial.exists() and any(not p.name.endswith(".part") for p in partial.iterdir())
    if not begun:  # nor was it by a run killed while it wrote the marker
        write_json(marker, {"job": job, **record})
    elif not marker.exists() or json.loads(marker.read_text())["job"] != job:
        raise MlxquantError(f"{partial} holds the unfinished work of another job; "
                            "remove it or choose another output path")
    return partial


@contextmanager
def exclusive(target: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold ``target`` for this process; with ``wait``, until whoever holds it is done.

    A process that dies lets go. Raises ``MlxquantError`` where another holds it.
    """
    key = target.absolute()
    if key in _held:
        yield
        return
    path = target.with_name(f".{target.name}.lock")
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        file = _locked(path, target, wait)
    _held.add(key)
    try:
        yield
    finally:
        _held.remove(key)
        path.unlink(missing_ok=True)
        file.close()


def _locked(path: Path, target: Path, wait: bool) -> IO[str]:
    while True:
        file = path.open("a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            file.close()
            raise MlxquantError(f"another run is writing {target}; wait for it or choose another "
                                "output path") from error
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return file
        file.close()  # whoever held it has removed it meanwhile


def holds_output(function: Callable[..., _Result]) -> Callable[..., _Result]:
    """For functions of (name, output, …): two that write one output do not run at once."""

    @functools.wraps(function)
    def run(name: str, output: str | Path, *args: Any, **kwargs: Any) -> _Result:
        with exclusive(Path(output)):
            return function(name, output, *args, **kwargs)

    return run


def drop_stale(target: Path) -> None:
    """Remove what killed runs left of ``target``'s scratch files; only for who holds ``target``."""
    for scratch in target.parent.glob(f".{target.name}.*.part"):
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            scratch.unlink(missing_ok=True)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes ``target`` if the block succeeds.

    The scratch folder sits beside the target, so the last step is one rename;
    on any failure, Ctrl-C included, it is removed and ``target`` is untouched.
    Raises ``MlxquantError`` where ``target`` already holds something, another
    process is writing it, or the disk is full or read-only.
    """
    with exclusive(target), disk_errors(target):
        refuse_existing(target)
        drop_stale(target)
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
def new_file(target: Path) -> Iterator[Path]:
    """Yield a scratch path that replaces ``target`` if the block succeeds."""

    def make(**where: Any) -> str:
        handle, name = tempfile.mkstemp(**where)
        os.close(handle)
        return name

    with disk_errors(target):
        scratch = _scratch(target, make)
        try:
            yield scratch
            _sync(scratch)
            _give_default_mode(scratch, 0o666)
            os.replace(scratch, target)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise


def write_json(target: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, replacing ``target`` in one step."""
    with new_file(target) as scratch:
        scratch.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_arrays(target: Path, arrays: dict[str, Any], metadata: dict[str, str]) -> None:
    """Write MLX arrays as safetensors, replacing ``target`` in one step."""
    with new_file(target) as scratch:
        tensor_file.write(scratch, dict(arrays), metadata)


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Say in one line that a disk is full, a folder read-only, a file in a folder's place."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = f" ({error.filename})" if error.filename and str(target) not in str(error.filename) else ""
        raise MlxquantError(f"cannot write {target}: {error.strerror}{where}") from error


def _scratch(target: Path, make: Callable[..., str]) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(make(prefix=f".{target.name}.", suffix=".part", dir=target.parent))


def _give_default_mode(path: Path, mode: int) -> None:
    """Undo the private mode that ``tempfile`` gives."""
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(mode & ~umask)


def _sync(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())
