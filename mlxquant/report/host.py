"""The machine that a model is planned for: this one, a chip of the table, or a Mac of some size."""

from dataclasses import dataclass

from mlxquant.base.errors import BadValue
from mlxquant.machine import chips, system
from mlxquant.machine.chips import Chip
from mlxquant.machine.memory import memory_limit, parse_size
from mlxquant.machine.replica_limits import ReplicaLimits
from mlxquant.report import lanes
from mlxquant.report.predict import working_set
from mlxquant.runtime import probe

_SOLD = (8, 16, 18, 24, 32, 36, 48, 64, 96, 128, 192, 256, 512)


@dataclass(frozen=True)
class Host:
    """``memory`` is what a model may take, in bytes. ``chip`` is None where nothing predicts its
    speed; then ``ceiling`` (GB/s) bounds it, if it is known. ``dense`` says that weights are
    expanded to float32 where that fits, as a plain CPU runs them. ``limits`` are the replicas that
    were measured to be free, on other chips predicted, ``remarks`` what was assumed."""

    name: str
    memory: int
    chip: Chip | None = None
    ceiling: float | None = None
    dense: bool = False
    limits: ReplicaLimits | None = None
    remarks: tuple[str, ...] = ()


def host(chip: str | None, memory: str | None) -> Host:
    """This machine, or one of which only memory or chip are given. Raises ``BadValue``."""
    found = chips.find(chip) if chip else chips.detect()
    apple = found.name.startswith("Apple ") and found.headline_gb_per_s is not None
    here = chip is None and (apple or memory is None)
    limit, remarks = _memory(found, memory) if chip or memory else (memory_limit(), ())
    limits = probe.replica_limits() if here else None
    if apple:
        limits = limits or lanes.limits(found)
        return Host(found.label, limit, found, limits=limits, remarks=remarks)
    if chip is None and memory is not None:
        return Host("a Mac of any chip", limit, remarks=remarks)
    remarks += ("tokens/s are a ceiling, not a prediction: bandwidth over bytes",)
    ceiling = found.headline_gb_per_s if chip else probe.measured().ceiling.gb_per_s
    return Host(found.label, limit, ceiling=ceiling, dense=here and system.device() == "cpu",
                limits=limits, remarks=remarks)


def memory_for(needed: int, chip: str | None) -> int | None:
    """The smallest memory that machines are sold with, in GB, of which a model may take ``needed``
    bytes; None where there is none."""
    found = chips.find(chip) if chip else chips.detect()
    return next((size for size in _SOLD if _memory(found, f"{size}GB")[0] >= needed), None)


def _memory(chip: Chip, memory: str | None) -> tuple[int, tuple[str, ...]]:
    """Bytes that a model may take of a machine's memory, which is sold in units of 2^30 bytes."""
    size = parse_size(memory) / 1e9 if memory else chip.max_memory_gb
    if size is None:
        raise BadValue(f"the largest memory of {chip.label} is not known; "
                       "allowed is --memory, e.g. 64GB")
    if chip.name.startswith("NVIDIA"):
        return int(size * 1e9), ()
    limit = working_set(size * 2**30)
    return int(limit), (f"of {size:g} GB a model is taken to have {limit / 1e9:.1f} GB, macOS's "
                        "usual share; a Mac tells its own, and sysctl iogpu.wired_limit_mb "
                        "changes it",)
