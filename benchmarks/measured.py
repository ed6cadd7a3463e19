"""Which rows of ``results/`` count, and their names: what tables, figures and the planner read.

Earlier runs stay in ``results/`` as they were; ``LOG.md`` says what was wrong with them.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from record import RESULTS, Rows, read

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


def metal_body_run() -> dict[str, Any]:
    """The body that Metal compiles, on an NVIDIA GPU's ordinary cores, in one run with the body
    before it (``before_us``) and MLX's own product: the rows of 14336 × 4096. Until the body as it
    stands was timed, the candidate that it was made from."""
    stands = (RESULTS / "kernel-shapes.json").exists()
    run = read("kernel-shapes" if stands else "kernel-candidates")
    times: dict[tuple[Any, ...], dict[str, float]] = {}
    for row in run["rows"]:
        shape, size = tuple(row["shape"][:4]), row["shape"][4:]
        if size in ([], [14336, 4096]):
            times.setdefault(shape, {})[row["kernel"]] = statistics.median(row["us"])
    rows = []
    for (bits, replicas, group, tokens), found in times.items():
        heights = (4, 8) if replicas == 8 and not group else (8, 4)
        names = ["new", "mx.quantized_matmul", *(
            f"dec1 rows{height} sg2 ahead1 float sums" for height in heights)]
        us = next(found[name] for name in names if name in found)
        stored = 14336 * 4096 * bits / 8 + 36864 * tokens + (
            4096 // (group or 1) * 4 * replicas + 4 * 4096 * bool(group) + 28672 * replicas + 512
            if replicas else 14336 * 4096 / 16)
        rows.append(dict(
            kernel="replicated_matvec" if replicas else "mx.quantized_matmul", bits=bits,
            replicas=replicas, group=group, tokens=tokens, free_us=us, gb_per_s=stored / us / 1e3,
            before_us=found.get("old", found.get("today"))))
    return run | {"rows": rows, "stands": stands}
