"""Which chip this machine has, and a table of the figures of known chips.

A chip is identified by brand string and number of GPU cores: an M3 Max has 300 or 400 GB/s,
depending on its cores. A chip that is not in the table has no figures; none are guessed.
"""

import difflib
import platform
import re
import sys
from dataclasses import dataclass, field
from functools import cache

from mlxquant.base.errors import BadValue
from mlxquant.machine.system import device, output_of

MARKS = {
    "V": "read in a primary source", "D": "arithmetic on figures read in a primary source",
    "R": "recalled from a public table, not verified", "E": "an estimate",
    "M": "the maker's data sheet",
}
_Marked = tuple[float, str]


@dataclass(frozen=True)
class Chip:
    """A chip and its figures, each None where it is not known, with a mark of ``MARKS`` in
    ``sources``: the maker's bandwidth, the peak of the GPU's ordinary arithmetic, the most memory
    sold, and the cache before memory."""

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
        if not self.gpu_cores or not self.clock_ghz:
            return None
        return self.gpu_cores * 128 * self.clock_ghz * 1e9

    def known(self, figure: str) -> float:
        """A figure by its name; raises ``BadValue`` where the table lacks it."""
        value: float | None = getattr(self, figure)
        if value is None:
            raise BadValue(f"the {figure} of {self.label} are not in the table")
        return value


def of(name: str, gpu_cores: int | None) -> Chip:
    """The chip of this brand string and core count; without a core count, with the figures that all
    its variants share; without figures where the table has no such chip."""
    fitting = [chip for chip in every() if chip.name == name
               and (gpu_cores is None or chip.gpu_cores in (gpu_cores, None))]
    if not fitting:
        return Chip(name, gpu_cores)
    values = {key: {getattr(chip, key) for chip in fitting}
              for key in ("gpu_cores", *fitting[0].sources)}
    shared = {key: found.pop() for key, found in values.items() if len(found) == 1}
    return Chip(name, **shared, sources={key: mark for key, mark in fitting[0].sources.items()
                                         if key in shared})


def find(text: str) -> Chip:
    """The chip a person means by "M1 Pro" or "M1 Pro 14c"; without cores the largest variant.
    Raises ``BadValue`` for what is not in the table."""
    parts = re.fullmatch(r"(?:apple )?(.+?)(?:[ ,]+(\d+)[ -]?c(?:ores?)?)?", text.strip(),
                         re.IGNORECASE)
    wanted, cores = (parts[1].lower(), parts[2]) if parts else ("", None)
    known = {chip.name.removeprefix("Apple ").lower(): chip.name for chip in every()}
    known |= {"h100": "NVIDIA H100 80GB HBM3", "h200": "NVIDIA H200"}
    if wanted not in known:
        near = difflib.get_close_matches(wanted, known, n=3) or known
        raise BadValue(f"no chip {text!r} in the table; near it are {', '.join(near)}")
    variants = [chip for chip in every() if chip.name == known[wanted]]
    for chip in reversed(variants):
        if cores is None or chip.gpu_cores == int(cores):
            return chip
    raise BadValue(f"{known[wanted]} with {cores} GPU cores is not in the table; "
                   f"allowed are {', '.join(chip.label for chip in variants)}")


@cache
def detect() -> Chip:
    """Recognise this machine; every source may be missing."""
    if sys.platform == "darwin":
        name = output_of("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
        cores = re.search(r'"gpu-core-count" = (\d+)|"num_cores"=(\d+)',
                          output_of("ioreg", "-rc", "AGXAccelerator", "-d1"))
        return of(name, int(cores[1] or cores[2]) if cores else None)
    import mlx.core as mx  # here, because reading the table needs no MLX

    named = mx.device_info().get("device_name") or platform.processor() or platform.machine()
    return of(str(named), None)


def slug() -> str:
    """A file name for what is measured once per chip, kind of device and MLX version."""
    import mlx.core as mx  # see above

    label = f"{detect().label}-{device()}-{mx.__version__}"
    return "".join(c if c.isalnum() else "-" for c in label)


def _apple(name: str, clock: _Marked, slc: _Marked | None,
           *variants: tuple[int, float, float | None]) -> list[Chip]:
    """Variants of (GPU cores, GB/s, most memory in GB), under one clock in GHz and cache in MB.
    Cores and bandwidths are the maker's own; FP32 is cores × 256 operations × clock."""
    marks = {"headline_gb_per_s": "V", "fp32_tflops": "D" if clock[1] == "V" else clock[1],
             "clock_ghz": clock[1]}
    cached = {"slc_mb": slc[1]} if slc else {}
    return [Chip(f"Apple {name}", cores, bandwidth, cores * 0.256 * clock[0], clock[0], memory,
                 slc[0] if slc else None,
                 marks | ({"max_memory_gb": "R"} if memory else {}) | cached)
            for cores, bandwidth, memory in variants]


def _nvidia(name: str, bandwidth: float, memory: float) -> Chip:
    marks = dict.fromkeys(("headline_gb_per_s", "fp32_tflops", "max_memory_gb"), "M")
    return Chip(f"NVIDIA {name}", None, bandwidth, 67, None, memory, None, marks)


@cache
def every() -> list[Chip]:
    """All variants of all chips that are known."""
    m1, m1_wide, m2, m3_max = (1.278, "V"), (1.296, "V"), (1.398, "V"), (1.38, "V")
    m3, m4, m5 = (1.38, "E"), (1.578, "E"), (1.65, "E")
    return [
        *_apple("M1", m1, (8, "V"), (7, 68.25, 16), (8, 68.25, 16)),
        *_apple("M1 Pro", m1_wide, (24, "V"), (14, 200, 32), (16, 200, 32)),
        *_apple("M1 Max", m1_wide, (48, "V"), (24, 400, 64), (32, 400, 64)),
        *_apple("M1 Ultra", m1_wide, (96, "V"), (48, 800, 128), (64, 800, 128)),
        *_apple("M2", m2, (8, "V"), (8, 100, 24), (10, 100, 24)),
        *_apple("M2 Pro", m2, (24, "V"), (16, 200, 32), (19, 200, 32)),
        *_apple("M2 Max", m2, (48, "V"), (30, 400, 96), (38, 400, 96)),
        *_apple("M2 Ultra", m2, (96, "V"), (60, 800, 192), (76, 800, 192)),
        *_apple("M3", m3, (8, "E"), (8, 100, 24), (10, 100, 24)),
        *_apple("M3 Pro", m3, None, (14, 150, 36), (18, 150, 36)),
        *_apple("M3 Max", m3_max, (48, "E"), (30, 300, 96), (40, 400, 128)),
        *_apple("M3 Ultra", m3, (96, "E"), (60, 819, 256), (80, 819, 512)),
        *_apple("M4", m4, None, (8, 120, 32), (10, 120, 32)),
        *_apple("M4 Pro", m4, None, (16, 273, 64), (20, 273, 64)),
        *_apple("M4 Max", m4, (48, "E"), (32, 410, 36), (40, 546, 128)),
        *_apple("M5", m5, None, (8, 153, 32), (10, 153, 32)),
        *_apple("M5 Pro", m5, None, (16, 307, 64), (20, 307, 64)),
        *_apple("M5 Max", m5, None, (32, 460, None), (40, 614, 128)),
        _nvidia("H100 80GB HBM3", 3350, 80), _nvidia("H200", 4800, 141)]
