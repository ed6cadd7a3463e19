"""Where files are kept, and how they are written: whole or not at all, by one process at a time."""

import contextlib
import errno
import fcntl
import functools
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from mlxquant.base import tensor_file
from mlxquant.base.errors import BadValue, CannotWrite, MlxquantError, TooLarge

_MARKER = "job.json"
_PLACES, _READ = 16, 1 << 16  # of a file, and bytes that are read there, to know it again
_Result = TypeVar("_Result")
_held: set[Path] = set()  # outputs that this process has locked: a second flock would fail
_warned: set[str] = set()  # cache folders of which this process has said that it cannot write
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO,
         errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ENAMETOOLONG}


def cache_dir(*parts: str) -> Path:
    """Folder for what can be fetched or computed again (``MLXQUANT_CACHE`` moves it)."""
    above = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("MLXQUANT_CACHE") or above / "mlxquant").joinpath(*parts)


def state_dir(*parts: str) -> Path:
    """Folder for what a user would miss, such as a chat's history (``MLXQUANT_STATE`` moves it)."""
    above = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return Path(os.environ.get("MLXQUANT_STATE") or above / "mlxquant").joinpath(*parts)


def shipped(installed: str, checkout: str) -> Path:
    """The path of a data file: ``installed`` in the package, or else ``checkout`` beside it."""
    package = Path(__file__).parents[1]
    path = package / installed
    return path if path.exists() else package.parent / checkout


@contextmanager
def if_writable() -> Iterator[None]:
    """Context for writing to the cache: ``CannotWrite`` becomes a warning, printed once."""
    try:
        yield
    except CannotWrite as error:
        if (place := str(cache_dir())) not in _warned:
            _warned.add(place)
            print(f"{error}: what is measured will be measured again next time "
                  "(MLXQUANT_CACHE names another folder)", file=sys.stderr)


def recalled(file: Path) -> Any:
    """The JSON value in the cache's ``file``, or None."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(file.read_text(encoding="utf-8"))
    return None


def cached(file: Path, make: Callable[[], Any]) -> Any:
    """The JSON value in the cache's ``file``; where there is none, ``make`` gives and stores it."""
    if (value := recalled(file)) is not None:
        return value
    value = make()
    with if_writable():
        write_json(file, value)
    return json.loads(json_text(value))


