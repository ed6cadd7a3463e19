"""Figures for reports, as PNG or SVG files by their names."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlxquant.base.errors import BadValue, MlxquantError

_ENDINGS = (".png", ".svg")


def check_plot(path: Path | None) -> None:
    """Refuse a name that ``figure`` could not write to, before anything is measured."""
    if path is None:
        return
    if path.suffix.lower() not in _ENDINGS:
        raise BadValue(f"the plot's file is {path}, its name must end in {' or '.join(_ENDINGS)}")
    if not path.parent.is_dir():
        raise MlxquantError(f"no such folder: {path.parent}")


@contextmanager
def figure(path: Path, size: tuple[float, float], rows: int = 1) -> Iterator[list[Any]]:
    """Matplotlib's axes, one below the other, for what is to be drawn into ``path``; ``size`` is
    in inches."""
    check_plot(path)
    from matplotlib.figure import Figure  # slow to import; and without pyplot, no window

    made = Figure(figsize=size, layout="constrained")
    axes = list(made.subplots(rows, 1, sharex=True, squeeze=False)[:, 0])
    yield axes
    for each in axes:
        each.grid(True, which="both", alpha=0.3)
        each.legend(fontsize=8)
    try:
        made.savefig(path, dpi=150)
    except OSError as error:
        raise MlxquantError(f"cannot write {path}: {error}") from error
