"""Train a block's scales, norms and codes to bring its outputs close to the float block's.

As in BRECQ (Li et al. 2021, https://arxiv.org/abs/2102.05426), OmniQuant (Shao et al. 2023,
https://arxiv.org/abs/2308.13137) and the first phase of EfficientQAT (Chen et al. 2024,
https://arxiv.org/abs/2407.11062) one block after the other is trained on the calibration text, so
that memory holds one block and its optimiser. The block's inputs come from the quantised blocks
before it, its targets are the outputs of the float block in the float model: so it also corrects
the errors of the blocks before it. A code starts as far from the middle of its cell as the float
weight is, and may end in another cell. The losses are in ``aims.py``.
"""

import math
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_unflatten
from mlx_lm.utils import dequantize_model

from mlxquant.base.errors import MlxquantError, first_line
from mlxquant.layers.blocks import Block
from mlxquant.layers.traffic import leaf_modules
from mlxquant.layers.trainable import Trainable, TrainedParts
from mlxquant.quantise.aims import OUTPUTS, BlockCall, OutputLoss
from mlxquant.quantise.blocks import restore
from mlxquant.quantise.job import Job
from mlxquant.quantise.plans import BlockPlan
from mlxquant.quantise.results import BlockResult
from mlxquant.quantise.training import Rate, State, Training

CODES_RATE = 6e-3  # levels a step, however many steps there are
RATE = 2e-3  # of scales, relative to their size, in ``_FULL`` steps; in fewer up to twice as much
_FULL = 320  # steps; in as many and more, rates fall as the square of a cosine
_CHECKS = 8
_HELD_OUT = 8  # one in so many batches, at least one, is held out to choose the best state
# The errors of a block that MLX cannot trace, differentiate or hold in memory.
_UNTRAINABLE = (MlxquantError, RuntimeError, ValueError, TypeError, AttributeError, KeyError,
                MemoryError)
UNTUNED = "blocks left untuned"  # in every note that says so
Report = Callable[[int, int, float], None]


