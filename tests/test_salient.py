"""Salient channels: the layer against float64, the kept values against least squares, the gain on data."""

import json

import mlxquant  # first: it loads the BLAS before MLX
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxquant.errors import BadCheckpoint, BadValue, Unsupported
from mlxquant.layers.dense import to_dense
from mlxquant.layers.grouped import GroupedLinear, tensors_of
from mlxquant.layers.salient import SalientLinear, expand_salient
from mlxquant.layers.transformed import TransformedLinear
from mlxquant.quant import awq, gptq, hadamard, rtn, salient
from mlxquant.quant.spec import Spec
from mlxquant.quant.statistics import Statistics
from mlxquant.roofline import traffic

N, M, GROUP = 96, 7, 32
COLUMNS = [3, 40, 41, 95]
LOUD = [5, 70, 71, 150]  # outlying channels of ``problem``
METHODS = {"rtn": rtn.quantise, "awq": awq.quantise, "gptq": gptq.quantise}


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(ours, reference, tolerance=2e-6):
    assert ours.shape == reference.shape
    gap = np.abs(np.array(ours.astype(mx.float32)) - reference).max()
    assert gap <= tolerance * np.abs(reference).max(), gap


# --- the layer

def inner(kind, n=N):
    """A layer of n inputs and its weight in float64."""
    if kind == "dense":
        linear = nn.Linear(n, M)
        weight = linear.weight
    elif kind == "quantised":
        linear = nn.QuantizedLinear(n, M, bias=True, group_size=GROUP, bits=3)
        weight = mx.dequantize(linear.weight, linear.scales, linear.biases, GROUP, 3)
    else:
        linear = GroupedLinear(n, M, 2, n // 2, bias=True)
        affine = rtn.quantise(mx.array(draw(M, n)), None, Spec(bits=2, group_size=n // 2), mx.float32)
        linear.update(tensors_of(affine, mx.float32))
        weight = affine.dequantise()
    linear.bias = mx.array(draw(M, seed=1))
    return linear, np.array(weight, np.float64)


def make(kind="quantised", columns=COLUMNS, n=N):
    """A salient layer, and the weight and bias that it stands for in float64."""
    linear, weight = inner(kind, n)
    residual = draw(M, len(columns), seed=2)
    weight[:, columns] += residual
    layer = SalientLinear(linear, mx.array(columns), mx.array(residual))
    return layer, weight, np.array(linear.bias, np.float64)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 2), (4,), ()])
@pytest.mark.parametrize("kind", ["dense", "quantised", "grouped"])
def test_layer_equals_the_dense_product(kind, shape):
    layer, weight, bias = make(kind)
    x = draw(*shape, N, seed=3)
    close(layer(mx.array(x)), x.astype(np.float64) @ weight.T + bias, 1e-5)


@pytest.mark.parametrize("columns", [[0], [95, 2], list(range(N))])
def test_any_number_of_columns_in_any_order(columns):
    layer, weight, bias = make(columns=columns)
    x = draw(2, N)
    close(layer(mx.array(x)), x.astype(np.float64) @ weight.T + bias, 1e-5)


