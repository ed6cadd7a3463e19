"""Whether tuning fits in memory and on the disk, before it starts.

What is held at once is counted in arrays, as in ``quantise/room.py``. How many arrays of a size
each piece (``piecewise.py``) holds was measured; ``tests/test_tuning_room.py`` compares the sum
with real runs.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxquant.base.storage import require_space
from mlxquant.layers import head, outline, traffic
from mlxquant.layers.blocks import find_blocks, held_bytes, shape_of
from mlxquant.layers.repeated import RepeatedBlock
from mlxquant.layers.trainable import Trainable
from mlxquant.machine.memory import DENSE_SHARE, memory_limit, require_memory
from mlxquant.quantise.room import BatchShape
from mlxquant.tuning.predictions import bytes_for
from mlxquant.tuning.settings import HELD_OUT, Tuning

# Bytes per trained number: start, size, u, two moments, best, gradient, and a step's new u and
# moments, float32 each. Moving codes share one start, and not all of the rest is held at once.
_TRAINED, _MOVING = 40, 26
_STATE = 16  # of them on the disk
# Arrays of a block when its gradient is computed: its matrices (in float32, whatever the computing
# type), inputs and outputs of its layers, and attention's scores. Then those of a forward pass.
_MATRICES, _PASSING, _SCORES = 2.0, 2.7, 3.1
_FORWARD = 1.1
_EXPANDING = {3: 3, 5: 5, 6: 6}  # arrays of a matrix more, by its bits, without a GPU's kernel
_LOGITS, _LIKELIEST = 5.3, 4.5  # arrays of a chunk's logits: with their gradient, and to choose
STREAMED = 8192  # most tokens that are predicted together where the model is read for each batch
_WRITING = 1 / 8  # of the memory, which what the original writes may take (``self_written.py``)


@dataclass(frozen=True)
class Step(BatchShape):
    """The batch of a step, and whether codes move."""

    moving: bool

    @classmethod
    def of(cls, tuning: Tuning, config: dict[str, Any]) -> "Step":
        return cls(tuning.schedule.batch_size, tuning.sequence_length,
                   outline.attention_heads(config), tuning.codes > 0)


@dataclass(frozen=True)
class Room:
    """The memory that tuning ``student`` takes, and predicting with ``teacher``, whose weights are
    still on disk; ``whole``: all of the teacher is in memory while it predicts."""

    student: Trainable
    teacher: nn.Module
    vocabulary: int
    whole: bool

    def check(self, tuning: Tuning, config: dict[str, Any], output: Path) -> None:
        """Raises ``TooLarge`` where predictions and state do not fit on the disk, or either model
        in memory; the latter names what would fit."""
        step = Step.of(tuning, config)
        tokens = (tuning.schedule.steps * step.windows + HELD_OUT) * step.length
        state = _STATE * sum(array.size for array in self.student.base.values())
        made = sum(file.stat().st_size for file in
                   output.with_name(f"{output.name}.partial").glob("*"))
        require_space(output, bytes_for(tokens, self.vocabulary) + state - made,
                      f"tuning into {output.name}")
        limit, writing = memory_limit(), 0.0
        if tuning.written or tuning.conversations:
            writing = _WRITING * limit + (dense_bytes(self.teacher, self.student.dtype)
                                          if self.whole else held_bytes(self.teacher))
        require_memory("tuning", step, lambda step: max(
            self.student_bytes(step), self.teacher_bytes(step), writing), limit, _smaller(step))

    def student_bytes(self, step: Step) -> float:
        """The most bytes that training holds."""
        student, width = self.student, self.student.dtype.size
        kept = sum(array.nbytes for path, array in tree_flatten(student.network.parameters())
                   if path not in student.base)
        trained = sum(step.moving * _MOVING * array.size if path.endswith(".moves")
                      else _TRAINED * array.size for path, array in student.base.items())
        blocks = [block.module for block in find_blocks(student.network)]
        costs = [_MATRICES * 4 * sum(map(traffic.weight_count, block.modules())) + width * (
            _PASSING * step.tokens * _numbers(block) + _SCORES * step.scores) for block in blocks]
        # Blocks that repeat are not computed again: all that their passes compute stays.
        stays = sum(cost * block.passes for block, cost in zip(blocks, costs)
                    if isinstance(block, RepeatedBlock))
        return (kept + trained + stays + self._hidden(student.network, step, width)
                + max(*costs, self._chunk(step, _LOGITS)))

    def teacher_bytes(self, step: Step) -> float:
        """The most bytes that predicting holds: the whole teacher, or the arrays outside its blocks
        and one block, and activations."""
        return self._predicting(replace(step, windows=self.at_once(step) // step.length))

    def at_once(self, step: Step) -> int:
        """How many tokens the teacher predicts together: those of a step or, where its weights are
        read again for each batch, as many as fit, up to ``STREAMED``."""
        most, limit = STREAMED // step.length, memory_limit()
        larger = [replace(step, windows=most >> half) for half in range(most.bit_length())]
        return next((way.tokens for way in larger if not self.whole and way.windows > step.windows
                     and self._predicting(way) <= limit), step.tokens)

    def _predicting(self, step: Step) -> float:
        """The most bytes that predicting so much together holds."""
        network, dtype = self.teacher, self.student.dtype
        found, width = find_blocks(network), dtype.size
        blocks = [block.module for block in found]
        passing = max(step.tokens * _numbers(block) for block in blocks)
        one, held = width * _FORWARD * (passing + step.scores), dense_bytes(network, dtype)
        hidden, ends = self._hidden(network, step, width), 0.0
        if head.foreseen(network, found):  # what a block was given, and what it gave
            hidden = 2 * hidden // len(blocks)
        if not self.whole:
            held -= sum(dense_bytes(block, dtype) for block in blocks)
            one = max(dense_bytes(block, dtype) + max(one, _reading(block.modules(), dtype))
                      for block in blocks)
            inside = {id(module) for block in blocks for module in block.modules()}
            ends = _reading((module for module in network.modules()
                             if id(module) not in inside), dtype)
        return held + max(ends, hidden + max(one, self._chunk(step, _LIKELIEST)))

    def _hidden(self, network: nn.Module, step: Step, width: int) -> int:
        """Bytes of the hidden states that enter all blocks, as wide as an embedding."""
        size = max((shape_of(module)[-1] for module in network.modules()
                    if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))), default=0)
        return len(find_blocks(network)) * step.tokens * size * width

    def _chunk(self, step: Step, arrays: float) -> float:
        return arrays * head.logits_bytes(step.tokens, self.vocabulary)


def _smaller(step: Step) -> Iterator[list[tuple[str, Step]]]:
    """Steps that take less, by the option that makes them so; of each kind the nearest first."""
    yield [(f"--batch-size {size}", replace(step, windows=size)) for half in range(
        1, step.windows.bit_length()) for size in [step.windows >> half]]
    yield [(f"--sequence-length {length}", replace(step, length=length)) for half in range(1, 5)
           for length in [step.length >> half] if length >= 32]
    yield [("--codes 0", replace(step, moving=False))]


def dense_bytes(network: nn.Module, dtype: mx.Dtype) -> int:
    """Bytes of a network with all matrices expanded."""
    return traffic.dense_bytes(network) * dtype.size // 4


def _reading(modules: Iterable[nn.Module], dtype: mx.Dtype) -> float:
    """The most bytes that expanding one of these matrices to ``dtype`` takes beside the result: the
    stored array, or for 16 bits half of it and the matrix in float32."""
    def beside(module: nn.Module) -> float:
        stored, wide = traffic.own_bytes(module), traffic.float32_bytes(module)
        source = 0 if stored == wide else stored if dtype == mx.float32 else stored / 2
        between = 0 if dtype == mx.float32 else wide
        if hasattr(module, "bits") and mx.default_device() == mx.cpu:
            between += wide * _EXPANDING.get(module.bits, 1)
        return source + between

    return max(map(beside, modules))


def fits_dense(network: nn.Module, dtype: mx.Dtype) -> bool:
    """Whether a network is to be expanded, as ``load`` decides it."""
    return dense_bytes(network, dtype) <= DENSE_SHARE * memory_limit()


def _numbers(block: nn.Module) -> float:
    """Numbers of a token that go into and out of the matrices of a block."""
    matrices = [part for part in traffic.parts(block) if traffic.weight_count(part.module)]
    return sum(part.chosen * sum(shape_of(part.module)[-2:]) for part in matrices
               if len(shape_of(part.module)) > 1)
