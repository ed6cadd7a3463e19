"""Which machine and which versions a result belongs to."""

import os
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxquant.base import blas
from mlxquant.base.version import __version__
from mlxquant.machine import chips
from mlxquant.machine.system import device


def machine() -> dict[str, Any]:
    """The chip, cores, memory and versions that a result belongs to."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    loaded = blas.preload()
    chip = chips.detect()
    return {
        "chip": chip.name, "gpu_cores": chip.gpu_cores, "device": device(), "cores": os.cpu_count(),
        "memory_gb": round(memory / 1e9, 1), "system": f"{platform.system()} {platform.machine()}",
        "gpu_architecture": mx.device_info().get("architecture"),
        "gpu_architecture_override": os.environ.get("MLX_METAL_GPU_ARCH"),
        "python": platform.python_version(), "mlx": mx.__version__, "mlx_lm": version("mlx-lm"),
        "mlxquant": __version__, "openblas": Path(loaded).name if loaded else None,
    }
