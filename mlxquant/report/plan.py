"""Which quantised form of a model to make for a machine: what fits, how fast, how good, and how.

Sizes come from the network that the configuration builds, with the very layers that would run;
speed from ``predict.py``, or as a ceiling where nobody's measurements cover the chip; quality from
measurements only.
"""

import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlxquant.base import checks
from mlxquant.base.errors import BadValue, MlxquantError, TooLarge
from mlxquant.codes.spec import Spec
from mlxquant.codes.width import Width
from mlxquant.layers import outline, traffic
from mlxquant.layers.blocks import blocks_or_itself, held_bytes, inside
from mlxquant.layers.prompt_step import MOST_SCORES
from mlxquant.layers.replicated import Replicated
from mlxquant.machine.chips import Chip
from mlxquant.quantise.job import Job
from mlxquant.quantise.rehearsal import planned
from mlxquant.report import lanes
from mlxquant.report.host import Host, host, memory_for
from mlxquant.report.needs import Model, Need, model_of, needs_of
from mlxquant.report.predict import Prediction, predict
from mlxquant.report.quality import lookup
from mlxquant.sources.names import config_of

AFFINE = ((8, 64), (6, 64), (5, 64), (4, 64), (4, 128), (3, 64), (3, 128), (2, 64), (2, 128))
REPLICATED = tuple((bits, k, g) for bits in (4, 3, 2, "ternary", 1)
                   for k, g in ((2, 0), (4, 0), (8, 16)))
_TOKENS = 256  # a context that is proposed is a multiple of it
_AS_GOOD = 1.02  # times the best perplexity: then the faster is recommended


@dataclass(frozen=True)
class Form:
    """A way to store the model, and what is known of it: perplexity over the original's, whether
    the replicas cost less than 5 % (measured here, or predicted for another chip), and the command
    that makes it."""

    method: str
    bits: int | str
    replicas: int | None = None
    group: int | None = None
    free_replicas: bool | None = None
    quality: float | None = None
    quality_source: str | None = None
    quality_rank: int | None = None
    command: str | None = None

    def label(self) -> str:
        if self.replicas:
            width = self.bits if self.bits == "ternary" else f"{self.bits} bit"
            stored = "as stored " if self.method == "as stored" else ""
            grouped = f" G={self.group}" if self.group else ""
            return f"{stored}{width}, K={self.replicas}{grouped}"
        group = f", groups of {self.group}" if self.group else ""
        return f"{self.method if self.method != 'affine' else ''} {self.bits} bit{group}".strip()


@dataclass(frozen=True, kw_only=True)
class PlanRow(Form):
    """A form with one format of keys and values. ``scores_bytes`` is what attention to the full
    context takes for a prompt's last chunk, besides. ``tps`` is for one sequence at the full
    context: predicted or, where ``tps_source`` says "ceiling", what bandwidth allows at most."""

    kv_bits: int
    bits_per_weight: float
    file_bytes: int
    kv_bytes: int
    scores_bytes: int
    total_bytes: int
    bytes_per_token: float
    fits: bool
    tps: float | None = None
    tps_source: str | None = None


@dataclass(frozen=True)
class Plan:
    """Rows from the most to the fewest bits, and the one to take, None where nothing fits.
    ``active_parameters`` are those that a token uses: of a mixture's experts only the chosen."""

    model: str
    parameters: int
    active_parameters: int
    context: int
    memory_bytes: int
    machine: str
    rows: list[PlanRow]
    recommended: PlanRow | None
    remarks: list[str]


def plan(name: str | PathLike[str], *, config: dict[str, Any] | None = None,
         memory: str | None = None, chip: str | None = None, context: int = 8192,
         min_tps: float = 0.0, revision: str | None = None) -> Plan:
    """Plan for the model called ``name``, or of ``config``, on this machine or on a known chip.

    ``memory`` is that of the machine, such as "16GB"; the default is the largest sold with
    ``chip``, or what this machine recommends. Nothing but a configuration is read. Raises
    ``BadValue`` and what ``config_of`` and ``network_of`` raise.
    """
    if context < 1 or min_tps < 0:
        raise BadValue(f"context is {context} and min-tps {min_tps:g}; "
                       "allowed are at least 1 and 0")
    name = checks.path("model", name)
    config = config_of(name, revision=revision) if config is None else config
    machine = host(chip, memory)
    model, remarks = model_of(name, config, context), list(machine.remarks)
    rows = [row for candidate in _candidates(model, config, machine, remarks)
            for row in _rows(*candidate, model, machine)]
    rows.sort(key=lambda row: (-row.bits_per_weight, -row.kv_bits))
    return Plan(name, traffic.parameters(model.original), traffic.active_parameters(model.original),
                context, machine.memory, machine.name, rows, recommend(rows, min_tps), remarks)


