"""Rewrite ``quality.json``, what ``mlxquant plan`` expects of a width, from what was measured.

    python benchmarks/quality.py

Of every width with its groups or replicas it holds the best method that ``quantize`` can run, with
its options, blocks trained where that was measured and else calibrated only; beside them GPTQ's
published rows (``literature.json``). A ratio is the perplexity over that of the original.
"""

import re
from pathlib import Path
from typing import Any

from measured import literature, method_rows, original_perplexity, replica_results
from record import Row, parser, read

from mlxquant.base.storage import write_json
from mlxquant.quantise.calibration import SAMPLES
from mlxquant.report.comparison import METHODS

AS_GOOD = 1.002
TABLE = Path(__file__).with_name("quality.json")
MODEL = "SmolLM2-135M-Instruct"
FLAGS = {"method": "--method {}", "replicas": "--replicas {}",
         "replica_group": "--replica-group {}", "propagation": "--propagation {}",
         "refine": "--refine {}", "alpha": "--alpha {}"}  # in the order of a command


def options_of(method: str) -> Row | None:
    """The options of ``quantize`` that a row's method stands for; None if flags cannot say them."""
    plain = method.replace("gptq-plain", "gptq")
    options = METHODS.get(method) or METHODS.get(plain)
    if options is None or {"mixed", "activation"} & set(options):
        return None
    return options | ({"act_order": False, "refine": 0} if plain != method else {})


def flags(options: Row) -> str:
    """The same on the command line."""
    parts = [flag.format(options[name]) for name, flag in FLAGS.items() if name in options]
    parts += {None: [], "online": ["--rotate"],
              "fused": ["--rotate-fused"]}[options.get("rotation")]
    parts += ["--no-act-order"] if options.get("act_order") is False else []
    return " ".join(parts)


def untuned_replicas() -> list[Row]:
    """Rows of ``replicas.py`` before ``tune``, which all correct for earlier blocks, under
    ``METHODS``' names."""
    found = []
    trained = [row | {"trained": ", blocks trained on a GPU"}
               for row in read("blocks-trained-h100")["rows"]
               if row["model"] == MODEL and row["windows"] == SAMPLES]
    for row in [*replica_results(), *trained]:
        group = f"-g{row['replica_group']}" if row["replica_group"] else ""
        name = f"replica-{row['replicas']}{group}-corrected"
        if row["rotated"] and not row["tuned"] and name in METHODS:
            found.append(row | {"method": name})
    return found


def measured() -> list[Row]:
    original = original_perplexity()
    ways: dict[tuple[Any, ...], list[Row]] = {}
    for row in [*method_rows(), *untuned_replicas()]:
        if row["method"] == "w8a16":  # one scale for a row: groups of 64 can only be better
            row = row | {"method": "rtn", "group_size": 64}
        options = options_of(row["method"])
        if options is None:
            continue
        replicas = options.get("replicas")
        group = options.get("replica_group", 0) if replicas else row["group_size"]
        found = {"model": MODEL, "bits": row["bits"], "replicas": replicas, "group": group,
                 "ratio": row["perplexity"] / original, "method": row["method"],
                 "flags": flags(options), "source": f"measured on {MODEL}{row.get('trained', '')}"}
        ways.setdefault((row["bits"], replicas, group), []).append(found)
    return [simplest(found) for found in ways.values()]


def simplest(ways: list[Row]) -> Row:
    """Of those as good as the best, the one with the fewest options: rounding needs no text."""
    best = min(way["ratio"] for way in ways)
    good = [way for way in ways if way["ratio"] <= AS_GOOD * best]
    return min(good, key=lambda way: (len(way["flags"]), way["ratio"]))


def published() -> list[Row]:
    """GPTQ's rows in the literature; other methods are not ours to run."""
    table = literature()
    rows = ((row, re.fullmatch(r"GPTQ g(\d+)", row["method"])) for row in table["rows"])
    return [{"model": table["model"], "bits": row["bits"], "replicas": None, "group": int(found[1]),
             "ratio": row["perplexity"] / row["reference"], "method": row["method"],
             "flags": "--method gptq",
             "source": f"published, {table['model']}: {row['paper'].split(',')[0]}"}
            for row, found in rows if found]


if __name__ == "__main__":
    parser(__doc__).parse_args()
    write_json(TABLE, {"rows": [*measured(), *published()]})
