"""How many replicas this machine runs at no cost in time: replicated layers timed by width.

One token passes a chain of distinct layers, each fed by the one before, together several
times larger than any cache. What counts is the GPU's own time (``kernels/gpu_clock.py``):
launching from Python would hide what a replica costs.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxquant.codes.spec import REPLICA_WIDTHS, ReplicaShape
from mlxquant.codes.width import Width
from mlxquant.kernels import gpu_clock
from mlxquant.layers.blocks import held_bytes
from mlxquant.layers.pack import pack
from mlxquant.layers.replicated import ReplicaInput, ReplicatedLinear
from mlxquant.machine.replica_limits import ReplicaLimits, search
from mlxquant.machine.system import device

_SHAPE = (14336, 4096)
_LEAST_LAYERS, _LEAST_BYTES = 8, 256e6
_CALLS = 64
_LEAST_SHARE = 0.25  # of the ceiling: one replica must reach it, else others mean nothing


def measure_replicas(ceiling_gb_per_s: float,
                     progress: Callable[[int, int, float], None] = lambda *_: None
                     ) -> ReplicaLimits:
    """Time this machine's replicated layers; ``progress`` gets widths done, of how many, and
    microseconds."""
    if device() == "cpu":
        return ReplicaLimits("on a plain CPU replicated layers run as dense weights, "
                             "for which replicas cost nothing")
    largest: dict[str, int | None] = {}
    groups: dict[str, dict[str, int | None] | None] = {}
    timings: list[dict[str, Any]] = []
    slow = []

    def timed(bits: Width, replicas: int, group: int) -> float:
        timings.append(time_layers(ReplicaShape(bits, replicas, group), _SHAPE))
        progress(len(largest), len(REPLICA_WIDTHS), timings[-1]["microseconds"])
        return float(timings[-1]["microseconds"])

    for bits in REPLICA_WIDTHS:
        one, rate, width = timed(bits, 1, 0), timings[-1]["gb_per_s"], str(bits)
        if rate < _LEAST_SHARE * ceiling_gb_per_s:
            largest[width] = groups[width] = None
            slow.append(f"{width} ({rate:.0f} GB/s)")
        else:
            largest[width], groups[width] = search(one, partial(timed, bits))
    reason = (f"one replica reads less than {100 * _LEAST_SHARE:.0f} % of {ceiling_gb_per_s:.0f} "
              f"GB/s at {', '.join(slow)} bits: there it is not reading that takes the time"
              ) if slow else None
    return ReplicaLimits(reason, largest, groups, timings)


def time_layers(shape: ReplicaShape, size: tuple[int, int],
                dtype: mx.Dtype = mx.float16) -> dict[str, Any]:
    """Median microseconds of one layer with one token, as a loaded model runs it, the spread of
    the passes, and GB/s of what it stores."""
    one = size[0] * size[1] * shape.bits.code_bits / 8
    count = max(_LEAST_LAYERS, 2 * round(_LEAST_BYTES / one / 2))
    chain: Any = nn.Sequential(*(
        _Step(_layer(shape, *(size if i % 2 == 0 else size[::-1]), dtype)) for i in range(count)))
    stored = held_bytes(chain) / count
    start = mx.random.normal((1, size[1])).astype(dtype)
    mx.eval(start, chain.parameters())
    chain = pack(chain)

    def run(rounds: int, zero: mx.array) -> list[mx.array]:
        x = start + zero.astype(dtype)
        for _ in range(rounds):
            x = chain(x)
        return [x]

    passes = gpu_clock.seconds_per_step(run, max(1, _CALLS // count))
    times = [seconds / count for seconds in passes]
    median = statistics.median(times)
    return shape.as_dict() | {
        "microseconds": 1e6 * median, "spread": (max(times) - min(times)) / median,
        "gb_per_s": stored / median / 1e9, "layers": count}


class _Step(nn.Module):
    """A layer and its ``ReplicaInput`` as children of one module, as in a model."""

    def __init__(self, layer: ReplicatedLinear):
        super().__init__()
        self.shared, self.layer = layer.input, layer

    def __call__(self, x: mx.array) -> mx.array:
        return self.layer(x)


def _layer(shape: ReplicaShape, outputs: int, inputs: int, dtype: mx.Dtype) -> ReplicatedLinear:
    """Random codes, and scales with which outputs are about as large as inputs."""
    shared = ReplicaInput(inputs, shape)
    layer = ReplicatedLinear(outputs, shared)
    variance = (shape.bits.levels**2 - 1) / 12 * shape.bits.distance**2
    shared.replica_in = mx.random.normal(shared.replica_in.shape).astype(dtype)
    if shape.replica_group:
        shared.column_scale = mx.ones(inputs, dtype)
    size = (inputs * shape.replicas * variance) ** -0.5
    layer.replica_out = (size * mx.random.normal(layer.replica_out.shape)).astype(dtype)
    low, high = (0, 243) if shape.bits is Width.TERNARY else (-(1 << 31), (1 << 31) - 1)
    layer.codes = mx.random.randint(low, high, layer.codes.shape).astype(layer.codes.dtype)
    return layer
