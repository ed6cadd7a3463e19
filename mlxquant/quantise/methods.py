"""The methods by name: how each moves scale between input and weight, and how it finds codes."""

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx

from mlxquant.codes import rtn
from mlxquant.codes.affine import Affine
from mlxquant.codes.spec import Spec
from mlxquant.codes.statistics import Statistics
from mlxquant.layers.transformed import ActivationSpec
from mlxquant.quantise import awq, gptq, replica, smoothquant
from mlxquant.quantise.envelope import Replicas

Codes = Affine | Replicas


@dataclass(frozen=True)
class Settings:
    """What holds for every layer of a job: the type that scales are stored in, how far the target
    moves to make up for earlier layers (``gptq.correct``), how activations are rounded, and
    SmoothQuant's strength (None: searched). ``sweep`` is that of the statistics, where known."""

    dtype: mx.Dtype = mx.float16
    correction: float = 0.0
    activation: ActivationSpec | None = None
    alpha: float | None = None
    sweep: gptq.Sweep | None = None


Quantise = Callable[[mx.array, Statistics, Spec, Settings], Codes]
Balance = Callable[[list[mx.array], Statistics, Spec, Settings], mx.array | None]


@dataclass(frozen=True)
class Method:
    """``quantise`` finds the codes of a matrix (m, n), or of stacked siblings. ``balance`` gives
    factors (n,) for siblings (weight · s, input / s), or None. A method that is not
    ``calibrated`` looks at no statistics."""

    quantise: Quantise
    balance: Balance = lambda weights, statistics, spec, settings: None
    calibrated: bool = True


def _smooth(weights: list[mx.array], statistics: Statistics, spec: Spec,
            settings: Settings) -> mx.array | None:
    if settings.alpha == 0 or settings.activation is None:
        return None
    if settings.alpha is None:
        return smoothquant.search_alpha(weights, statistics, spec, settings.activation)[1]
    return smoothquant.balance(weights, statistics, spec, settings.alpha)


METHODS = {
    "rtn": Method(lambda w, _, spec, given: rtn.quantise(w, None, spec, given.dtype),
                  calibrated=False),
    "gptq": Method(lambda w, seen, spec, given: gptq.quantise(
        w, seen, spec, given.dtype, correction=given.correction, sweep=given.sweep)),
    "awq": Method(lambda w, seen, spec, given: awq.quantise(w, seen, spec, given.dtype),
                  lambda ws, seen, spec, given: awq.balance(ws, seen, spec, given.dtype)),
    "smoothquant": Method(
        lambda w, seen, spec, given: smoothquant.quantise(w, seen, spec, given.dtype), _smooth),
    "replica": Method(lambda w, seen, spec, given: replica.quantise(
        w, seen, spec, given.dtype, correction=given.correction, sweep=given.sweep)),
}
