"""Keeping salient channels: the kept values against least squares, and the gain on data."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from test_salient_layer import close, draw

from mlxquant.base.errors import BadValue
from mlxquant.codes import rtn
from mlxquant.codes.spec import Spec
from mlxquant.codes.statistics import Statistics
from mlxquant.layers.salient import SalientLinear
from mlxquant.quantise import awq, gptq, salient

LOUD = [5, 70, 71, 150]  # outlying channels of ``problem``
METHODS = {"rtn": rtn.quantise, "awq": awq.quantise, "gptq": gptq.quantise}


def problem(rows=40, columns=160, tokens=1500, seed=0):
    """A weight, the statistics of correlated inputs with four loud channels, and more such inputs."""
    random = np.random.default_rng(seed)
    mix = random.normal(size=(20, columns))
    loudness = np.exp(0.3 * random.normal(size=columns))
    loudness[LOUD] = [12, 20, 15, 30]
    x = random.normal(size=(2 * tokens, 20)) @ mix / 4 + 0.5 * random.normal(size=(2 * tokens, columns))
    x = (x * loudness).astype(np.float32)
    statistics = Statistics.empty(columns)
    statistics.add(mx.array(x[:tokens]))
    return mx.array(random.normal(size=(rows, columns)).astype(np.float32)), statistics, x[tokens:]


def quantise(*args, **options):
    """(affine, kept, residual), the latter two empty where nothing is kept."""
    made = salient.quantise(*args, **options)
    if made.kept is None:
        return made.affine, np.zeros(0, int), mx.zeros((len(made.affine.codes), 0))
    return made.affine, made.kept, made.residual


def full(affine, kept, residual):
    weight = np.array(affine.dequantise(), np.float64)
    weight[:, kept] += np.array(residual.astype(mx.float32))
    return weight


def output_error(quantised, weight, x):
    return np.square((quantised - np.array(weight)) @ x.T).sum()


def test_the_loudest_and_the_heaviest_are_selected():
    weight, statistics, _ = problem()
    assert salient.select(weight, statistics, 4).tolist() == LOUD
    assert salient.select(weight, statistics, 4, "magnitude").tolist() == LOUD
    heavy = weight * mx.where(mx.arange(160) == 9, 1000, 1)
    assert 9 in salient.select(heavy, statistics, 4)
    assert 9 not in salient.select(heavy, statistics, 4, "magnitude")
    assert salient.select(weight, statistics, 0).shape == (0,)


@pytest.mark.parametrize("count", [-1, 160, 1.0, True, None])
def test_bad_counts_say_what_is_allowed(count):
    weight, statistics, _ = problem()
    for refuse in (lambda: salient.select(weight, statistics, count),
                   lambda: quantise(weight, statistics, Spec(group_size=32), count)):
        with pytest.raises(BadValue, match="allowed are 0 to 159 of 160 inputs"):
            refuse()


def test_bad_measures_say_what_is_allowed():
    weight, statistics, _ = problem()
    with pytest.raises(BadValue, match="allowed are energy, magnitude"):
        salient.select(weight, statistics, 1, "luck")


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_no_kept_channels_are_the_plain_path(method):
    weight, statistics, _ = problem()
    spec = Spec(bits=3, group_size=32)
    plain = method(weight, statistics, spec, mx.float16)
    affine, kept, residual = quantise(weight, statistics, spec, 0, mx.float16, method)
    for name in ("codes", "scales", "biases"):
        np.testing.assert_array_equal(np.array(getattr(affine, name)), np.array(getattr(plain, name)))
    assert kept.shape == (0,) and residual.shape == (40, 0)


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("name,factor", [("rtn", 0.4), ("awq", 0.85), ("gptq", 0.85)])
def test_kept_channels_lower_the_output_error(name, factor, bits):
    weight, statistics, x = problem()
    spec = Spec(bits=bits, group_size=32)
    plain = output_error(np.array(METHODS[name](weight, statistics, spec).dequantise()), weight, x)
    kept = output_error(full(*quantise(weight, statistics, spec, 4, method=METHODS[name])), weight, x)
    assert kept < factor * plain


@pytest.mark.parametrize("options", [{}, {"group_size": 0}, {"group_size": -1}, {"group_size": 4, "bits": 4},
                                     {"symmetric": True}, {"bits": "ternary"}, {"bits": 1}])
@pytest.mark.parametrize("name", METHODS)
def test_every_spec_keeps_groups_in_place_and_values_to_sixteen_bits(name, options):
    weight, statistics, _ = problem()
    spec = Spec(**{"bits": 2, "group_size": 32} | options)
    affine, kept, residual = quantise(weight, statistics, spec, 4, mx.float16, METHODS[name])
    assert kept.tolist() == LOUD and residual.dtype == mx.float16 and residual.shape == (40, 4)
    assert affine.codes.shape == (40, 160) and affine.codes.dtype == mx.uint8
    assert affine.scales.shape == (40, 160 // spec.group_for(160)) and affine.codes.max().item() < spec.levels
    quantised, target = full(affine, kept, residual), np.array(weight, np.float64)
    hessian = gptq.damped(np.array(statistics.hessian, np.float64))
    # What is left of the gradient of e H eᵀ in the kept columns, as an error of their values.
    missed = np.linalg.solve(hessian[np.ix_(kept, kept)], ((quantised - target) @ hessian)[:, kept].T)
    assert np.abs(missed).max() < 2 ** -11 * np.abs(np.array(residual)).max() + 1e-5


def test_the_loss_left_is_that_of_the_complement():
    weight, statistics, _ = problem()
    hessian = gptq.damped(np.array(statistics.hessian, np.float64))
    kept, error = np.array(LOUD), draw(40, 160, seed=5).astype(np.float64)
    values = salient.best_values(weight, weight + mx.array(error), hessian, kept)
    error[:, kept] = np.array(values - weight[:, mx.array(kept)])
    complement = salient.without(hessian, kept)
    assert not complement[kept].any() and not complement[:, kept].any()
    assert ((error @ complement) * error).sum() == pytest.approx(((error @ hessian) * error).sum(), rel=1e-4)


def test_kept_columns_do_not_widen_their_groups():
    weight, statistics, _ = problem()
    weight = mx.where(mx.array(np.isin(np.arange(160), LOUD)), 100.0, weight)
    spec = Spec(bits=4, group_size=32)
    wide = rtn.quantise(weight, statistics, spec).scales
    narrow = quantise(weight, statistics, spec, 4, method=rtn.quantise)[0].scales
    assert wide[:, 0].min().item() > 1 and narrow.max().item() < 1


def test_a_group_of_kept_columns_only():
    weight, statistics, x = problem()
    whole = mx.where((mx.arange(160) >= 32) & (mx.arange(160) < 48), 1000, 1)
    spec = Spec(bits=2, group_size=16)
    affine, kept, residual = quantise(weight * whole, statistics, spec, 16, method=rtn.quantise)
    assert kept.tolist() == list(range(32, 48))
    assert np.isfinite(full(affine, kept, residual)).all() and np.isfinite(np.array(residual)).all()


def test_dead_inputs_do_no_harm():
    weight, statistics, _ = problem()
    statistics.hessian = mx.zeros((160, 160))
    assert np.isfinite(full(*quantise(weight, statistics, Spec(bits=2, group_size=32), 4))).all()


def test_the_target_is_corrected_first():
    weight, statistics, x = problem()
    statistics = Statistics.empty(160)
    statistics.add(mx.array(x + draw(*x.shape) * x.std(0) * 0.3), mx.array(x))
    spec = Spec(bits=3, group_size=32)
    ours = quantise(weight, statistics, spec, 4, correction=0.5)
    moved = quantise(gptq.correct(weight, statistics, 0.5), statistics, spec, 4)
    np.testing.assert_array_equal(full(*ours), full(*moved))
    plain = gptq.quantise(weight, statistics, spec, correction=0.5)
    affine, _, _ = quantise(weight, statistics, spec, 0, correction=0.5)
    np.testing.assert_array_equal(np.array(affine.codes), np.array(plain.codes))


def test_the_layer_runs_what_was_quantised():
    weight, statistics, x = problem()
    affine, kept, residual = quantise(weight, statistics, Spec(bits=3, group_size=32), 4)
    linear = nn.QuantizedLinear(160, 40, bias=False, group_size=32, bits=3)
    linear.update({"weight": affine.packed(), "scales": affine.scales, "biases": affine.biases})
    layer = SalientLinear(linear, kept, residual)
    close(layer(mx.array(x[:5])), x[:5].astype(np.float64) @ full(affine, kept, residual).T, 1e-5)
