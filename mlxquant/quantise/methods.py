"""The methods by name: how each moves scale between input and weight, and how it finds codes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlxquant.codes import rtn
from mlxquant.codes.affine import Affine
from mlxquant.codes.spec import Spec
from mlxquant.codes.statistics import Statistics
from mlxquant.quantise import awq, gptq, replica, smoothquant
from mlxquant.quantise.envelope import Replicas
from mlxquant.quantise.settings import Settings

Codes = Affine | Replicas
Quantise = Callable[[mx.array, Any, Spec, Settings], Codes]  # statistics; None if uncalibrated
Balance = Callable[[list[mx.array], Statistics, Spec, Settings], mx.array | None]


@dataclass(frozen=True)
class Method:
    """``quantise`` finds the codes of a matrix (m, n), or of stacked siblings; ``start`` is what it
    begins a sweep with, where it sweeps. ``balance`` gives factors (n,) for siblings (weight · s,
    input / s), or None. A method that is not ``calibrated`` looks at no statistics."""

    quantise: Quantise
    balance: Balance = lambda weights, statistics, spec, settings: None
    start: Quantise | None = None
    calibrated: bool = True


METHODS = {
    "rtn": Method(lambda weight, _, spec, settings: rtn.quantise(weight, spec, settings.dtype),
                  calibrated=False),
    "gptq": Method(gptq.quantise, start=gptq.start),
    "awq": Method(awq.quantise, awq.balance),
    "smoothquant": Method(smoothquant.quantise, smoothquant.balance),
    "replica": Method(replica.quantise, start=replica.start),
}
