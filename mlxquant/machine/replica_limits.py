"""How many replicas cost nothing on a chip: the result of a search, measured or predicted."""

from collections.abc import Callable
from dataclasses import dataclass, field

TOLERANCE = 0.05  # of the time of one replica
_REPLICAS = (2, 4, 8, 16)
_GROUPS = (64, 32, 16, 8)  # inputs that share a scaling


@dataclass(frozen=True)
class ReplicaLimits:
    """``largest_replicas`` is the most that cost at most 5 % more time than one, by width.
    ``smallest_group`` is, by width and replicas, the smallest group with which they do (0: they do without
    groups), None where none does. A width is None where reading is not what takes its layers' time (no
    kernel of their own, or too short to fill a GPU); ``reason`` says so, and why where nothing was measured.
    ``timings`` are the single results."""

    reason: str | None
    largest_replicas: dict[str, int | None] | None = None
    smallest_group: dict[str, dict[str, int | None] | None] | None = None
    timings: list[dict] = field(default_factory=list)

    def group_for(self, bits: int | str, replicas: int) -> int | None:
        """The smallest free group of so many replicas, 0 where they need none; None: not free or not known."""
        known = (self.smallest_group or {}).get(str(bits)) or {}
        return 0 if replicas == 1 and known else known.get(str(replicas))

    def free(self, bits: int | str, replicas: int, group: int) -> bool | None:
        """Whether so many replicas, in groups of ``group`` or none (0), cost at most 5 %; None: not known."""
        if (self.largest_replicas or {}).get(str(bits)) is None:
            return None
        smallest = self.group_for(bits, replicas)
        return smallest is not None and (smallest == 0 or smallest <= group)


def search(one: float, timer: Callable[[int, int], float]) -> tuple[int, dict[str, int | None]]:
    """(largest K, smallest G by K), given the time of one replica and a way to time others.

    More replicas and smaller groups never cost less, so each search ends with the first that is not free.
    """
    most = one * (1 + TOLERANCE)
    largest, groups = 1, {}
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
