"""The transformed linear layer, against dense float64 matrices."""

import json

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import dequantize_model

from mlxquant.base.errors import BadValue, Unsupported
from mlxquant.codes import hadamard
from mlxquant.layers import traffic
from mlxquant.layers.dense import to_dense
from mlxquant.layers.grouped import GroupedLinear
from mlxquant.layers.transformed import ActivationSpec, TransformedLinear

N, M, BLOCK = 96, 7, 32


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def rotation_matrix(signs, block):
    """R from its definition, entry by entry: H[i, j] = (−1)^(number of common bits)."""
    h = np.array([[(-1.0) ** (i & j).bit_count() for j in range(block)] for i in range(block)])
    return np.kron(np.eye(len(signs) // block), h / np.sqrt(block)) * np.asarray(signs, np.float64)


def rounded(x, bits, axis=-1, step=None):
    """Symmetric rounding in float64; returns integers and step."""
    top = 2 ** (bits - 1) - 1
    step = np.abs(x).max(axis, keepdims=True) / top if step is None else step
    return np.clip(np.round(x / step), -top, top), step


def close(ours, reference, tolerance=2e-6):
    assert ours.shape == reference.shape
    gap = np.abs(np.array(ours.astype(mx.float32)) - reference).max()
    assert gap <= tolerance * np.abs(reference).max(), gap


PARTS = {
    "nothing": set(), "scale": {"scale"}, "rotation": {"rotation"}, "token": {"token"},
    "tensor": {"tensor"}, "static": {"static"}, "scale+rotation": {"scale", "rotation"},
    "all": {"scale", "rotation", "token"}, "all, static": {"scale", "rotation", "static"}}


def make(parts, inner=None, n=N, block=BLOCK, seed=0):
    """A layer and the same in float64: x → y."""
    inner = inner or nn.Linear(n, M)
    scale = np.abs(draw(n, seed=seed + 1)) + 0.1 if "scale" in parts else None
    signs = hadamard.random_signs(n, seed) if "rotation" in parts else None
    granularity = next((g for g in ("token", "tensor", "static") if g in parts), None)
    step = 0.03125 if granularity == "static" else None
    layer = TransformedLinear(
        inner, None if scale is None else mx.array(scale), signs,
        None if signs is None else block, granularity and ActivationSpec(8, granularity), step)
    matrix = np.diag(np.ones(n) if scale is None else scale.astype(np.float64))
    if signs is not None:
        matrix = rotation_matrix(np.array(signs), block) @ matrix

    def reference(x, weight, bias):
        x = x.astype(np.float64) @ matrix.T
        if granularity:
            codes, steps = rounded(x, 8, -1 if granularity == "token" else None, step)
            x = codes * steps
        return x @ np.array(weight, np.float64).T + np.array(bias, np.float64)

    return layer, reference


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 2), (4,)])
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_layer_equals_the_dense_product(parts, shape):
    layer, reference = make(parts)
    x = draw(*shape, N, seed=5)
    close(layer(mx.array(x)), reference(x, layer.linear.weight, layer.linear.bias))


@pytest.mark.parametrize("n,block", [(5, 1), (6, 2), (33, 1), (36, 4)])
def test_odd_sizes(n, block):
    layer, reference = make({"scale", "rotation"}, n=n, block=block)
    x = draw(1, 3, n)
    close(layer(mx.array(x)), reference(x, layer.linear.weight, layer.linear.bias))


def test_rounding_of_the_layer_is_exact_where_float32_is():
    layer = TransformedLinear(nn.Linear(4, 2, bias=False), activation=ActivationSpec(4, "tensor"))
    layer.linear.weight = mx.array([[1.0, 2, 3, 4], [0, -1, 0, 1]])
    # Step 14 / 7 = 2: codes 7, 2 (2.5 rounds to even), −1, 0.
    assert layer(mx.array([[14.0, 5, -2, 0.9]])).tolist() == [[14 + 8 - 6, -4]]


@pytest.mark.parametrize("inner", ["quantised", "grouped"])
def test_around_packed_layers(inner):
    if inner == "quantised":
        linear = nn.QuantizedLinear(N, M, bias=True, group_size=32, bits=4)
        weight = mx.dequantize(linear.weight, linear.scales, linear.biases, 32, 4)
    else:
        linear = GroupedLinear(N, M, 3, 48, bias=True)
        linear.codes = mx.array(np.random.default_rng(0).integers(0, 1 << 32, linear.codes.shape,
                                                                  np.uint32))
        linear.scales, linear.biases = mx.array(draw(M, 2)), mx.array(draw(M, 2, seed=3))
        weight = linear.dense()
    linear.bias = mx.array(draw(M))
    layer, reference = make({"scale", "rotation"}, linear)
    x = draw(1, 4, N)
    close(layer(mx.array(x)), reference(x, weight, linear.bias), 1e-5)


def test_half_precision_stays_half_whatever_the_parameters_are():
    layer, reference = make(PARTS["all"])
    layer.linear.update({"weight": layer.linear.weight.astype(mx.float16),
                         "bias": layer.linear.bias.astype(mx.float16)})
    x = mx.array(draw(1, 3, N)).astype(mx.float16)
    y = layer(x)
    assert y.dtype == mx.float16
    close(y, reference(np.array(x), layer.linear.weight, layer.linear.bias), 2e-2)


