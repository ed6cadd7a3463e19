"""Whether a job fits on the disk and in memory, before it starts.

What a job holds at once is counted in arrays: hidden states of the whole text, a block in float32,
moments of its inputs, and temporaries of finding the codes of its largest siblings. How many arrays
of a size a step holds was measured; ``tests/test_room.py`` compares the sum with real jobs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxquant.base.storage import require_space
from mlxquant.codes.affine import SEARCHED
from mlxquant.codes.spec import Spec, Whole
from mlxquant.layers import traffic
from mlxquant.layers.blocks import Block, arrays_outside, shape_of
from mlxquant.layers.head import Head, foreseen, logits_bytes
from mlxquant.machine.memory import memory_limit, require_memory, told
from mlxquant.quantise.aims import PREDICTED
from mlxquant.quantise.ends import bytes_held
from mlxquant.quantise.job import Job, Target
from mlxquant.quantise.observe import keeps_experts_apart
from mlxquant.quantise.plans import EXPERTS, LAYERS, BlockPlan, inputs_of, plan_blocks
from mlxquant.quantise.rehearsal import given_inputs
from mlxquant.quantise.replica import AT_ONCE
from mlxquant.quantise.walk import batch_size
from mlxquant.sources.checkpoint import SHARD_BYTES

# Of the memory: where the hidden states of all batches would take more, they wait on the disk.
_SPILL_SHARE = 1 / 8
_SHORTEST = 32  # tokens of a window that may be advised
_PASSING = 2  # arrays of a batch's inputs and outputs
# Training a block, where its gradient begins and where it ends: bytes per weight whose code moves
# (latent, best and two moments, 16; current value and matrix, 8; start and code, 3; gradients),
# float32 arrays of layers' inputs and outputs, and of scores; ``_EXPERT``: bytes per expert weight.
_EXPERT, _BEGIN, _END = 12, (30, 3.9, 3.5), (41, 1.2, 0)
# The gradients of a budget: arrays of a block's inputs and outputs, of scores, and of logits.
_WEIGHED, _WEIGHED_LOGITS = (3.1, 3.0), 6.0
_LOGITS, _HEAD = 5.7, 1.2  # arrays of a step's logits, and of the head, where the last begins
# Arrays of an input's (n, n) that stay while its siblings are quantised, and come in between.
_KEPT, _FACTORING = 2.2, 1.7
_CORRECTED = 1.0  # more of them, where the target is corrected
# Arrays (m, n) of stacked siblings: to fit scales; to refine affine codes; to refine replicas;
# (K, m, n) for replicas' equations; to round (rtn).
_FIT, _REFINE, _REPLICAS, _EQUATIONS, _ROUND = 12.0, 13.0, 10.0, 6.0, 5.0


@dataclass(frozen=True)
class Needs:
    """``memory``: the most bytes that a job holds at once, without the interpreter's own;
    ``waiting``: the bytes of hidden states on the disk; ``untrained``: by path, why blocks cannot
    be trained in this memory; ``predicting``: by the last block's path, the head on whose
    predictions that block can be trained."""

    memory: float = 0.0
    waiting: float = 0.0
    untrained: dict[str, str] = field(default_factory=dict)
    predicting: dict[str, Head] = field(default_factory=dict)

    @property
    def training(self) -> dict[str, Any]:
        """Which blocks are trained, and how, for a record."""
        return {"untrained": self.untrained, "predicting": list(self.predicting)}


def check(network: nn.Module, blocks: list[Block], output: Path, job: Job, heads: int) -> Needs:
    """What the job takes, of a network with so many heads of attention. Raises ``TooLarge`` where
    the result does not fit on the disk, or the job in memory; the latter names what would fit."""
    stored = sum(map(_stored_bytes, blocks, plan_blocks(network, blocks, job)))
    needed = needs(network, blocks, job, heads)
    # The finished blocks and the shards made of them lie side by side for a moment.
    require_space(output, int(2 * stored + _ends(network, blocks) + needed.waiting),
                  f"quantising into {output.name}")
    require_memory("quantising", job, lambda other: (
        needed if other is job else needs(network, blocks, other, heads)).memory,
        memory_limit(), _smaller(job))
    return needed


def _smaller(job: Job) -> Iterator[list[tuple[str, Job]]]:
    """Jobs that take less, by the options that make them so; of each kind the nearest first."""
    if job.calibrated:
        yield [(f"--sequence-length {short.length}", job.changed(length=short.length))
               for short in _shorter(BatchShape(1, job.text.length, 0))]
    if job.tuning.tune_blocks:
        yield [("--no-tune-blocks", job.changed(tune_blocks=False))]
    if job.propagation == "corrected":
        yield [("--propagation quantised", replace(job, propagation="quantised"))]
    yield [(f"--method {method}", job.changed(method=method, rotation=None))
           for method in {"replica": ("gptq", "rtn"), "rtn": ()}.get(job.spec.method, ("rtn",))]


@dataclass(frozen=True)
class _Siblings:
    """Layers of a block, by the path of the ``first``, that are quantised as one matrix (rows,
    inputs) in float32, each of so many ``experts`` by itself; ``moments`` are the bytes of their
    input's."""

    first: str
    rows: int
    inputs: int
    experts: int
    spec: Spec | None
    moments: float

    def work(self, job: Job) -> float:
        """Bytes that finding their codes takes at once, beside the moments as observed."""
        spec, square, matrix = self.spec, 4 * self.inputs**2, 4 * self.rows * self.inputs
        if spec is None:
            return 0.0
        if spec.method == "rtn":
            return _ROUND * matrix
        corrected = _CORRECTED * (job.propagation == "corrected" and not self.experts)
        if spec.method == "replica":
            fit = _FIT * matrix
            refine = _REPLICAS * matrix + _EQUATIONS * min(spec.replicas * matrix, 4 * AT_ONCE)
        else:
            fit, refine = _FIT * min(matrix, 4 * SEARCHED), _REFINE * matrix
        refine *= spec.refine > 0
        return (_KEPT + corrected) * square + max(_FACTORING * square, fit + corrected * square,
                                                  refine)


