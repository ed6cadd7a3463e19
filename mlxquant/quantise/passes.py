"""Quantise all blocks: by weights alone, or on inputs behind float or behind quantised blocks."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from mlxquant.layers.blocks import Block
from mlxquant.quantise.aims import BlockCall
from mlxquant.quantise.block_tuning import BlockTuner
from mlxquant.quantise.blocks import quantise_block, rebuild
from mlxquant.quantise.calibration import Calibration
from mlxquant.quantise.observe import Observation, Watch
from mlxquant.quantise.plans import BlockPlan
from mlxquant.quantise.profile import step
from mlxquant.quantise.results import BlockResult
from mlxquant.quantise.settings import Settings
from mlxquant.quantise.shelf import Shelf
from mlxquant.quantise.walk import dense_block, float_walk, visits


@dataclass
class Passes:
    """The blocks of a network, with a plan and a result file for each. ``turn`` (n, n) rotates the
    residual stream, ``tuner`` trains blocks, ``shelf`` holds hidden states. With ``floats``, blocks
    are calibrated on their inputs in the float model."""

    network: nn.Module
    blocks: list[Block]
    plans: list[BlockPlan]
    files: list[Path]
    turn: mx.array | None
    settings: Settings
    tuner: BlockTuner | None = None
    floats: bool = False
    shelf: Shelf = field(default_factory=Shelf)

    def rounded(self) -> Iterator[tuple[int, BlockResult]]:
        """The result of every block, by its weights alone: the network does not run."""
        for index, block in enumerate(self.blocks):
            yield index, self._result(index, Watch(dense_block(block, self.turn)).seen)

    def on_float(self, folder: Path, tokens: Calibration) -> Iterator[tuple[int, BlockResult]]:
        """The result of every block, each calibrated on what the float model gives it."""
        walk = float_walk(self.network, self.blocks, folder, tokens, self.shelf, self.turn,
                          done=lambda index: self.files[index].exists())
        for index, seen in walk:
            yield index, self._result(index, seen)

    def on_quantised(self, folder: Path, tokens: Calibration) -> Iterator[tuple[int, BlockResult]]:
        """The result of every block, calibrated on its inputs behind quantised blocks, or behind
        float ones with ``floats``; with a correction, on both."""
        corrected, seen = bool(self.settings.correction), dict[int, Observation]()
        for visit in visits(self.network, self.blocks, folder, tokens, self.shelf, quantised=True,
                            floats=corrected or self.tuner is not None, turn=self.turn):
            index, block = visit.index, self.blocks[visit.index]
            first, idle = index not in seen, self.files[index].exists()
            watch = Watch(dense_block(block, self.turn) if first else block.module)
            calls = list[BlockCall]()
            for task, beside in zip_longest(visit.quantised, visit.floats):
                target = None
                if beside is not None:
                    with step("float pass"):
                        output, target = watch.run(beside.stand.run)
                        calls += [BlockCall(task.stand, output)] if self.tuner and first else []
                        beside.go_on(output)
                if first and not idle:
                    with step("observing"):
                        inputs = target if self.floats else watch.run(task.stand.run)[1]
                        watch.take(inputs or {}, target if corrected else None)
            if first:
                seen[index] = watch.seen
            if not visit.left:  # a block that is called again stays as it was until its last call
                result = self._result(index, seen[index], calls)
                calls.clear()
                rebuild(block.module, result)
            with step("quantised pass"):
                for task in visit.quantised:
                    task.go_on(task.stand.run())
            if not visit.left:
                yield index, result
        for index, block in enumerate(self.blocks):
            if index not in seen:  # no text reaches it
                yield index, self._result(index, Watch(dense_block(block, self.turn)).seen)

    def _result(self, index: int, seen: Observation | None,
                calls: list[BlockCall] | None = None) -> BlockResult:
        """A block's result: read from its file or, where there is none, computed and written."""
        block, file = self.blocks[index], self.files[index]
        if file.exists() or seen is None:
            return BlockResult.read(file, block)
        result = quantise_block(block, self.plans[index], seen, self.settings)
        if self.tuner is not None and calls is not None:
            with step("tuning"):
                self.tuner.tune(block, self.plans[index], result, calls)
        with step("writing"):
            result.write(file, block)
        return result
