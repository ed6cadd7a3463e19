"""Which quantised form of a model to make for a machine: what fits, how fast, how good, and the command.

Sizes come from the network that the configuration builds, with the very layers that would run; speed from
``predict.py``, or as a ceiling where nobody's measurements cover the chip; quality from measurements only.
"""

import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import mlx.nn as nn

from mlxquant.base.errors import BadValue
from mlxquant.codes.spec import ReplicaShape
from mlxquant.codes.width import Width
from mlxquant.layers import outline, traffic
from mlxquant.layers.blocks import held_bytes
from mlxquant.machine import chips, lanes, system
from mlxquant.machine.chips import Chip
from mlxquant.machine.memory import DENSE_SHARE, memory_limit, parse_size
from mlxquant.machine.replica_limits import ReplicaLimits
from mlxquant.report.bench import CHUNK
from mlxquant.report.predict import Prediction, predict, working_set
from mlxquant.report.quality import lookup
from mlxquant.runtime import probe
from mlxquant.sources.names import config_of

AFFINE = ((8, 64), (6, 64), (5, 64), (4, 64), (4, 128), (3, 64), (3, 128), (2, 64), (2, 128))
REPLICATED = tuple((bits, k, g) for bits in (4, 3, 2, "ternary", 1) for k, g in ((2, 0), (4, 0), (8, 16)))
KV_BITS = (16, 8, 4)
_AS_GOOD = 1.02  # times the best perplexity: then the faster is recommended


@dataclass(frozen=True)
class Row:
    """One way to hold the model, with one format of keys and values. None where a value is not known.

    ``quality`` is the perplexity over the original's. ``tps`` is for one sequence at the full context,
    predicted or, where ``tps_source`` says "ceiling", what bandwidth allows at most. ``free_replicas``
    says whether the replicas cost less than 5 % on this machine, as measured.
    """

    method: str
    bits: int | str
    replicas: int | None
    group: int | None
    kv_bits: int
    bits_per_weight: float
    file_bytes: int
    kv_bytes: int
    total_bytes: int
    bytes_per_token: float
    fits: bool
    tps: float | None
    tps_source: str | None
    free_replicas: bool | None
    quality: float | None
    quality_source: str | None
    quality_rank: int | None
    command: str | None


@dataclass(frozen=True)
class Plan:
    """Rows from the most to the fewest bits, and the one to take, None where nothing fits."""

    model: str
    parameters: int
    context: int
    memory_bytes: int
    machine: str
    rows: list[Row]
    recommended: Row | None
    remarks: list[str]

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class _Target:
    """The machine planned for. ``chip`` is None where nothing predicts its speed; then ``ceiling`` does."""

    name: str
    memory: int
    chip: Chip | None
    ceiling: float | None
    dense: bool
    limits: ReplicaLimits | None


def plan(name: str, *, config: dict | None = None, memory: str | None = None, chip: str | None = None,
         context: int = 8192, min_tps: float = 0.0, revision: str | None = None) -> Plan:
    """Plan for the model called ``name``, or of ``config``, on this machine or on a chip of the table.

    ``memory`` is that of the machine, such as "16GB", of which macOS lets a model take a part;
    the default is the largest sold with ``chip``, or what this machine recommends. Nothing but a
    configuration is read. Raises ``BadValue`` and what ``config_of`` and ``network_of`` raise.
    """
    if context < 1 or min_tps < 0:
        raise BadValue(f"context is {context} and min-tps {min_tps:g}; allowed are at least 1 and 0")
    config = config_of(name, revision=revision) if config is None else config
    target, remarks = _target(chip, memory)
    original = outline.network_of(outline.unquantised(config))
    rows = list(_rows(name, config, original, target, context, remarks))
    rows.sort(key=lambda row: (-row.bits_per_weight, -row.kv_bits))
    return Plan(name, traffic.parameters(original), context, target.memory, target.name, rows,
                recommend(rows, min_tps), remarks)


