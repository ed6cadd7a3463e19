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
from mlxquant.quantise.refine import refine

DAMPING = 0.01
CORRECTION = 0.5


@dataclass(frozen=True)
class Sweep:
    """What the inputs alone decide, the same for every width: the damped H (n, n) in float32, the order in which
    columns are taken, and what an error adds to later ones."""

    hessian: mx.array
    order: mx.array
    back: mx.array
    feedback: mx.array

    @classmethod
    def of(cls, statistics: Statistics, act_order: bool) -> "Sweep":
        """The most active inputs first, or as they come."""
        hessian = damped(np.array(statistics.hessian, np.float64))
        order = np.argsort(-hessian.diagonal(), kind="stable") if act_order else np.arange(len(hessian))
        feedback = feedback_matrix(hessian[np.ix_(order, order)])
        return cls(mx.array(hessian.astype(np.float32)), mx.array(order), mx.array(np.argsort(order)),
                   mx.array(feedback.astype(np.float32)))

    def codes(self, weight: mx.array, scales: mx.array, biases: mx.array, levels: int) -> mx.array:
        """Codes (m, n) float32 of ``weight``, each on the grid of its own scale and bias (m, n)."""
        return sweep_columns(*(x[:, self.order] for x in (weight, scales, biases)), self.feedback,
                             levels)[:, self.back]


def quantise(weight: mx.array, statistics: Statistics, spec: Spec, dtype: mx.Dtype = mx.float16, *,
             correction: float = 0.0, sweep: Sweep | None = None) -> Affine:
    """Quantise ``weight`` (m, n) for inputs with these statistics.

    ``correction`` between 0 and 1 is how far the target moves to make up for
    the error of earlier layers; it needs ``statistics.cross``. ``sweep`` is that of
    the statistics, where it is known.
    """
    if correction:
        weight = correct(weight, statistics, correction)
    weight, sweep = weight.astype(mx.float32), sweep or Sweep.of(statistics, spec.act_order)
    start = fit(weight, spec, statistics.hessian.diagonal(), dtype)
    scales, biases = (expand(x, start.group) for x in (start.scales, start.biases))
    codes = sweep.codes(weight, scales, biases, spec.bits.levels)
    swept = Affine(codes.astype(mx.uint8), start.scales, start.biases, spec)
    result = refine(weight, swept, sweep.hessian, spec.refine, dtype)
    mx.eval(result.codes, result.scales, result.biases)
    return result


def correct(weight: mx.array, statistics: Statistics, amount: float) -> mx.array:
    """``weight`` moved towards reproducing the float model's outputs from the quantised inputs."""
    hessian = damped(np.array(statistics.hessian, np.float64))
    gap = np.array(statistics.cross, np.float64) - np.array(statistics.hessian, np.float64)
    change = np.linalg.solve(hessian, gap.T).T  # gap · H⁻¹, for H symmetric
    return weight + amount * (weight.astype(mx.float32) @ mx.array(change.astype(np.float32)))


def damped(hessian: np.ndarray) -> np.ndarray:
    """H with a hundredth of its mean diagonal added, and dead inputs made harmless."""
    diagonal = hessian.diagonal()
    made = hessian.copy()
    made.flat[::len(made) + 1] += DAMPING * max(diagonal.mean(), 1e-12)  # no n × n identity beside it
    return made


def feedback_matrix(hessian: np.ndarray) -> np.ndarray:
    """Strictly upper A with A_ij = V_ij / V_jj for a definite H = V Vᵀ, V upper, in float64."""
    upper = np.linalg.cholesky(hessian[::-1, ::-1])[::-1, ::-1]
    upper /= upper.diagonal().copy()  # in place: a copy of a width of 14336 takes 1.6 GB
    np.fill_diagonal(upper, 0)
    return upper
