"""Distillation: train a quantised model's scales until it predicts as the original does.

The loss is KL(teacher ‖ student) at every position, as in LLM-QAT
(https://arxiv.org/abs/2305.17888), over the part of the teacher's predictions that is stored
(``predictions.py``). Codes stay fixed, as in PEQA (https://arxiv.org/abs/2305.14152), unless
``Tuning.codes`` lets them move. Held-out sequences decide which state is the result.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from mlxquant.base.errors import BadValue, MlxquantError
from mlxquant.base.storage import save_arrays
from mlxquant.layers.by_block import judged
from mlxquant.layers.head import Judge
from mlxquant.layers.trainable import Trainable
from mlxquant.quantise.training import State, Training
from mlxquant.tuning.piecewise import Pieces
from mlxquant.tuning.predictions import Predictions, Wanted, divergence
from mlxquant.tuning.settings import Schedule

Report = Callable[[int, int, float], None]
_DISK = 1e9  # bytes a second, until a first file has shown better


class Keeping:
    """Decides when to write a state of ``size`` bytes: once training since the last write has taken
    ten times as long as a write takes, so that a killed run loses little. A state that takes less
    than a second to write is always written.

    Where codes move, a state has 16 bytes a weight. Writing it at each of eight checks took two
    thirds of the time for 1.3 billion weights (``benchmarks/LOG.md``).
    """

    def __init__(self, size: int):
        self._seconds, self._last = size / _DISK, time.perf_counter()

    @property
    def due(self) -> bool:
        return self._seconds < 1 or time.perf_counter() - self._last > 10 * self._seconds

    def write(self, save: Callable[[], None]) -> None:
        """Call ``save`` and learn how long it takes."""
        start = time.perf_counter()
        save()
        self._last = time.perf_counter()
        self._seconds = self._last - start


class Distillation(Training):
    """Training of one ``Trainable`` on the ``predictions`` of its original, step by step, so that
    it can be stopped. Each step takes one batch, in order; the batches after the last step's are
    held out."""

    def __init__(self, student: Trainable, predictions: Predictions, schedule: Schedule):
        if len(predictions.batches) <= schedule.steps:
            raise BadValue(f"{schedule.steps} steps need as many batches and one to check with, "
                           f"not {len(predictions.batches)}")
        self.predictions, self.schedule = predictions, schedule
        pieces = Pieces(student.network, frozenset(student.base))
        held_out = range(schedule.steps, len(predictions.batches))

        def on_held_out(_: nn.Module) -> float:
            total, positions = 0.0, 0
            for tokens, wanted in map(predictions.__getitem__, held_out):
                total += sum(value.item() for value in
                             judged(student.network, tokens, _judge(wanted)))
                positions += tokens.size
            return total / positions

        super().__init__(
            student, lambda _, tokens, *wanted: pieces.loss(tokens, _judge(Wanted(*wanted)))
            / tokens.size, on_held_out, schedule.rate())

    def run(self, report: Report = lambda *_: None, file: Path | None = None) -> State:
        """Train to the end, from the state in ``file`` if there is one; ``report`` gets (steps
        done, steps, loss) after each step. After a check the state is written to ``file``, where
        that costs little time (``Keeping``)."""
        if file is not None and file.exists():
            self.restore(file)
        state, schedule = self.state, self.schedule
        keeping = Keeping(sum(array.nbytes for _, array in tree_flatten(self._arrays())))
        while state.step < schedule.steps:
            tokens, wanted = self.predictions[state.step]
            value = self.step(tokens, *wanted)
            report(state.step, schedule.steps, value)
            if state.step % schedule.check_every == 0 or state.step == schedule.steps:
                self.check()
                if file is not None and keeping.due:
                    keeping.write(partial(self.save, file))
        return state

    def save(self, file: Path) -> None:
        """Write everything that a later run needs to go on, in one step."""
        state = self.state
        numbers = {"step": state.step, "best_loss": state.best_loss, "first_loss": state.first_loss}
        save_arrays(file, dict(tree_flatten(self._arrays())), {"numbers": json.dumps(numbers)})

    def restore(self, file: Path) -> None:
        """Go on from what ``save`` wrote; raises ``MlxquantError`` for another version's state."""
        arrays, metadata = mx.load(str(file), return_metadata=True)
        try:
            parts = tree_map_with_path(lambda path, _: arrays[path], self._arrays())
        except KeyError as error:
            raise MlxquantError(f"{file} is a state of another version, without {error.args[0]}; "
                                "remove that file to train from the start") from error
        optimizer = self.state.optimizer
        optimizer.state = parts.pop("optimizer")
        self.resume(State(optimizer=optimizer, **parts, **json.loads(metadata["numbers"])))

    def _arrays(self) -> dict[str, Any]:
        state = self.state
        return {"moved": state.moved, "best": state.best, "optimizer": state.optimizer.state}


def _judge(wanted: Wanted) -> Judge:
    return lambda logits, place: divergence(logits, wanted.part(place))