def predict_model(config: dict, chip: Chip, depth: int = 0) -> Prediction:
    """The speed of a model, as its configuration stores it, on a chip with ``depth`` tokens in the context."""
    network, original = outline.network_of(config), outline.network_of(outline.unquantised(config))
    kv = outline.kv_bytes(original, depth) if depth else 0
    return predict(chip, bytes_per_token=traffic.weight_bytes(network) + kv,
                   total_bytes=held_bytes(network) + kv, layers=len(network.layers),
                   weights=traffic.operations_per_token(original) / 2, cost=_stored_form(config)[-1])


def recommend(rows: list[Row], min_tps: float = 0.0) -> Row | None:
    """The fastest row whose expected perplexity is within 2 % of the best, of those that fit, are fast
    enough and do not slow down by their replicas. Qualities are compared only where they come from
    one kind of source: this model's, else another's, else published ones."""
    able = [row for row in rows if row.fits and row.free_replicas is not False
            and (not min_tps or (row.tps or 0) >= min_tps)]
    for rank in (0, 1, 2):
        known = [row for row in able if row.quality is not None and row.quality_rank in (None, rank)]
        if any(row.quality_rank == rank for row in known) or (known and rank == 2):
            best = min(row.quality for row in known)
            close = [row for row in known if row.quality <= _AS_GOOD * best]
            return max(close, key=lambda row: (row.kv_bits, row.tps or 0, -row.total_bytes))
    return None


def _rows(name: str, config: dict, original: nn.Module, target: _Target, context: int,
          remarks: list[str]) -> Iterator[Row]:
    kv = {bits: outline.kv_bytes(original, context, bits) for bits in KV_BITS}
    kv = {bits: size for bits, size in kv.items() if bits == 16 or size < kv[16]}
    base = Row("original", 16, None, None, kv_bits=16, bits_per_weight=16.0, file_bytes=0, kv_bytes=0, total_bytes=0,
               bytes_per_token=0, fits=False, tps=None, tps_source=None, free_replicas=None, quality=1.0,
               quality_source="the original", quality_rank=None, command=None)
    weights = traffic.operations_per_token(original) / 2

    def ways(row: Row, network: nn.Module, cost: lanes.Cost) -> Iterator[Row]:
        row = replace(row, file_bytes=held_bytes(network),
                      bits_per_weight=traffic.body_bits_per_weight(network))
        held, read = _when_loaded(network, config, target)
        held += _workspace(network)
        for bits, size in kv.items():
            size *= 2 if target.dense and bits == 16 else 1
            filled = replace(row, kv_bits=bits, kv_bytes=size, bytes_per_token=read + size, total_bytes=held + size,
                             fits=held + size <= target.memory)
            yield _timed(filled, target, len(network.layers), weights, cost)

    yield from ways(base, original, lanes.stock(16))
    if "quantization" in config:
        bits, replicas, group, cost = _stored_form(config)
        yield from ways(replace(base, method="as stored", bits=bits, replicas=replicas, group=group, quality=None,
                                quality_source=None), outline.network_of(config), cost)
    if reason := outline.check(original):
        remarks.append(reason)
        return
    for bits, group in AFFINE:
        try:
            network = outline.affine(config, bits, group)
        except ValueError:  # a group that does not divide some layer's inputs
            continue
        yield from ways(_judged(name, replace(base, method="affine", bits=bits, group=group)), network,
                        lanes.stock(bits))
    for bits, replicas, group in REPLICATED:
        try:
            network = outline.replicated(config, ReplicaShape(Width.of(bits), replicas, group))
        except BadValue:
            continue
        row = _judged(name, replace(base, method="replicas", bits=bits, replicas=replicas, group=group))
        free = target.limits.free(bits, replicas, group) if target.limits else None
        yield from ways(replace(row, free_replicas=free), network, lanes.replicated(bits, replicas, group))


def _stored_form(config: dict) -> tuple[int | str, int | None, int | None, lanes.Cost]:
    """Bits, replicas, group and cost of most of a stored model's weights."""
    for entry in config.get("mlxquant", {}).get("replicas", {}).values():
        shape = entry["bits"], entry["replicas"], entry["replica_group"]
        return *shape, lanes.replicated(*shape)
    stored = config.get("quantization", {"bits": 16, "group_size": None})
    return stored["bits"], None, stored["group_size"], lanes.stock(stored["bits"])


