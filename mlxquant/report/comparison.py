"""The methods side by side on one model: quality, size, time and memory, by one protocol."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from mlxquant.base.errors import BadValue
from mlxquant.codes.spec import Whole
from mlxquant.codes.width import Width
from mlxquant.layers.transformed import ActivationSpec
from mlxquant.model.loading import LanguageModel, load
from mlxquant.quantise.job import Job, Made, Target
from mlxquant.quantise.pipeline import quantize
from mlxquant.report.divergence import Divergence, divergence
from mlxquant.report.figure import figure

if TYPE_CHECKING:  # these need lm-eval
    from mlxquant.report.tasks import BuiltTask, Score

_REPLICAS = dict(method="replica", rotation="online")
_EIGHT = dict(method="smoothquant", group_size=Whole.ROW, activation=ActivationSpec())
_ROTATED = _EIGHT | dict(rotation="online", propagation="float")
_TENSOR = _EIGHT | dict(activation=ActivationSpec(granularity="tensor"))
# A row's name → what its ``Job`` has beside what all rows have in common. "mixed" stands for a
# budget of as many bits as uniform widths would take.
METHODS: dict[str, dict[str, Any]] = {
    "rtn": dict(method="rtn"),
    "awq": dict(method="awq"),
    "gptq": dict(method="gptq"),
    "gptq-corrected": dict(method="gptq", propagation="corrected"),
    "gptq-plain": dict(method="gptq", act_order=False, refine=0),
    "gptq-float": dict(method="gptq", propagation="float"),
    "gptq-fast": dict(method="gptq", propagation="float", refine=0),
    "gptq-mixed": dict(method="gptq", mixed=True),
    "gptq-rotated": dict(method="gptq", rotation="online"),
    "gptq-rotated-corrected": dict(method="gptq", rotation="online", propagation="corrected"),
    "gptq-fused": dict(method="gptq", rotation="fused"),
    "w8a16": _EIGHT | dict(alpha=0.0, activation=ActivationSpec(bits=16)),
    "w8a8": _EIGHT | dict(alpha=0.0),
    "smoothquant": _EIGHT | dict(alpha=0.5),
    "smoothquant-searched": _EIGHT,
    "w8a8-rotated": _ROTATED | dict(alpha=0.0),
    "smoothquant-rotated": _ROTATED | dict(alpha=0.5),
    "w8a8-tensor": _TENSOR | dict(alpha=0.0),
    "smoothquant-tensor": _TENSOR | dict(alpha=0.5),
}
for _k in (1, 2, 4, 8, 16):
    METHODS[f"replica-{_k}"] = _REPLICAS | dict(replicas=_k)
    METHODS[f"replica-{_k}-corrected"] = METHODS[f"replica-{_k}"] | dict(propagation="corrected")
for _k, _g in ((4, 16), (8, 16), (8, 32), (16, 32)):
    METHODS[f"replica-{_k}-g{_g}-corrected"] = (
        METHODS[f"replica-{_k}-corrected"] | dict(replica_group=_g))


@dataclass(frozen=True)
class Evaluation:
    """What every row is measured on: the first ``windows`` (None: all) of ``context`` tokens of a
    text (a string, or a file's path), and ``tasks``."""

    text: str | Path
    context: int = 1024
    windows: int | None = None
    tasks: "Sequence[BuiltTask]" = ()


@dataclass(frozen=True)
class ComparedRow:
    """One method at one width; a value that does not apply is None."""

    method: str
    bits: int | str | None
    group_size: int | None
    rotated: bool
    replicas: int | None
    replica_group: int | None
    bits_per_weight: float
    file_bytes: int
    perplexity: float
    kl_mean: float
    top1_agreement: float
    seconds: float | None
    peak_memory_gb: float | None
    tasks: "Sequence[Score]" = ()


def compare(name: str, evaluation: Evaluation, *, methods: list[str], bits: list[Width],
            job: Job | None = None, original: bool = True,
            progress: Callable[[str], None] = lambda *_: None) -> Iterator[ComparedRow]:
    """Yield a row for the original, unless not asked for, and one for every method and width.

    All run densely in float32, so that rows differ by their weights alone. ``job`` says what the
    methods have in common, such as calibration text and group size. Activation-quantising methods
    run at 8 bits only, per channel. Raises ``BadValue`` for a method that is not known, cannot have
    a width or would have none.
    """
    asked = _asked(methods, bits, job or Job())
    teacher = load(name, dense=True)
    known = [task.answered(teacher) for task in evaluation.tasks]

    def measured(model: LanguageModel) -> "tuple[Divergence, list[Score]]":
        return (divergence(model, teacher, evaluation.text, context=evaluation.context,
                           windows=evaluation.windows),
                [answers.task.answered(model).score(answers) for answers in known])

    if original:
        progress(f"{name} itself")
        yield _row("original", *measured(teacher))
    with tempfile.TemporaryDirectory(prefix="mlxquant-") as scratch:
        for method, own in asked:
            width = own.spec.bits
            progress(f"{method} at {width} bits")
            folder = Path(scratch, f"{method}-{width}")
            made = quantize(name, folder, own)
            yield _row(method, *measured(load(str(folder), dense=True)), own, made)
            mx.clear_cache()
            shutil.rmtree(folder)


def _asked(methods: list[str], bits: list[Width], common: Job) -> list[tuple[str, Job]]:
    """Every method with each of the widths that it runs at, width by width."""
    asked = []
    for width, method in product(bits, methods):
        if method not in METHODS:
            raise BadValue(f"no method {method!r}; allowed are {', '.join(METHODS)}")
        if width is Width.EIGHT or "activation" not in METHODS[method]:
            try:
                asked.append((method, _job(method, width, common)))
            except BadValue as error:
                raise BadValue(f"{method}: {error}") from error
    for method in methods:
        if method not in dict(asked):
            raise BadValue(f"{method}: bits is {', '.join(map(str, bits))}, allowed is 8")
    return asked


def _job(method: str, width: Width, common: Job) -> Job:
    """What a method asks of ``quantize`` at one width."""
    settings = METHODS[method] | {"bits": width}
    mixed = settings.pop("mixed", False)
    asked = common.changed(**settings)
    return asked if not mixed else asked.changed(
        target=Target(width.code_bits + 32 / asked.spec.group_for(1 << 20)))


def _row(method: str, quality: Divergence, scores: "Sequence[Score]", job: Job | None = None,
         made: Made | None = None) -> ComparedRow:
    """A row of what was measured, asked and made; only the original's has no ``job``."""
    spec: dict[str, Any] = job.spec.as_dict() if job else {
        "bits": None, "group_size": None, "rotation": None}
    replicated = spec if spec.get("method") == "replica" else {}
    measured = ("bits_per_weight", "file_bytes", "perplexity", "kl_mean", "top1_agreement")
    return ComparedRow(method, spec["bits"], spec["group_size"], spec["rotation"] is not None,
                       replicas=replicated.get("replicas"),
                       replica_group=replicated.get("replica_group"),
                       **{key: getattr(quality, key) for key in measured},
                       seconds=made.seconds if made else None,
                       peak_memory_gb=made.peak_memory / 1e9 if made else None, tasks=scores)


def table(rows: list[ComparedRow]) -> list[list[str]]:
    """The rows as text for a table, its head first."""
    def shown(value: float | str | None, form: str) -> str:
        return "" if value is None else format(value, form)

    def share(value: float | None, error: float | None) -> str:
        return shown(None if value is None else 100 * value, ".1f") + (
            "" if error is None else f" ± {100 * error:.1f}")

    heads = [head for score in rows[0].tasks for head in (f"{score.task} %", "same %")]
    return [["method", "bits", "group", "bits/weight", "MB", "perplexity", "KL", "top-1", "s",
             "peak GB", *heads], *(
        [r.method, shown(r.bits, ""), shown(r.group_size, "d"), f"{r.bits_per_weight:.2f}",
         f"{r.file_bytes / 1e6:.1f}", f"{r.perplexity:,.2f}", f"{r.kl_mean:.4f}",
         f"{100 * r.top1_agreement:.1f} %", shown(r.seconds, ".0f"), shown(r.peak_memory_gb, ".2f"),
         *(cell for s in r.tasks for cell in (share(s.accuracy, s.accuracy_stderr),
                                              share(s.agreement, s.agreement_stderr)))]
        for r in rows)]


def plot(rows: list[ComparedRow], path: Path) -> None:
    """Draw perplexity over whole-folder bytes, a line for each method, into a PNG or SVG file."""
    with figure(path, (7, 4.5)) as (axes,):
        for method in dict.fromkeys(r.method for r in rows):
            points = sorted((r.file_bytes / 1e6, r.perplexity) for r in rows if r.method == method)
            axes.plot(*zip(*points), marker="o", label=method)
        axes.set(xlabel="whole folder, MB", ylabel="perplexity (log)", yscale="log")
