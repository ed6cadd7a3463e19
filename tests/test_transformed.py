"""The transformed linear layer and its rotation, against dense float64 matrices."""

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
from mlxquant.layers.transformed import ActivationSpec, TransformedLinear, round_activation

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


# --- rotation

@pytest.mark.parametrize("n,block", [
    (64, 64), (96, 32), (6, 2), (5, 1), (576, 64), (960, 64), (12, 4)])
def test_rotation_equals_its_matrix(n, block):
    signs = hadamard.random_signs(n, seed=n)
    r = rotation_matrix(np.array(signs), block)
    np.testing.assert_allclose(r @ r.T, np.eye(n), atol=1e-12)
    x, h = draw(2, 3, n), draw(n, n, seed=1)
    close(hadamard.rotate(mx.array(x), signs, block), x @ r.T)
    close(hadamard.rotate_weight(mx.array(x[0]), signs, block), x[0] @ r.T)
    close(hadamard.unrotate_weight(mx.array(x[0]), signs, block), x[0] @ r)
    close(hadamard.rotate_hessian(mx.array(h), signs, block), r @ h @ r.T)
    turned = hadamard.rotate_weight(mx.array(x[0]), signs, block)
    close(hadamard.unrotate_weight(turned, signs, block), x[0])


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_rotation_stays_in_its_dtype(dtype):
    x, signs = mx.array(draw(3, 64)).astype(dtype), hadamard.random_signs(64, 0)
    for turned in (hadamard.rotate(x, signs, 32), hadamard.unrotate_weight(x, signs, 32)):
        assert turned.dtype == dtype
    expected = np.array(x.astype(mx.float32)) @ rotation_matrix(signs, 32).T
    close(hadamard.rotate(x, signs, 32), expected, 2e-2)


def test_signs_are_repeatable_and_even():
    signs = np.array(hadamard.random_signs(4096, 7))
    assert set(signs) == {-1.0, 1.0} and abs(signs.mean()) < 0.06
    np.testing.assert_array_equal(signs, np.array(hadamard.random_signs(4096, 7)))
    assert (signs != np.array(hadamard.random_signs(4096, 8))).any()


@pytest.mark.parametrize("n", [1, 3, 8, 9, 96, 577])
def test_signs_pack_to_bits_lowest_first(n):
    signs = hadamard.random_signs(n, n)
    packed = hadamard.pack_signs(signs)
    assert packed.dtype == mx.uint8 and packed.shape == (-(-n // 8),)
    for j, sign in enumerate(signs.tolist()):
        assert packed[j // 8].item() >> j % 8 & 1 == (sign < 0)
    np.testing.assert_array_equal(np.array(hadamard.unpack_signs(packed, n)), np.array(signs))


@pytest.mark.parametrize("n,at_most,expected", [
    (576, 64, 64), (96, 64, 32), (96, 16, 16), (97, 64, 1), (4096, 64, 64), (4096, 100, 64),
    (4096, 4096, 4096), (1 << 15, 1 << 15, 8192)])
def test_default_block(n, at_most, expected):
    assert hadamard.default_block(n, at_most) == expected


@pytest.mark.parametrize("block", [0, -2, 3, 64, 96, 2.0, True])
def test_impossible_blocks_say_what_is_allowed(block):
    with pytest.raises(BadValue, match="allowed for 96 inputs are 1, 2, 4, 8, 16, 32"):
        hadamard.rotate(mx.ones((2, 96)), mx.ones(96), block)


# --- activations

def test_integers_are_exact_per_token_per_tensor_and_static():
    # Maxima of 127/8 and 127/4 make both steps powers of two, so every quotient is exact.
    x = np.random.default_rng(0).integers(-508, 508, (1, 2, 9)) / 32
    x[0, 0, 3], x[0, 1, 4] = -127 / 8, 127 / 4
    x[0, 0] = np.clip(x[0, 0], -127 / 8, 127 / 8)
    for spec, scale, steps in [(ActivationSpec(8, "token"), None, [[[1 / 8], [1 / 4]]]),
                               (ActivationSpec(8, "tensor"), None, [1 / 4]),
                               (ActivationSpec(8, "static"), mx.array([1 / 16]), [1 / 16])]:
        codes, step = round_activation(mx.array(x), spec, scale)
        np.testing.assert_array_equal(np.array(step), np.array(steps, np.float32))
        np.testing.assert_array_equal(np.array(codes), np.clip(np.round(x / steps), -127, 127))


@pytest.mark.parametrize("bits", [2, 3, 4, 8, 12, 15])
@pytest.mark.parametrize("granularity", ["token", "tensor"])
def test_error_is_within_half_a_step(bits, granularity):
    x = draw(2, 5, 33)
    codes, step = map(np.array, round_activation(mx.array(x), ActivationSpec(bits, granularity)))
    top = 2 ** (bits - 1) - 1
    assert np.abs(codes).max() == top and (codes == np.round(codes)).all()
    assert (np.abs(codes * step - x) <= step * 0.5 + 1e-6 * np.abs(x).max()).all()


def test_a_token_of_zeros_stays_zero():
    codes, step = round_activation(mx.zeros((1, 2, 4)), ActivationSpec())
    assert not codes.any() and not step.any()


def test_static_clips_what_calibration_did_not_see():
    x = mx.array([[-9.0, 0.6, 9.0]])
    codes, _ = round_activation(x, ActivationSpec(4, "static"), mx.ones(1))
    assert codes.tolist() == [[-7, 1, 7]]


@pytest.mark.parametrize("changes,allowed", [
    ({"bits": 1}, "2 to 16"), ({"bits": 17}, "2 to 16"), ({"bits": 8.0}, "2 to 16"),
    ({"bits": True}, "2 to 16"), ({"granularity": "row"}, "token, tensor, static"),
    ({"scale": 0.1}, "static only"), ({"granularity": "static", "scale": 0.0}, "positive"),
    ({"granularity": "static", "scale": float("nan")}, "positive"),
    ({"granularity": "static", "scale": True}, "positive")])
def test_impossible_activations_say_what_is_allowed(changes, allowed):
    with pytest.raises(BadValue, match=allowed):
        ActivationSpec(**changes)


# --- the layer

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
        None if signs is None else block, granularity and ActivationSpec(8, granularity, step))
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
    ({"activation": ActivationSpec(8, "static")}, "needs its scale")])
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


# --- in a network

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
    assert traffic.weight_bytes(network, dense=True) == traffic.dense_bytes(network)


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
