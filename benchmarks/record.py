"""One form for every result: what was run, on which machine, with which versions."""

import argparse
import datetime
import json
import os
import sys
from pathlib import Path
from typing import Any

from mlxquant.base.storage import write_json  # loads the BLAS, which must come before MLX
from mlxquant.machine.identity import machine

RESULTS = Path(__file__).parent / "results"


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of arguments that prints a script's docstring as it stands."""
    return argparse.ArgumentParser(description=description,
                                   formatter_class=argparse.RawTextHelpFormatter)


def save(name: str, **values: Any) -> Path:
    """Write ``results/NAME.json`` with the machine, the date and the command beside the values."""
    path = RESULTS / f"{name}.json"
    arguments = [Path(a).name if Path(a).is_absolute() else a for a in sys.argv[1:]]
    script = os.path.relpath(sys.argv[0], RESULTS.parents[1])
    write_json(path, {"date": datetime.date.today().isoformat(),
                      "command": " ".join(["python", script, *arguments]),
                      "machine": machine(), **values})
    return path


def read(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def place(result: dict[str, Any]) -> str:
    """Where and with what a result was measured."""
    m = result["machine"]
    return (f"Measured {result['date']} on one {m['chip']} ({m['device']}, {m['cores']} cores), "
            f"MLX {m['mlx']}, mlx-lm {m['mlx_lm']}")