@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS.keys())
def test_config_and_weights_make_the_same_layer(parts, tmp_path):
    layer, _ = make(parts, nn.QuantizedLinear(N, M, group_size=32, bits=4))
    x = mx.array(draw(1, 3, N))
    file = str(tmp_path / "layer.safetensors")
    mx.save_safetensors(file, dict(tree_flatten(layer.parameters())))
    entry = json.loads(json.dumps(layer.describe()))
    inner = nn.QuantizedLinear(N, M, group_size=32, bits=4)
    again = TransformedLinear.from_config(inner, entry)
    own = [a for name, a in tree_flatten(again.parameters()) if not name.startswith("linear.")]
    assert not any(a.any().item() for a in own)
    again(x)  # what it caches must not outlive the empty parameters
    again.load_weights(file, strict=True)
    assert again.describe() == layer.describe()
    np.testing.assert_array_equal(np.array(again(x)), np.array(layer(x)))


def test_parameters_by_name():
    layer, _ = make(PARTS["all, static"])
    mx.eval(layer(mx.ones((1, N))))
    assert {name: (a.shape, a.dtype) for name, a in tree_flatten(layer.parameters())} == {
        "linear.weight": ((M, N), mx.float32), "linear.bias": ((M,), mx.float32),
        "input_scale": ((N,), mx.float32), "rotation_signs": ((N // 8,), mx.uint8),
        "activation_scale": ((1,), mx.float32)}
    assert "rotation_signs" not in layer.trainable_parameters()


def test_sixteen_bits_are_off():
    layer = TransformedLinear(nn.Linear(N, M), activation=ActivationSpec(16))
    assert layer.describe() == {"input_scale": False, "rotation_block": None, "activation": None}


def test_trains_and_compiles():
    layer, _ = make({"scale", "rotation"})
    x = mx.array(draw(2, N))
    compiled = mx.compile(lambda x: layer(x))(x)  # before any other call: it fills the cache
    close(layer(x), np.array(compiled))
    gradient = nn.value_and_grad(layer, lambda m, x: mx.square(m(x)).sum())(layer, x)[1]
    assert gradient["input_scale"].abs().max().item() > 0


@pytest.mark.parametrize("arguments,message", [
    ({"input_scale": mx.ones(5)}, r"input_scale has shape \(5,\), allowed is \(96,\)"),
    ({"rotation_signs": mx.ones(5), "rotation_block": 1}, r"rotation_signs has shape \(5,\)"),
    ({"rotation_signs": mx.zeros(N), "rotation_block": 32}, "allowed 1 and -1"),
    ({"rotation_signs": mx.ones(N), "rotation_block": 64}, "allowed for 96 inputs"),
    ({"rotation_block": 32}, "needs both"), ({"rotation_signs": mx.ones(N)}, "needs both"),
    *(({"activation": ActivationSpec(8, "static"), "activation_scale": scale}, "needs its scale")
      for scale in (None, 0.0, float("nan"), float("inf")))])
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(BadValue, match=message):
        TransformedLinear(nn.Linear(N, M), **arguments)


@pytest.mark.parametrize("entry,error,message", [
    ({"shift": True}, Unsupported, "input_scale, rotation_block, activation"),
    ("rotated", Unsupported, "input_scale, rotation_block, activation"),
    ({"input_scale": 1}, BadValue, "true and false"),
    ({"rotation_block": "32"}, BadValue, "allowed for 96 inputs"),
    ({"activation": {"bits": 8, "zero": 1}}, Unsupported, "bits, granularity"),
    ({"activation": {"bits": "8"}}, BadValue, "2 to 16"),
    ({"activation": {"granularity": ["token"]}}, BadValue, "token, tensor, static")])
def test_entries_that_make_no_layer_are_refused(entry, error, message):
    with pytest.raises(error, match=message):
        TransformedLinear.from_config(nn.Linear(N, M), entry)


def test_other_layers_are_not_wrapped():
    with pytest.raises(Unsupported, match="Embedding"):
        TransformedLinear(nn.Embedding(4, 4))


class Network(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.blocks = [{"mlp": layer}]
        self.lm_head = nn.Linear(M, 3, bias=False)


def test_quantised_in_place_and_expanded_again():
    layer, _ = make(PARTS["all"])
    network = Network(layer)
    nn.quantize(network, 32, 4, class_predicate=lambda path, m: path.endswith("mlp.linear"))
    assert isinstance(layer.linear, nn.QuantizedLinear)
    x = mx.array(draw(1, 3, N))
    before = np.array(layer(x))
    dequantize_model(network)
    assert isinstance(layer.linear, nn.Linear)
    close(layer(x), before, 1e-5)


def test_bytes_of_scale_signs_and_step_are_counted():
    layer, _ = make(PARTS["all, static"])
    network = Network(layer)
    network.update({"blocks": [{"mlp": {"input_scale": layer.input_scale.astype(mx.float16)}}]})
    leaves = 4 * (M * N + M + 3 * M)
    assert traffic.weight_bytes(network) == leaves + 2 * N + N // 8 + 4
    assert traffic.dense_bytes(network) == leaves + 4 * N + N // 8 + 4
    assert traffic.weight_bytes(network, traffic.float32_bytes) == traffic.dense_bytes(network)


def test_a_dense_network_has_linear_transforms_in_its_weights():
    weight, x = draw(5, 96), mx.array(draw(3, 96, seed=1))
    linear = nn.Linear(96, 5)
    linear.weight = mx.array(weight)
    scale = mx.array(np.abs(draw(96, seed=2)) + 0.1)
    layers = {"folded": TransformedLinear(linear, scale, hadamard.random_signs(96, 0), 32),
              "rounded": TransformedLinear(nn.Linear(96, 5), scale, activation=ActivationSpec())}

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.folded, self.rounded = layers["folded"], layers["rounded"]

    network, wanted = Network(), layers["folded"](x)
    to_dense(network)
    assert type(network.folded) is nn.Linear and type(network.rounded) is TransformedLinear
    close(network.folded(x), np.array(wanted, np.float64), 1e-5)