def state_of(files: Iterable[Path]) -> tuple[tuple[str, int, int, str], ...]:
    """Name, size, time, and a digest of bytes here and there of every file: what changes when a
    file does. ``cp -p`` keeps size and time of what it puts in a file's place."""
    found = []
    for file in files:
        digest, stat = hashlib.sha256(), file.stat()
        with file.open("rb") as opened:
            for place in range(_PLACES):
                opened.seek(place * stat.st_size // _PLACES)
                digest.update(opened.read(_READ))
        found.append((file.name, stat.st_size, stat.st_mtime_ns, digest.hexdigest()))
    return tuple(found)


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


def working_folder(output: Path, job: dict[str, str], record: dict[str, Any]) -> Path:
    """``OUT.partial``, where a long job that makes ``output`` keeps its state: ``job`` identifies
    it, ``record`` is for people. Raises ``MlxquantError`` where it belongs to another job."""
    refuse_unfinished(output, job)
    partial = output.with_name(f"{output.name}.partial")
    if not _begun(partial):
        write_json(partial / _MARKER, job | record)
    return partial


def begun_with(partial: Path) -> dict[str, Any]:
    """The ``record`` with which a job began its ``working_folder``, and what identifies it."""
    begun: dict[str, Any] = json.loads((partial / _MARKER).read_text(encoding="utf-8"))
    return begun


def refuse_unfinished(output: Path, known: dict[str, str]) -> None:
    """Raise ``MlxquantError`` where ``OUT.partial`` belongs to a job that differs from the items
    ``known``."""
    partial = output.with_name(f"{output.name}.partial")
    marker = partial / _MARKER
    if _begun(partial) and not (
            marker.exists() and known.items() <= begun_with(partial).items()):
        raise MlxquantError(f"{partial} holds the unfinished work of another job; "
                            "remove it or choose another output path")


def _begun(partial: Path) -> bool:
    # A run that was killed while it wrote the marker leaves only scratch files.
    return partial.exists() and not all(p.name.endswith(".part") for p in partial.iterdir())


@contextmanager
def exclusive(target: Path, *, wait: bool = False) -> Iterator[None]:
    """Lock ``target`` for this process; the lock ends with the block or the process. Where another
    process has it locked, ``wait`` or raise ``MlxquantError``; ``BadValue`` for ``.`` or ``..``."""
    if target.name in ("", ".."):
        raise BadValue(f"{target} is no name for an output, which is made under another one and "
                       "then moved: give a name, such as ./model")
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
    """Decorator for functions of (name, output, …): lock ``output`` while the function runs."""

    @functools.wraps(function)
    def run(name: str, output: str | Path, *args: Any, **kwargs: Any) -> _Result:
        with exclusive(Path(output)):
            return function(name, output, *args, **kwargs)

    return run


def drop_stale(target: Path) -> None:
    """Remove scratch paths that killed runs left beside ``target``, which must be locked."""
    # Exactly: ".a.5b.1234abcd.part" is scratch of a.5b, which another process may be writing.
    own = re.compile(rf"\.{re.escape(target.name)}\.\w{{8}}\.part")
    for path in target.parent.iterdir():
        if own.fullmatch(path.name):
            _remove(path)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes ``target`` if the block succeeds.

    The scratch folder sits beside the target, so the last step is one rename; on any failure,
    Ctrl-C included, it is removed. Raises ``MlxquantError`` where ``target`` already holds
    something, another process is writing it, or the disk is full or read-only.
    """
    with exclusive(target), _scratch(target) as scratch:
        refuse_existing(target)
        drop_stale(target)
        scratch.mkdir()
        yield scratch
        for path in scratch.iterdir():
            _sync(path)
        if target.is_dir():
            target.rmdir()
        scratch.rename(target)


@contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """Yield a scratch path that replaces ``target`` if the block succeeds."""
    with _scratch(target) as scratch:
        yield scratch
        _sync(scratch)
        scratch.replace(target)


@contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """Yield an unused path beside ``target``; if the block fails, what lies there is removed."""
    with disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}.part")
        try:
            yield scratch
        except BaseException:
            _remove(scratch)
            raise


def json_text(value: Any, indent: int | None = 2) -> str:
    """JSON, indented; raises ``MlxquantError`` naming the key of a number that is not finite."""
    try:
        return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False) + "\n"
    except ValueError as error:
        key = next(_not_finite(value, ""), "")
        raise MlxquantError(f"{key or 'a value'} is not a finite number: {error}") from error


def _not_finite(value: Any, key: str) -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield key
    elif isinstance(value, (dict, list, tuple)):
        for name, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _not_finite(part, f"{key}.{name}" if key else str(name))


def write_json(target: Path, value: Any) -> None:
    """Write ``json_text`` of ``value``, replacing ``target`` in one step."""
    text = json_text(value)
    with new_file(target) as scratch:
        scratch.write_text(text, encoding="utf-8")


def save_arrays(target: Path, arrays: dict[str, Any], metadata: dict[str, str]) -> None:
    """Write MLX arrays as safetensors, replacing ``target`` in one step."""
    with new_file(target) as scratch:
        tensor_file.write(scratch, dict(arrays), metadata)


@contextmanager
def disk_errors(target: Path) -> Iterator[None]:
    """Raise ``CannotWrite`` for a full disk, a read-only folder or a file in a folder's place."""
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        named = error.filename and str(target) not in str(error.filename)
        where = f" ({error.filename})" if named else ""
        raise CannotWrite(f"cannot write {target}: {error.strerror}{where}") from error


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())
