"""One form for every result: what was run, on which machine, with which versions."""

import datetime
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path

import mlxquant  # first: it loads the BLAS before MLX
import mlx.core as mx

from mlxquant.roofline import chips
from mlxquant.storage import write_json

RESULTS = Path(__file__).parent / "results"


def machine() -> dict:
    """The chip, cores, memory and versions a result belongs to."""
    gpu = mx.default_device() == mx.gpu
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "chip": chips.detect().name, "device": "gpu" if gpu else "cpu", "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1), "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(), "mlx": mx.__version__, "mlx_lm": version("mlx-lm"),
        "mlxquant": mlxquant.__version__, "openblas": blas_name(),
    }


def blas_name() -> str | None:
    loaded = mlxquant.blas.preload()
    return Path(loaded).name if loaded else None


def save(name: str, **values) -> Path:
    """Write ``results/NAME.json`` with the machine, the date and the command beside the values."""
    path = RESULTS / f"{name}.json"
    arguments = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    command = " ".join(["python", os.path.relpath(sys.argv[0], RESULTS.parents[1]), *arguments])
    write_json(path, {"date": datetime.date.today().isoformat(), "command": command,
                      "machine": machine(), **values})
    return path


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())
