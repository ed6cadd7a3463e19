"""Distillation: train a quantised model's scales until it predicts as the original does.

The loss is KL(teacher ‖ student) over the whole vocabulary at every position, as
in LLM-QAT (https://arxiv.org/abs/2305.17888); codes stay, as in
PEQA (https://arxiv.org/abs/2305.14152), unless they are let move. Adam (https://arxiv.org/abs/1412.6980) with a
cosine schedule. Some
sequences are held out: the state that serves them best, rounded as it will be
stored, is what is written, and if none beats the model as it was, that is.
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np

from mlxquant.base.errors import BadValue
from mlxquant.base.storage import save_arrays
from mlxquant.tuning.trainable import Trainable

Report = Callable[[int, int, float], None]


@dataclass(frozen=True)
class Schedule:
    """``steps`` of ``batch_size`` sequences; the learning rate is relative to each array's size and
    rises over the first twentieth, then falls to zero. Every ``check_every`` steps the held-out
    sequences are tried."""

    steps: int = 1000
    batch_size: int = 8
    learning_rate: float = 2e-3
    check_every: int = 100

    def __post_init__(self):
        for name in ("steps", "batch_size", "check_every"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise BadValue(f"{name} is {getattr(self, name)!r}, allowed is a positive whole number")
        if not 0 < self.learning_rate < 1:
            raise BadValue(f"learning_rate is {self.learning_rate!r}, allowed is a number between 0 and 1")

    def rate(self) -> Callable:
        rise = max(1, self.steps // 20)
        return optim.join_schedules([optim.linear_schedule(0, self.learning_rate, rise),
                                     optim.cosine_decay(self.learning_rate, max(1, self.steps - rise))], [rise])

    @property
    def drift(self) -> float:
        """How far chance carries what is trained: the standard deviation, at the end, where gradients are noise alone.

        Adam's steps then add up as if each were its rate times a draw of mean square 1, and the squares of a cosine's
        rates are 3/8 in the mean.
        """
        return self.learning_rate * math.sqrt(3 / 8 * self.steps)

    def as_dict(self) -> dict:
        return asdict(self)


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

    def __init__(self, student: Trainable, teacher: nn.Module, tokens: np.ndarray, held_out: np.ndarray,
                 schedule: Schedule):
        if len(tokens) < schedule.steps * schedule.batch_size:
            raise BadValue(f"{schedule.steps} steps of {schedule.batch_size} need as many sequences, "
                           f"not {len(tokens)}")
        self.student, self.teacher, self.schedule = student, teacher, schedule
        self.tokens, self.held_out = tokens, held_out
        # without the correction Adam's steps are up to six times the rate, for a thousand steps more than 1.2 times
        optimizer = optim.Adam(learning_rate=schedule.rate(), bias_correction=True)
        moved = student.start()
        optimizer.init(moved)
        first = self.held_out_loss(moved)
        self.state = State(0, moved, optimizer, dict(moved), first, first)
        self._compile()

    def _compile(self) -> None:
        """One step as one graph. What it changes is handed in and out, so that it is traced once.

        What it starts from is handed in too: MLX writes the value of a captured array of one element into
        the source of every kernel that reads it, and a model has hundreds (the sizes of norms, of single
        replicas). Each such kernel took a GPU's compiler seconds: the first step did not come in nine minutes.
        """
        state = self.state
        live = [state.moved, state.optimizer.state]
        constant = [self.student.base, self.student.size]

        def loss(moved: dict[str, mx.array], batch: mx.array) -> mx.array:
            return divergence_loss(self.student.install(self.student.values(moved)), self.teacher, batch)

        def step(batch: mx.array) -> mx.array:
            value, gradients = mx.value_and_grad(loss)(state.moved, batch)
            state.moved.update(state.optimizer.apply_gradients(gradients, state.moved))
            return value

        self._live = live
        self._step = mx.compile(step, inputs=[*live, *constant], outputs=live)

    def run(self, report: Report = lambda *_: None, save: Callable[[], None] = lambda: None) -> State:
        """Train to the end; ``report`` gets (steps done, steps, loss), ``save`` is called after each check."""
        state, size = self.state, self.schedule.batch_size
        while state.step < self.schedule.steps:
            batch = mx.array(self.tokens[state.step * size:(state.step + 1) * size])
            value = self._step(batch)
            mx.eval(value, self._live)
            state.step += 1
            report(state.step, self.schedule.steps, value.item())
            if state.step % self.schedule.check_every == 0 or state.step == self.schedule.steps:
                self._check()
                save()
        return state

    def _check(self) -> None:
        loss = self.held_out_loss(self.state.moved)
        if loss < self.state.best_loss:
            self.state.best, self.state.best_loss = dict(self.state.moved), loss

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
        """Everything that goes on later needs, in one step."""
        state = self.state
        arrays = {f"moved|{path}": array for path, array in state.moved.items()}
        arrays |= {f"best|{path}": array for path, array in state.best.items()}
        for name, entry in state.optimizer.state.items():  # two scalars, and moments by path
            entries = entry if isinstance(entry, dict) else {"": entry}
            arrays |= {f"optimizer|{name}|{moment}": array for moment, array in entries.items()}
        numbers = {"step": state.step, "best_loss": state.best_loss, "first_loss": state.first_loss}
        save_arrays(file, arrays, {"numbers": json.dumps(numbers)})

    def restore(self, file: Path) -> None:
        """Take up what ``save`` left."""
        arrays, metadata = mx.load(str(file), return_metadata=True)
        moved, best, moments = {}, {}, {}
        for key, array in arrays.items():
            part, _, path = key.partition("|")
            if part == "optimizer":
                name, _, moment = path.partition("|")
                if moment:
                    moments.setdefault(name, {})[moment] = array
                else:
                    moments[name] = array
            else:
                (moved if part == "moved" else best)[path] = array
        numbers = json.loads(metadata["numbers"])
        self.state = State(moved=moved, best=best, optimizer=self.state.optimizer, **numbers)
        self.state.optimizer.state = moments
        self._compile()