def _judged(name: str, row: Row) -> Row:
    """The row with what is known of its quality, and the command that makes it."""
    known = lookup(name, row.bits, row.replicas, row.group)
    default = "--method gptq" if row.replicas is None else (
        f"--method replica --replicas {row.replicas} --replica-group {row.group} --rotate")
    parts = [known[0].flags if known else default]
    if row.replicas is None:
        parts.append(f"--group-size {row.group}")
    label = f"{row.bits}" if row.bits == "ternary" else f"{row.bits}bit"
    base = Path(name).name.removesuffix(".gguf").removesuffix(".json")
    folder = f"{base}-{label}" + (f"-k{row.replicas}" if row.replicas else "")
    source = "MODEL" if name.endswith(".json") else shlex.quote(name)
    command = (f"mlxquant quantize {source} -o {shlex.quote(folder)} --bits {row.bits} {' '.join(parts)} "
               f"--embedding-bits {outline.EMBEDDING['bits']}")
    quality = dict(quality=known[0].ratio, quality_source=known[0].source, quality_rank=known[0].rank) if known else \
        dict(quality=None, quality_source=None, quality_rank=None)
    return replace(row, command=command, **quality)


def _when_loaded(network: nn.Module, config: dict, target: _Target) -> tuple[int, int]:
    """Bytes of weights held and read for a token: a plain CPU expands them to float32, where that fits."""
    if target.dense and (dense := traffic.dense_bytes(network)) <= DENSE_SHARE * target.memory:
        return dense, traffic.weight_bytes(network, dense=True)
    return held_bytes(network), traffic.weight_bytes(network)


def _timed(row: Row, target: _Target, layers: int, weights: float, cost: lanes.Cost) -> Row:
    if target.chip is not None:
        speed = predict(target.chip, bytes_per_token=row.bytes_per_token, total_bytes=row.total_bytes,
                        layers=layers, weights=weights, cost=cost)
        return replace(row, tps=speed.tps, tps_source="predicted")
    if target.ceiling is not None:
        return replace(row, tps=1e9 * target.ceiling / row.bytes_per_token, tps_source="ceiling")
    return row


def _workspace(network: nn.Module) -> int:
    """Bytes of activations while a prompt's chunk is processed, an estimate: three of the widest layer's outputs."""
    rows = (module.shape[0] if hasattr(module, "shape") else module.weight.shape[0]
            for block in network.layers for _, module in traffic.leaf_modules(block) if traffic.weight_count(module))
    return 3 * 2 * CHUNK * max(rows)


def _target(chip: str | None, memory: str | None) -> tuple[_Target, list[str]]:
    """The machine, and what was assumed of it: this one, or a Mac or GPU of which only memory or name are given."""
    found = chips.find(chip) if chip else chips.detect()
    apple = found.name.startswith("Apple ") and found.headline_gb_per_s is not None
    here = chip is None and (apple or memory is None)
    limit, remarks = _memory(found, memory) if chip or memory else (memory_limit(), [])
    limits = probe.replica_limits() if here else None
    if apple:
        return _Target(found.label, limit, found, None, False, limits), remarks
    if chip is None and memory is not None:
        return _Target("a Mac of any chip", limit, None, None, False, None), remarks
    remarks.append("tokens/s are a ceiling, not a prediction: bandwidth over bytes")
    ceiling = found.headline_gb_per_s if chip else probe.read_ceiling().gb_per_s
    return _Target(found.label, limit, None, ceiling, here and system.device() == "cpu", limits), remarks


def _memory(chip: Chip, memory: str | None) -> tuple[int, list[str]]:
    """Bytes that a model may take of a machine's memory, which is sold in units of 2^30 bytes."""
    size = parse_size(memory) / 1e9 if memory else chip.max_memory_gb
    if size is None:
        raise BadValue(f"the largest memory of {chip.label} is not known; allowed is --memory, e.g. 64GB")
    if chip.name.startswith("NVIDIA"):
        return int(size * 1e9), []
    limit = working_set(size * 2**30)
    return int(limit), [f"of {size:g} GB a model is taken to have {limit / 1e9:.1f} GB, macOS's usual share; a Mac "
                        "tells its own, and sysctl iogpu.wired_limit_mb changes it"]