@dataclass(frozen=True)
class BatchShape:
    """The tokens that run through a block at once: ``windows`` of ``length`` tokens, in a network
    with so many ``heads`` of attention."""

    windows: int
    length: int
    heads: int

    @property
    def tokens(self) -> int:
        return self.windows * self.length

    @property
    def scores(self) -> int:
        """Numbers that attention computes in a block: of each head, token and earlier token."""
        return self.heads * self.tokens * self.length


def needs(network: nn.Module, blocks: list[Block], job: Job, heads: int) -> Needs:
    """The memory and disk that the job takes. Hidden states are kept on the disk where they would
    take more than an eighth of the memory, or more than the job's peak leaves free. Blocks whose
    training does not fit are not trained, unless ``tune_blocks`` is set."""
    plans, limit = plan_blocks(network, blocks, job), memory_limit()
    given = given_inputs(network, blocks) if job.calibrated else {}
    batch = (BatchShape(min(job.text.samples, batch_size()), job.text.length, heads) if given
             else BatchShape(1, 2, heads))
    embeddings = sum(traffic.own_bytes(m) for _, m in network.named_modules()
                     if isinstance(m, (nn.Embedding, nn.QuantizedEmbedding)))
    grouped = [(block, list(_groups(block, plan, given, job)))
               for block, plan in zip(blocks, plans)]
    tuned = [each for each, plan in zip(grouped, plans)
             if given and job.tunes(plan.specs.values())]
    # Bytes of hidden states in float32: behind quantised blocks, and behind float ones if needed.
    width = next(iter(given.values())).shape[-1] if given else 0
    state = 4 * (1 + bool(tuned or job.propagation == "corrected")) * width

    def trained(block: Block, groups: list[_Siblings], batch: BatchShape) -> float:
        return state * batch.tokens + _training_bytes(block, groups, batch)

    steps, untrained = [_block_bytes(block, plan, groups, job, batch)
                        for (block, groups), plan in zip(grouped, plans)], {}
    for block, groups in tuned:
        needed = trained(block, groups, batch)
        if job.tuning.tune_blocks or needed <= limit:
            steps.append(_training_bytes(block, groups, batch))
        else:
            fitting = [f"--sequence-length {short.length}" for short in _shorter(batch)
                       if trained(block, groups, short) <= limit]
            untrained[block.path] = f"training takes {told(needed, limit, fitting[:1])}"
    predicting = foreseen(network, blocks) if tuned else {}
    for block, groups in tuned:
        if block.path in predicting and block.path not in untrained:
            needed = _training_bytes(block, groups, batch, predicting[block.path])
            if state * batch.tokens + needed <= limit:
                steps.append(needed)
            else:  # it is trained as the others are
                predicting = {}
    held, waiting = max(embeddings, *steps), state * job.text.samples * batch.length
    spills = waiting > min(_SPILL_SHARE * limit, limit - held)
    stored = sum(map(_stored_bytes, blocks, plans))
    writing = _ends(network, blocks) + min(stored, SHARD_BYTES)
    weighing = _weighing_bytes(network, grouped, width, batch, job.target) if job.target else 0
    return Needs(max(writing, weighing, held + (state * batch.tokens if spills else waiting)),
                 spills * waiting, untrained, predicting)


def _shorter(batch: BatchShape) -> list[BatchShape]:
    """Batches of shorter windows, the nearest first."""
    return [replace(batch, length=batch.length >> half) for half in (1, 2, 3)
            if batch.length >> half >= _SHORTEST]


