"""The sweep of GPTQ: round column by column, each making up for the errors of those before it.

Frantar et al. 2023, https://arxiv.org/abs/2210.17323, in the form of QuIP (Chee et al. 2023,
https://arxiv.org/abs/2307.13304), which proves the two equal: with H = E[x xᵀ] = V Vᵀ, V upper
triangular, the loss of an error E is ‖E V‖², so column j is best rounded from
w_j − Σ_{i<j} E_i V_ij / V_jj. That takes one Cholesky factorisation of H and no inverse.
"""

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlxquant.codes.statistics import Statistics
from mlxquant.kernels.column_sweep import sweep_columns
from mlxquant.quantise.factor import Factor
from mlxquant.quantise.profile import step

DAMPING = 0.01
CORRECTION = 0.5  # see ``Sweep.correct``


@dataclass(frozen=True)
class Sweep:
    """The part of GPTQ that depends on the inputs alone, not on the width: the damped H (n, n), the
    order in which columns are rounded and its inverse, and H's factor in that order."""

    hessian: mx.array
    order: mx.array
    back: mx.array
    factor: Factor

    @classmethod
    @step("factor")
    def of(cls, statistics: Statistics, act_order: bool) -> "Sweep":
        """The most active inputs first, or as they come."""
        hessian = damped(statistics.hessian)
        diagonal = np.array(hessian.diagonal())
        order = np.argsort(-diagonal, kind="stable") if act_order else np.arange(len(diagonal))
        taken = mx.array(order)
        return cls(hessian, taken, mx.array(np.argsort(order)),
                   Factor.of(hessian[taken][:, taken]))

    @step("sweep")
    def codes(self, weight: mx.array, scales: mx.array, biases: mx.array,
              levels: int) -> mx.array:
        """Codes (m, n) uint8 of ``weight`` (m, n) float32, each on the grid of its own scale and
        bias (m, n)."""
        weight, scales, biases = (x[:, self.order] for x in (weight, scales, biases))
        codes = sweep_columns(weight, scales, biases, self.factor.upper, levels)
        return codes[:, self.back].astype(mx.uint8)

    def correct(self, weight: mx.array, cross: mx.array | None, amount: float) -> mx.array:
        """``weight`` (m, n) moved by ``amount``, 0 to 1, towards reproducing the float model's
        outputs from the quantised model's inputs, given ``cross`` E[x̃ xᵀ] (n, n) of the two.

        W + amount · W (E[x̃ xᵀ] − H) H⁻¹: QEP, https://arxiv.org/abs/2504.09629, with its damping
        α; the same asymmetry as GPTAQ, https://arxiv.org/abs/2504.02692.
        """
        if not amount or cross is None:
            return weight
        gap = weight @ (cross - self.hessian) + weight * self.damping()
        return weight + amount * self.factor.divide(gap[:, self.order])[:, self.back]

    def damping(self) -> mx.array:
        """What ``damped`` added to the diagonal."""
        return self.hessian.diagonal().mean() * (DAMPING / (1 + DAMPING))


def damped(hessian: mx.array) -> mx.array:
    """H (n, n) with a hundredth of its mean diagonal added, so that it is definite."""
    added = DAMPING * mx.maximum(hessian.diagonal().mean(), 1e-12)
    return mx.where(mx.eye(len(hessian), dtype=mx.bool_), hessian + added, hessian)
