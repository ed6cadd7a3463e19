"""One form for every result: what was run, on which machine, with which versions."""

import datetime
import json
import os
import sys
from pathlib import Path

# isort: split
from mlxquant.base.storage import write_json
from mlxquant.machine.identity import machine

RESULTS = Path(__file__).parent / "results"


def save(name: str, **values) -> Path:
    """Write ``results/NAME.json`` with the machine, the date and the command beside the values."""
    path = RESULTS / f"{name}.json"
    arguments = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    command = " ".join(["python", os.path.relpath(sys.argv[0], RESULTS.parents[1]), *arguments])
    write_json(path, {"date": datetime.date.today().isoformat(), "command": command,
                      "machine": machine(), **values})
    return path


def read(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())
