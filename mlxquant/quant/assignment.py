"""Give every layer its own width, so that a model of a wanted size predicts best.

Each layer is quantised at every candidate width on the float model's
statistics, and the error weighed by how much the model's predictions feel it
(``sensitivity.py``): nats of divergence per token, which add up over layers as
long as they are small. ``budget.py`` then spends the bits.
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxquant import checkpoint
from mlxquant.errors import BadValue
from mlxquant.layers.dense import to_dense
from mlxquant.loading import open_lazily
from mlxquant.quant.assembly import outside
from mlxquant.quant.blocks import quantise_trial
from mlxquant.quant.budget import Option, choose
from mlxquant.quant.calibration import Calibration
from mlxquant.quant.job import Job, Progress
from mlxquant.quant.sensitivity import expected_divergence, output_importance
from mlxquant.quant.spec import Overrides
from mlxquant.quant.walk import float_walk, identity
from mlxquant.roofline.traffic import weight_count
from mlxquant.storage import cache_dir, write_json

CANDIDATES = (2, 3, 4, 5, 6, 8)
_SEQUENCES = 16  # for the gradients: the whole model is in memory with their activations
_HEADER_BYTES = 300  # of a tensor's entry in a safetensors header, and its share of config.json


@dataclass(frozen=True)
class Target:
    """A size to meet: bits per weight of the body, or gigabytes of the whole folder (10⁹ bytes)."""

    bits_per_weight: float | None = None
    gigabytes: float | None = None

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
    budget = _budget(network, config, folder, job, options, target)
    chosen = choose(options, budget)
    ruled = {path for path in options if job.overrides.spec_for(path) != job.spec}
    rules = tuple((path, {"bits": option.choice}) for path, option in chosen.items() if path not in ruled)
    return replace(job, overrides=Overrides(job.spec, job.overrides.rules + rules))


def _options(folder: Path, job: Job, tokens: Calibration, progress: Progress) -> dict[str, list[Option]]:
    """Every layer's widths with the bits they store and the nats they cost."""
    setting = identity(folder, tokens.digest, asdict(replace(job.spec, bits=4)), job.overrides.rules, job.seed)
    file = cache_dir("sensitivity", f"{hashlib.sha256(setting.encode()).hexdigest()[:16]}.json")
    if not file.exists():
        write_json(file, _measure(folder, job, tokens, progress))
    return {path: [Option(*way) for way in ways] for path, ways in json.loads(file.read_text()).items()}


def _measure(folder: Path, job: Job, tokens: Calibration, progress: Progress) -> dict[str, list[tuple]]:
    start = time.perf_counter()
    importance = output_importance(to_dense(open_lazily(folder)[0]),
                                   [mx.array(row[None]) for row in tokens.tokens[:_SEQUENCES]], job.seed)
    network, _ = open_lazily(folder)
    total, options = len(network.layers), {}
    for index, (block, seen) in enumerate(float_walk(network, folder, tokens)):
        prefix = f"model.layers.{index}"
        for paths, statistics in seen.siblings():
            for path in paths:
                options |= _ways(block, prefix, path, statistics, importance[f"{prefix}.{path}"], job)
        network.layers[index] = None
        progress(index + 1, total, time.perf_counter() - start)
    return options


def _ways(block: nn.Module, prefix: str, path: str, statistics, importance: mx.array, job: Job) -> dict:
    spec = job.overrides.spec_for(f"{prefix}.{path}")
    widths = CANDIDATES if spec == job.spec else [spec.bits]
    ways = []
    for bits in widths:
        trial = replace(spec, bits=bits, refine=0)
        error, hessian, stored = quantise_trial(block, prefix, path, trial, statistics, job.seed)
        ways.append((bits, stored, expected_divergence(error, hessian, importance)))
    return {f"{prefix}.{path}": ways}


def _budget(network: nn.Module, config: dict, folder: Path, job: Job, options: dict[str, list[Option]],
            target: Target) -> float:
    """Bits that the layers may store together; raises ``BadValue`` where that is too few."""
    least = sum(min(option.bits for option in ways) for ways in options.values())
    if target.bits_per_weight is not None:
        modules = dict(network.named_modules())
        weights = sum(weight_count(modules[path]) for path in options)
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
    inside = tuple(f"{path}." for path in options)
    loose = [array for path, array in tree_flatten(network.parameters())
             if ".layers." in path and not path.startswith(inside)]
    stored = sum(array.nbytes for array in [*tensors.values(), *loose])
    side = sum(map(len, checkpoint.side_files(folder).values()))
    return stored + side + _HEADER_BYTES * (len(tensors) + len(loose) + 4 * len(options))