@dataclass(frozen=True)
class BlockTuner:
    """Tunes blocks as ``job`` says; ``report`` gets (steps done, steps, 100 × error) of each.
    ``untrained`` says why blocks, by path, cannot be trained; ``aims`` are, by path, further
    losses that blocks are trained on after the loss on the float block's outputs."""

    job: Job
    report: Report
    untrained: dict[str, str] = field(default_factory=dict)
    aims: Mapping[str, OutputLoss] = field(default_factory=dict)

    @property
    def _rate(self) -> float:
        """The learning rate of scales at the first step."""
        return RATE * min(2.0, max(1.0, math.sqrt(_FULL / self.job.tuning.steps)))

    def tune(self, block: Block, plan: BlockPlan, result: BlockResult,
             calls: list[BlockCall]) -> None:
        """Train the quantised layers of a block in ``result``, and record there the errors before
        and after, or why it cannot be trained. The block's module keeps its structure."""
        if not plan.specs or not self.job.tunes(plan.specs.values()):
            return
        reason = self.untrained.get(block.path)
        if not calls:
            reason = "it is called more than once"
        elif not block.path:
            reason = "the network is one block"
        reason = reason or self._tried(block, plan, result, calls, OUTPUTS)
        result.remainders.clear()
        if reason is None and block.path in self.aims:  # where that fails, it is trained already
            self._tried(block, plan, result, calls, self.aims[block.path])
        if reason is not None:
            result.tuned = {"left": reason}
            print(f"{block.path or 'the block'} is left untuned: {reason}", file=sys.stderr)

    def _tried(self, block: Block, plan: BlockPlan, result: BlockResult, calls: list[BlockCall],
               aim: OutputLoss) -> str | None:
        """Train a block; returns None, or the reason why it cannot be trained."""
        try:
            aim.prepare()
            self._train(block, plan, result, calls, aim)
        except _UNTRAINABLE as error:
            mx.clear_cache()  # what ran out of memory must not cost the next block its own
            return first_line(error)
        return None

    def _train(self, block: Block, plan: BlockPlan, result: BlockResult, calls: list[BlockCall],
               aim: OutputLoss) -> None:
        with _as_stored(block.module, result):
            remainders = result.remainders
            starts = {path: remainders.pop(path).astype(mx.float16) / 256  # exact
                      for path in list(remainders)}
            parts = TrainedParts(codes=CODES_RATE / self._rate, specs=plan.specs, starts=starts)
            student = Trainable(block.module, mx.float32, parts, [Block("", block.module)])
            dequantize_model(block.module)  # what else is quantised
            state = self._best(student, calls, aim)
            tensors, moved = student.tensors(state.best), student.moved_share(state.best)
            mx.eval(tensors)
        if state.best_loss < state.first_loss:
            result.tensors |= tensors
        elif aim is not OUTPUTS:
            return
        result.tuned = aim.told | {"before": state.first_loss, "after": state.best_loss,
                                   "moved": moved + result.tuned.get("moved", 0)}

    def _best(self, student: Trainable, calls: list[BlockCall], aim: OutputLoss) -> State:
        """Train on the calls in random order, repeatedly; returns the final state, which includes
        the best one."""
        held = max(1, len(calls) // _HELD_OUT)
        used, held_out, steps = calls[:-held] or calls, calls[-held:], self.job.tuning.steps
        random, order = np.random.default_rng(self.job.seed), list[int]()
        call = calls[0]  # the current call; a compiled step keeps this one and gets new arrays
        training = Training(
            student, lambda network, *data: aim.error(call, *data),
            lambda network: float(np.mean([aim.error(c, *aim.data(c)).item() for c in held_out])),
            _falling(self._rate, steps),
            compiled=mx.default_device() == mx.gpu and _alike(calls))
        try:
            if not math.isfinite(training.state.first_loss):
                raise MlxquantError("its error is not a finite number")
            self.report(0, steps, 100 * training.state.first_loss)
            for step in range(1, steps + 1):
                order = order or random.permutation(len(used)).tolist()
                call = used[order.pop()]
                training.step(*aim.data(call, random))
                if step % math.ceil(steps / _CHECKS) == 0 or step == steps:
                    training.check()
                    self.report(step, steps, 100 * training.state.best_loss)
        finally:
            training.end()
        return training.state


def _falling(rate: float, steps: int) -> Rate:
    """The learning rate by step, from ``rate`` to 0: half a cosine, squared in long training. The
    square spends more steps on small rates, at which late blocks get better than they started."""
    if steps < _FULL:
        return optim.cosine_decay(rate, steps)
    root = optim.cosine_decay(math.sqrt(rate), steps)
    return lambda step: mx.square(root(step))


def summary(tuned: dict[str, dict[str, Any]]) -> tuple[dict[str, Any], list[str]]:
    """The errors before and after tuning by block, for config.json, and a note for each reason why
    blocks were left untuned."""
    gains = {path: found for path, found in tuned.items() if "left" not in found}
    left: dict[str, list[str]] = {}
    for path, found in tuned.items():
        if "left" in found:
            left.setdefault(found["left"], []).append(path)
        elif not found["after"] < found["before"]:  # nor where either is no number
            left.setdefault("training brought it no nearer", []).append(path)
    notes = [f"{len(paths)} of {len(tuned)} {UNTUNED}"
             + f", {paths[0]} the first" * bool(paths[0]) + f": {reason}"
             for reason, paths in left.items()]
    return gains, notes


def _alike(calls: list[BlockCall]) -> bool:
    """Whether calls differ only in arrays, which are a compiled step's inputs."""
    numbers = calls[0].numbers()
    return all(isinstance(n, (type(None), str, int, float)) for n in numbers) and all(
        call.numbers() == numbers for call in calls)


@contextmanager
def _as_stored(module: nn.Module, result: BlockResult) -> Iterator[None]:
    """Within the context the block has the layers of ``result`` in place of its dense ones, ready
    to be trained; afterwards its dense layers again, without their weights."""
    leaves, training = leaf_modules(module), module.training
    for _, leaf in leaves:
        if "weight" in leaf and leaf.weight.ndim > 1:
            leaf.weight = mx.zeros(leaf.weight.shape)  # not computed, so it takes no memory
    try:
        restore(module, result).train()
        yield
    finally:
        for path in result.replicas:
            above, _, name = path.rpartition(".")
            holder = dict(module.named_modules())[above]
            if name in holder:
                delattr(holder, name)
        module.update_modules(tree_unflatten(leaves))
        module.train(training)
