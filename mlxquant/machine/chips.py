"""Which chip this is, and what is known of it.

Keyed on the brand string and the number of GPU cores: an M3 Max has 300 or 400
GB/s. A chip or variant that is not in the table has no figures, never guessed
ones: only the measured ceiling is shown.
"""

import difflib
import platform
import re
import sys
from dataclasses import dataclass, field
from functools import cache

from mlxquant.base.errors import BadValue
from mlxquant.machine.chip_table import MODELS, Model, Variant
from mlxquant.machine.system import device, output_of


@dataclass(frozen=True)
class Chip:
    """A chip and its figures, each None where it is not known.

    ``headline_gb_per_s`` is the maker's bandwidth, ``fp32_tflops`` the peak of the GPU's
    ordinary arithmetic, ``max_memory_gb`` the most sold, ``slc_mb`` the cache before
    memory. ``sources`` gives a mark of ``table.MARKS`` for each figure.
    """

    name: str
    gpu_cores: int | None = None
    headline_gb_per_s: float | None = None
    fp32_tflops: float | None = None
    clock_ghz: float | None = None
    max_memory_gb: float | None = None
    slc_mb: float | None = None
    sources: dict[str, str] = field(default_factory=dict, compare=False)

    @property
    def label(self) -> str:
        """Name and cores, as ``find`` reads them."""
        short = self.name.removeprefix("Apple ")
        return f"{short} {self.gpu_cores}c" if self.gpu_cores else short

    @property
    def lane_operations_per_s(self) -> float | None:
        """Full-rate operations a second: 128 lanes a core on Apple's GPUs."""
        return self.gpu_cores * 128 * self.clock_ghz * 1e9 if self.gpu_cores and self.clock_ghz else None


def every() -> list[Chip]:
    """All variants of the table."""
    return [_chip(name, model, variant) for name, model in MODELS.items() for variant in model.variants]


def of(name: str, gpu_cores: int | None) -> Chip:
    """The chip of this brand string and core count. Without cores only what all variants share is known."""
    model = MODELS.get(name)
    if model is None:
        return Chip(name, gpu_cores)
    fitting = [v for v in model.variants if gpu_cores in (v.gpu_cores, None) or v.gpu_cores is None]
    if not fitting:
        return Chip(name, gpu_cores)
    shared = (values.pop() if len(values := set(column)) == 1 else None for column in zip(*fitting))
    return _chip(name, model, Variant(*shared))


def find(text: str) -> Chip:
    """The chip a person means by "M1 Pro" or "M1 Pro 14c"; without cores the largest variant.

    Raises ``BadValue`` for what is not in the table.
    """
    parts = re.fullmatch(r"(?:apple )?(.+?)(?:[ ,]+(\d+)[ -]?c(?:ores?)?)?", text.strip(), re.IGNORECASE)
    wanted, cores = (parts[1].lower(), parts[2]) if parts else ("", None)
    known = {chip.name.removeprefix("Apple ").lower(): chip.name for chip in every()}
    known |= {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=3) or known
        raise BadValue(f"no chip {text!r} in the table; near it are {', '.join(near)}")
    variants = [chip for chip in every() if chip.name == known[wanted]]
    if cores is None:
        return variants[-1]
    for chip in variants:
        if chip.gpu_cores == int(cores):
            return chip
    raise BadValue(f"{known[wanted]} with {cores} GPU cores is not in the table; "
                   f"allowed are {', '.join(chip.label for chip in variants)}")


@cache
def detect() -> Chip:
    """Recognise this machine; every source may be missing."""
    if sys.platform == "darwin":
        name = output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
        return of(name, gpu_cores_in(output_of("ioreg", "-rc", "AGXAccelerator", "-d1")))
    import mlx.core as mx

    return of(mx.device_info().get("device_name") or platform.processor() or platform.machine(), None)


def slug() -> str:
    """A file name for what is measured once per chip, kind of device and MLX version."""
    import mlx.core as mx

    return "".join(c if c.isalnum() else "-" for c in f"{detect().label}-{device()}-{mx.__version__}")


def gpu_cores_in(registry: str) -> int | None:
    """The GPU's cores in what ``ioreg -rc AGXAccelerator -d1`` prints."""
    found = re.search(r'"gpu-core-count" = (\d+)', registry) or re.search(r'"num_cores"=(\d+)', registry)
    return int(found[1]) if found else None


def _chip(name: str, model: Model, variant: Variant) -> Chip:
    cores, bandwidth, memory = variant
    tflops, mark = model.tflops or (None, None)
    if cores and model.clock:
        tflops, mark = cores * 0.256 * model.clock[0], "D" if model.clock[1] == "V" else model.clock[1]
    clock, clock_mark = model.clock or (None, None)
    slc, slc_mark = model.slc or (None, None)
    figures = {"headline_gb_per_s": (bandwidth, model.bandwidth_mark), "fp32_tflops": (tflops, mark),
               "clock_ghz": (clock, clock_mark), "max_memory_gb": (memory, model.memory_mark),
               "slc_mb": (slc, slc_mark)}
    return Chip(name, cores, **{key: value for key, (value, _) in figures.items()},
                sources={key: mark for key, (value, mark) in figures.items() if value is not None})
