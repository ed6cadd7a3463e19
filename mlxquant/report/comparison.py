"""The methods side by side on one model: quality, size, time and memory, by one protocol."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.core as mx

from mlxquant.base.errors import BadValue
from mlxquant.codes.width import Width
from mlxquant.layers.transformed import ActivationSpec
from mlxquant.model.loading import LanguageModel, load
from mlxquant.quantise.job import Job, Target
from mlxquant.quantise.pipeline import quantize
from mlxquant.report.by_layer import check_plot
from mlxquant.report.divergence import divergence

_REPLICAS = dict(method="replica", rotation="online")
# A row's name → options of ``quantize``.
METHODS: dict[str, dict] = {
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
    "w8a16": dict(method="smoothquant", group_size=0, alpha=0.0, activation=ActivationSpec(bits=16)),
    "w8a8": dict(method="smoothquant", group_size=0, alpha=0.0, activation=ActivationSpec()),
    "smoothquant": dict(method="smoothquant", group_size=0, alpha=0.5, activation=ActivationSpec()),
    "smoothquant-searched": dict(method="smoothquant", group_size=0, activation=ActivationSpec()),
    "w8a8-rotated": dict(method="smoothquant", group_size=0, alpha=0.0, rotation="online",
                         propagation="float", activation=ActivationSpec()),
    "smoothquant-rotated": dict(method="smoothquant", group_size=0, alpha=0.5, rotation="online",
                                propagation="float", activation=ActivationSpec()),
    "w8a8-tensor": dict(method="smoothquant", group_size=0, alpha=0.0,
                        activation=ActivationSpec(granularity="tensor")),
    "smoothquant-tensor": dict(method="smoothquant", group_size=0, alpha=0.5,
                               activation=ActivationSpec(granularity="tensor")),
    **{f"replica-{k}": _REPLICAS | dict(replicas=k) for k in (1, 2, 4, 8, 16)},
    **{f"replica-{k}-corrected": _REPLICAS | dict(replicas=k, propagation="corrected")
       for k in (1, 2, 4, 8, 16)},
    **{f"replica-{k}-g{g}-corrected": _REPLICAS | dict(replicas=k, replica_group=g, propagation="corrected")
       for k, g in ((4, 16), (8, 16), (8, 32), (16, 32))},
}


@dataclass(frozen=True)
class Row:
    """One method at one width; a value that does not apply is None."""

    method: str
    bits: int | str
    group_size: int | None
    rotated: bool
    replicas: int | None
    replica_group: int | None
    tuned: bool
    bits_per_weight: float
    file_bytes: int
    perplexity: float
    kl_mean: float | None
    top1_agreement: float | None
    seconds: float | None
    peak_memory_gb: float | None


def check(methods: list[str]) -> None:
    """Raise ``BadValue`` for a method that is not known."""
    for name in methods:
        if name not in METHODS:
            raise BadValue(f"no method {name!r}; allowed are {', '.join(METHODS)}")


def compare(name: str, text: str | Path, *, methods: list[str], bits: list[Width],
            job: Job | None = None, context: int = 1024, windows: int | None = None,
            keep: Path | None = None, original: bool = True,
            progress: Callable[[str], None] = lambda *_: None) -> Iterator[Row]:
    """Yield a row for the original, unless not asked for, and one for every method and width.

    All run densely in float32, so that rows differ by their weights alone. The results go to
    ``keep``, or are deleted; ``job`` says what the methods have in common, such as calibration
    text and group size. Activation-quantising methods run at 8 bits only, per channel.
    """
    check(methods)
    teacher = load(name, dense=True)
    protocol = dict(context=context, windows=windows)
    if original:
        progress(f"{name} itself")
        yield _row("original", teacher, teacher, text, protocol, bits=16, group_size=None)
    with tempfile.TemporaryDirectory(prefix="mlxquant-") as scratch:
        for width in bits:
            for method in methods:
                settings = METHODS[method] | {"bits": width}
                if "activation" in settings and width is not Width.EIGHT:
                    continue
                mixed = settings.pop("mixed", False)
                asked = (job or Job()).changed(**settings)
                if mixed:  # as many bits as uniform widths would take
                    groups = 32 / asked.spec.group_for(1 << 20)
                    asked = asked.changed(target=Target(width.code_bits + groups))
                progress(f"{method} at {width} bits")
                folder = (keep or Path(scratch)) / f"{method}-{width}"
                made, spec = quantize(name, folder, asked), asked.spec.as_dict()
                student = load(str(folder), dense=True)
                replicated = spec["method"] == "replica"
                yield _row(method, student, teacher, text, protocol, bits=width.value,
                           group_size=spec["group_size"], rotated=spec["rotation"] is not None,
                           replicas=spec["replicas"] if replicated else None,
                           replica_group=spec["replica_group"] if replicated else None,
                           seconds=made.seconds, peak_memory_gb=made.peak_memory / 1e9)
                del student
                mx.clear_cache()
                if keep is None:
                    shutil.rmtree(folder)


def _row(method: str, student: LanguageModel, teacher: LanguageModel, text, protocol: dict, *,
         rotated: bool = False, replicas: int | None = None, replica_group: int | None = None,
         seconds: float | None = None, peak_memory_gb: float | None = None, **shape) -> Row:
    quality = divergence(student, teacher, text, **protocol)
    return Row(method=method, rotated=rotated, replicas=replicas, replica_group=replica_group, tuned=False,
               bits_per_weight=quality.bits_per_weight, file_bytes=quality.file_bytes,
               perplexity=quality.perplexity, kl_mean=quality.kl_mean,
               top1_agreement=quality.top1_agreement, seconds=seconds,
               peak_memory_gb=peak_memory_gb, **shape)


def table(rows: list[Row]):
    """The rows as a rich table."""
    from rich.table import Table

    view = Table("method", "bits", "group", "bits/weight", "MB", "perplexity", "KL", "top-1", "s",
                 "peak GB", box=None)
    for r in rows:
        view.add_row(r.method, str(r.bits), "" if r.group_size is None else str(r.group_size),
                     f"{r.bits_per_weight:.2f}", f"{r.file_bytes / 1e6:.1f}", f"{r.perplexity:,.2f}",
                     f"{r.kl_mean:.4f}", f"{100 * r.top1_agreement:.1f} %",
                     "" if r.seconds is None else f"{r.seconds:.0f}",
                     "" if r.peak_memory_gb is None else f"{r.peak_memory_gb:.2f}")
    return view


def plot(rows: list[Row], path: Path) -> None:
    """Draw perplexity over whole-folder bytes, a line for each method, into a PNG or SVG file."""
    check_plot(path)
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(r.method for r in rows):
        points = sorted((r.file_bytes / 1e6, r.perplexity) for r in rows if r.method == method)
        axes.plot(*zip(*points), marker="o", label=method)
    axes.set(xlabel="whole folder, MB", ylabel="perplexity (log)", yscale="log")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path)


def as_dicts(rows: list[Row]) -> list[dict]:
    return [asdict(row) for row in rows]
