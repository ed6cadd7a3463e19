"""Hold hidden states until they are needed: in memory, or in files of a scratch folder.

A network's own variables still refer to the hidden state that it passed to a block. So an array
that is put away is emptied in place, which frees its memory wherever it is referred to, and filled
again before the network runs on.
"""

import shutil
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlxquant.base.errors import CannotWrite
from mlxquant.base.trees import arrays

_NAME = "array"


class Shelf:
    """Arrays put away in ``folder``, each in a file that goes as soon as nobody holds the array;
    without a folder they stay in memory, and every method leaves them as they are."""

    def __init__(self, folder: Path | None = None):
        self._folder, self._numbers = folder, count()
        self._files: dict[int, Path] = {}  # by the array's id; an array that ends takes its own out

    def put(self, tree: Any, batch: tuple[int, ...]) -> None:
        """Put away the hidden states of a tree: computed arrays with the ``batch`` (sequences,
        tokens) among their axes. Masks and the like may be the network's own, and stay."""
        if self._folder is None:
            return
        for array in arrays(tree):
            places = range(array.ndim - 1)
            if id(array) in self._files or not any(array.shape[i:i + 2] == batch for i in places):
                continue
            file = self._folder / f"{next(self._numbers)}.safetensors"
            try:
                mx.save_safetensors(str(file), {_NAME: array})
            except RuntimeError as error:
                raise CannotWrite(f"cannot write {file}: {error}") from error
            array[...] = mx.zeros((), array.dtype)
            self._files[id(array)] = file
            weakref.finalize(array, self._drop, id(array)).atexit = False

    def read(self, tree: Any) -> Any:
        """The tree with the arrays that were put away, which MLX reads from disk when needed."""
        return tree_map(self._read, tree)

    def give_back(self, tree: Any) -> None:
        """Fill the arrays of a tree again, in place."""
        for array in arrays(tree):
            if id(array) in self._files:
                array[...] = self._read(array)
                self._drop(id(array))

    def _read(self, leaf: Any) -> Any:
        file = self._files.get(id(leaf))
        return leaf if file is None else mx.load(str(file))[_NAME]

    def _drop(self, key: int) -> None:
        if (file := self._files.pop(key, None)) is not None:
            file.unlink(missing_ok=True)


@contextmanager
def shelf(folder: Path, spills: bool) -> Iterator[Shelf]:
    """A shelf that ``spills`` into ``folder`` or keeps all in memory. The folder goes in the end,
    and what a killed run left there at the start."""
    shutil.rmtree(folder, ignore_errors=True)
    if spills:
        folder.mkdir()
    try:
        yield Shelf(folder if spills else None)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
