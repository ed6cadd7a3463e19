"""Predict tokens per second on a chip that is not here, with an error band from published runs.

    time of a token = layers · a + max(b · bytes / headline bandwidth, lane-operations)

a, an engine's fixed time per layer, and b, how much longer bytes take than at the headline
bandwidth, are fitted to ``published.json`` by least squares; lane-operations are counted
(``lanes.py``). Then each chip is predicted from all others alone: these errors give the band.
"""

import statistics
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from mlxquant.base.errors import BadValue
from mlxquant.machine import chips
from mlxquant.machine.chips import Chip
from mlxquant.report import lanes

ENGINES = ("llama.cpp", "mlx-lm")
_OURS = "mlx-lm"  # whose generation loop and graphs run here
_LEAST_ROWS = 5  # of a family, to have a band of its own
_BAND = 90  # percent of the back-test's errors that lie within
Rows = list[dict[str, Any]]  # of ``published.json``


@dataclass(frozen=True)
class Coefficients:
    """Milliseconds per layer by engine, and how much longer bytes take than at the headline."""

    ms_per_layer: dict[str, float]
    bytes_factor: float

    def milliseconds(self, engine: str, layers: int, headline_ms: float, lane_ms: float) -> float:
        """The time of a token whose bytes take ``headline_ms`` at the headline bandwidth, and whose
        operations take ``lane_ms``."""
        return layers * self.ms_per_layer[engine] + max(self.bytes_factor * headline_ms, lane_ms)


@dataclass(frozen=True)
class Prediction:
    """``ceiling_tps`` is bandwidth over bytes; ``low`` and ``high`` hold 9 of 10 of the family's
    back-tests; ``fits`` is None where the chip's memory is not known."""

    chip: str
    gpu_cores: int | None
    tps: float
    low: float
    high: float
    ceiling_tps: float
    percent_of_headline: float
    bytes_per_token: float
    total_bytes: float
    max_memory_gb: float | None
    fits: bool | None
    bound_by: str
    assumptions: tuple[str, ...]

    def line(self) -> str:
        """One line for people, labelled as what it is."""
        memory = "largest memory not known" if self.fits is None else \
            f"{'fits' if self.fits else 'does not fit'}: {self.max_memory_gb:g} GB"
        return (f"predicted {self.tps:.2f} tokens/s ({self.low:.2f} to {self.high:.2f}), "
                f"bound by {self.bound_by}; ceiling {self.ceiling_tps:.2f} tokens/s; {memory}")


def predict(chip: Chip, *, bytes_per_token: float, total_bytes: float, layers: int,
            weights: float = 0, cost: lanes.Cost | None = None) -> Prediction:
    """Decode speed of one sequence on ``chip``. ``total_bytes`` is what must be held; ``cost`` that
    of the ``weights`` that the blocks use for a token, None where lane-operations do not bind.

    Raises ``BadValue`` for a chip without figures or of a kind that nobody's measurements cover.
    """
    if chip.headline_gb_per_s is None or not chip.name.startswith("Apple "):
        raise BadValue(f"no published measurements to predict {chip.label} from; "
                       "allowed are Apple's chips")
    learnt, band = _learnt(), error_band(chip)
    headline_ms, memory = bytes_per_token / chip.headline_gb_per_s / 1e6, chip.max_memory_gb
    lane_ms = 1e3 * cost.seconds(chip, weights) if cost else 0.0
    tps = 1e3 / learnt.milliseconds(_OURS, layers, headline_ms, lane_ms)
    return Prediction(
        chip=chip.name, gpu_cores=chip.gpu_cores, tps=tps, low=tps / (1 + band),
        high=tps * (1 + band), ceiling_tps=1e3 / headline_ms,
        percent_of_headline=tps * headline_ms / 10,
        bytes_per_token=bytes_per_token, total_bytes=total_bytes, max_memory_gb=memory,
        fits=None if memory is None else total_bytes <= working_set(memory * 2**30),
        bound_by="arithmetic" if lane_ms > learnt.bytes_factor * headline_ms else "bytes",
        assumptions=_assumptions(chip, learnt))


