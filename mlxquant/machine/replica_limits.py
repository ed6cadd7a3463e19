"""How many replicas cost nothing on a chip: the result of a search, measured or predicted."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

TOLERANCE = 0.05  # of the time of one replica
_REPLICAS = (2, 4, 8, 16)
_GROUPS = (64, 32, 16, 8)  # inputs that share a scaling


@dataclass(frozen=True)
class ReplicaLimits:
    """By width the largest K that takes at most 5 % longer than one replica, and by width and K the
    smallest group within that limit: 0 where none is needed, None where none tried suffices. A
    width is None where memory reads do not bound its layers' time (no kernel of their own, or too
    short to fill a GPU). ``reason`` says so, or why nothing was measured."""

    reason: str | None
    largest_replicas: dict[str, int | None] | None = None
    smallest_group: dict[str, dict[str, int | None] | None] | None = None
    timings: list[dict[str, Any]] = field(default_factory=list)

    def group_for(self, bits: object, replicas: int) -> int | None:
        """The smallest group in which so many replicas, or the next more that were tried, are
        free, 0 where they need none; None where they are not free, or it is not known."""
        known = (self.smallest_group or {}).get(str(bits)) or {}
        tried = next((count for count in _REPLICAS if count >= replicas), _REPLICAS[-1])
        return 0 if replicas == 1 and known else known.get(str(tried))

    def free(self, bits: object, replicas: int, group: int) -> bool | None:
        """Whether so many replicas, in groups of ``group`` or none (0), take at most 5 % longer
        than one; None where it is not known."""
        if (self.largest_replicas or {}).get(str(bits)) is None:
            return None
        smallest = self.group_for(bits, replicas)
        return smallest is not None and (smallest == 0 or smallest <= group)


def search(one: float, timer: Callable[[int, int], float]) -> tuple[int, dict[str, int | None]]:
    """(largest K, smallest G by K), given the time of one replica and a way to time others. More
    replicas and smaller groups never cost less: a search ends with the first that are not free."""
    most = one * (1 + TOLERANCE)
    largest = 1
    groups: dict[str, int | None] = {}
    for replicas in _REPLICAS:
        if replicas // 2 == largest and timer(replicas, 0) <= most:
            largest, groups[str(replicas)] = replicas, 0
            continue
        groups[str(replicas)] = None
        for group in _GROUPS:
            if timer(replicas, group) > most:
                break
            groups[str(replicas)] = group
    return largest, groups
