"""How a model is to be tuned, checked on construction."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim

from mlxquant.base import checks
from mlxquant.base.errors import BadValue
from mlxquant.quantise.calibration import SEQUENCE_LENGTH

HELD_OUT = 32  # sequences
# Levels that a step may move a code at the peak of the rate: 0.019 served 135 million weights well,
# 0.013 1.5 billion, while at 0.023 their loss rose until step 75 of 200 (``benchmarks/LOG.md``).
_FARTHEST = 0.02


@dataclass(frozen=True)
class Schedule:
    """``steps`` of ``batch_size`` sequences, by default 8 on a GPU and 2 without one. The learning
    rate is relative to each array's size; it rises over the first twentieth, then falls to zero as
    a cosine. Every ``check_every`` steps the held-out sequences are tried."""

    steps: int = 1000
    batch_size: int = field(default_factory=lambda: 8 if mx.default_device() == mx.gpu else 2)
    learning_rate: float = 2e-3
    check_every: int = 100

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "check_every"):
            checks.integer(name, getattr(self, name), 1)
        if not 0 < self.learning_rate < 1:
            raise BadValue(f"learning_rate is {self.learning_rate!r}, "
                           "allowed is a number between 0 and 1")

    def rate(self) -> Callable[[mx.array], mx.array]:
        """The learning rate by step."""
        rise = max(1, self.steps // 20)
        fall = optim.cosine_decay(self.learning_rate, max(1, self.steps - rise))
        return optim.join_schedules([optim.linear_schedule(0, self.learning_rate, rise), fall],
                                    [rise])

    @property
    def drift(self) -> float:
        """The standard deviation of trained values u after all steps, if gradients are pure noise.

        Adam's steps then add up as if each were its rate times a draw of mean square 1, and the
        squares of a cosine's rates are 3/8 in the mean.
        """
        return self.learning_rate * math.sqrt(3 / 8 * self.steps)


@dataclass(frozen=True)
class Tuning:
    """How to tune a model towards ``teacher``, the name of its original, on the texts ``data``
    (files, or ``hf://datasets/OWNER/NAME/FILE``), in sequences of ``sequence_length`` tokens.

    ``norms`` trains the weights of normalisation layers too. ``codes`` above 0 lets the codes
    move (``unpacked.py``), with this standard deviation in levels if gradients are all noise
    (``Schedule.drift``), so that mostly codes with consistent gradients change. At 0.2 the
    rounding boundary, half a level away, is 2.5 deviations off
    (``benchmarks/LOG.md``). ``written`` adds so many sequences in which the teacher continues
    beginnings of the texts, drawn as often as all texts together; ``conversations`` adds so many in
    which it talks to itself (``quantise/conversations.py``), drawn as often as each text. ``seed``
    decides the order of texts and the teacher's sampling. Raises ``BadValue``.
    """

    teacher: str
    data: tuple[str, ...] | list[str]
    schedule: Schedule = Schedule()
    sequence_length: int = SEQUENCE_LENGTH
    norms: bool = True
    codes: float = 0.0
    written: int = 0
    conversations: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("sequence_length", 2), ("written", 0), ("conversations", 0),
                            ("seed", 0)):
            checks.integer(name, getattr(self, name), least)
        if isinstance(self.data, str) or not self.data:
            raise BadValue(f"data is {self.data!r}, allowed is a list of at least one text")
        checks.number("codes", self.codes, 0, 0.5)  # half a level is the way to the next

    @property
    def code_unit(self) -> float:
        """How many levels u = 1 moves a code (``trainable.Parts``)."""
        return self.codes / self.schedule.drift

    @property
    def hasty(self) -> str | None:
        """A warning for the user where steps move codes too far, else None."""
        farthest = self.code_unit * self.schedule.learning_rate
        if farthest <= _FARTHEST:
            return None
        steps = math.ceil(self.schedule.steps * (farthest / _FARTHEST) ** 2)
        codes = math.floor(1e3 * self.codes * _FARTHEST / farthest) / 1e3
        return (f"at the peak a step moves codes by some {farthest:.3f} levels; 0.023 made losses "
                f"of 1.5 billion weights rise first; {_FARTHEST:g} takes --steps {steps}, or "
                f"--codes {codes:g}")

    def record(self, data: str, dtype: mx.Dtype) -> dict[str, Any]:
        """The record of this tuning for a checkpoint, with the names of ``data`` and ``dtype``."""
        return asdict(self) | {"teacher": Path(self.teacher).name, "data": data,
                               "dtype": str(dtype).removeprefix("mlx.core.")}
