"""Time of a matrix-vector product on an Apple GPU, from counted operations and bytes: a prediction.

    time = max(bytes / bandwidth, weights · lane-operations / (cores · 128 · clock))

A lane-operation is one of a core's 128 lanes for a cycle: add, multiply-add, mask and OR take 1;
converting an integer to float, and a shift by a constant, take 4. From M3 on integer work and
conversions run beside the floating-point work, before that they take turns. Our kernels mask a
code into the mantissa of a power of two and subtract, so they neither convert nor shift.
"""

import json
import statistics
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mlxquant.machine import chips
from mlxquant.machine.chips import Chip
from mlxquant.machine.replica_limits import search

BANDWIDTH_SHARE = 0.92  # of the headline, what whole models reach at the margin (``predict.py``)
# Fetching an input costs as much as this many operations: the one number that is fitted, to how
# the time of stock 2-bit products grows from 2 to 8 vectors on an M4 Pro (2.8 lane-operations a
# vector, one of them the multiply-add). With one vector every fetch serves four rows.
_FETCH = 1.8
_ROWS = 4
_SHARED_PIPES = ("Apple M1", "Apple M2")

ASSUMPTIONS = (
    f"memory is read at {100 * BANDWIDTH_SHARE:.0f} % of the headline",
    "128 lane-operations a core and cycle, conversions and constant shifts at a quarter of that",
    "integer work runs beside floating-point work from M3 on, in turns with it before",
    f"an input fetched costs {_FETCH} operations and serves {_ROWS} rows; launches cost nothing",
    "replicas: a code costs a mask, an OR and a subtraction, a replica one multiply-add a weight, "
    "in a group of G one multiply-add a group")


@dataclass(frozen=True)
class Cost:
    """Lane-operations per weight, floating-point and integer (conversions among the latter)."""

    floating: float
    integer: float

    def on(self, chip: Chip) -> float:
        """Lane-operations per weight that ``chip`` waits for."""
        shared = chip.name.startswith(_SHARED_PIPES)
        return self.floating + self.integer if shared else max(self.floating, self.integer)

    def seconds(self, chip: Chip, weights: float) -> float:
        """What ``weights`` take, if nothing else does; raises ``BadValue`` as ``chip.known``."""
        return weights * self.on(chip) / chip.known("lane_operations_per_s")


def stock(bits: int, vectors: int = 1) -> Cost:
    """MLX's own affine product: AND, convert and multiply-add for a weight (none of them at 16
    bits), and a multiply-add and a fetch for each vector."""
    decode = 0 if bits == 16 else 5
    if vectors == 1:  # the scale multiplies sums; each fourth weight adds to a sum of inputs
        return Cost(1 + _FETCH / _ROWS + (0.25 if decode else 0), decode)
    return Cost((1 if decode else 0) + vectors * (1 + _FETCH), decode)


def replicated(bits: int | str, replicas: int, group: int = 0) -> Cost:
    """A replicated product: K multiply-adds and fetches a weight, or in groups one and K / G."""
    fetched = 1 + _FETCH / _ROWS
    products = fetched + replicas / group if group else replicas * fetched
    return Cost(1 + products, 3 if str(bits) == "3" else 2)  # codes of 3 bits lie across words


def seconds(chip: Chip, weights: float, stored_bytes: float, cost: Cost) -> float:
    """The time of one product; raises ``BadValue`` where the chip's figures are not known."""
    reading = stored_bytes / (BANDWIDTH_SHARE * chip.known("headline_gb_per_s") * 1e9)
    return max(reading, cost.seconds(chip, weights))


def free_replicas(chip: Chip, bits: int) -> tuple[int, dict[str, int | None]]:
    """(largest K, smallest G by K) that take at most 5 % longer than one replica: the probe's
    question, answered by prediction."""

    def timer(replicas: int, group: int) -> float:
        return seconds(chip, 1e9, bits / 8 * 1e9, replicated(bits, replicas, group))

    return search(timer(1, 0), timer)


@cache
def published() -> dict[str, list[dict[str, Any]]]:
    """Measurements that others published: of whole models and of matrix-vector products."""
    return json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))


def check() -> list[dict[str, Any]]:
    """Predicted against published times of stock products, the relative error of each."""
    rows = []
    for row in published()["matvec"]:
        weights = row["outputs"] * row["inputs"]
        stored = weights * (row["bits"] + 32 / row["group"]) / 8
        chip = chips.of(row["chip"], row["gpu_cores"])
        predicted = 1e6 * seconds(chip, weights, stored, stock(row["bits"], row["vectors"]))
        rows.append(row | {"predicted": predicted, "error": predicted / row["microseconds"] - 1})
    return rows


def check_line() -> str:
    """The check in one line."""
    errors = [100 * abs(row["error"]) for row in check()]
    return (f"stock products, {len(errors)} published times: "
            f"median error {statistics.median(errors):.0f} %, worst {max(errors):.0f} %")
