"""Train the trainable arrays of a quantised network with Adam, and keep the best state.

The optimiser is Adam (https://arxiv.org/abs/1412.6980). The result is the state with the least loss
on held-out data, rounded as it will be stored; this is the start if no state is better.
"""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten

from mlxquant.layers.trainable import Trainable

Loss = Callable[..., mx.array]  # (network, *arrays) → the loss that a step lowers
Rate = Callable[[mx.array], mx.array]


@dataclass
class State:
    """Where training stands: u, the optimiser's moments, and the best state seen."""

    step: int
    moved: dict[str, mx.array]
    optimizer: optim.Optimizer
    best: dict[str, mx.array]
    best_loss: float
    first_loss: float


class Training:
    """Training of one ``Trainable``, step by step.

    A step lowers ``loss(network, *data)`` for the arrays that it is given; ``held_out(network)`` is
    the loss on data that no step uses. ``rate`` is the learning rate by step. Without ``compiled``
    steps run uncompiled, for networks that MLX cannot trace.
    """

    def __init__(self, student: Trainable, loss: Loss, held_out: Callable[[nn.Module], float],
                 rate: Rate, compiled: bool = True):
        self.student, self._loss, self._held_out = student, loss, held_out
        self._compiled = compiled
        # One after the other, so that temporaries do not add up; and now, because arrays that are
        # loaded inside a step would be loaded again in every step.
        for _, array in tree_flatten([student.base, student.size, student.network.parameters()]):
            mx.eval(array)
        # Without the correction Adam's first steps are up to six times the rate, and more than
        # 1.2 times for a thousand steps.
        optimizer = optim.Adam(learning_rate=rate, bias_correction=True)
        moved = student.start()
        optimizer.init(moved)
        first = self.held_out_loss(moved)
        self.resume(State(0, moved, optimizer, dict(moved), first, first))

    def resume(self, state: State) -> None:
        """Go on from ``state``.

        A step is one graph. The arrays it changes are its inputs and outputs, so it is traced once.
        The arrays it starts from (θ₀ and sizes) are inputs too: MLX writes the value of a captured
        array of one element into the source of every kernel that reads it, and a model has hundreds
        of them (the sizes of norms, of single replicas). A GPU's compiler took seconds for each
        such kernel: the first step had not finished after nine minutes.
        """
        self.state = state
        self._live = [state.moved, state.optimizer.state]

        def loss(moved: dict[str, mx.array], *data: mx.array) -> mx.array:
            return self._loss(self.student.install(self.student.values(moved)), *data)

        def step(*data: mx.array) -> mx.array:
            value, gradients = mx.value_and_grad(loss)(state.moved, *data)
            # The norm of a zero vector has no derivative: NaN gradients count as zero.
            gradients = {path: mx.nan_to_num(g, 0, 0, 0) for path, g in gradients.items()}
            state.moved.update(state.optimizer.apply_gradients(gradients, state.moved))
            return value

        self._step = mx.compile(step, outputs=self._live, inputs=[
            *self._live, self.student.base, self.student.size]) if self._compiled else step

    def step(self, *data: mx.array) -> float:
        """One step on ``data``; returns the loss before it."""
        value = self._step(*data)
        mx.eval(value, self._live)
        self.state.step += 1
        return value.item()

    def end(self) -> None:
        """Drop the compiled step: it and this object refer to each other."""
        del self._step

    def check(self) -> None:
        """Keep the state if it is the best so far."""
        state = self.state
        loss = self.held_out_loss(state.moved)
        if loss < state.best_loss:
            state.best, state.best_loss = dict(state.moved), loss

    def held_out_loss(self, moved: dict[str, mx.array]) -> float:
        """The loss on what is held out, with scales as they will be stored."""
        return self._held_out(self.student.install(self.student.stored_values(moved)))
