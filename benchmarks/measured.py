"""Which rows of ``results/`` count, and their names: what tables, figures and the planner read.

Earlier runs stay in ``results/`` as they were; ``LOG.md`` says what was wrong with them.
"""

import json
from pathlib import Path
from typing import Any

from record import RESULTS, read

HERE = Path(__file__).parent
WIDTHS = [8, 4, 3, 2, "ternary", 1]
STAGES = ("calibrated", "tuned")
COMPARED = 300  # steps of the tuned rows that are compared with each other

# Runs side by side on one host: their perplexities hold, their seconds do not.
_SHARED_HOST = ("methods-h200-2", "methods-h200-3", "methods-h100-1")
# Made before GPTQ took active inputs first and refined its result, which is today's --no-act-order
# --refine 0, and with a rounding that no longer exists.
_EARLIER = tuple(f"methods-h200-{n}" for n in range(1, 6))
_CORRECTED = 19  # the first run of replicas.py in which Adam's bias was corrected
Rows = list[dict[str, Any]]


def original_perplexity() -> float:
    return read("methods-h200-1")["rows"][0]["perplexity"]


def literature() -> dict[str, Any]:
    return json.loads((HERE / "literature.json").read_text(encoding="utf-8"))


def method_rows() -> Rows:
    """The latest row of each method and width, by width and then the best first."""
    rows = {}
    for path in sorted([*RESULTS.glob("methods-*.json"), *RESULTS.glob("stock-*.json")]):
        result = read(path.stem)
        alone = path.stem not in _SHARED_HOST and result["machine"]["device"] == "gpu"
        for row in result["rows"]:
            method = row["method"]
            if method == "original" or (method == "rtn" and path.stem in _EARLIER):
                continue
            if path.stem in _EARLIER and method.startswith("gptq"):
                method = method.replace("gptq", "gptq-plain")
            seconds = row["seconds"] if alone else None
            rows[method, row["bits"]] = row | {"method": method, "seconds": seconds}
    return sorted(rows.values(), key=lambda r: (WIDTHS.index(r["bits"]), r["perplexity"]))


def replica_runs() -> Rows:
    """The results of ``replicas.py`` that count, the oldest first."""
    names = {int(path.stem.split("-")[-1]): path.stem for path in RESULTS.glob("replicas-h*.json")}
    return [read(names[number]) for number in sorted(names) if number >= _CORRECTED]


def replica_results() -> Rows:
    """Their rows, each with its stage, under a name that tells it from others of its plan."""
    found = []
    for row in (row for run in replica_runs() for row in run["rows"]):
        name = row["method"]
        if row["steps"] > COMPARED:
            name += f", {row['steps']:,} steps"
        if row.get("conversations"):
            name += ", conversations"
        if row["tuned"] and not row["codes"]:
            name += ", scales alone"
        found.append(row | {"method": name, "stage": STAGES[row["tuned"]]})
    return found


def replica_rows() -> dict[str, dict[str, dict[str, Any]]]:
    """The latest row of each method and stage, the methods by size."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in sorted(replica_results(), key=lambda row: row["bits_per_weight"]):
        found.setdefault(row["method"], {})[row["stage"]] = row
    return found


def kernel_run() -> dict[str, Any]:
    """The latest result of ``kernels.py``."""
    names = {int(path.stem.split("-")[-1]): path.stem for path in RESULTS.glob("kernels-h*.json")}
    return read(names[max(names)])


def stated_kernels() -> dict[str, Any]:
    """Times of Metal's body stated without a result file, for as long as no run has them."""
    if any(row["kernel"] == "replicated_matvec" for row in kernel_run()["rows"]):
        return {"rows": []}
    return json.loads((HERE / "stated.json").read_text(encoding="utf-8"))
