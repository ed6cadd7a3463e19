"""The methods by name: how each moves scale between input and weight, and how it finds codes.

Scales are fixed before GPTQ's sweep (``sweep.py``), so columns can be rounded in any order without
changing the groups: by default the most active inputs first. Refinement rounds then change codes
and scales.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx

from mlxquant.base.trees import arrays
from mlxquant.codes import rtn
from mlxquant.codes.affine import Affine, fit
from mlxquant.codes.spec import Spec
from mlxquant.codes.statistics import Statistics
from mlxquant.quantise import awq, refine, replica, smoothquant
from mlxquant.quantise.envelope import Replicas
from mlxquant.quantise.profile import step
from mlxquant.quantise.settings import Settings
from mlxquant.quantise.sweep import Sweep

Codes = Affine | Replicas
Start = Callable[[mx.array, Any, Spec, Settings], Codes]  # statistics; None if uncalibrated
Refine = Callable[[mx.array, Any, mx.array, mx.Dtype], Codes]
Balance = Callable[[list[mx.array], Statistics, Spec, Settings], mx.array | None]


@dataclass(frozen=True)
class Method:
    """``start`` finds scales, and the codes nearest to each weight. A method with ``refine`` then
    moves the codes in a GPTQ sweep and calls ``refine``, which improves codes and scales under a
    damped H, for each of ``spec.refine`` rounds. ``balance``, where there is one, gives factors
    s (n,) for siblings (weight · s, input / s), or None. A method that is not ``calibrated`` uses
    no statistics."""

    start: Start
    refine: Refine | None = None
    balance: Balance | None = None
    calibrated: bool = True

    def quantise(self, weight: mx.array, statistics: Any, spec: Spec, settings: Settings) -> Codes:
        """The codes of ``weight`` (m, n), of one layer or of stacked siblings, already balanced and
        rotated, for inputs with these ``statistics``; these hold ``cross`` where the weight is to
        be corrected for earlier errors. Raises ``BadValue`` if the groups do not divide n."""
        if self.refine is None:
            return self.start(weight, statistics, spec, settings)
        with step("refine"):
            sweep = Sweep.of(statistics, spec.act_order)
            weight = sweep.correct(weight.astype(mx.float32), statistics.cross,
                                   settings.correction)
            found = self.start(weight, statistics, spec, settings)
            found = replace(found, codes=sweep.codes(weight, *found.grid(), spec.bits.levels))
            for _ in range(spec.refine):
                found = self.refine(weight, found, sweep.hessian, settings.dtype)
            mx.eval(arrays(vars(found)))
        return found


@step("fit")
def _fit(weight: mx.array, statistics: Statistics, spec: Spec, settings: Settings) -> Affine:
    """Ranges clipped per group for the least error weighted by E[x²]."""
    return fit(weight, spec, statistics.hessian.diagonal(), settings.dtype)


METHODS = {
    "rtn": Method(lambda weight, _, spec, settings: rtn.quantise(weight, spec, settings.dtype),
                  calibrated=False),
    "gptq": Method(_fit, refine.refine),
    "awq": Method(_fit, balance=awq.balance),
    "smoothquant": Method(smoothquant.quantise, balance=smoothquant.balance),
    "replica": Method(replica.start, replica.refine),
}


def treatment(spec: Spec) -> tuple[str | None, Balance | None]:
    """How the input of a layer is treated: the rotation, and what balances it with the weight."""
    return spec.rotation, METHODS[spec.method].balance
