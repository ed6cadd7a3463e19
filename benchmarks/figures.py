"""The figures of docs/results.md, drawn from ``results/`` into it."""

import re

from matplotlib.figure import Figure
from measured import STAGES, method_rows, original_perplexity, replica_rows
from record import RESULTS, Rows

from mlxquant.report.comparison import ComparedRow, plot

# Names in the legend, and the rows that belong to them.
KINDS = {"replicas under a budget": r"budget-[\d.]+",
         "groups under a budget": r"groups-budget-[\d.]+",
         "groups": r"groups-\d+", "replicas, one K": "replica-4",
         "replicas under a budget, 1,800 steps": r"budget-.*1,800 steps"}


def draw_methods() -> None:
    """Perplexity over whole-folder bytes of the rows that were saved as folders."""
    fields = ComparedRow.__dataclass_fields__
    rows: Rows = [{"tasks": (), **row} for row in method_rows() if row["bits"] in (2, 3, 4)]
    rows = [row for row in rows if set(fields) <= set(row)]
    plot([ComparedRow(**{name: row[name] for name in fields}) for row in rows],
         RESULTS / "methods-h200.png")


def draw_replicas() -> None:
    """Perplexity over whole-folder bytes: replicas and groups, calibrated only and tuned."""
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    methods = replica_rows()
    for color, (kind, names) in enumerate(KINDS.items()):
        for stage, line, marker in zip(STAGES, (":", "-"), "vo"):
            rows = [rows[stage] for name, rows in methods.items()
                    if stage in rows and re.fullmatch(names, name)]
            points = [(row["file_bytes"] / 1e6, row["perplexity"]) for row in rows
                      if 2 < row["bits_per_weight"] < 3.1]
            if points:
                axes.plot(*zip(*points), marker=marker, color=f"C{color}", linestyle=line,
                          label=f"{kind}, {stage}")
    axes.axhline(original_perplexity(), color="gray", linewidth=1)
    axes.set(xlabel="whole folder, MB", ylabel="perplexity (log)", yscale="log")
    axes.grid(True, which="both", alpha=0.3)
    axes.set_yticks(ticks := [25, 30, 40, 50, 60, 80], list(map(str, ticks)))
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(RESULTS / "replicas.png")
