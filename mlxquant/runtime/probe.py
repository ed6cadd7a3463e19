"""What this machine can do, measured once per chip, device and MLX version, and cached.

The read ceiling: buffers that are distinct, together at least a gigabyte and so several
times larger than any cache, are read in turn by a few readers; it is the best one's
median. On a CPU NumPy's product is one of the readers: MLX reads slower than the memory
there, and a ceiling must be the memory's. A model that reads faster than the ceiling shows that
other work slowed the readers: then they run once more. Also measured are the rate of a large matrix
product and what replicated layers cost here (``replica_probe.py``).
"""

import json
import statistics
import sys
import timeit
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxquant.base.storage import cache_dir, if_writable, write_json
from mlxquant.kernels import read_ceiling as read_kernel
from mlxquant.machine import chips
from mlxquant.machine.memory import memory_limit
from mlxquant.machine.replica_limits import ReplicaLimits
from mlxquant.machine.system import device
from mlxquant.runtime.replica_probe import measure_replicas

_COLUMNS = 8192
_ROWS = (4096, 16384)  # on a CPU or a small GPU, and where 4 GB are a quarter of the memory at most
_MATRICES = 8
_PASSES = 9
_VECTORS = (16, 64)  # of the read kernel; which is quicker depends on the chip
# What this process has read or measured, by file: every reply's report asks for it.
_known: dict[Path, "Probe"] = {}


@dataclass(frozen=True)
class Ceiling:
    """Median GB/s of the best reader, and (max − min) / median over its passes."""

    gb_per_s: float
    spread: float
    kernel: str
    chip: str
    mlx: str


@dataclass(frozen=True)
class Probe:
    """All that is known of this machine: ``readers`` are GB/s by reader, ``product_tflops`` the
    rate of a matrix product in the type that models run in here, ``beaten_by`` the GB/s of the
    run for which the ceiling was last measured again."""

    ceiling: Ceiling
    readers: dict[str, float]
    product_tflops: float
    replicas: ReplicaLimits | None = None
    beaten_by: float = 0.0


def percent_of_ceiling(gb_per_s: float) -> tuple[float, Ceiling]:
    """How much of the ceiling a run reached, and the ceiling.

    Where a run exceeds the ceiling, the ceiling is measured again and the larger result is kept.
    After that only a faster run causes this, because a small model may be read from a cache.
    """
    known = measured()
    if gb_per_s > max(known.ceiling.gb_per_s, known.beaten_by) and _spare() > 2 * _bytes(_ROWS[0]):
        print(f"{gb_per_s:.1f} GB/s is more than the {known.ceiling.gb_per_s:.1f} GB/s that this "
              "machine was found to read: measuring that again", file=sys.stderr)
        best = max(known, _measure(), key=lambda probe: probe.ceiling.gb_per_s)
        known = _kept(replace(best, replicas=known.replicas, beaten_by=gb_per_s))
    return 100 * gb_per_s / known.ceiling.gb_per_s, known.ceiling


def replica_limits() -> ReplicaLimits | None:
    """How many replicas are free here, if ``mlxquant probe`` has measured it."""
    known = _cached()
    return known.replicas if known else None


def measured(*, refresh: bool = False, replicas: bool = False,
             progress: Callable[[int, int, float], None] = lambda *_: None) -> Probe:
    """This machine's figures, from the cache or measured now; ``replicas`` only if asked for."""
    known = None if refresh else _cached()
    if known is None:
        print("Measuring how fast this machine reads memory, once", file=sys.stderr)
        known = _kept(_measure())
    if replicas and known.replicas is None:
        limits = measure_replicas(known.ceiling.gb_per_s, progress)
        known = _kept(replace(known, replicas=limits))
    return known


def _file() -> Path:
    return cache_dir("probe", f"{chips.slug()}.json")


def _cached() -> Probe | None:
    file = _file()
    if file not in _known:
        try:
            values = json.loads(file.read_text())
            replicas = values["replicas"] and ReplicaLimits(**values["replicas"])
            _known[file] = Probe(
                **values | {"ceiling": Ceiling(**values["ceiling"]), "replicas": replicas})
        except (OSError, ValueError, TypeError, KeyError):
            return None
    return _known[file]


def _kept(probe: Probe) -> Probe:
    """``probe``, remembered by this process and, where the disk allows, by later ones."""
    _known[_file()] = probe
    with if_writable():
        write_json(_file(), asdict(probe))
    return probe


def _bytes(rows: int) -> int:
    """Bytes of all matrices with so many ``rows`` each."""
    return 4 * _MATRICES * rows * _COLUMNS


def _spare() -> int:
    """Bytes of memory that no model takes."""
    return memory_limit() - (mx.get_active_memory() if device() == "gpu" else 0)


def _measure() -> Probe:
    small, large = _ROWS
    roomy = device() == "gpu" and _spare() >= 4 * _bytes(large)
    matrices = [mx.random.normal((large if roomy else small, _COLUMNS)) for _ in range(_MATRICES)]
    mx.eval(matrices)
    total = sum(matrix.nbytes for matrix in matrices)
    passes = {name: _passes(read, total) for name, read in readers(matrices).items()}
    del matrices
    mx.clear_cache()
    rates = {name: statistics.median(found) for name, found in passes.items()}
    best = max(rates, key=lambda name: rates[name])
    spread = (max(passes[best]) - min(passes[best])) / rates[best]
    ceiling = Ceiling(rates[best], spread, best, chips.detect().name, mx.__version__)
    return Probe(ceiling, rates, _product_tflops())


def readers(matrices: list[mx.array]) -> dict[str, Callable[[], object]]:
    """Ways to read all ``matrices``, each after the one before, by name."""
    vector = mx.ones((_COLUMNS, 1))
    flat = [matrix.reshape(-1).view(mx.uint32) for matrix in matrices]
    mx.eval(vector, flat)

    def reduction() -> None:
        total = mx.array(0.0)
        for matrix in matrices:
            total = total + matrix.sum()
        mx.eval(total)

    def product() -> None:
        x = vector
        for matrix in matrices:
            x = vector + 1e-9 * (matrix @ x).sum()
        mx.eval(x)

    def kernel(vectors: int) -> None:
        result = flat[0][:8]
        for buffer in flat:
            result = read_kernel.read(buffer, result, vectors)
        mx.eval(result)

    known: dict[str, Callable[[], object]] = {"mlx reduction": reduction, "mlx product": product}
    if device() == "cpu":
        views = [np.array(matrix, copy=False) for matrix in matrices]
        ones = np.ones(_COLUMNS, np.float32)
        known["numpy product"] = lambda: [view @ ones for view in views]
    elif read_kernel.trusted():
        known |= {f"read kernel, {v} vectors": partial(kernel, v) for v in _VECTORS
                  if flat[0].size % read_kernel.words(v) == 0}
    return known


def _passes(read: Callable[[], object], total: int) -> list[float]:
    """GB/s of each pass over ``total`` bytes, after one that warms up."""
    read()
    return [total / seconds / 1e9 for seconds in timeit.repeat(read, number=1, repeat=_PASSES)]


def _product_tflops() -> float:
    """10¹² operations a second of the product of two square matrices, the best of 5."""
    on_cpu = device() == "cpu"
    size, dtype = (1024, mx.float32) if on_cpu else (8192, mx.float16)
    a, b = (mx.random.normal((size, size)).astype(dtype) for _ in range(2))
    mx.eval(a, b, a @ b)
    return 2e-12 * size**3 / min(timeit.repeat(lambda: mx.eval(a @ b), number=1, repeat=5))
