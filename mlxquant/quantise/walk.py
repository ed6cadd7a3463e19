"""Go through a network block by block, with every block called as the network itself calls it.

Each batch of tokens runs through the network as a task of its own (a greenlet), which halts
wherever a block is called. Once all tasks have reached the same block, the caller can run the block
on the arguments that the network made, change it and run it again. The outputs that the caller
chooses go back into the tasks, which run on to their next block. Nothing is assumed about a block
except that it is called: not its arguments, its outputs, or the operations between two blocks.

A walk on the float model depends on nothing but the model and the text, so its statistics are
kept in the cache for the next method, width or budget.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from greenlet import getcurrent, greenlet
from mlx.utils import tree_map, tree_unflatten

from mlxquant.base.errors import Unsupported
from mlxquant.base.storage import cache_dir, if_writable, save_arrays
from mlxquant.base.trees import arrays, is_float
from mlxquant.codes.statistics import Statistics
from mlxquant.layers.blocks import Block, arrays_outside
from mlxquant.layers.dense import to_dense
from mlxquant.layers.hooks import call_order, intercepted
from mlxquant.model.original import open_original
from mlxquant.quantise import rotation
from mlxquant.quantise.calibration import Calibration
from mlxquant.quantise.observe import Observation, Routed, Watch
from mlxquant.quantise.profile import step
from mlxquant.quantise.shelf import Shelf
from mlxquant.sources import checkpoint

# Statistics of one model and text are cached between these sizes: less is quickly computed again,
# more (H alone is 4·n² bytes an input) fills disks.
_KEPT_BYTES = (1e7, 2e9)
_KEPT_SECONDS = 7 * 24 * 3600


def identity(folder: Path, *rest: Any) -> str:
    """A digest of the model (``checkpoint.fingerprint``), MLX's version and ``rest``."""
    return hashlib.sha256(repr((checkpoint.fingerprint(folder), mx.__version__, *rest))
                          .encode()).hexdigest()


