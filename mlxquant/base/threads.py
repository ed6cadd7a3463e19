"""Threads other than the main one: MLX aborts the process at exit where one of them has ended and
left the streams open that MLX made for it."""

import threading
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")
_own = threading.local()


class _End:
    """Closes the streams of the thread that lets go of it."""

    def __init__(self) -> None:
        import mlx.core as mx  # not before the BLAS is loaded

        self._close = mx.clear_streams

    def __del__(self) -> None:
        self._close()


def close_streams_at_end() -> None:
    """Have MLX's streams of this thread closed when it ends."""
    if threading.current_thread() is not threading.main_thread() and not hasattr(_own, "end"):
        _own.end = _End()


def for_any(work: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """``work``, such that any thread may call it."""
    @wraps(work)
    def called(*args: _Given.args, **options: _Given.kwargs) -> _Result:
        close_streams_at_end()
        return work(*args, **options)

    return called
