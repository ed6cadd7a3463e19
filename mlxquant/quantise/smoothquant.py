"""SmoothQuant: move the activations' outliers into the weights, so that both round well.

Xiao et al. 2022, https://arxiv.org/abs/2211.10438, equation 4:

    s_j = max|X_j|^α / max|W_j|^(1−α),   Y = (X / s)(W · s)

The activation is divided by s and the weight multiplied by it. Summaries often have this the other
way round, or the exponents exchanged; then outliers grow. At α = ½ both sides end with the same
maximum per channel, √(max|X_j| · max|W_j|).
"""

import math
from dataclasses import replace

import mlx.core as mx

from mlxquant.codes import rtn
from mlxquant.codes.affine import Affine
from mlxquant.codes.spec import Spec
from mlxquant.codes.statistics import Statistics
from mlxquant.layers.transformed import ActivationSpec
from mlxquant.quantise.awq import above_zero, output_error, some_rows
from mlxquant.quantise.settings import Settings

CANDIDATES = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def balance(weights: list[mx.array], statistics: Statistics, spec: Spec,
            settings: Settings) -> mx.array | None:
    """Factors s (n,) float32 > 0 for siblings (m_i, n) that read one input, to be used as
    weight → weight · s (columns), input → input / s; None where α is 0 or activations are not
    rounded."""
    if settings.alpha == 0 or settings.activation is None:
        return None
    if settings.alpha is None:
        return search_alpha(weights, statistics, spec, settings.activation)[1]
    return factors(weights, statistics, settings.alpha)


def factors(weights: list[mx.array], statistics: Statistics, alpha: float) -> mx.array:
    """Equation 4 for siblings, W being all their rows."""
    columns = mx.stack([mx.abs(weight.astype(mx.float32)).max(0) for weight in weights]).max(0)
    return above_zero(statistics.largest) ** alpha / above_zero(columns) ** (1 - alpha)


def search_alpha(weights: list[mx.array], statistics: Statistics, spec: Spec,
                 activation: ActivationSpec) -> tuple[float, mx.array]:
    """The α of ``CANDIDATES`` with the least estimated output error, and its factors s (n,).

    The estimate adds two errors as if they were independent:

    - of the weights, e H' eᵀ over the rows, with e = Q(W s) − W s and H' = H / (s sᵀ) the
      second moment of x / s; Q is ``quantise``, on some of the rows for speed;
    - of the activations, ‖W s‖² · step² / 12: rounding noise spread evenly over a step of
      max|x / s| / (2^(bits−1) − 1). Per tensor the maximum is that of calibration; per token
      its mean square is expected, as if channels were independent and Gaussian. The maximum
      of calibration would be several times too large there, and α with it.
    """
    some = some_rows([weight.astype(mx.float32) for weight in weights])

    def estimate(s: mx.array) -> float:
        noise = 0.0 if activation.off else _peak_square(statistics, s, activation)
        noise /= 12 * activation.largest ** 2
        total = 0.0
        for w in some:
            error = quantise(w * s, statistics, spec, Settings()).dequantise() / s - w
            total += output_error(error, statistics.hessian) + noise * mx.square(w * s).sum().item()
        return total

    tried = [(alpha, factors(weights, statistics, alpha)) for alpha in CANDIDATES]
    return min(tried, key=lambda pair: estimate(pair[1]))


def quantise(weight: mx.array, statistics: Statistics, spec: Spec,
             settings: Settings) -> Affine:
    """Quantise ``weight`` (m, n), already times s, to symmetric levels whatever ``spec`` says; the
    statistics play no part.

    The paper's one scale per output channel is ``group_size`` 0. Raises ``BadValue`` if the groups
    do not divide n.
    """
    return rtn.quantise(weight, replace(spec, symmetric=True), settings.dtype)


def _peak_square(statistics: Statistics, s: mx.array, activation: ActivationSpec) -> float:
    """The square of the largest |x / s| that a step is made from; see ``search_alpha``."""
    if activation.granularity != "token":
        return mx.square((statistics.largest / s).max()).item()
    deviation = mx.sqrt(above_zero(statistics.hessian.diagonal())) / s
    width = 8 * deviation.max() / 256
    peak = width * mx.arange(1, 257)
    below = mx.erf(peak[:, None] / (deviation * math.sqrt(2))).prod(1)  # P(all |x_j / s_j| < peak)
    return (2 * peak * (1 - below) * width).sum().item()  # E[peak²] = ∫ 2 t P(peak > t) dt
