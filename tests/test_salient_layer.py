"""The layer with salient channels, against float64."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlxquant.base.errors import BadCheckpoint, BadValue, Unsupported
from mlxquant.codes import hadamard, rtn
from mlxquant.codes.spec import Spec
from mlxquant.layers import traffic
from mlxquant.layers.dense import to_dense
from mlxquant.layers.grouped import GroupedLinear, tensors_of
from mlxquant.layers.salient import SalientLinear, expand_salient
from mlxquant.layers.transformed import TransformedLinear

N, M, GROUP = 96, 7, 32
COLUMNS = [3, 40, 41, 95]


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def close(ours, reference, tolerance=2e-6):
    assert ours.shape == reference.shape
    gap = np.abs(np.array(ours.astype(mx.float32)) - reference).max()
    assert gap <= tolerance * np.abs(reference).max(), gap


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
    dense = network.blocks[0]["mlp"]
    assert type(dense) is nn.Linear
    close(dense(mx.array(x)), expected, 1e-5)
