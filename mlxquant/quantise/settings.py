"""What holds for every layer of a job, whatever its method."""

from dataclasses import dataclass

import mlx.core as mx

from mlxquant.layers.transformed import ActivationSpec
from mlxquant.quantise.sweep import Sweep


@dataclass(frozen=True)
class Settings:
    """The type that scales are stored in, how far the target moves to make up for earlier layers
    (0 to 1, see ``Sweep.correct``), how activations are rounded, and SmoothQuant's strength (None:
    searched). ``sweep`` spares finding it anew where it is known for the statistics."""

    dtype: mx.Dtype = mx.float16
    correction: float = 0.0
    activation: ActivationSpec | None = None
    alpha: float | None = None
    sweep: Sweep | None = None