def predict_model(config: dict[str, Any], chip: Chip, depth: int = 0) -> Prediction:
    """The speed of a model, as its configuration stores it, on a chip behind ``depth`` tokens.
    Raises ``BadValue`` for a depth below 0."""
    checks.integer("depth", depth, 0)
    network, model = outline.network_of(config), model_of("", config, max(depth, 1))
    need = needs_of(network, model, Host(chip.label, 0, chip))[16]
    return _predicted(chip, need, model, _stored(network)[1])


def recommend(rows: list[PlanRow], min_tps: float = 0.0) -> PlanRow | None:
    """The fastest row whose expected perplexity is within 2 % of the best, of those that fit, are
    fast enough and do not slow down by their replicas. Qualities are compared only where they come
    from one kind of source: this model's, else another's, else published ones."""
    known = [(row.quality, row) for row in rows
             if row.fits and row.free_replicas is not False and row.quality is not None
             and (not min_tps or (row.tps or 0) >= min_tps)]
    first = min((row.quality_rank for _, row in known if row.quality_rank is not None), default=0)
    alike = [(quality, row) for quality, row in known if row.quality_rank in (None, first)]
    best = min((quality for quality, _ in alike), default=0)
    close = [row for quality, row in alike if quality <= _AS_GOOD * best]
    return max(close, key=lambda row: (row.kv_bits, row.tps or 0, -row.total_bytes), default=None)


def choose(result: Plan, rows: list[PlanRow], chip: str | None = None) -> PlanRow:
    """What ``recommend`` takes of those ``rows`` of a plan that can be made. Raises ``BadValue``
    where nothing is known of the quality of any, ``TooLarge`` where none fits."""
    if (row := recommend(rows)) is not None:
        return row
    known = [row for row in rows if row.quality is not None and row.free_replicas is not False]
    if not known:
        raise BadValue(f"none of the forms of {result.model} that were asked for has a measured "
                       "quality; `mlxquant plan` shows those that have")
    least = min(known, key=lambda row: row.total_bytes)
    kv, scores = max(least.kv_bytes, 1), least.scores_bytes
    left = result.memory_bytes - least.total_bytes + kv + scores
    share = left / (kv + scores)
    if 2 * share * scores <= MOST_SCORES:  # so few tokens are read in larger steps again
        share = (left - min(MOST_SCORES, 2 * scores)) / kv
    tokens = int(share * result.context) // _TOKENS * _TOKENS
    size = memory_for(least.total_bytes, chip)
    fitting = [f"--fit {size}GB"] * (size is not None) + [f"--fit-context {tokens}"] * (tokens > 0)
    raise TooLarge(
        f"nothing of {result.model} fits in {result.memory_bytes / 1e9:.2f} GB with "
        f"{result.context:,} tokens: {least.label()} with {least.kv_bits}-bit keys and values "
        f"takes {least.total_bytes / 1e9:.2f} GB; {' or '.join(fitting) or 'no machine'} would do")