def test_columns_past_sixteen_bits():
    n = (1 << 16) + 32
    layer, weight, bias = make("dense", [2, n - 1], n)
    assert layer.salient_columns.dtype == mx.int32
    x = draw(1, n)
    close(layer(mx.array(x)), x.astype(np.float64) @ weight.T + bias, 1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_stays_half_whatever_the_parameters_are(dtype):
    layer, weight, bias = make("dense")
    layer.linear.update({"weight": layer.linear.weight.astype(dtype),
                         "bias": layer.linear.bias.astype(dtype)})
    x = mx.array(draw(1, 3, N)).astype(dtype)
    y = layer(x)
    assert y.dtype == dtype
    close(y, np.array(x.astype(mx.float32)) @ weight.T + bias, 3e-2)


def test_parameters_by_name_and_their_bytes():
    layer, _, _ = make("dense")
    assert {name: (a.shape, a.dtype) for name, a in tree_flatten(layer.parameters())} == {
        "linear.weight": ((M, N), mx.float32), "linear.bias": ((M,), mx.float32),
        "salient_columns": ((4,), mx.uint16), "salient_weight": ((M, 4), mx.float32)}
    assert layer.shape == (M, N) and layer.stored_bytes == 4 * 2 + M * 4 * 4
    network = Network(layer)
    assert traffic.weight_bytes(network, {}) == 4 * (M * N + M + 3 * M) + layer.stored_bytes
    layer.salient_weight = layer.salient_weight.astype(mx.float16)
    assert layer.stored_bytes == 4 * 2 + M * 4 * 2


def test_trains_and_compiles():
    layer, _, _ = make("dense")
    x = mx.array(draw(2, N))
    close(mx.compile(lambda x: layer(x))(x), np.array(layer(x)))
    gradient = nn.value_and_grad(layer, lambda m, x: mx.square(m(x)).sum())(layer, x)[1]
    assert gradient["salient_weight"].abs().max().item() > 0 and "salient_columns" not in gradient


@pytest.mark.parametrize("kind", ["quantised", "grouped"])
def test_config_and_weights_make_the_same_layer(kind, tmp_path):
    layer, _, _ = make(kind)
    layer.salient_weight = layer.salient_weight.astype(mx.float16)
    file = str(tmp_path / "layer.safetensors")
    mx.save_safetensors(file, dict(tree_flatten(layer.parameters())))
    entry = json.loads(json.dumps(layer.describe()))
    assert entry == {"columns": 4}
    empty, _ = inner(kind)
    again = SalientLinear.from_config(empty, entry)
    x = mx.array(draw(1, 3, N))
    np.testing.assert_array_equal(np.array(again(x)), np.array(empty(x)))
    again.load_weights(file, strict=True)
    again.check_loaded("layer")
    assert again.describe() == entry and again.salient_weight.dtype == mx.float16
    np.testing.assert_array_equal(np.array(again(x)), np.array(layer(x)))


@pytest.mark.parametrize("columns,residual,message", [
    ([], (M, 0), "number 0, allowed are 1 to 96"), ([0, 96], (M, 2), "from 0 to 95"),
    ([-1], (M, 1), "from 0 to 95"), ([4, 4], (M, 2), "different integers"), ([[4]], (M, 1), "in one row"),
    ([0.5], (M, 1), "different integers"), ([4], (M, 2), r"shape \(7, 2\), allowed is \(7, 1\)")])
def test_what_does_not_fit_is_refused(columns, residual, message):
    with pytest.raises(BadValue, match=message):
        SalientLinear(nn.Linear(N, M), np.array(columns), mx.zeros(residual))


@pytest.mark.parametrize("entry,error,message", [
    ({}, Unsupported, "columns"), ("4", Unsupported, "columns"),
    ({"columns": 4, "rows": 1}, Unsupported, "columns"),
    ({"columns": 0}, BadValue, "allowed are 1 to 96"), ({"columns": 97}, BadValue, "allowed are 1 to 96"),
    ({"columns": True}, BadValue, "1 to 96"), ({"columns": "4"}, BadValue, "1 to 96")])
def test_entries_that_make_no_layer_are_refused(entry, error, message):
    with pytest.raises(error, match=message):
        SalientLinear.from_config(nn.Linear(N, M), entry)


def test_other_layers_are_not_wrapped():
    with pytest.raises(Unsupported, match="Embedding"):
        SalientLinear(nn.Embedding(4, 4), [0], mx.zeros((4, 1)))


# --- in a network

class Network(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.blocks = [{"mlp": layer}]
        self.lm_head = nn.Linear(M, 3, bias=False)


@pytest.mark.parametrize("kind", ["dense", "quantised", "grouped"])
def test_expanded_into_one_dense_layer(kind):
    layer, weight, bias = make(kind)
    network = Network(layer)
    expand_salient(to_dense(network))
    dense = network.blocks[0]["mlp"]
    assert type(dense) is nn.Linear
    close(dense.weight, weight)
    close(dense.bias, bias)


def test_a_packed_inner_layer_stays():
    layer, _, _ = make("quantised")
    network = expand_salient(Network(layer))
    assert network.blocks[0]["mlp"] is layer


def test_loaded_columns_out_of_range_are_refused():
    layer, _, _ = make("quantised")
    layer.salient_columns = mx.array([1, 2, 3, 96], mx.uint16)
    message = "blocks.0.mlp.salient_columns are not different inputs from 0 to 95"
    with pytest.raises(BadCheckpoint, match=message):
        expand_salient(Network(layer))


def test_inside_a_transform():
    layer, weight, bias = make()
    scale, signs = np.abs(draw(N, seed=4)) + 0.1, hadamard.random_signs(N, 0)
    outer = TransformedLinear(nn.Linear(N, M), mx.array(scale), signs, 32)
    outer.linear = layer
    x = draw(1, 3, N)
    turned = np.array(hadamard.rotate_weight(mx.array(np.eye(N)), signs, 32), np.float64)  # Rᵀ
    expected = (x * scale.astype(np.float64)) @ turned @ weight.T + bias
    close(outer(mx.array(x)), expected, 1e-5)
    network = expand_salient(to_dense(Network(outer)))
    assert network.blocks[0]["mlp"] is outer and type(outer.linear) is nn.Linear
    close(outer(mx.array(x)), expected, 1e-5)


# --- the choice and the kept values

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
