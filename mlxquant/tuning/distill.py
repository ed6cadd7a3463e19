"""Distillation: train a quantised model's scales until it predicts as the original does.

The loss is KL(teacher ‖ student) over the whole vocabulary at every position, as in LLM-QAT
(https://arxiv.org/abs/2305.17888). Codes stay, as in PEQA (https://arxiv.org/abs/2305.14152),
unless they may move. Some sequences are held out, to choose the result by.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxquant.base.errors import BadValue
from mlxquant.base.storage import save_arrays
from mlxquant.layers.trainable import Trainable
from mlxquant.quantise.training import State, Training
from mlxquant.tuning.settings import Schedule

Report = Callable[[int, int, float], None]


def divergence_loss(student: nn.Module, teacher: nn.Module, tokens: mx.array) -> mx.array:
    """Mean KL(teacher ‖ student) in nats over the positions of ``tokens`` (batch, length)."""
    wanted = nn.log_softmax(mx.stop_gradient(teacher(tokens)).astype(mx.float32), axis=-1)
    given = nn.log_softmax(student(tokens).astype(mx.float32), axis=-1)
    return (mx.exp(wanted) * (wanted - given)).sum(-1).mean()


class Distillation(Training):
    """Training of one ``Trainable`` on one ``teacher``, step by step, so that it can be stopped.

    ``tokens`` (steps · batch_size, length) are used once each, in order; ``held_out``
    (some, length) never.
    """

    def __init__(self, student: Trainable, teacher: nn.Module, tokens: np.ndarray,
                 held_out: np.ndarray, schedule: Schedule):
        if len(tokens) < schedule.steps * schedule.batch_size:
            raise BadValue(f"{schedule.steps} steps of {schedule.batch_size} need as many "
                           f"sequences, not {len(tokens)}")
        self.tokens, self.schedule, size = tokens, schedule, schedule.batch_size
        batches = [mx.array(held_out[start:start + size])
                   for start in range(0, len(held_out), size)]

        def on_held_out(network: nn.Module) -> float:
            losses = [divergence_loss(network, teacher, batch).item() for batch in batches]
            return np.average(losses, weights=[len(batch) for batch in batches]).item()

        super().__init__(student, lambda network, batch: divergence_loss(network, teacher, batch),
                         on_held_out, schedule.rate())

    def run(self, report: Report = lambda *_: None, file: Path | None = None) -> State:
        """Train to the end; ``report`` gets (steps done, steps, loss) after each step. The state
        is kept in ``file`` after each check, and taken up from there."""
        if file is not None and file.exists():
            self.restore(file)
        state, schedule = self.state, self.schedule
        while state.step < schedule.steps:
            start = state.step * schedule.batch_size
            value = self.step(mx.array(self.tokens[start:start + schedule.batch_size]))
            report(state.step, schedule.steps, value)
            if state.step % schedule.check_every == 0 or state.step == schedule.steps:
                self.check()
                if file is not None:
                    self.save(file)
        return state

    def save(self, file: Path) -> None:
        """Write everything that a later run needs to go on, in one step."""
        state, arrays = self.state, dict[str, mx.array]()
        for part, entries in (("moved", state.moved), ("best", state.best),
                              ("optimizer", state.optimizer.state)):
            for path, entry in entries.items():  # Adam's is an array, or moments by name
                named = entry if isinstance(entry, dict) else {None: entry}
                arrays |= {f"{part}|{path}" + (f"|{name}" if name else ""): array
                           for name, array in named.items()}
        numbers = {"step": state.step, "best_loss": state.best_loss, "first_loss": state.first_loss}
        save_arrays(file, arrays, {"numbers": json.dumps(numbers)})

    def restore(self, file: Path) -> None:
        """Take up what ``save`` left."""
        arrays, metadata = mx.load(str(file), return_metadata=True)
        parts: dict[str, Any] = {"moved": {}, "best": {}, "optimizer": {}}
        for key, array in arrays.items():
            *above, last = key.split("|")
            place = parts
            for name in above:
                place = place.setdefault(name, {})
            place[last] = array
        optimizer = self.state.optimizer
        optimizer.state = parts.pop("optimizer")
        self.resume(State(optimizer=optimizer, **parts, **json.loads(metadata["numbers"])))
