"""How many replicas cost nothing on a chip: the result of a search, measured or predicted."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

TOLERANCE = 0.05  # of the time of one replica
_REPLICAS = (2, 4, 8, 16)
_GROUPS = (64, 32, 16, 8)  # inputs that share a scaling


@dataclass(frozen=True)
class ReplicaLimits:
    """``largest_replicas``: by code width the largest K that takes at most 5 % longer than one
    replica. ``smallest_group``: by width and K the smallest group within that limit, 0 where no
    group is needed, None where no tried group suffices. A width's value is None where memory reads
    do not bound the time of its layers (they have no kernel, or are too short to fill a GPU).
    ``reason`` explains such a None, or why nothing was measured, or how values were predicted."""

    reason: str | None
    largest_replicas: dict[str, int | None] | None = None
    smallest_group: dict[str, dict[str, int | None] | None] | None = None
    timings: list[dict[str, Any]] = field(default_factory=list)

    def group_for(self, bits: object, replicas: int) -> int | None:
        """The smallest group in which ``replicas``, rounded up to a number that was tried, are
        free: 0 where they need no group, None where they are not free or nothing is known."""
        known = (self.smallest_group or {}).get(str(bits)) or {}
        tried = next((count for count in _REPLICAS if count >= replicas), _REPLICAS[-1])
        return 0 if replicas == 1 and known else known.get(str(tried))

    def free(self, bits: object, replicas: int, group: int) -> bool | None:
        """Whether ``replicas`` in groups of ``group`` inputs (0: no groups) take at most 5 % longer
        than one replica; None where this is not known."""
        if (self.largest_replicas or {}).get(str(bits)) is None:
            return None
        smallest = self.group_for(bits, replicas)
        return smallest is not None and (smallest == 0 or smallest <= group)


def search(one: float, timer: Callable[[int, int], float]) -> tuple[int, dict[str, int | None]]:
    """(largest K, smallest G by K) whose time ``timer(K, G)`` is at most ``TOLERANCE`` above
    ``one``, the time of one replica. More replicas and smaller groups never cost less, so each
    search ends at the first that are not free."""
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
