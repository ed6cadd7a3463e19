"""Which chip this is, and the memory bandwidth its maker states.

Apple's figures are from its technical specifications, keyed on the brand
string and, where variants differ, on the number of GPU cores. A chip that is
not in the table has no headline: only the measured ceiling is shown.
"""

import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache

# GB/s; a dict gives it by GPU cores.
HEADLINE = {
    "Apple M1": 68.25, "Apple M1 Pro": 200, "Apple M1 Max": 400, "Apple M1 Ultra": 800,
    "Apple M2": 100, "Apple M2 Pro": 200, "Apple M2 Max": 400, "Apple M2 Ultra": 800,
    "Apple M3": 100, "Apple M3 Pro": 150, "Apple M3 Max": {30: 300, 40: 400}, "Apple M3 Ultra": 819,
    "Apple M4": 120, "Apple M4 Pro": 273, "Apple M4 Max": {32: 410, 40: 546},
    "Apple M5": 153, "Apple M5 Pro": 307, "Apple M5 Max": {32: 460, 40: 614},
}


@dataclass(frozen=True)
class Chip:
    """The chip that MLX runs on here; ``headline_gb_per_s`` is None where it is not known."""

    name: str
    gpu_cores: int | None
    headline_gb_per_s: float | None


def headline(name: str, gpu_cores: int | None) -> float | None:
    """Stated bandwidth in GB/s, or None for an unknown chip or variant."""
    entry = HEADLINE.get(name)
    return entry.get(gpu_cores) if isinstance(entry, dict) else entry


@cache
def detect() -> Chip:
    """Recognise this machine; every source may be missing."""
    if sys.platform == "darwin":
        name = _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
        found = re.search(r'"gpu-core-count" = (\d+)', _output("ioreg", "-rc", "AGXAccelerator", "-d1"))
        cores = int(found[1]) if found else None
        return Chip(name, cores, headline(name, cores))
    import mlx.core as mx

    name = mx.device_info().get("device_name") or platform.processor() or platform.machine()
    return Chip(name, None, None)


def slug() -> str:
    """A file name for what is measured once per chip, kind of device and MLX version."""
    import mlx.core as mx

    device = "cpu" if mx.default_device() == mx.cpu else "gpu"
    return "".join(c if c.isalnum() else "-" for c in f"{detect().name}-{device}-{mx.__version__}")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
