"""Give every layer its own width, so that a model of a wanted size predicts best.

Each layer is quantised in every candidate way on the float model's statistics, replicated siblings
together. The error is converted into its effect on the model's predictions (``sensitivity.py``):
nats of divergence per token, which add up over layers as long as they are small. ``budget.py``
then spends the bits. Siblings share their input's scales where they are stored alike; where the
predictions depend more on one of them, it may be worth scales of its own.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxquant.base.errors import BadValue
from mlxquant.base.storage import cache_dir, cached, if_writable, recalled, write_json
from mlxquant.codes.spec import Spec
from mlxquant.layers.blocks import Block, release, shape_of
from mlxquant.layers.dense import lazily_dense
from mlxquant.layers.siblings import find_siblings
from mlxquant.layers.traffic import body_bits
from mlxquant.model.original import open_original
from mlxquant.quantise import ends
from mlxquant.quantise.assembly import blocks_of, outside
from mlxquant.quantise.budget import Option, at_every_price, choose
from mlxquant.quantise.calibration import Calibration
from mlxquant.quantise.job import Job, Progress, Target
from mlxquant.quantise.methods import METHODS, treatment
from mlxquant.quantise.observe import Observation, linears
from mlxquant.quantise.plans import STACKS, BlockPlan, inputs_of, plan_blocks
from mlxquant.quantise.sensitivity import output_importance
from mlxquant.quantise.shelf import Shelf
from mlxquant.quantise.trials import Trial, stored_bits
from mlxquant.quantise.walk import batch_size, float_walk, identity
from mlxquant.sources import checkpoint
from mlxquant.sources.checkpoint import KnownFolder

Way = dict[str, Any]  # the fields of a layer's spec that it changes
AFFINE_WAYS: list[Way] = [{"bits": bits} for bits in (2, 3, 4, 5, 6, 8)]
REPLICA_WAYS: list[Way] = [{"bits": bits, "replicas": replicas} for bits, choices in (
    (1, (4, 8)), ("ternary", (2, 4, 8)), (2, (1, 2, 4, 8, 16)), (3, (2, 4, 8)), (4, (4,)))
    for replicas in choices]
_SEQUENCES = 16  # for the gradients
_HEADER_BYTES = 300  # of a tensor's entry in a safetensors header, and its share of config.json

Ways = dict[str, list[tuple[Any, float, float]]]  # by joined paths: choice, bits, damage


def assign(source: KnownFolder, job: Job, tokens: Calibration, progress: Progress) -> Job:
    """``job`` with a rule for every layer, such that the result meets its target; where that is a
    folder's size, with a width for embedding and head, too, unless it has one.

    Layers that match the job's own rules follow these. The measured damages are cached, so another
    target needs no new measurement. Raises ``BadValue`` for a target below the smallest widths.
    """
    if job.target is None:
        return job
    measure = _Measure(source, job, tokens)
    options = measure.options(progress)
    if job.target.alike:
        options = {paths: [way for way in ways if len(set(way.choice)) == 1]
                   for paths, ways in options.items()}
    width, chosen = measure.spend(options, job.target)
    rules = tuple((path, dict(way)) for paths, option in chosen.items()
                  for path, way in zip(paths.split(","), option.choice) if way)
    return replace(job, rules=job.rules + rules, embedding_bits=width)


@dataclass
class _Measure:
    """A model, opened lazily, whose layers are tried in every way."""

    source: KnownFolder
    job: Job
    tokens: Calibration

    def __post_init__(self) -> None:
        self.folder = self.source.folder
        self.network, self.config = open_original(self.folder)
        self.blocks = blocks_of(self.network)
        self.plans = plan_blocks(self.network, self.blocks, self.job)

    @cached_property
    def _side(self) -> int:
        """Bytes of the files beside weights and configuration."""
        return sum(map(len, checkpoint.side_files(self.folder).values()))

    def options(self, progress: Progress) -> dict[str, list[Option]]:
        """The ways to store every layer, or siblings (their paths joined by commas, the choice
        having one part for each), with the bits they take and the nats they cost."""
        specs = [(plan.specs, sorted(plan.fixed)) for plan in self.plans]
        setting = identity(self.folder, self.tokens.digest, specs, self.job.seed, AFFINE_WAYS,
                           REPLICA_WAYS, "apart, by block")
        file = cache_dir("sensitivity", f"{setting[:16]}.json")
        known: dict[str, Ways] = recalled(file) or {}
        if len(known) < len(self.blocks):
            self._measure(known, file, progress)
        return {paths: [Option(tuple(tuple(way.items()) for way in choice), stored, damage)
                        for choice, stored, damage in ways]
                for weighed in known.values() for paths, ways in weighed.items()}

    def _measure(self, known: dict[str, Ways], file: Path, progress: Progress) -> None:
        """Weigh the blocks, by their numbers, that are not ``known`` yet, each kept in ``file`` as
        soon as it is."""
        start, importance = time.perf_counter(), self._importance()
        network, _ = open_original(self.folder)
        blocks = blocks_of(network)
        walk = float_walk(network, blocks, self.folder, self.tokens, Shelf(),
                          done=lambda index: str(index) in known)
        for done, (index, seen) in enumerate(walk, 1):
            block, plan = blocks[index], self.plans[index]
            if str(index) not in known:
                found = Ways()
                for trial, ways in self._trials(block, plan, seen) if seen else ():
                    found |= self._ways(trial, ways, importance)
                self.source.check()
                known[str(index)] = found
                with if_writable():
                    write_json(file, known)
            if seen:
                seen.statistics.clear()  # before those of the next block are taken
            release(block.module)
            progress(done, len(blocks), time.perf_counter() - start, "weighing")

    def _importance(self) -> dict[str, mx.array]:
        batches = self.tokens.rows(batch_size())[:_SEQUENCES // batch_size()]
        return output_importance(lambda: lazily_dense(open_original(self.folder)[0]),
                                 list(map(mx.array, batches)), self.job.seed)

    def _trials(self, block: Block, plan: BlockPlan,
                seen: Observation) -> Iterator[tuple[Trial, list[Way]]]:
        """What is weighed together, and in which ways: replicated siblings of one spec, which share
        scales where they are stored alike; others each by itself. What is fixed has one way, which
        changes nothing."""
        modules = linears(block.module)
        for paths, statistics in seen.siblings():
            kinds: dict[tuple[Spec, bool, str], list[str]] = {}
            for path in filter(plan.specs.__contains__, paths):
                spec = plan.specs[path]
                alone = "" if spec.method == "replica" else path
                kinds.setdefault((spec, path in plan.fixed, alone), []).append(path)
            for (spec, fixed, _), alike in kinds.items():
                yield (Trial(block, alike, spec, statistics, self.job.seed),
                       [{}] if fixed else _allowed(spec, inputs_of(modules[alike[0]])))

    def _ways(self, trial: Trial, ways: list[Way], importance: dict[str, mx.array]) -> Ways:
        """The ways to store siblings, by their joined paths: the same of ``ways`` for all siblings
        or one for each, chosen at a common price per bit. A sibling's damage is measured in the
        fit of all together, whose scales suit it less well."""
        felt = [importance[path] for path in trial.full()]
        single: list[list[Option]] = [[] for _ in trial.paths]
        shared = []
        for way, (stored, common, damages) in enumerate(trial.results(ways, felt)):
            shared.append(common)
            for layer, bits, damage in zip(single, stored, damages):
                layer.append(Option(way, bits + common, damage))
        found = {}
        for options in [*zip(*single), *at_every_price(single)]:
            chosen = tuple(option.choice for option in options)
            twice = sum(shared[w] for w in chosen) - sum(shared[w] for w in set(chosen))
            found[chosen] = ([ways[w] for w in chosen], sum(o.bits for o in options) - twice,
                             sum(o.damage for o in options))
        return {",".join(trial.full()): list(found.values())}

    def spend(self, options: dict[str, list[Option]],
              target: Target) -> tuple[int | None, dict[str, Option]]:
        """(width of embedding and head, option of every layer) with the least total damage within
        the target; raises ``BadValue`` where nothing is small enough."""
        found: list[tuple[float, int | None, dict[str, Option]]] = []
        refusals: list[BadValue] = []
        for width, nats in self._ends(target):
            try:
                chosen = choose(options, self.budget(options, target, width))
            except BadValue as error:
                refusals.append(error)
                continue
            found.append((nats + sum(option.damage for option in chosen.values()), width, chosen))
        if not found:
            raise refusals[0]  # of the narrowest
        return min(found, key=lambda way: (way[0], way[1] is not None))[1:]

    def _ends(self, target: Target) -> list[tuple[int | None, float]]:
        """(width, nats that it costs) for each width in which embedding and head may be stored;
        None keeps them as they are. A fused rotation changes both: then no width is chosen."""
        if (target.gigabytes is None or self.job.embedding_bits is not None
                or self.job.spec.rotation == "fused"):
            return [(self.job.embedding_bits, 0.0)]
        setting = identity(self.folder, self.tokens.digest, ends.WIDTHS, "in groups that fit")
        file = cache_dir("sensitivity", f"{setting[:16]}.json")

        def measure() -> list[Any]:
            found = ends.divergences(self.folder, self.tokens.tokens)
            self.source.check()  # nothing else may be kept for it
            return found

        measured = cached(file, measure)
        return [*map(tuple, measured), (None, 0.0)]

    def budget(self, options: dict[str, list[Option]], target: Target,
               width: int | None) -> float:
        """Bits that the layers may store together where embedding and head have ``width`` bits;
        raises ``BadValue`` where that is too few."""
        least = sum(min(option.bits for option in ways) for ways in options.values())
        beside = self._beside(set(",".join(options).split(",")))
        if target.bits_per_weight is not None:
            kept, weights = body_bits(self.network, self._planned)
            left = target.bits_per_weight * weights - kept - beside
            if left < least:
                raise BadValue(f"the target is {target.bits_per_weight:g} bits per weight; with "
                               f"these groups the smallest widths take at least "
                               f"{(least + kept + beside) / weights:.4g} bits per weight")
            return left
        fixed, wanted = self._fixed_bytes(width) + beside / 8, target.gigabytes or 0.0
        if 8 * (wanted * 1e9 - fixed) < least:
            raise BadValue(f"the target is {wanted:g} GB; the smallest widths take at least "
                           f"{(fixed + least / 8) / 1e9:.4g} GB, {fixed / 1e9:.4g} of them outside "
                           "the body")
        return 8 * (wanted * 1e9 - fixed)

    @cached_property
    def _planned(self) -> dict[str, Spec]:
        """The specs of all layers, by their paths in the network."""
        return {block.full(path): spec for block, plan in zip(self.blocks, self.plans)
                for path, spec in plan.specs.items()}

    def _beside(self, weighed: set[str]) -> int:
        """Bits of layers that no text reaches, which stay as the job says; and of the scales of
        inputs that AWQ and SmoothQuant store where nothing before a layer can take them, at
        most."""
        modules, bits = dict(self.network.named_modules()), 0
        for path, spec in self._planned.items():
            if path not in weighed:
                bits += stored_bits(spec, shape_of(modules[path]))
            elif path in self._scaled and not isinstance(modules[path], STACKS):
                bits += 16 * inputs_of(modules[path])
        return bits

    @cached_property
    def _scaled(self) -> set[str]:
        """The layers beside which AWQ and SmoothQuant may store the scales of their input, as
        neither a norm nor a layer before them takes it from all siblings."""
        balanced = {path for path, spec in self._planned.items() if METHODS[spec.method].balance}
        taken = set[str]()
        for known in find_siblings(self.network) if balanced else ():
            specs = [self._planned.get(path) for path in known.paths]
            alike = len({spec and treatment(spec) for spec in specs}) == 1
            if alike and (known.norm or known.before):
                taken |= set(known.paths)
        return balanced - taken

    def _fixed_bytes(self, width: int | None) -> int:
        """Bytes of a result's folder beside the layers' weights, at most."""
        job = replace(self.job, embedding_bits=width)
        tensors = outside(self.network, self.config, job).tensors
        layers = tuple(f"{path}." for path in self._planned)
        held = {block.full(path): array for block in self.blocks
                for path, array in tree_flatten(block.module.parameters())}
        loose = [array for path, array in held.items() if not path.startswith(layers)]
        biases = [held[f"{layer}bias"] for layer in layers if f"{layer}bias" in held]
        stored = sum(array.nbytes for array in [*tensors.values(), *loose, *biases])
        return stored + self._side + _HEADER_BYTES * (len(tensors) + len(loose) + 4 * len(layers))


def _allowed(spec: Spec, inputs: int) -> list[Way]:
    """The ways for layers of so many inputs that have the job's ``spec``."""
    if spec.method != "replica":
        return AFFINE_WAYS
    return [way for way in REPLICA_WAYS if way["replicas"] <= inputs // (spec.replica_group or 1)]
