"""The widths of a code: how many values it takes, which levels they stand for, and its bits."""

from collections.abc import Iterable
from enum import Enum

from mlxquant.base.errors import BadValue


class Width(Enum):
    """The width of a code. ``value`` is what JSON files and the command line call it: its bits,
    or ``"ternary"`` for the levels −1, 0, 1.

    Replicated layers multiply with symmetric levels: code c stands for
    ``lowest + distance · c``. They lie 1 apart; at one bit they are ±1, like a sign.
    """

    ONE = 1
    TERNARY = "ternary"
    TWO = 2
    THREE = 3
    FOUR = 4
    FIVE = 5
    SIX = 6
    EIGHT = 8

    @classmethod
    def of(cls, value: object, allowed: Iterable["Width"] | None = None) -> "Width":
        """The width that ``value`` is or names, a number also as text; raises ``BadValue`` for
        one that is not ``allowed`` (by default: any width)."""
        widths = list(cls if allowed is None else allowed)
        for width in widths:
            if value is width or (type(value) in (int, str) and str(value) == str(width)):
                return width
        shown = value.value if isinstance(value, Width) else value
        raise BadValue(f"bits is {shown!r}, allowed are {', '.join(map(str, widths))}")

    def __str__(self) -> str:
        return str(self.value)

    @property
    def levels(self) -> int:
        """Number of values a code can take."""
        return 3 if self is Width.TERNARY else 1 << self.code_bits

    @property
    def code_bits(self) -> int:
        """Bits that one code takes in memory; a file packs ternary codes closer."""
        return 2 if self is Width.TERNARY else int(self.value)

    @property
    def distance(self) -> float:
        """Distance between neighbouring levels."""
        return 2.0 if self is Width.ONE else 1.0

    @property
    def lowest(self) -> float:
        """The level of code 0."""
        return -self.distance * (self.levels - 1) / 2
