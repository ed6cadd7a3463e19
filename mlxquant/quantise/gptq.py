"""GPTQ: quantise column by column, and let every column make up for the earlier ones' errors.

Frantar et al. 2023, https://arxiv.org/abs/2210.17323, in the form of QuIP
(Chee et al. 2023, https://arxiv.org/abs/2307.13304), which proves the two equal:
with H = E[x xᵀ] = V Vᵀ, V upper triangular, the loss of an error E is ‖E V‖², so
column j is best rounded from w_j − Σ_{i<j} E_i V_ij / V_jj. That takes one Cholesky
factorisation of H and no inverse. Columns are swept in blocks: inside a block one
by one, what earlier blocks add to it in one product.

Scales are fixed before the sweep, by least squares weighted with diag(H), so
columns may be taken in any order while groups stay where they are: by default the
most active inputs first. ``refine.py`` then moves codes and scales together.

``correct`` moves the target first: with the float model's inputs x̃ and the
quantised prefix's x, the weight that reproduces W x̃ from x is
W E[x̃ xᵀ] H⁻¹ (QEP, https://arxiv.org/abs/2504.09629, with its damping α; the
same asymmetry as GPTAQ, https://arxiv.org/abs/2504.02692).
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxquant.codes.affine import Affine, expand, fit
from mlxquant.codes.spec import Spec
from mlxquant.codes.statistics import Statistics
from mlxquant.kernels.column_sweep import sweep_columns
from mlxquant.quantise.factor import Factor
from mlxquant.quantise.refine import refine

DAMPING = 0.01
CORRECTION = 0.5


@dataclass(frozen=True)
class Sweep:
    """What the inputs alone decide, the same for every width: the damped H (n, n), the order in
    which columns are taken, and H's factor in that order."""

    hessian: mx.array
    order: mx.array
    back: mx.array
    factor: Factor

    @classmethod
    def of(cls, statistics: Statistics, act_order: bool) -> "Sweep":
        """The most active inputs first, or as they come."""
        hessian = damped(statistics.hessian)
        diagonal = np.array(hessian.diagonal())
        order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(diagonal))
        taken = mx.array(order)
        return cls(hessian, taken, mx.array(np.argsort(order)),
                   Factor.of(hessian[taken][:, taken]))

    def codes(self, weight: mx.array, scales: mx.array, biases: mx.array,
              levels: int) -> mx.array:
        """Codes (m, n) float32 of ``weight``, each on the grid of its own scale and bias (m, n)."""
        weight, scales, biases = (x[:, self.order] for x in (weight, scales, biases))
        return sweep_columns(weight, scales, biases, self.factor.feedback(),
                             levels)[:, self.back]

    def correct(self, weight: mx.array, cross: mx.array | None, amount: float) -> mx.array:
        """``weight`` (m, n) moved by ``amount`` towards reproducing the float model's outputs from
        the quantised inputs, given ``cross`` E[x̃ xᵀ]: W + amount · W (E[x̃ xᵀ] − H) H⁻¹."""
        if not amount or cross is None:
            return weight
        gap = weight @ (cross - self.hessian) + weight * self.damping()
        return weight + amount * self.factor.divide(gap[:, self.order])[:, self.back]

    def damping(self) -> mx.array:
        """What ``damped`` added to the diagonal."""
        return self.hessian.diagonal().mean() * (DAMPING / (1 + DAMPING))


def quantise(weight: mx.array, statistics: Statistics, spec: Spec, dtype: mx.Dtype = mx.float16, *,
             correction: float = 0.0, sweep: Sweep | None = None) -> Affine:
    """Quantise ``weight`` (m, n) for inputs with these statistics.

    ``correction`` between 0 and 1 is how far the target moves to make up for
    the error of earlier layers; it needs ``statistics.cross``. ``sweep`` is that of
    the statistics, where it is known.
    """
    sweep = sweep or Sweep.of(statistics, spec.act_order)
    weight = sweep.correct(weight.astype(mx.float32), statistics.cross, correction)
    start = fit(weight, spec, statistics.hessian.diagonal(), dtype)
    scales, biases = (expand(x, start.group) for x in (start.scales, start.biases))
    codes = sweep.codes(weight, scales, biases, spec.bits.levels)
    swept = Affine(codes.astype(mx.uint8), start.scales, start.biases, spec)
    result = refine(weight, swept, sweep.hessian, spec.refine, dtype)
    mx.eval(result.codes, result.scales, result.biases)
    return result


def damped(hessian: mx.array) -> mx.array:
    """H with a hundredth of its mean diagonal added."""
    diagonal = hessian.diagonal()
    added = DAMPING * mx.maximum(diagonal.mean(), 1e-12)
    return mx.where(mx.eye(len(hessian), dtype=mx.bool_), hessian + added, hessian)
