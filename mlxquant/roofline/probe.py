"""The read ceiling: how fast this machine reads memory, measured once and cached.

Matrices of 128 MB, distinct and together several times larger than any cache,
are read in turn by a reduction and by matrix-vector products. The ceiling is
the best kernel's median. On a CPU NumPy's product takes part as well: MLX
reads slower than the memory there, and a ceiling must be the memory's.
"""

import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from typing import Callable

import mlx.core as mx
import numpy as np

from mlxquant.roofline import chips
from mlxquant.storage import cache_dir, write_json

_ROWS, _COLUMNS = 4096, 8192
_MATRICES = 8
_PASSES = 7


@dataclass(frozen=True)
class Ceiling:
    """Median GB/s of the best reader, and (max − min) / median over its passes."""

    gb_per_s: float
    spread: float
    kernel: str
    chip: str
    mlx: str


def read_ceiling(*, refresh: bool = False) -> Ceiling:
    """The cached ceiling of this chip and MLX version, measured now if there is none."""
    chip = chips.detect().name
    path = cache_dir("probe", f"{chips.slug()}.json")
    if not refresh:
        try:
            return Ceiling(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            pass
    print("Measuring how fast this machine reads memory, once", file=sys.stderr)
    ceiling = _measure(chip)
    write_json(path, asdict(ceiling))
    return ceiling


def _measure(chip: str) -> Ceiling:
    matrices = [mx.random.normal((_ROWS, _COLUMNS)) for _ in range(_MATRICES)]
    vector = mx.ones((_COLUMNS, 1))
    mx.eval(matrices, vector)

    def reduction() -> None:
        total = mx.array(0.0)
        for matrix in matrices:
            total = total + matrix.sum()
        mx.eval(total)

    def product() -> None:
        x = vector
        for matrix in matrices:  # each product waits for the one before
            x = vector + 1e-9 * (matrix @ x).sum()
        mx.eval(x)

    readers: dict[str, Callable[[], None]] = {"mlx reduction": reduction, "mlx product": product}
    if mx.default_device() == mx.cpu:
        views = [np.array(matrix, copy=False) for matrix in matrices]
        ones = np.ones(_COLUMNS, np.float32)
        readers["numpy product"] = lambda: [view @ ones for view in views]
    total = sum(matrix.nbytes for matrix in matrices)
    best = max(_passes(read, total) + (name,) for name, read in readers.items())
    del matrices
    mx.clear_cache()
    return Ceiling(*best, chip=chip, mlx=mx.__version__)


def _passes(read: Callable[[], None], total: int) -> tuple[float, float]:
    read()
    rates = []
    for _ in range(_PASSES):
        start = time.perf_counter()
        read()
        rates.append(total / (time.perf_counter() - start) / 1e9)
    median = statistics.median(rates)
    return median, (max(rates) - min(rates)) / median