def _weighing_bytes(network: nn.Module, groups: list[tuple[Block, list[_Siblings]]], width: int,
                    batch: BatchShape, target: Target) -> float:
    """What weighing layers for a budget takes. Its gradients: embedding and head in float32, what
    goes into all blocks of ``width`` numbers a token, and one block, as stored and in float32, or
    some of the logits."""
    outside = traffic.dense_bytes(network) - sum(traffic.dense_bytes(b.module) for b, _ in groups)
    vocabulary = max((shape_of(m)[0] for _, m in network.named_modules()
                      if isinstance(m, (nn.Embedding, nn.QuantizedEmbedding))), default=0)
    logits = logits_bytes(batch.tokens, vocabulary)
    passing, scores = _WEIGHED
    blocks = [traffic.dense_bytes(block.module) + passing * 4 * batch.tokens * _numbers(block, own)
              + sum(traffic.own_bytes(m) for _, m in traffic.leaf_modules(block.module))
              + scores * 4 * batch.scores for block, own in groups]
    largest = max(traffic.dense_bytes(block.module) for block, _ in groups)
    ends = 0.0 if target.gigabytes is None else bytes_held(outside, largest, vocabulary)
    return max(ends, outside + 4 * width * batch.tokens * (len(groups) + 1)
               + max(_WEIGHED_LOGITS * logits, *blocks))


def _training_bytes(block: Block, groups: list[_Siblings], batch: BatchShape,
                    head: Head | None = None) -> float:
    """What training a block takes, with its codes as they are stored; for the predictions of
    ``head``, if any."""
    experts = sum(g.rows * g.inputs * g.experts for g in groups)
    sizes = (sum(g.rows * g.inputs for g in groups if not g.experts),
             4 * batch.tokens * _numbers(block, groups), 4 * batch.scores)
    begin, end = (sum(each * size for each, size in zip(step, sizes)) for step in (_BEGIN, _END))
    if head:
        begin += 4 * head.vocabulary * (_LOGITS * min(PREDICTED, batch.tokens)
                                        + _HEAD * head.inputs.shape[-1])
    return _EXPERT * experts + max(begin, end)


def _block_bytes(block: Block, plan: BlockPlan, groups: list[_Siblings], job: Job,
                 batch: BatchShape) -> float:
    """What one block takes, at the step that takes the most; training apart."""
    modules = traffic.leaf_modules(block.module)
    weights = sum(traffic.float32_bytes(module) for _, module in modules)
    passing = 4 * batch.tokens * _numbers(block, groups)
    steps = [sum(traffic.own_bytes(module) for _, module in modules),
             sum(group.moments for group in groups) + _PASSING * passing
             + max((g.moments for g in groups), default=0)]
    for index, group in enumerate(groups):  # the last is taken first, and its moments are freed
        steps.append(sum(g.moments for g in groups[:index + 1]) + group.work(job))
    return weights + _stored_bytes(block, plan) + max(steps)


def _numbers(block: Block, groups: list[_Siblings]) -> int:
    """Numbers of a token that go into and out of a block's layers."""
    # Of a mixture's experts a token runs through those that it chooses.
    run = {part.path: part for part in traffic.parts(block.module) if type(part.module) in LAYERS}
    outputs = sum(part.chosen * traffic.weight_count(part.module)
                  // (part.pool * inputs_of(part.module)) for part in run.values())
    return outputs + sum(run[group.first].chosen * group.inputs for group in groups)


def _groups(block: Block, plan: BlockPlan, given: dict[str, mx.array],
            job: Job) -> Iterator[_Siblings]:
    """The block's siblings in the order of their calls; layers by themselves where nothing is
    calibrated."""
    found: dict[int | str, list[str]] = {}
    modules = {path: m for path, m in traffic.leaf_modules(block.module) if type(m) in LAYERS}
    for path in modules:
        x = given.get(block.full(path))
        found.setdefault(path if x is None else id(x), []).append(path)
    for key, paths in found.items():
        first = modules[paths[0]]
        experts = first.weight.shape[0] if isinstance(first, EXPERTS) else 0
        inputs, square = inputs_of(first), 4 * inputs_of(first)**2
        pairs = 1 + (job.propagation == "corrected" and not experts)
        if experts and keeps_experts_apart(experts, inputs):
            pairs += experts
        rows = sum(traffic.weight_count(modules[p]) // inputs for p in paths) // max(1, experts)
        yield _Siblings(paths[0], rows, inputs, experts, plan.specs.get(paths[0]),
                        0.0 if isinstance(key, str) else pairs * square)


def _ends(network: nn.Module, blocks: list[Block]) -> int:
    """Bytes outside the blocks, as stored."""
    return sum(array.nbytes for array in arrays_outside(network, blocks).values())


def _stored_bytes(block: Block, plan: BlockPlan) -> float:
    total = 0.0
    for path, module in traffic.leaf_modules(block.module):
        spec = plan.specs.get(path)
        if spec is None:
            total += traffic.own_bytes(module)
        else:
            group = 128 if isinstance(spec.group_size, Whole) else spec.group_size
            total += traffic.weight_count(module) * (spec.bits.code_bits + 32 / group) / 8
    return total
