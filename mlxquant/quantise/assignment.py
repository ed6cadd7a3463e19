"""Give every layer its own width, so that a model of a wanted size predicts best.

Each layer is quantised in every candidate way on the float model's statistics, replicated siblings together, and
the error weighed by how much the model's predictions feel it (``sensitivity.py``): nats of divergence per token, which
add up over layers as long as they are small. ``budget.py`` then spends the bits. Siblings share their input's scales
where they are stored alike; where one of them is felt more, it may be worth scales of its own.
"""

import json
import time
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxquant.base.errors import BadValue
from mlxquant.base.storage import cache_dir, write_json
from mlxquant.codes.spec import Overrides
from mlxquant.codes.width import Width
from mlxquant.layers.dense import to_dense
from mlxquant.layers.traffic import weight_count
from mlxquant.model.loading import open_lazily
from mlxquant.quantise.assembly import gates, outside, stored_dtype
from mlxquant.quantise.blocks import quantise_trials
from mlxquant.quantise.budget import Option, at_every_price, choose
from mlxquant.quantise.calibration import Calibration
from mlxquant.quantise.job import Job, Progress
from mlxquant.quantise.sensitivity import expected_divergence, output_importance
from mlxquant.quantise.walk import float_walk, identity
from mlxquant.sources import checkpoint

WIDTHS = [{"bits": bits} for bits in (2, 3, 4, 5, 6, 8)]
REPLICATED = [{"bits": bits, "replicas": replicas} for bits, choices in
              ((1, (4, 8)), ("ternary", (2, 4, 8)), (2, (1, 2, 4, 8, 16)), (3, (2, 4, 8)), (4, (4,)))
              for replicas in choices]
_SEQUENCES = 16  # for the gradients: the whole model is in memory with their activations
_HEADER_BYTES = 300  # of a tensor's entry in a safetensors header, and its share of config.json


@dataclass(frozen=True)
class Target:
    """A size to meet: bits per weight of the body, or gigabytes of the whole folder (10⁹ bytes).

    ``alike`` gives replicated siblings one width, and so one dispatch: faster, and a little worse.
    """

    bits_per_weight: float | None = None
    gigabytes: float | None = None
    alike: bool = False

    def __post_init__(self):
        given = [value for value in (self.bits_per_weight, self.gigabytes) if value is not None]
        if len(given) != 1 or not given[0] > 0:
            raise BadValue("a target is one positive number: bits per weight, or gigabytes")


def assign(folder: Path, job: Job, tokens: Calibration, target: Target, progress: Progress) -> Job:
    """``job`` with a rule for every layer, such that the result meets ``target``.

    Layers that the job's own rules name keep what those say. The damages are
    kept in the cache, so another target costs nothing more. The first pass needs
    the whole model in memory as float32. Raises ``BadValue`` for a target below
    the smallest widths.
    """
    network, config = open_lazily(folder)
    options = _options(folder, job, tokens, progress)
    if target.alike:
        options = {paths: [way for way in ways if len(set(way.choice)) == 1] for paths, ways in options.items()}
    budget = _budget(network, config, folder, job, options, target)
    chosen = choose(options, budget)
    rules = tuple((path, dict(way)) for paths, option in chosen.items()
                  for path, way in zip(paths.split(","), option.choice) if job.overrides.spec_for(path) == job.spec)
    return replace(job, overrides=Overrides(job.spec, job.overrides.rules + rules))


def _options(folder: Path, job: Job, tokens: Calibration, progress: Progress) -> dict[str, list[Option]]:
    """The ways to store every layer, or replicated siblings (their paths joined by commas, the choice having one
    part for each), with the bits they take and the nats they cost."""
    plain = replace(job.spec, bits=Width.FOUR, replicas=4)  # what the ways vary plays no part
    setting = identity(folder, tokens.digest, plain.as_dict(), job.overrides.rules, job.seed, WIDTHS, REPLICATED, "apart")
    file = cache_dir("sensitivity", f"{setting[:16]}.json")
    if not file.exists():
        write_json(file, _measure(folder, job, tokens, progress))
    return {paths: [Option(tuple(tuple(way.items()) for way in choice), stored, damage)
                    for choice, stored, damage in ways] for paths, ways in json.loads(file.read_text()).items()}


