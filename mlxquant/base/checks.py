"""Arguments checked for type and range, in one line that says what is allowed."""

import os
import reprlib
from collections.abc import Collection

from mlxquant.base.errors import BadValue


def integer(name: str, value: object, low: int, high: int | None = None) -> None:
    """Raise ``BadValue`` unless ``value`` is a whole number from ``low`` to ``high``."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadValue(f"{name} is {reprlib.repr(value)}, a whole number is needed")
    if value < low or (high is not None and value > high):
        raise BadValue(f"{name} is {_shown(value)}, " + (
            f"at least {low} is needed" if high is None else f"allowed are {low} to {high}"))


def number(name: str, value: object, low: float, high: float) -> None:
    """Raise ``BadValue`` unless ``value`` is a number from ``low`` to ``high``."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise BadValue(f"{name} is {reprlib.repr(value)}, a number is needed")
    if not low <= value <= high:  # NaN is in no range
        raise BadValue(f"{name} is {_shown(value)}, allowed are {low} to {high}")


def choice(name: str, value: object, allowed: Collection[object]) -> None:
    """Raise ``BadValue`` unless ``value`` is one of ``allowed``, among which 1 is not 1.0 or True.
    """
    if type(value) is bool or type(value) is float or value not in allowed:
        raise BadValue(f"{name} is {value!r}, allowed are {', '.join(map(str, allowed))}")


def kind(name: str, value: object, wanted: type) -> None:
    """Raise ``BadValue`` unless ``value`` is of the class ``wanted``."""
    if not isinstance(value, wanted):
        raise BadValue(f"{name} is {reprlib.repr(value)}, a {wanted.__name__} is needed")


def several(name: str, value: object) -> None:
    """Raise ``BadValue`` unless ``value`` is a list or tuple: text would be taken by letters."""
    if not isinstance(value, (list, tuple)):
        raise BadValue(f"{name} is {reprlib.repr(value)}, a list is needed")


def path(name: str, value: str | os.PathLike[str]) -> str:
    """``value``, a name or path, as text; raises ``BadValue`` for anything else."""
    if not isinstance(value, (str, os.PathLike)):
        raise BadValue(f"{name} is {reprlib.repr(value)}, text or a path is needed")
    return os.fspath(value)


def _shown(value: float) -> str:
    """The number as text, or "too large": Python prints no integer of more than 4,300 digits."""
    return str(value) if abs(value) < 1e300 or isinstance(value, float) else "too large"
