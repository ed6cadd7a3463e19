"""Through a network block by block, with the statistics of every linear layer's input.

A walk on the float model depends on nothing but the model and the text, so its
statistics are kept in the cache for the next method, width or budget.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxquant.base.storage import cache_dir, save_arrays
from mlxquant.codes.statistics import Statistics
from mlxquant.layers.dense import to_dense
from mlxquant.model.loading import open_lazily
from mlxquant.quantise import rotation
from mlxquant.quantise.calibration import Calibration
from mlxquant.quantise.capture import Observation, block_calls, observe
from mlxquant.sources import checkpoint

# Of one model and text: less is made again in a moment, more (H alone is 4·n² bytes an input) fills disks.
_KEPT_BYTES = (1e7, 2e9)
_KEPT_SECONDS = 7 * 24 * 3600


def identity(folder: Path, *rest) -> str:
    """A digest of the weight files (by name, size and time), MLX's version and ``rest``."""
    weights = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in checkpoint.weight_files(folder)]
    return hashlib.sha256(repr((weights, mx.__version__, *rest)).encode()).hexdigest()


def enter(folder: Path, tokens: Calibration, turn: mx.array | None = None,
          ) -> tuple[list[mx.array], Callable[[nn.Module, int], Callable[[mx.array], mx.array]]]:
    """Batches of hidden states that enter the first block, in float32, turned by ``turn`` (n, n) where
    given; and what runs a block, given its index, on one of them."""
    network, _ = open_lazily(folder)  # its embedding is in memory only until this returns
    batches = tokens.batches(16 if mx.default_device() == mx.gpu else 2)
    entered = [block_calls(network, batch) for batch in batches]
    calls = entered[0][1]
    hidden = [state.astype(mx.float32) for state, _ in entered]
    if turn is not None:
        hidden = [state @ turn.T for state in hidden]
    mx.eval(hidden)

    def runner(block: nn.Module, index: int) -> Callable[[mx.array], mx.array]:
        args, kwargs = calls[index]
        return lambda state: block(state, *args, **kwargs)

    return hidden, runner


def dense_block(network: nn.Module, index: int, turn: mx.array | None = None) -> nn.Module:
    block = network.layers[index]
    return to_dense(block) if turn is None else rotation.rotate_block(block, turn)


def float_walk(network: nn.Module, folder: Path, tokens: Calibration, turn: mx.array | None = None,
               done: Callable[[int], bool] = lambda index: False,
               ) -> Iterator[tuple[nn.Module, Observation | None]]:
    """Every block, dense in float32, and its observation on the float model; None for a block ``done``."""
    total = len(network.layers)
    turned = None if turn is None else hashlib.sha256(np.array(turn).tobytes()).hexdigest()
    kept = cache_dir("statistics", identity(folder, tokens.digest, turned)[:16])
    files = [kept / f"block-{index:04d}.safetensors" for index in range(total)]
    if all(file.exists() for file in files):
        for index in range(total):
            yield dense_block(network, index, turn), None if done(index) else _read(files[index])
        return
    hidden, runner = enter(folder, tokens, turn)
    _drop_old(kept.parent)
    for index in range(total):
        block = dense_block(network, index, turn)
        idle = done(index) and files[index].exists()
        seen, hidden, _ = observe(block, runner(block, index), hidden, idle=idle)
        if not idle and _KEPT_BYTES[0] < total * _bytes(seen) < _KEPT_BYTES[1]:
            _write(files[index], seen)
        yield block, None if idle else seen


def _bytes(seen: Observation) -> int:
    return sum(array.nbytes for statistics in seen.statistics.values() for array in statistics.arrays())


def _drop_old(folder: Path) -> None:
    for entry in folder.glob("*"):
        if time.time() - entry.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(entry, ignore_errors=True)


def _write(file: Path, seen: Observation) -> None:
    arrays = {}
    for first, s in seen.statistics.items():
        arrays |= {f"{first}:hessian": s.hessian, f"{first}:mean_magnitude": s.mean_magnitude,
                   f"{first}:largest": s.largest}
    counts = {first: s.count for first, s in seen.statistics.items()}
    save_arrays(file, arrays, {"groups": json.dumps(seen.groups), "counts": json.dumps(counts)})


def _read(file: Path) -> Observation:
    arrays, metadata = mx.load(str(file), return_metadata=True)
    seen = Observation(json.loads(metadata["groups"]))
    for first, count in json.loads(metadata["counts"]).items():
        seen.statistics[first] = Statistics(count, *(arrays[f"{first}:{name}"] for name in
                                                     ("hessian", "mean_magnitude", "largest")))
    return seen