def _measure(folder: Path, job: Job, tokens: Calibration, progress: Progress) -> dict[str, list[tuple]]:
    start = time.perf_counter()
    importance = output_importance(to_dense(open_lazily(folder)[0]),
                                   [mx.array(row[None]) for row in tokens.tokens[:_SEQUENCES]], job.seed)
    network, _ = open_lazily(folder)
    total, options = len(network.layers), {}
    for index, (block, seen) in enumerate(float_walk(network, folder, tokens)):
        prefix = f"model.layers.{index}"
        for paths, statistics in seen.siblings():
            for group in _together(paths, prefix, job):
                options |= _ways(block, prefix, group, statistics, importance, job)
        network.layers[index] = None
        progress(index + 1, total, time.perf_counter() - start)
    return options


def _together(paths: list[str], prefix: str, job: Job) -> list[list[str]]:
    """Siblings that share scales where they are stored alike: replicated ones of one spec; others each by itself."""
    kinds: dict = {}
    for path in paths:
        spec = job.overrides.spec_for(f"{prefix}.{path}")
        kinds.setdefault(spec if spec.method == "replica" else path, []).append(path)
    return list(kinds.values())


def _ways(block: nn.Module, prefix: str, paths: list[str], statistics, importance: dict[str, mx.array],
          job: Job) -> dict[str, list[tuple]]:
    """The siblings' ways by their joined paths: all alike, or each in its own at one price per bit.

    What a sibling costs by itself is taken from the fit of all together, whose scales serve it a little worse.
    """
    full = [f"{prefix}.{path}" for path in paths]
    spec, felt = job.overrides.spec_for(full[0]), [importance[path] for path in full]
    candidates = [{}] if spec != job.spec else REPLICATED if spec.method == "replica" else WIDTHS
    ends = list(accumulate(map(len, felt)))[:-1]
    single: list[list[Option]] = [[] for _ in paths]
    shared = []
    trials = quantise_trials(block, prefix, paths, [replace(spec, refine=0, **choice) for choice in candidates],
                             statistics, job.seed)
    for way, (error, hessian, own, common) in enumerate(trials):
        shared.append(common)
        for layer, bits, rows, weights in zip(single, own, mx.split(error, ends), felt):
            layer.append(Option(way, bits + common, expected_divergence(rows, hessian, weights)))
    found = {}
    for options in [*zip(*single), *at_every_price(single)]:
        ways = tuple(option.choice for option in options)
        twice = sum(shared[way] for way in ways) - sum(shared[way] for way in set(ways))
        found[ways] = ([candidates[way] for way in ways], sum(option.bits for option in options) - twice,
                       sum(option.damage for option in options))
    return {",".join(full): list(found.values())}


def _budget(network: nn.Module, config: dict, folder: Path, job: Job, options: dict[str, list[Option]],
            target: Target) -> float:
    """Bits that the layers may store together; raises ``BadValue`` where that is too few."""
    least = sum(min(option.bits for option in ways) for ways in options.values())
    if target.bits_per_weight is not None:
        modules = dict(network.named_modules())
        weights = sum(weight_count(modules[path]) for paths in options for path in paths.split(","))
        if target.bits_per_weight * weights < least:
            raise BadValue(f"the target is {target.bits_per_weight:g} bits per weight; with these groups the "
                           f"smallest widths take at least {least / weights:.4g} bits per weight")
        return target.bits_per_weight * weights
    fixed = _fixed_bytes(network, config, folder, job, options)
    if 8 * (target.gigabytes * 1e9 - fixed) < least:
        raise BadValue(f"the target is {target.gigabytes:g} GB; the smallest widths take at least "
                       f"{(fixed + least / 8) / 1e9:.4g} GB, {fixed / 1e9:.4g} of them outside the body")
    return 8 * (target.gigabytes * 1e9 - fixed)


def _fixed_bytes(network: nn.Module, config: dict, folder: Path, job: Job, options: dict) -> int:
    """Bytes of a result's folder beside the layers' weights, at most."""
    tensors, _, _ = outside(network, config, job)
    tensors |= gates(job, stored_dtype(network))
    inside = tuple(f"{path}." for paths in options for path in paths.split(","))
    loose = [array for path, array in tree_flatten(network.parameters())
             if ".layers." in path and not path.startswith(inside)]
    stored = sum(array.nbytes for array in [*tensors.values(), *loose])
    side = sum(map(len, checkpoint.side_files(folder).values()))
    return stored + side + _HEADER_BYTES * (len(tensors) + len(loose) + 4 * len(inside))
