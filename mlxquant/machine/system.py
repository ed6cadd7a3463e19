"""What the operating system tells of the machine; any of its sources may be missing."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx


def output_of(*command: str) -> str:
    """What a command prints, or nothing where it is missing or fails."""
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
        return result.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def device() -> str:
    """``"gpu"`` or ``"cpu"``: where MLX runs by default."""
    return "cpu" if mx.default_device() == mx.cpu else "gpu"


def power_state() -> dict[str, Any]:
    """Conditions that change the machine's speed: power source, low-power mode, speed and power
    limits, and the load of the last minute; each None where the system does not report it."""
    load = {"load_average": round(os.getloadavg()[0], 2)}
    if sys.platform == "darwin":
        return _mac_power(output_of("pmset", "-g", "batt"), output_of("pmset", "-g"),
                          output_of("pmset", "-g", "therm")) | load
    supplies = Path("/sys/class/power_supply").glob("*/online")
    mains = [file.read_text().strip() == "1" for file in supplies]
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    limit = re.match(r"\d+(\.\d+)?$", output_of(
        "nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits"), re.MULTILINE)
    return {"source": ("mains" if any(mains) else "battery") if mains else None,
            "low_power_mode": governor.read_text().strip() == "powersave"
            if governor.exists() else None,
            "cpu_speed_limit_percent": None,
            "gpu_power_limit_w": float(limit[0]) if limit else None} | load


def _mac_power(battery: str, settings: str, thermal: str) -> dict[str, Any]:
    source = re.search(r"drawing from '(AC|Battery) Power'", battery)
    low = re.search(r"lowpowermode\s+(\d)", settings)
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", thermal)
    return {"source": {"AC": "mains", "Battery": "battery"}[source[1]] if source else None,
            "low_power_mode": low[1] == "1" if low else None,
            "cpu_speed_limit_percent": int(limit[1]) if limit else None,
            "gpu_power_limit_w": None}
