"""Time of a matrix-vector product on an Apple GPU, from counted operations and bytes: a prediction.

    time = max(bytes / bandwidth, weights · lane-operations / (cores · 128 · clock))

A lane-operation is one of a core's 128 lanes for a cycle: add, multiply-add, mask and OR take 1;
converting an integer to float, and a shift by a constant, take 4; reading a half as a float takes
nothing. From M3 on, integer work and conversions run in parallel with floating-point work; on older
chips they take turns. The operations of our kernel per weight were counted in the code that LLVM
compiles (a test counts them again); the bytes that it fetches from the caches are counted too.
"""

import json
import statistics
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mlxquant.codes.spec import ReplicaShape
from mlxquant.codes.width import Width
from mlxquant.kernels.replicated_matvec import rows_together
from mlxquant.machine import chips
from mlxquant.machine.chips import Chip
from mlxquant.machine.replica_limits import ReplicaLimits, search

BANDWIDTH_SHARE = 0.92  # of the headline, what whole models reach at the margin (``predict.py``)
# Fetching a byte from the caches costs as much as this many operations (a core fetches 142 bytes a
# cycle). It is the only fitted number: stock 2-bit products on an M4 Pro take 2.8 lane-operations
# more per weight for each vector from 2 to 8, one of them the multiply-add, the rest for 2 bytes of
# input. With one vector every fetch serves four rows.
_FETCH_BYTE = 0.9
_ROWS = 4
# Integer operations per weight in ``replicated_matvec.py``, by the bits that a code takes; a shift
# counts as 4.
_DECODING = {1: 1.3, 2: 1.35, 3: 2.5, 4: 1.6}
_SHARED_PIPES = ("Apple M1", "Apple M2")

ASSUMPTIONS = (
    f"memory is read at {100 * BANDWIDTH_SHARE:.0f} % of the headline",
    "128 lane-operations a core and cycle, conversions and constant shifts at a quarter of that",
    "integer work runs beside floating-point work from M3 on, in turns with it before",
    f"a byte fetched costs {_FETCH_BYTE} operations and serves {_ROWS} rows, with ours up to 8; "
    "launches cost nothing",
    "replicas: two codes cost a mask and an OR, a replica one multiply-add a weight, in a group of "
    "G one multiply-add a group")


@dataclass(frozen=True)
class Cost:
    """What one weight costs: floating-point operations, integer operations (which include
    conversions), and bytes fetched from the caches."""

    operations: float
    integer: float
    fetched: float

    def on(self, chip: Chip) -> float:
        """Lane-operations per weight that ``chip`` waits for."""
        floating = self.operations + _FETCH_BYTE * self.fetched
        shared = chip.name.startswith(_SHARED_PIPES)
        return floating + self.integer if shared else max(floating, self.integer)

    def seconds(self, chip: Chip, weights: float) -> float:
        """Seconds that ``weights`` take in operations; raises ``BadValue`` as ``chip.known``."""
        return weights * self.on(chip) / chip.known("lane_operations_per_s")


def stock(bits: int, vectors: int = 1) -> Cost:
    """MLX's own affine product: AND, convert and multiply-add for a weight (none of them at 16
    bits), and a multiply-add and a fetch for each vector."""
    decode = 0 if bits == 16 else 5
    if vectors == 1:  # the scale multiplies sums; each fourth weight adds to a sum of inputs
        return Cost(1.25 if decode else 1, decode, 2 / _ROWS)
    return Cost((1 if decode else 0) + vectors, decode, 2 * vectors)


def replicated(bits: int | str, replicas: int, group: int = 0) -> Cost:
    """The product of ``replicated_matvec.py``, per weight: K + K / 32 float operations, grouped
    1 + (K + 2) / G. It fetches K + K / 32 float32 numbers, grouped 1 + (K + 1) / G, once for all
    rows of a simdgroup. G counts as at most 32."""
    shared = min(group or 32, 32)
    vectors = 1 if group else replicas
    rows = rows_together(ReplicaShape(Width.of(bits), replicas, group), 1)
    products = vectors + vectors / shared + ((replicas + 1) / shared if group else 0)
    fetched = 4 * (vectors + vectors / shared + (replicas / shared if group else 0)) / rows
    return Cost(products, _DECODING[Width.of(bits).code_bits], fetched)


def seconds(chip: Chip, weights: float, stored_bytes: float, cost: Cost) -> float:
    """The time of one product; raises ``BadValue`` where the chip's figures are not known."""
    reading = stored_bytes / (BANDWIDTH_SHARE * chip.known("headline_gb_per_s") * 1e9)
    return max(reading, cost.seconds(chip, weights))


def free_replicas(chip: Chip, bits: int | str) -> tuple[int, dict[str, int | None]]:
    """(largest K, smallest G by K) that take at most 5 % longer than one replica: the probe's
    question, answered by prediction."""

    def timer(replicas: int, group: int) -> float:
        stored = 1e9 * Width.of(bits).code_bits / 8
        return seconds(chip, 1e9, stored, replicated(bits, replicas, group))

    return search(timer(1, 0), timer)


def limits(chip: Chip) -> ReplicaLimits | None:
    """The replicas that are predicted to be free; None where the chip's figures are not known."""
    if chip.lane_operations_per_s is None or chip.headline_gb_per_s is None:
        return None
    found = {str(bits): free_replicas(chip, bits) for bits in (1, "ternary", 2, 3, 4)}
    return ReplicaLimits("predicted from counted operations",
                         {bits: most for bits, (most, _) in found.items()},
                         {bits: groups for bits, (_, groups) in found.items()})


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
