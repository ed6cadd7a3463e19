"""AWQ: scale up the weight's columns that matter before rounding, and scale the input down.

Lin et al. 2023, https://arxiv.org/abs/2306.00978. Channels with large activations get more of the
weight's resolution: s = E[|x|]^α, with α found by a search. The paper measures the output error on
samples; here E[x xᵀ] gives its expectation over all calibration tokens.
"""

import mlx.core as mx

from mlxquant.codes.affine import fit
from mlxquant.codes.spec import Spec
from mlxquant.codes.statistics import Statistics
from mlxquant.quantise.settings import Settings

STEPS = 20
_PATIENCE = 3  # steps without gain: 1 in 80 measured curves fell below its first valley later
_ROWS = 256  # to search on; twice as many to check what was found


def balance(weights: list[mx.array], statistics: Statistics, spec: Spec,
            settings: Settings) -> mx.array:
    """Factors s (n,) float32 > 0 for siblings (m_i, n) that read one input, to be used as
    weight → weight · s (columns), input → input / s; sqrt(max s · min s) = 1.

    α goes up from 0 to 1 in 20 steps, until three steps in a row do not lower the error. For speed
    the error is measured on up to 256 rows of a matrix, with ranges clipped as in the result. The
    best α is used only if it also beats s = 1 on up to 512 rows, so that it does not depend on the
    choice of rows. Raises ``BadValue`` if the groups do not divide n.
    """
    weights = [weight.astype(mx.float32) for weight in weights]
    base = above_zero(statistics.mean_magnitude)

    def factors(step: int) -> mx.array:
        s = base ** (step / STEPS)
        return s / mx.sqrt(s.max() * s.min())

    def error(step: int, matrices: list[mx.array]) -> float:
        s = factors(step)
        importance = statistics.hessian.diagonal() / mx.square(s)
        return sum(output_error(fit(w * s, spec, importance, settings.dtype).dequantise() / s - w,
                                statistics.hessian) for w in matrices)

    # Min–max rounding would be quicker still, but its best α is about twice as large: it
    # ignores that the clipping in ``fit`` already favours the large channels.
    some, more = some_rows(weights), some_rows(weights, 2 * _ROWS)
    best, least = 0, error(0, some)
    for step in range(1, STEPS + 1):
        if (now := error(step, some)) < least:
            best, least = step, now
        elif step - best == _PATIENCE:
            break
    return factors(best if best and error(best, more) < error(0, more) else 0)


def output_error(error: mx.array, hessian: mx.array) -> float:
    """E‖error · x‖² of a weight's ``error`` (m, n), for ``hessian`` E[x xᵀ] (n, n)."""
    return ((error @ hessian) * error).sum().item()


def some_rows(weights: list[mx.array], at_most: int = _ROWS) -> list[mx.array]:
    """The same share of every sibling's rows, ``at_most`` of one: enough to compare errors by."""
    step = -(-max(len(weight) for weight in weights) // at_most)
    return [weight[::step] for weight in weights]


def above_zero(values: mx.array) -> mx.array:
    """``values`` ≥ 0 with dead channels raised to 1e-5 of the mean; ones if all are dead."""
    mean = values.mean()
    return mx.maximum(values, mx.where(mean > 0, 1e-5 * mean, 1.0))
