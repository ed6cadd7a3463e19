"""How much memory a model may take, and sizes as people write them."""

import os
import resource
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

import mlx.core as mx

from mlxquant.base.errors import BadValue, TooLarge

T = TypeVar("T")
DENSE_SHARE = 0.7  # of the memory, so that activations and the KV cache have room
_UNITS = {"": 1, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def parse_size(size: str | float) -> int:
    """Bytes from a number or from text such as "16GB", "500 MB"; raises ``BadValue``, also where
    the unit is missing: bytes are at least a million."""
    text = str(size).strip().upper().removesuffix("B").rstrip()
    number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS and text else (text, "")
    try:
        value = float(number) * _UNITS[unit]
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf") or (not unit and value < 1e6):
        raise BadValue(f"{size!r} is no size; write for example 16GB")
    return int(value)


def peak_resident() -> int:
    """The most bytes that this process has held in memory so far."""
    try:  # on Linux ru_maxrss begins with the parent's peak, VmHWM does not
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(x for x in lines if x.startswith("VmHWM")).split()[1]) * 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def told(needed: float, limit: float, fitting: Iterable[str]) -> str:
    """What is needed and may be used, in GB, and which options would fit."""
    return (f"{needed / 1e9:.2f} GB of memory, {limit / 1e9:.2f} GB may be used; "
            f"{' or '.join(fitting) or 'no option'} would fit")


def require_memory(what: str, asked: T, need: Callable[[T], float], limit: float,
                   smaller: Iterable[Iterable[tuple[str, T]]]) -> None:
    """Raise ``TooLarge`` where the request ``asked`` needs more than ``limit`` bytes. The message
    calls it ``what``; from each list of (option, request) in ``smaller`` it names the first option
    that fits."""
    if (needed := need(asked)) > limit:
        fitting = [next((name for name, other in others if need(other) <= limit), None)
                   for others in smaller]
        raise TooLarge(f"{what} needs {told(needed, limit, filter(None, fitting))}")


def memory_limit() -> int:
    """Bytes a model may take: on Metal the GPU's recommended working set, on CUDA the GPU memory
    that no other process holds, without a GPU the available main memory."""
    info = mx.device_info()
    if recommended := info.get("max_recommended_working_set_size"):
        return int(recommended)
    if free := info.get("free_memory"):
        return int(free) + mx.get_active_memory() + mx.get_cache_memory()
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return int(next(x for x in lines if x.startswith("MemAvailable")).split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
