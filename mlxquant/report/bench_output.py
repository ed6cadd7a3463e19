"""What ``bench`` measured: a table for people, JSON, JSON lines or CSV, and a roofline plot."""

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

from mlxquant.machine.chips import Chip
from mlxquant.report.bench import Record, fit_of


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "" if value is None else f"{value:,.{digits}f}{unit}"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def _rate(mean: float, spread: float | None) -> str:
    return f"{mean:,.2f}" + ("" if spread is None else f" ± {spread:.2f}")


_COLUMNS: dict[str, Callable[[Record], str]] = {
    "model": lambda r: r.model, "weights GB": lambda r: _number(r.weight_gb, 3),
    "params": lambda r: _count(r.parameters),
    "device": lambda r: r.device, "test": lambda r: r.test,
    "tokens/s": lambda r: _rate(r.tps_mean, r.tps_stdev),
    "first token ms": lambda r: _number(r.ttft_ms, 1),
    "MB/token": lambda r: _number(r.bytes_per_token / 1e6, 1),
    "GB/s": lambda r: _number(r.gb_per_s, 1),
    "of headline": lambda r: _number(r.percent_of_headline, 0, " %"),
    "of measured": lambda r: _number(r.percent_of_probe, 0, " %"),
    "fixed ms/token": lambda r: _number(r.fixed_ms_per_token, 2),
    "margin GB/s": lambda r: _number(r.marginal_gb_per_s, 0),
    "peak GB": lambda r: _number(r.peak_memory_gb, 2),
}


def markdown(records: list[Record]) -> str:
    """llama-bench's kind of table, then where it ran and each split of a token's time."""
    if not records:
        return ""
    rows = [[column(record) for column in _COLUMNS.values()] for record in records]
    shown = [i for i in range(len(_COLUMNS)) if any(row[i] for row in rows)]
    rule = ["---" if name in ("model", "device", "test") else "--:" for name in _COLUMNS]
    lines = [list(_COLUMNS), rule, *rows]
    text = ["| " + " | ".join(line[i] for i in shown) + " |" for line in lines]
    last = records[-1]
    ceilings = [f"{last.probe_gb_per_s:.1f} GB/s measured"]
    ceilings += [f"{last.headline_gb_per_s:g} GB/s stated"] if last.headline_gb_per_s else []
    cores = f", {last.gpu_cores} GPU cores" if last.gpu_cores else ""
    text += ["", f"{last.chip} ({last.device}{cores}), MLX {last.mlx}, mlx-lm {last.mlx_lm}; "
             f"{', '.join(ceilings)}; {last.repetitions} repetitions"]
    splits: dict[tuple[str, float | None], list[Record]] = {}
    for record in records:
        if record.fit_over:
            splits.setdefault((record.fit_over, record.fixed_ms_per_token), []).append(record)
    text += [f"Over {over}: {found.line()}" for (over, _), members in splits.items()
             if (found := fit_of(members))]
    return "\n".join(text)


def as_json(records: list[Record]) -> str:
    return json.dumps([record.as_dict() for record in records], indent=2, ensure_ascii=False)


def json_lines(records: list[Record]) -> str:
    return "\n".join(json.dumps(record.as_dict(), ensure_ascii=False) for record in records)


def comma_separated(records: list[Record]) -> str:
    """Every key a column; those of the machine and its power flat, with a prefix."""
    rows = []
    for record in records:
        row = record.as_dict()
        for key in ("machine", "power"):
            row |= {f"{key}_{name}": value for name, value in row.pop(key).items()}
        rows.append(row)
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return text.getvalue().rstrip("\n")


FORMATS: dict[str, Callable[[list[Record]], str]] = {
    "md": markdown, "json": as_json, "jsonl": json_lines, "csv": comma_separated}


def plot(records: list[Record], chip: Chip, product_tflops: float, path: Path) -> None:
    """Operations per byte against rate: the chip's roofs, stated and measured, and each record's
    point."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    rates = [1e-12 * r.operations_per_byte * r.gb_per_s * 1e9 for r in records]
    low = min(0.5, *(r.operations_per_byte / 2 for r in records))
    high = max(3e3 * product_tflops / records[0].probe_gb_per_s,
               *(2 * r.operations_per_byte for r in records))
    roofs: list[tuple[str, float, float | None, str, str]] = [
        ("measured", records[0].probe_gb_per_s, product_tflops, "", "-")]
    if records[0].headline_gb_per_s:
        roofs.append(("stated", records[0].headline_gb_per_s, chip.fp32_tflops, " FP32", "--"))
    for name, bandwidth, peak, kind, style in roofs:
        bend = min(1e3 * peak / bandwidth, high) if peak else high
        label = f"{name}: {bandwidth:,.0f} GB/s" + (f", {peak:.3g} TFLOP/s{kind}" if peak else "")
        heights = [low * bandwidth / 1e3, bend * bandwidth / 1e3, peak or bend * bandwidth / 1e3]
        axes.plot([low, bend, high], heights, style, color="0.35", label=label)
    models = list(dict.fromkeys(record.model for record in records))
    labels: dict[tuple[float, float], list[str]] = {}
    for record, rate in zip(records, rates):
        point = (record.operations_per_byte, rate)
        marker = "o" if record.test.startswith("tg") else "s"
        axes.plot(*point, marker, color=f"C{models.index(record.model) % 10}")
        near = (known for known in labels  # one label where points lie together
                if all(abs(math.log(a / b)) < 0.2 for a, b in zip(known, point)))
        labels.setdefault(next(near, point), []).append(record.test)
    for point, names in labels.items():
        axes.annotate("\n".join(dict.fromkeys(names)), point, xytext=(7, 0),
                      textcoords="offset points", fontsize=7, va="top")
    for model in models:
        axes.plot([], [], "o", color=f"C{models.index(model) % 10}", label=Path(model).name)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte read",
             ylabel="10¹² operations/s", title=f"{records[0].chip}, {records[0].device}")
    axes.set_ylim(bottom=min(rates) / 2)  # room for labels below the lowest point
    axes.grid(True, which="both", alpha=0.25)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
