"""The loss a block is trained on: the error of its outputs, or that of the model's predictions.

The last block's output goes only into the final norm and the head. Only its effect on the logits
matters, so the last block is trained at the end on KL(float ‖ quantised) over the vocabulary, at
some tokens of each step.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map

from mlxquant.base.trees import arrays, floats
from mlxquant.layers.head import Head
from mlxquant.quantise.walk import Halt

PREDICTED = 512  # tokens of a step whose predictions are compared


@dataclass(frozen=True)
class BlockCall:
    """A call of a block for one batch, with inputs computed by quantised blocks (``halt``), and the
    output that the float block gave for the same batch in the float model (``wanted``)."""

    halt: Halt
    wanted: Any

    def numbers(self) -> list[Any]:
        """The arguments that are not arrays; None in the place of each array."""
        leaves = tree_flatten((self.halt.args, self.halt.kwargs))
        return [None if isinstance(leaf, mx.array) else leaf for _, leaf in leaves]

    def outputs(self, data: Iterator[mx.array]) -> list[mx.array]:
        """The block's outputs for arguments whose arrays are replaced by the next of ``data``."""
        args, kwargs = tree_map(lambda leaf: next(data) if isinstance(leaf, mx.array) else leaf,
                                (self.halt.args, self.halt.kwargs))
        return floats(self.halt.own(*args, **kwargs))


class OutputLoss:
    """The loss on the float block's outputs. ``told`` is recorded with errors to name their unit:
    empty for shares of the output's energy."""

    told: ClassVar[dict[str, float]] = {}

    def prepare(self) -> None:
        """Called once before training."""

    def data(self, call: BlockCall, random: np.random.Generator | None = None) -> list[mx.array]:
        """All arrays of a call's arguments, then the arrays that ``error`` compares with. Where
        only some tokens are compared, ``random`` draws them; without it they stay the same."""
        return [*arrays(call.halt.given()), *floats(call.halt.shelf.read(call.wanted))]

    def error(self, call: BlockCall, *data: mx.array) -> mx.array:
        """The error of the block's outputs ŷ against the float block's y: half the mean over tokens
        of ‖y − ŷ‖² / ‖y‖², half Σ‖y − ŷ‖² / Σ‖y‖². The first half weights all tokens alike, as the
        next block's norm does. The hidden states of a few tokens are hundreds of times as large as
        all others and serve as attention sinks (Sun et al. 2024, https://arxiv.org/abs/2402.17762):
        without the second half, training can lose them, which raises the first half by only a
        thousandth and breaks the later blocks."""
        left, errors = iter(data), []
        for y, wanted in zip(call.outputs(left), left, strict=True):
            missed, energy = mx.square(y - wanted).sum(-1), mx.square(wanted).sum(-1)
            floor = 1e-3 * energy.mean() + 1e-20
            errors += [(missed / (energy + floor)).mean(), missed.mean() / (energy.mean() + floor)]
        return mx.stack(errors).mean()


OUTPUTS = OutputLoss()


@dataclass(frozen=True)
class PredictionLoss(OutputLoss):
    """The loss on the predictions that ``head``, the source model's own, makes from the float
    block's output. ``turn`` (n, n) is the fused rotation of the blocks' outputs, which the head
    does not have."""

    told: ClassVar[dict[str, float]] = {"nats": True}
    head: Head
    turn: mx.array | None

    def prepare(self) -> None:
        self.head.expand()

    def data(self, call: BlockCall, random: np.random.Generator | None = None) -> list[mx.array]:
        wanted, = floats(call.halt.shelf.read(call.wanted))
        tokens = wanted.size // wanted.shape[-1]
        places = mx.array(np.arange(0, tokens, math.ceil(tokens / PREDICTED)) if random is None
                          else random.permutation(tokens)[:PREDICTED])
        logits = self._logits(wanted, places)
        likely = mx.softmax(logits, axis=-1)
        found = [*arrays(call.halt.given()), places, likely, _cross_entropy(likely, logits)]
        mx.eval(found[-3:])  # so that the head's temporaries are freed before a step
        return found

    def error(self, call: BlockCall, *data: mx.array) -> mx.array:
        """The mean over tokens of KL(float ‖ quantised) in nats."""
        left = iter(data)
        y, = call.outputs(left)
        places, likely, entropy = left
        return _cross_entropy(likely, self._logits(y, places)) - entropy

    def _logits(self, y: mx.array, places: mx.array) -> mx.array:
        some = y.reshape(-1, y.shape[-1])[places]
        return self.head.logits(some if self.turn is None else some @ self.turn)


def _cross_entropy(likely: mx.array, logits: mx.array) -> mx.array:
    return (mx.logsumexp(logits, axis=-1) - (likely * logits).sum(-1)).mean()