def _candidates(model: Model, config: dict[str, Any], machine: Host,
                remarks: list[str]) -> Iterator[tuple[Form, nn.Module, lanes.Cost]]:
    """The forms to choose from, the network of each and what a weight costs; ``remarks`` gets why
    there are none of a kind."""
    yield (Form("original", 16, quality=1.0, quality_source="the original"), model.original,
           lanes.stock(16))
    if outline.quantization_of(config):
        network = outline.network_of(config)
        form, cost = _stored(network)
        yield form, network, cost
    made = [(Form("affine", bits, group=group), lanes.stock(bits),
             Spec(bits=Width.of(bits), group_size=group, method="rtn")) for bits, group in AFFINE]
    for shape in REPLICATED:
        free = machine.limits.free(*shape) if machine.limits else None
        spec = Spec(bits=Width.of(shape[0]), method="replica", rotation="online",
                    replicas=shape[1], replica_group=shape[2])
        made.append((Form("replicas", *shape, free), lanes.replicated(*shape), spec))
    for form, cost, spec in made:
        try:
            job = Job(spec, embedding_bits=_ends(form))
            yield _judged(model.name, form), planned(model.original, model.config, job), cost
        except BadValue:  # most layers cannot take it
            continue
        except MlxquantError as error:
            if str(error) not in remarks:
                remarks.append(str(error))


def _ends(form: Form) -> int:
    """Bits of embedding and head beside a body of this form. 6 cost 0.001 to 0.005 nats per token
    (``benchmarks/LOG.md``), which is little beside what a body of 4 bits or fewer costs."""
    return 8 if Width.of(form.bits).code_bits > 4 else 6


def _stored(network: nn.Module) -> tuple[Form, lanes.Cost]:
    """The form that most of the weights that the blocks use for a token are stored in, and what one
    of them costs."""
    used: Counter[Form] = Counter()
    paths = inside(blocks_or_itself(network))
    for part in traffic.parts(network):
        if part.path.startswith(paths) and (weights := traffic.weight_count(part.module)):
            used[_form_of(part.module)] += round(part.passes * part.share() * weights)
    (form, _), = used.most_common(1)
    return form, (lanes.replicated(form.bits, form.replicas, form.group or 0) if form.replicas
                  else lanes.stock(int(form.bits)))


def _form_of(layer: nn.Module) -> Form:
    if isinstance(layer, Replicated):
        shape = layer.input.spec
        return Form("as stored", shape.bits.value, shape.replicas, shape.replica_group)
    quantised = hasattr(layer, "mode")  # other groups than MLX's are expanded
    return Form("as stored", layer.bits if quantised else 16,
                group=layer.group_size if quantised else None)


def _judged(name: str, form: Form) -> Form:
    """The form with what is known of its quality, and the command that makes it."""
    known = lookup(name, form.bits, form.replicas, form.group)
    flags = known.flags if known else "--method gptq" if form.replicas is None else (
        f"--method replica --replicas {form.replicas} --replica-group {form.group} --rotate")
    if form.replicas is None:
        flags += f" --group-size {form.group}"
    folder = Path(name).name.removesuffix(".gguf").removesuffix(".json") + (
        f"-{form.bits}" + "bit" * (form.bits != "ternary"))
    folder += f"-k{form.replicas}" if form.replicas else ""
    source = "MODEL" if name.endswith(".json") else shlex.quote(name)
    form = replace(form, command=f"mlxquant quantize {source} -o {shlex.quote(folder)} "
                                 f"--bits {form.bits} {flags} --embedding-bits {_ends(form)}")
    return form if known is None else replace(
        form, quality=known.ratio, quality_source=known.source, quality_rank=known.rank)


def _rows(form: Form, network: nn.Module, cost: lanes.Cost, model: Model,
          machine: Host) -> Iterator[PlanRow]:
    """A form with each format of keys and values."""
    stored, width = held_bytes(network), traffic.body_bits_per_weight(network)
    for bits, need in needs_of(network, model, machine).items():
        tps = source = None
        if machine.chip is not None:
            source, tps = "predicted", _predicted(machine.chip, need, model, cost).tps
        elif machine.ceiling is not None:
            source, tps = "ceiling", 1e9 * machine.ceiling / need.moved
        yield PlanRow(**vars(form), kv_bits=bits, bits_per_weight=width, file_bytes=stored,
                      kv_bytes=need.kv, scores_bytes=need.scores, total_bytes=need.total,
                      bytes_per_token=need.moved, fits=need.total <= machine.memory, tps=tps,
                      tps_source=source)


def _predicted(chip: Chip, need: Need, model: Model, cost: lanes.Cost) -> Prediction:
    return predict(chip, bytes_per_token=need.moved, total_bytes=need.total, layers=model.layers,
                   weights=model.weights, cost=cost)