@dataclass
class Halt:
    """A block's call with the network's arguments, not yet made; ``shelf`` has hidden states."""

    module: nn.Module
    own: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    shelf: Shelf = field(default_factory=Shelf)

    def given(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call's arguments in float32."""
        return tree_map(lambda leaf: leaf.astype(mx.float32) if is_float(leaf) else leaf,
                        self.shelf.read((self.args, self.kwargs)))

    def run(self) -> Any:
        """What the block returns, as it is now."""
        args, kwargs = self.given()
        return self.own(*args, **kwargs)


class Task:
    """One batch's pass through the network, halted at the block call ``halt``, None at the end. Its
    hidden states are on ``shelf``; ``turn`` (n, n) rotates the first of them."""

    def __init__(self, network: nn.Module, tokens: mx.array, shelf: Shelf,
                 turn: mx.array | None = None):
        self._task, self._shelf, self._batch = greenlet(network), shelf, tokens.shape
        self.halt: Halt | None = None
        self._run_on(tokens, turn)

    @property
    def stand(self) -> Halt:
        """Where the task stands, as it must before a block."""
        if self.halt is None:
            raise Unsupported("the network ended before all of its blocks were called")
        return self.halt

    def go_on(self, output: Any) -> None:
        """Let the block at which the task stands return ``output``."""
        mx.eval(arrays(output))
        self._shelf.give_back((self.stand.args, self.stand.kwargs))  # the network may use them on
        self._run_on(output)
        if self.halt is None:  # else it is the next block's argument, or the network's to use
            self._shelf.put(output, self._batch)

    def _run_on(self, value: Any, turn: mx.array | None = None) -> None:
        found = self._task.switch(value)
        self.halt = found if isinstance(found, Halt) else None
        if self.halt is None:
            return
        if turn is not None:
            hidden, *rest = self.halt.args
            self.halt.args = (hidden.astype(mx.float32) @ turn.T, *rest)
        given = self.halt.args, self.halt.kwargs
        # Once the arguments are computed, the arrays they were computed from are freed.
        mx.eval(arrays(given))
        self.halt.shelf = self._shelf
        self._shelf.put(given, self._batch)


def _stand(module: nn.Module, own: Callable[..., Any], args: tuple[Any, ...],
           kwargs: dict[str, Any]) -> Any:
    """In a task: halt at the block. Elsewhere the block runs."""
    above = getcurrent().parent
    return own(*args, **kwargs) if above is None else above.switch(Halt(module, own, args, kwargs))


@dataclass
class Visit:
    """All tasks halted at one call of block ``index``, which will be called ``left`` more times.

    ``quantised`` are tasks that passed quantised blocks, ``floats`` the same batches that passed
    float ones, both in the order of the batches; either may be empty.
    """

    index: int
    left: int
    quantised: list[Task]
    floats: list[Task]

    def go_on(self) -> None:
        """Let every task return what the block, as it is now, gives it."""
        for task in (*self.quantised, *self.floats):
            task.go_on(task.stand.run())


def visits(network: nn.Module, blocks: list[Block], folder: Path, tokens: Calibration,
           shelf: Shelf, *, quantised: bool, floats: bool, turn: mx.array | None = None,
           ) -> Iterator[Visit]:
    """Every call of every block, in the order in which the network of ``folder`` makes them.

    The caller must let the tasks of each visit go on; their hidden states are on ``shelf``.
    ``turn`` (n, n) rotates the hidden state that enters the first block. Raises ``Unsupported``
    where batches come to different blocks.
    """
    places = {id(block.module): index for index, block in enumerate(blocks)}
    order = call_order(network, blocks)
    batches = [mx.array(rows) for rows in tokens.rows(batch_size())]
    with intercepted((block.module for block in blocks), _stand):
        behind, before = ([Task(network, b, shelf, turn) for b in batches] if wanted else []
                          for wanted in (quantised, floats))
        _read_anew(network, blocks, folder)
        for call, index in enumerate(order):
            if any(places[id(task.stand.module)] != index for task in (*behind, *before)):
                raise Unsupported(f"{blocks[index].path} is not called for every text alike; "
                                  "calibration needs a network that calls its blocks in one order")
            yield Visit(index, order[call + 1:].count(index), behind, before)


def _read_anew(network: nn.Module, blocks: list[Block], folder: Path) -> None:
    """Free the arrays outside the blocks that have been read, such as the embedding: those that the
    network uses again are read again."""
    fresh, _ = open_original(folder)
    network.update(tree_unflatten(list(arrays_outside(fresh, blocks).items())))


def batch_size() -> int:
    """How many sequences run through a block at once."""
    return 8 if mx.default_device() == mx.gpu else 2


@step("loading")
def dense_block(block: Block, turn: mx.array | None = None) -> nn.Module:
    """The block's module, dense in float32, in place."""
    return to_dense(block.module) if turn is None else rotation.rotate_block(block.module, turn)


def float_walk(network: nn.Module, blocks: list[Block], folder: Path, tokens: Calibration,
               shelf: Shelf, turn: mx.array | None = None,
               done: Callable[[int], bool] = lambda index: False,
               ) -> Iterator[tuple[int, Observation | None]]:
    """Each block's index, with the block dense in float32, and its observation on the float model;
    None for a block that is ``done``."""
    turned = None if turn is None else hashlib.sha256(np.array(turn).tobytes()).hexdigest()
    kept = cache_dir("statistics", identity(folder, tokens.digest, turned)[:16])
    files = [kept / f"block-{index:04d}.safetensors" for index in range(len(blocks))]
    if all(file.exists() for file in files):
        for index, block in enumerate(blocks):
            dense_block(block, turn)
            yield index, None if done(index) else _read(files[index])
        return
    _drop_old(kept.parent)
    seen: dict[int, Observation | None] = {}
    left = set(range(len(blocks)))
    for visit in visits(network, blocks, folder, tokens, shelf, quantised=False, floats=True,
                        turn=turn):
        index = visit.index
        if index in seen:  # a block that is called again: its first call has been watched
            visit.go_on()
        else:
            idle = done(index) and files[index].exists()
            seen[index] = _observe(blocks[index], visit, idle, turn)
            _keep(files[index], seen[index], len(blocks))
        if not visit.left:
            left.remove(index)
            yield index, seen.pop(index)
    for index in sorted(left):  # no text reaches them
        yield index, Watch(dense_block(blocks[index], turn)).seen


@step("observing")
def _observe(block: Block, visit: Visit, idle: bool, turn: mx.array | None) -> Observation | None:
    """Let the tasks on the float model go on; the block's observation unless it is ``idle``."""
    watch = Watch(dense_block(block, turn))
    for task in visit.floats:
        output, inputs = watch.run(task.stand.run)
        if not idle:
            watch.take(inputs)
        task.go_on(output)
    return None if idle else watch.seen


def _keep(file: Path, seen: Observation | None, blocks: int) -> None:
    """Put statistics into the cache where their size is worth it; experts' never is."""
    if seen is None or any(isinstance(part, Routed) for part in seen.statistics.values()):
        return
    if _KEPT_BYTES[0] < blocks * sum(a.nbytes for a in seen.arrays()) < _KEPT_BYTES[1]:
        with if_writable():
            _write(file, seen)


def _drop_old(folder: Path) -> None:
    for entry in folder.glob("*"):
        if time.time() - entry.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(entry, ignore_errors=True)


def _write(file: Path, seen: Observation) -> None:
    arrays, counts = dict[str, mx.array](), dict[str, int]()
    for first, s in seen.statistics.items():
        if isinstance(s, Statistics):
            arrays |= {f"{first}:hessian": s.hessian, f"{first}:largest": s.largest,
                       f"{first}:mean_magnitude": s.mean_magnitude}
            counts[first] = s.count
    save_arrays(file, arrays, {"groups": json.dumps(seen.groups), "counts": json.dumps(counts),
                               "unseen": json.dumps(seen.unseen)})


def _read(file: Path) -> Observation:
    arrays, metadata = mx.load(str(file), return_metadata=True)
    seen = Observation(json.loads(metadata["groups"]), unseen=json.loads(metadata["unseen"]))
    for first, count in json.loads(metadata["counts"]).items():
        seen.statistics[first] = Statistics(count, *(arrays[f"{first}:{name}"] for name in
                                                     ("hessian", "mean_magnitude", "largest")))
    return seen