def _assumptions(chip: Chip, learnt: Coefficients) -> tuple[str, ...]:
    others = [c.label for c in chips.every()
              if c.name == chip.name and c.gpu_cores != chip.gpu_cores]
    cores = f"{chip.gpu_cores} GPU cores (there is also {', '.join(others)}), " if others else ""
    return (f"{chip.name}: {cores}{chip.headline_gb_per_s:g} GB/s stated",
            f"{learnt.ms_per_layer[_OURS]:.3f} ms a layer and bytes at "
            f"{100 / learnt.bytes_factor:.0f} % of the headline, learnt from "
            f"{len(lanes.published()['decode'])} published runs of llama.cpp and mlx-lm",
            f"the band holds {_BAND} % of the errors made on {family(chip.name)} chips, "
            "predicted from the others",
            "one sequence, greedy, nothing else running, no thermal limit; a model may take 2/3 "
            "of up to 36 GB and 3/4 of more, the usual default of macOS", *lanes.ASSUMPTIONS[1:])


@cache
def _learnt() -> Coefficients:
    return learn(lanes.published()["decode"])


def learn(rows: Rows) -> Coefficients:
    """Least squares of relative errors over rows of ``published.json`` of at least 4 bits."""
    rows = [row for row in rows if row["bits"] >= 4]
    times = np.array([1e3 / row["tokens_per_s"] for row in rows])
    terms = np.array([[*(row["layers"] * (row["engine"] == engine) for engine in ENGINES),
                       _headline_ms(row)] for row in rows])
    solution, *_ = np.linalg.lstsq(terms / times[:, None], np.ones(len(rows)), rcond=None)
    return Coefficients(dict(zip(ENGINES, map(float, solution))), float(solution[-1]))


@cache
def backtest() -> tuple[dict[str, Any], ...]:
    """Every published run with the tokens/s predicted from the runs of all other chips, and the
    relative error."""
    rows = lanes.published()["decode"]
    result = []
    for row in rows:
        learnt = learn([other for other in rows if other["chip"] != row["chip"]])
        lane_s = lanes.stock(row["bits"]).seconds(_chip(row), 1e9 * row["weights_billion"])
        predicted = 1e3 / learnt.milliseconds(row["engine"], row["layers"], _headline_ms(row),
                                              1e3 * lane_s)
        result.append(row | {"predicted": predicted, "error": predicted / row["tokens_per_s"] - 1,
                             "family": family(row["chip"])})
    return tuple(result)


def backtest_summary() -> Rows:
    """Median and worst relative error by family of chips and by engine, all together last."""
    rows, summary = backtest(), []
    for name in dict.fromkeys([*(row["family"] for row in rows), *ENGINES, "all"]):
        chosen = [row for row in rows if name in (row["family"], row["engine"], "all")]
        worst = max(chosen, key=lambda row: abs(row["error"]))
        summary.append({
            "chips": name, "runs": len(chosen),
            "median_error": statistics.median(abs(row["error"]) for row in chosen),
            "worst_error": worst["error"], "worst_run":
            f"{_chip(worst).label} {worst['model']} {worst['format']} ({worst['engine']})"})
    return summary


def error_band(chip: Chip) -> float:
    """The relative error that 9 of 10 back-tests of the chip's family stay below."""
    rows = backtest()
    errors = [abs(row["error"]) for row in rows if row["family"] == family(chip.name)]
    if len(errors) < _LEAST_ROWS:
        errors = [abs(row["error"]) for row in rows]
    return float(np.percentile(errors, _BAND))


def family(name: str) -> str:
    """"base", "Pro", "Max" or "Ultra"."""
    last = name.split()[-1]
    return last if last in ("Pro", "Max", "Ultra") else "base"


def working_set(memory: float) -> float:
    """Bytes a model may take of a Mac's ``memory``: macOS's usual default."""
    return memory * (2 / 3 if memory <= 36 * 2**30 else 3 / 4)


def _chip(row: dict[str, Any]) -> Chip:
    return chips.of(row["chip"], row["gpu_cores"])


def _headline_ms(row: dict[str, Any]) -> float:
    """Milliseconds that the bytes of a published run's token take at the headline."""
    return 1e3 * row["gb_per_token"] / _chip(row).known("headline_gb_per_s")
