"""Distillation: train a quantised model's scales until it predicts as the original does.

The loss is KL(teacher ‖ student) over the whole vocabulary at every position, as in LLM-QAT
(https://arxiv.org/abs/2305.17888). Codes stay, as in PEQA (https://arxiv.org/abs/2305.14152),
unless they may move. The optimiser is Adam (https://arxiv.org/abs/1412.6980). Some sequences are
held out: what serves them best, rounded as it will be stored, is the result, and if nothing beats
the model as it was, that is.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlxquant.base.errors import BadValue
from mlxquant.base.storage import save_arrays
from mlxquant.tuning.settings import Schedule
from mlxquant.tuning.trainable import Trainable

Report = Callable[[int, int, float], None]


@dataclass
class State:
    """Where training stands: u, the optimiser's moments, and the best state seen."""

    step: int
    moved: dict[str, mx.array]
    optimizer: optim.Optimizer
    best: dict[str, mx.array]
    best_loss: float
    first_loss: float


def divergence_loss(student: nn.Module, teacher: nn.Module, tokens: mx.array) -> mx.array:
    """Mean KL(teacher ‖ student) in nats over the positions of ``tokens`` (batch, length)."""
    wanted = nn.log_softmax(mx.stop_gradient(teacher(tokens)).astype(mx.float32), axis=-1)
    given = nn.log_softmax(student(tokens).astype(mx.float32), axis=-1)
    return (mx.exp(wanted) * (wanted - given)).sum(-1).mean()


class Distillation:
    """Training of one ``Trainable`` on one ``teacher``, step by step, so that it can be stopped.

    ``tokens`` (steps · batch_size, length) are used once each, in order; ``held_out``
    (some, length) never.
    """

    def __init__(self, student: Trainable, teacher: nn.Module, tokens: np.ndarray,
                 held_out: np.ndarray, schedule: Schedule):
        if len(tokens) < schedule.steps * schedule.batch_size:
            raise BadValue(f"{schedule.steps} steps of {schedule.batch_size} need as many "
                           f"sequences, not {len(tokens)}")
        self.student, self.teacher, self.schedule = student, teacher, schedule
        self.tokens, self.held_out = tokens, held_out
        # Without the correction Adam's first steps are up to six times the rate, and more than
        # 1.2 times for a thousand steps.
        optimizer = optim.Adam(learning_rate=schedule.rate(), bias_correction=True)
        moved = student.start()
        optimizer.init(moved)
        first = self.held_out_loss(moved)
        self.state = State(0, moved, optimizer, dict(moved), first, first)
        self._compile()

    def _compile(self) -> None:
        """One step as one graph. What it changes is handed in and out, so it is traced once.

        What it starts from is handed in too. MLX writes the value of a captured array of one
        element into the source of every kernel that reads it, and a model has hundreds (the sizes
        of norms, of single replicas). Each such kernel took a GPU's compiler seconds: the first
        step did not come in nine minutes.
        """
        state = self.state
        live = [state.moved, state.optimizer.state]

        def loss(moved: dict[str, mx.array], batch: mx.array) -> mx.array:
            network = self.student.install(self.student.values(moved))
            return divergence_loss(network, self.teacher, batch)

        def step(batch: mx.array) -> mx.array:
            value, gradients = mx.value_and_grad(loss)(state.moved, batch)
            state.moved.update(state.optimizer.apply_gradients(gradients, state.moved))
            return value

        self._live = live
        self._step = mx.compile(step, inputs=[*live, self.student.base, self.student.size],
                                outputs=live)

    def run(self, report: Report = lambda *_: None, file: Path | None = None) -> State:
        """Train to the end; ``report`` gets (steps done, steps, loss) after each step. The state
        is kept in ``file`` after each check, and taken up from there."""
        if file is not None and file.exists():
            self.restore(file)
        state, schedule = self.state, self.schedule
        while state.step < schedule.steps:
            start = state.step * schedule.batch_size
            value = self._step(mx.array(self.tokens[start:start + schedule.batch_size]))
            mx.eval(value, self._live)
            state.step += 1
            report(state.step, schedule.steps, value.item())
            if state.step % schedule.check_every == 0 or state.step == schedule.steps:
                loss = self.held_out_loss(state.moved)
                if loss < state.best_loss:
                    state.best, state.best_loss = dict(state.moved), loss
                if file is not None:
                    self.save(file)
        return state

    def held_out_loss(self, moved: dict[str, mx.array]) -> float:
        """Mean divergence on the held-out sequences, with scales as they will be stored."""
        network = self.student.install(self.student.stored_values(moved))
        size = self.schedule.batch_size
        losses = []
        for start in range(0, len(self.held_out), size):
            batch = mx.array(self.held_out[start:start + size])
            losses += [divergence_loss(network, self.teacher, batch).item()] * len(batch)
        return sum(losses) / len(losses)

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
        self.state = State(optimizer=optimizer, **parts, **json.loads(metadata["numbers"]))
        self._compile()
