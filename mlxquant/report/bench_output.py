"""What ``bench`` measured: a table for people, JSON, JSON lines or CSV, and a roofline plot."""

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlxquant.machine.chips import Chip
from mlxquant.report.bench import Record, fit_of
from mlxquant.report.figure import figure


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "" if value is None else f"{value:,.{digits}f}{unit}"


def _count(value: int | None) -> str:
    """A number of parameters."""
    if value is None:
        return ""
    return f"{value / 1e9:.2f} B" if value >= 1e9 else f"{value / 1e6:.1f} M"


_COLUMNS: dict[str, Callable[[Record], str]] = {
    "model": lambda r: r.model,
    "weights GB": lambda r: _number(r.weight_gb, 3),
    "params": lambda r: _count(r.parameters),
    "active": lambda r: _count(r.active_parameters) if r.active_parameters != r.parameters else "",
    "device": lambda r: r.device,
    "test": lambda r: r.test,
    "tokens/s": lambda r: _number(r.tps_mean, 2) + (
        f" ± {r.tps_stdev:.2f}" if r.tps_stdev is not None else ""),
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
    ruler = ["---" if name in ("model", "device", "test") else "--:" for name in _COLUMNS]
    lines = [list(_COLUMNS), ruler, *rows]
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
    return json.dumps([asdict(record) for record in records], indent=2, ensure_ascii=False)


def json_lines(records: list[Record]) -> str:
    return "\n".join(json.dumps(asdict(record), ensure_ascii=False) for record in records)


def comma_separated(records: list[Record]) -> str:
    """Every key a column; those of the machine and its power flat, with a prefix."""
    rows = []
    for record in records:
        row = asdict(record)
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
    per_byte = [record.operations_per_byte for record in records]
    rates = [record.operations_per_byte * record.gb_per_s / 1e3 for record in records]
    models, first = list(dict.fromkeys(record.model for record in records)), records[0]
    low = min(0.5, min(per_byte) / 2)
    high = max(3e3 * product_tflops / first.probe_gb_per_s, 2 * max(per_byte))
    labels: dict[tuple[float, float], list[str]] = {}
    with figure(path, (8, 5)) as (axes,):
        _draw_roof(axes, low, high, first.probe_gb_per_s, product_tflops, "measured", "-")
        if first.headline_gb_per_s:
            _draw_roof(axes, low, high, first.headline_gb_per_s, chip.fp32_tflops, "stated", "--")
        for record, point in zip(records, zip(per_byte, rates)):
            axes.plot(*point, "o" if record.test.startswith("tg") else "s",
                      color=f"C{models.index(record.model) % 10}")
            near = (known for known in labels
                    if all(abs(math.log(a / b)) < 0.2 for a, b in zip(known, point)))
            # One label where points lie together.
            labels.setdefault(next(near, point), []).append(record.test)
        for point, names in labels.items():
            axes.annotate("\n".join(dict.fromkeys(names)), point, xytext=(7, 0),
                          textcoords="offset points", fontsize=7, va="top")
        for index, model in enumerate(models):
            axes.plot([], [], "o", color=f"C{index % 10}", label=Path(model).name)
        axes.set(xscale="log", yscale="log", xlabel="operations per byte read",
                 ylabel="10¹² operations/s", title=f"{first.chip}, {first.device}")
        axes.set_ylim(bottom=min(rates) / 2)  # room for labels below the lowest point


def _draw_roof(axes: Any, low: float, high: float, bandwidth: float, peak: float | None, name: str,
               style: str) -> None:
    """What ``bandwidth`` (GB/s) and, where it is known, ``peak`` (10¹² operations/s) allow."""
    bend = min(1e3 * peak / bandwidth, high) if peak else high
    label = f"{name}: {bandwidth:,.0f} GB/s" + (
        f", {peak:.3g} TFLOP/s{' FP32' * (name == 'stated')}" if peak else "")
    reached = bend * bandwidth / 1e3
    axes.plot([low, bend, high], [low * bandwidth / 1e3, reached, peak or reached], style,
              color="0.35", label=label)
