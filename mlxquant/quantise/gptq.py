"""GPTQ: fit scales, find codes in a sweep over columns (``sweep.py``), then refine both.

Scales are fixed before the sweep, by least squares weighted with diag(H), so columns may be taken
in any order while groups stay where they are: by default the most active inputs first.
``refine.py`` then moves codes and scales together.
"""

from dataclasses import replace

import mlx.core as mx

from mlxquant.codes.affine import Affine, fit
from mlxquant.codes.spec import Spec
from mlxquant.codes.statistics import Statistics
from mlxquant.quantise.profile import step
from mlxquant.quantise.refine import refine
from mlxquant.quantise.settings import Settings
from mlxquant.quantise.sweep import Sweep

CORRECTION = 0.5


@step("refine")
def quantise(weight: mx.array, statistics: Statistics, spec: Spec, settings: Settings) -> Affine:
    """Quantise ``weight`` (m, n) for inputs with these statistics, which hold ``cross`` where it
    is to be corrected. Raises ``BadValue`` if the groups do not divide n."""
    sweep = Sweep.of(statistics, spec.act_order)
    weight = sweep.correct(weight.astype(mx.float32), statistics.cross, settings.correction)
    found = start(weight, statistics, spec, settings)
    swept = replace(found, codes=sweep.codes(weight, *found.grid(), spec.bits.levels))
    result = refine(weight, swept, sweep.hessian, spec.refine, settings.dtype)
    mx.eval(result.codes, result.scales, result.biases)
    return result


@step("fit")
def start(weight: mx.array, statistics: Statistics, spec: Spec, settings: Settings) -> Affine:
    """Scales for the sweep, with the codes nearest to each weight."""
    return fit(weight, spec, statistics.hessian.diagonal(), settings.dtype)
