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
from mlxquant.tuning.settings import Schedule, Tuning

RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]
Rows = list[Row]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of arguments that prints a script's docstring as it stands."""
    return argparse.ArgumentParser(description=description,
                                   formatter_class=argparse.RawTextHelpFormatter)


def tuning_options(description: str | None) -> argparse.ArgumentParser:
    """A parser of what whole-model tuning takes, and of what the result is measured on."""
    options = parser(description)
    for name, kind, default in (("steps", int, 300), ("batch-size", int, 32), ("length", int, 512),
                                ("learning-rate", float, 2e-3), ("codes", float, 0.0),
                                ("written", int, 0), ("conversations", int, 0),
                                ("windows", int, 40), ("keep", Path, None)):
        options.add_argument(f"--{name}", type=kind, default=default)
    return options


def tuning_of(a: argparse.Namespace, teacher: str) -> Tuning:
    """The tuning that ``tuning_options`` were parsed to."""
    schedule = Schedule(a.steps, a.batch_size, a.learning_rate, max(1, a.steps // 8))
    return Tuning(teacher, a.data, schedule, a.length, codes=a.codes, written=a.written,
                  conversations=a.conversations)


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
