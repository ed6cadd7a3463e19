"""What is known of Macs' chips and of two GPUs, each figure with the mark of its source.

Bandwidths (GB/s) and core counts are the makers' own. FP32 is cores × 256
operations × clock, so its mark is the clock's.
"""

from typing import NamedTuple

MARKS = {
    "V": "read in a primary source", "D": "arithmetic on figures read in a primary source",
    "R": "recalled from a public table, not verified", "E": "an estimate", "M": "the maker's data sheet",
}


class Variant(NamedTuple):
    """``memory`` is the most that is sold with it, in GB; None where that is not known."""

    gpu_cores: int | None
    gb_per_s: float
    memory: float | None


class Model(NamedTuple):
    """Chips of one name; ``clock`` of the GPU in GHz, ``slc`` (the cache before memory) in MB,
    each with its mark. ``tflops`` stands where cores and clock do not give the FP32 rate."""

    variants: tuple[Variant, ...]
    clock: tuple[float, str] | None
    slc: tuple[float, str] | None
    tflops: tuple[float, str] | None = None
    bandwidth_mark: str = "V"
    memory_mark: str = "R"


def _apple(clock: tuple[float, str], slc: tuple[float, str] | None, *variants: tuple) -> Model:
    return Model(tuple(Variant(*v) for v in variants), clock, slc)


_M1, _M1_WIDE, _M2 = (1.278, "V"), (1.296, "V"), (1.398, "V")
_M3, _M3_MAX, _M4, _M5 = (1.38, "E"), (1.38, "V"), (1.578, "E"), (1.65, "E")

MODELS = {
    "Apple M1": _apple(_M1, (8, "V"), (7, 68.25, 16), (8, 68.25, 16)),
    "Apple M1 Pro": _apple(_M1_WIDE, (24, "V"), (14, 200, 32), (16, 200, 32)),
    "Apple M1 Max": _apple(_M1_WIDE, (48, "V"), (24, 400, 64), (32, 400, 64)),
    "Apple M1 Ultra": _apple(_M1_WIDE, (96, "V"), (48, 800, 128), (64, 800, 128)),
    "Apple M2": _apple(_M2, (8, "V"), (8, 100, 24), (10, 100, 24)),
    "Apple M2 Pro": _apple(_M2, (24, "V"), (16, 200, 32), (19, 200, 32)),
    "Apple M2 Max": _apple(_M2, (48, "V"), (30, 400, 96), (38, 400, 96)),
    "Apple M2 Ultra": _apple(_M2, (96, "V"), (60, 800, 192), (76, 800, 192)),
    "Apple M3": _apple(_M3, (8, "E"), (8, 100, 24), (10, 100, 24)),
    "Apple M3 Pro": _apple(_M3, None, (14, 150, 36), (18, 150, 36)),
    "Apple M3 Max": _apple(_M3_MAX, (48, "E"), (30, 300, 96), (40, 400, 128)),
    "Apple M3 Ultra": _apple(_M3, (96, "E"), (60, 819, 256), (80, 819, 512)),
    "Apple M4": _apple(_M4, None, (8, 120, 32), (10, 120, 32)),
    "Apple M4 Pro": _apple(_M4, None, (16, 273, 64), (20, 273, 64)),
    "Apple M4 Max": _apple(_M4, (48, "E"), (32, 410, 36), (40, 546, 128)),
    "Apple M5": _apple(_M5, None, (8, 153, 32), (10, 153, 32)),
    "Apple M5 Pro": _apple(_M5, None, (16, 307, 64), (20, 307, 64)),
    "Apple M5 Max": _apple(_M5, None, (32, 460, None), (40, 614, 128)),
    "NVIDIA H100 80GB HBM3": Model((Variant(None, 3350, 80),), None, None, (67, "M"), "M", "M"),
    "NVIDIA H200": Model((Variant(None, 4800, 141),), None, None, (67, "M"), "M", "M"),
}
