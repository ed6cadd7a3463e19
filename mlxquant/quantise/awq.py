"""AWQ: scale up the inputs' columns that matter before rounding, scale the input down.

Lin et al. 2023, https://arxiv.org/abs/2306.00978. Channels with large
activations get more of the weight's resolution: s = E[|x|]^α, with α found by
trying. Where the paper measures the output error on samples, E[x xᵀ] gives its
expectation over all calibration tokens, without any.
"""

import mlx.core as mx

from mlxquant.codes.affine import Affine, fit
from mlxquant.codes.spec import Spec
from mlxquant.codes.statistics import Statistics
from mlxquant.quantise.settings import Settings

STEPS = 20
_ROWS = 256


def balance(weights: list[mx.array], statistics: Statistics, spec: Spec,
            settings: Settings) -> mx.array:
    """Factors s (n,) float32 > 0 for siblings (m_i, n) that read one input.

    To be used as weight → weight · s (columns), input → input / s;
    sqrt(max s · min s) = 1. α goes from 0 to 1 in 20 steps, each rounded as
    ``quantise`` does, but for speed on some of the rows only.
    The best is taken if it also beats s = 1 on all rows: the output error is never
    above that of no scaling. Raises ``BadValue`` if the groups do not divide n.
    """
    weights = [weight.astype(mx.float32) for weight in weights]
    base = above_zero(statistics.mean_magnitude)
    candidates = [_centred(base ** (step / STEPS)) for step in range(STEPS + 1)]

    def error(s: mx.array, matrices: list[mx.array]) -> float:
        importance = statistics.hessian.diagonal() / mx.square(s)
        return sum(output_error(fit(w * s, spec, importance, settings.dtype).dequantise() / s - w,
                                statistics.hessian) for w in matrices)

    # Rounded min–max, which is quicker still, the best α is about twice as large: it
    # misses that the clipping in ``fit`` favours the large channels already.
    some = some_rows(weights)
    best = min(candidates, key=lambda s: error(s, some))
    return min(candidates[0], best, key=lambda s: error(s, weights))


def quantise(weight: mx.array, statistics: Statistics, spec: Spec,
             settings: Settings) -> Affine:
    """Quantise ``weight`` (m, n): ranges clipped per group for the least error weighted by E[x²].

    Both are those after ``balance``: the weight times s, the statistics of x / s.
    Raises ``BadValue`` if the groups do not divide n.
    """
    return fit(weight, spec, statistics.hessian.diagonal(), settings.dtype)


def output_error(error: mx.array, hessian: mx.array) -> float:
    """E‖error · x‖² of a weight's ``error`` (m, n), for ``hessian`` E[x xᵀ] (n, n)."""
    return ((error @ hessian) * error).sum().item()


def some_rows(weights: list[mx.array]) -> list[mx.array]:
    """The same share of every sibling's rows, at most 256: enough to compare errors by."""
    step = -(-max(len(weight) for weight in weights) // _ROWS)
    return [weight[::step] for weight in weights]


def above_zero(values: mx.array) -> mx.array:
    """``values`` ≥ 0 with dead channels raised to 1e-5 of the mean; ones if all are dead."""
    mean = values.mean()
    return mx.maximum(values, mx.where(mean > 0, 1e-5 * mean, 1.0))


def _centred(s: mx.array) -> mx.array:
    return s / mx.sqrt(s.max() * s.min())
