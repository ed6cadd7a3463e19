"""GPTQ against the textbook's column-by-column form in float64."""

import mlx.core as mx
import numpy as np
import pytest

from mlxquant.codes import rtn
from mlxquant.codes.affine import expand, fit
from mlxquant.codes.spec import Spec
from mlxquant.codes.statistics import Statistics
from mlxquant.quantise import factor
from mlxquant.quantise.methods import METHODS
from mlxquant.quantise.settings import Settings
from mlxquant.quantise.sweep import Sweep, damped

GPTQ = METHODS["gptq"]


def problem(rows=24, columns=160, tokens=600, seed=0):
    """A weight and correlated inputs with a few loud channels."""
    random = np.random.default_rng(seed)
    mix = random.normal(size=(columns, columns)) * np.exp(random.normal(size=columns))
    x = (random.normal(size=(tokens, columns)) @ mix).astype(np.float32)
    statistics = Statistics.empty(columns)
    for part in np.array_split(x, 5):
        statistics.add(mx.array(part))
    return random.normal(size=(rows, columns)).astype(np.float32), x, statistics


def textbook(weight, hessian, scales, biases, levels, order):
    """Optimal brain quantization, one column at a time, eliminating it from the inverse Hessian."""
    w, done = weight.astype(np.float64).copy(), np.zeros_like(weight, dtype=np.float64)
    inverse = np.linalg.inv(
        hessian + 0.01 * np.trace(hessian) / len(hessian) * np.eye(len(hessian)))
    for j in order:
        code = np.clip(np.round((w[:, j] - biases[:, j]) / scales[:, j]), 0, levels - 1)
        done[:, j] = code
        error = (w[:, j] - scales[:, j] * code - biases[:, j]) / inverse[j, j]
        w -= np.outer(error, inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return done


@pytest.mark.parametrize("bits", [1, "ternary", 2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_codes_equal_the_textbook(bits, act_order):
    weight, _, statistics = problem()
    spec = Spec(bits=bits, group_size=32, act_order=act_order, refine=0)
    q = GPTQ.quantise(mx.array(weight), statistics, spec, Settings(mx.float32))
    hessian = np.array(statistics.hessian, np.float64)
    order = np.argsort(-hessian.diagonal(), kind="stable") if act_order else range(weight.shape[1])
    scales, biases = (np.array(expand(x, 32), np.float64) for x in (q.scales, q.biases))
    expected = textbook(weight, hessian, scales, biases, spec.bits.levels, order)
    same = (np.array(q.codes) == expected).mean()
    assert same > 0.99  # a tie broken differently in float32 moves what follows

    def loss(codes):
        error = scales * codes + biases - weight
        return ((error @ hessian) * error).sum()

    assert loss(np.array(q.codes)) == pytest.approx(loss(expected), rel=0.02)


def test_statistics_are_the_moments_of_all_batches():
    _, x, statistics = problem()
    exact = x.astype(np.float64)
    assert statistics.count == len(x)
    assert np.allclose(statistics.hessian, exact.T @ exact / len(x), rtol=1e-3, atol=1e-2)
    assert np.allclose(statistics.mean_magnitude, np.abs(exact).mean(0), rtol=1e-4)
    assert np.array_equal(np.array(statistics.largest), np.abs(x).max(0))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_sweep_beats_rounding_on_the_data(bits):
    weight, x, statistics = problem()
    spec = Spec(bits=bits, group_size=32)

    def output_error(q):
        return np.square((np.array(q.dequantise()) - weight) @ x.T).sum()

    rounded = output_error(rtn.quantise(mx.array(weight), spec))
    scaled = output_error(fit(mx.array(weight), spec, statistics.hessian.diagonal()))
    assert (output_error(GPTQ.quantise(mx.array(weight), statistics, spec, Settings()))
            < 0.7 * min(rounded, scaled))


@pytest.mark.parametrize("block", [32, 100, 512])
def test_the_feedback_diagonalises_the_damped_hessian(block, monkeypatch):
    """H = (1 + A) D (1 + A)ᵀ with A strictly upper: rounding one column is exact for the loss."""
    monkeypatch.setattr(factor, "BLOCK", block)
    _, _, statistics = problem()
    hessian, definite = np.array(statistics.hessian), damped(statistics.hessian)
    upper = np.array(factor.Factor.of(definite).upper, np.float64)
    assert np.array_equal(upper, np.triu(upper))
    feedback = np.triu(upper / upper.diagonal(), 1)
    unit = np.linalg.inv(np.eye(len(hessian)) + feedback)
    diagonal = unit @ np.array(definite, np.float64) @ unit.T
    assert np.allclose(diagonal, np.diag(diagonal.diagonal()), atol=1e-5 * hessian.max())


@pytest.mark.parametrize("block", [32, 100, 512])
def test_a_factor_divides_by_the_hessian_or_lets_the_host_do_it(block, monkeypatch):
    monkeypatch.setattr(factor, "BLOCK", block)
    weight, _, statistics = problem()
    definite = damped(statistics.hessian)
    wanted = np.linalg.solve(np.array(definite, np.float64), weight.T).T
    found = factor.Factor.of(definite)
    assert np.allclose(found.divide(mx.array(weight)), wanted, rtol=1e-3,
                       atol=1e-3 * abs(wanted).max())

    def coarse(hessian):  # as where a device's products are so rough that H seems indefinite
        raise np.linalg.LinAlgError

    monkeypatch.setattr(factor, "_by_blocks", coarse)
    host = factor.Factor.of(definite)
    assert np.allclose(host.upper, found.upper, atol=1e-4)
    assert np.allclose(host.divide(mx.array(weight)), wanted, rtol=1e-3,
                       atol=1e-3 * abs(wanted).max())


def test_dead_inputs_do_not_break_the_sweep():
    weight, _, statistics = problem()
    alive = mx.array(np.arange(160) >= 40, mx.float32)
    statistics.hessian = statistics.hessian * alive * alive[:, None]
    q = GPTQ.quantise(mx.array(weight), statistics, Spec(bits=4, group_size=32), Settings())
    assert np.isfinite(np.array(q.dequantise())).all()
    statistics.hessian = mx.zeros((160, 160))
    assert np.isfinite(np.array(GPTQ.quantise(
        mx.array(weight), statistics, Spec(bits=4, group_size=32), Settings()).dequantise())).all()


def test_full_correction_reproduces_the_float_outputs():
    weight, x, _ = problem(columns=64)
    noisy = x + 0.3 * np.random.default_rng(1).normal(size=x.shape).astype(np.float32) * x.std(0)
    statistics = Statistics.empty(64)
    statistics.add(mx.array(noisy), mx.array(x))
    sweep = Sweep.of(statistics, act_order=True)
    moved = np.array(sweep.correct(mx.array(weight), statistics.cross, 1.0))
    wanted = x @ weight.T
    best = np.linalg.lstsq(noisy, wanted, rcond=None)[0].T

    def miss(w):
        return np.square(noisy @ w.T - wanted).sum()

    assert miss(moved) < miss(weight) and miss(moved) < 1.1 * miss(best)  # damped
    assert np.allclose(sweep.correct(mx.array(weight), statistics.cross, 0.5), (moved + weight) / 2,
                       atol=1e-4)
