"""MLX's compiler of fused operations for a CPU, with its header precompiled: a third of the time.

MLX calls ``g++`` for each operation that it has not kept in the temporary folder, some 200 times
where that is empty, and most of each call goes into one header.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import mlx.core as mx

_HEADER = "mlx/backend/cpu/compiled_preamble.h"
_OPTIONS = ["-std=c++17", "-O3", "-Wall", "-fPIC", "-shared"]  # as MLX calls it
# Another process may look for the library, the last argument, as soon as it is there.
_SCRIPT = """#!/bin/sh
for library; do :; done
case $library in
*.so) {compiler} -I{folder} "$@" -o "$library.$$" && mv "$library.$$" "$library" ;;
*) exec {compiler} "$@" ;;
esac
"""


def quicken(cache: Path) -> None:
    """Put a ``g++`` before the others that finds the header in ``cache``, precompiled."""
    compiler, include = shutil.which("g++"), Path(mx.__file__).parent / "include"
    if mx.default_device() != mx.cpu or not compiler or not (include / _HEADER).exists():
        return
    version = subprocess.check_output([compiler, "-dumpfullversion"], text=True).strip()
    folder = cache / f"{mx.__version__}-{version}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=cache) as name:
            made = Path(name, "made", f"{_HEADER}.gch")
            made.parent.mkdir(parents=True)
            subprocess.run([compiler, *_OPTIONS, "-w", f"-I{include}", "-x", "c++-header",
                            str(include / _HEADER), "-o", str(made)], check=True)
            script = Path(name, "made", "g++")
            script.write_text(_SCRIPT.format(compiler=compiler, folder=folder))
            script.chmod(0o755)
            with contextlib.suppress(OSError):  # another worker was faster
                script.parent.rename(folder)
    os.environ["PATH"] = f"{folder}{os.pathsep}{os.environ['PATH']}"
