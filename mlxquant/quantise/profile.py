"""Where the time and the memory of a job go: seconds by step, and the most memory that each took.

MLX computes lazily: a step counts what is evaluated inside it, so steps are placed around code that
evaluates.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxquant.base.storage import write_json
from mlxquant.machine.identity import machine
from mlxquant.machine.memory import peak_resident
from mlxquant.sources.checkpoint import read_object

WEIGHING = "weighing"  # the pass of a budget: its steps are counted apart


@dataclass
class Profile:
    """Seconds, and peaks of MLX's memory in bytes, by step; steps inside a step are not counted
    into it, and ``open`` are under way. ``runs`` are more than one where a job was killed and went
    on."""

    seconds: dict[str, float] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    host_peak: int = 0
    runs: int = 1
    open: list[str] = field(default_factory=list)
    _since: float = field(default_factory=lambda: time.perf_counter())

    def count(self) -> None:
        """Count what happened since the last time for the innermost step that is open."""
        now, peak = time.perf_counter(), mx.get_peak_memory()
        name = self.open[-1] if self.open else "other"
        if WEIGHING in self.open[:-1]:
            name = f"{WEIGHING}: {name}"
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._since
        self.peaks[name] = max(self.peaks.get(name, 0), peak)
        self.host_peak, self._since = max(self.host_peak, peak_resident()), now
        mx.reset_peak_memory()

    @property
    def peak_memory(self) -> int:
        """The most of all steps, in bytes."""
        return max(self.peaks.values(), default=0)

    def as_dict(self) -> dict[str, Any]:
        """For a folder's record, the steps by their seconds."""
        order = sorted(self.seconds, key=lambda name: -self.seconds[name])
        return {"seconds": {"total": round(sum(self.seconds.values()), 3),
                            **{name: round(self.seconds[name], 3) for name in order}},
                "peak_memory_gb": {"total": round(self.peak_memory / 1e9, 4),
                                   **{name: round(self.peaks[name] / 1e9, 4) for name in order}},
                "host_peak_gb": round(self.host_peak / 1e9, 4), "runs": self.runs,
                "machine": machine()}

    def write(self, file: Path) -> None:
        """Write ``as_dict`` to ``file``, up to now."""
        self.count()
        write_json(file, self.as_dict())

    def go_on_from(self, file: Path) -> None:
        """Take in what an earlier run of the same job wrote to ``file``, if there was one."""
        if not file.exists():
            return
        record = read_object(file)
        for name, seconds in record["seconds"].items():
            if name != "total":
                peak = round(1e9 * record["peak_memory_gb"][name])
                self.seconds[name] = self.seconds.get(name, 0.0) + seconds
                self.peaks[name] = max(self.peaks.get(name, 0), peak)
        self.host_peak = max(self.host_peak, round(1e9 * record["host_peak_gb"]))
        self.runs += record["runs"]


class Pace:
    """How long the rest of a stage takes, from the blocks done so far. Those that an earlier run
    made go by in a moment and do not count."""

    def __init__(self) -> None:
        self._took: list[float] = []

    def left(self, done: int, total: int, seconds: float) -> float:
        """Seconds to come, ``seconds`` after the stage began, with ``done`` of ``total`` blocks."""
        self._took.append(seconds - sum(self._took))
        made = [took for took in self._took if took >= max(self._took) / 10]
        return (total - done) * sum(made) / len(made)


# A context variable, because steps are deep inside the methods, which would all have to pass a
# profile on. Threads and greenlets start without one: their work counts for the waiting step.
_current: ContextVar[Profile | None] = ContextVar("profile", default=None)


def current() -> Profile:
    """The profile of the job under way; there must be one."""
    if (profile := _current.get()) is None:
        raise RuntimeError("no job is under way")
    return profile


@contextmanager
def recording() -> Iterator[Profile]:
    """The profile of the job under way; a new one begins where there is none."""
    if (found := _current.get()) is not None:
        yield found
        return
    mx.reset_peak_memory()
    before = _current.set(profile := Profile())
    try:
        yield profile
    finally:
        _current.reset(before)


@contextmanager
def step(name: str) -> Iterator[None]:
    """What happens inside counts for the step ``name`` of the job under way. Also decorates."""
    if (profile := _current.get()) is None:
        yield
        return
    profile.count()
    profile.open.append(name)
    try:
        yield
    finally:
        profile.count()
        profile.open.pop()
