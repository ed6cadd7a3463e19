"""Settings of a job that are the same for every layer and method."""

from collections.abc import Callable
from dataclasses import dataclass, field

import mlx.core as mx

from mlxquant.base import checks
from mlxquant.layers.siblings import Siblings
from mlxquant.layers.transformed import ActivationSpec
from mlxquant.quantise import envelope


@dataclass(frozen=True)
class Settings:
    """``dtype`` of stored scales; ``correction``, 0 to 1, of the target for earlier layers' errors
    (``Sweep.correct``); how activations are rounded; SmoothQuant's ``alpha`` (None: searched);
    ``seed`` of rotations; ``siblings`` by each layer's path; ``remainders``: keep each weight's
    distance from its code; ``rounds`` in which replicas' scalings are fitted; ``leading`` gives the
    start of those fits (``envelope.leading``) where several share it."""

    dtype: mx.Dtype = mx.float16
    correction: float = 0.0
    activation: ActivationSpec | None = None
    alpha: float | None = None
    seed: int = 0
    siblings: dict[str, Siblings] = field(default_factory=dict)
    remainders: bool = False
    rounds: int = envelope.ROUNDS
    leading: Callable[[], tuple[mx.array, mx.array]] | None = None


@dataclass(frozen=True)
class BlockTuning:
    """Whether blocks are trained towards the float block's output (``block_tuning.py``), and in how
    many steps. By default blocks with a layer below 4 bits are trained, unless activations are
    rounded, in 320 steps on a GPU and 32 without one. Raises ``BadValue``."""

    tune_blocks: bool | None = None
    tune_steps: int | None = None

    def __post_init__(self) -> None:
        if self.tune_steps is not None:
            checks.integer("tune_steps", self.tune_steps, 1)

    @property
    def steps(self) -> int:
        return self.tune_steps or (320 if mx.default_device() == mx.gpu else 32)
