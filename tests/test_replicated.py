"""Replicated layers: against dense float64 products, as siblings, and in training."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_transformed import close, draw, rotation_matrix

from mlxquant.base.errors import BadValue
from mlxquant.codes import hadamard
from mlxquant.codes.packing import empty_codes, pack_codes, unpack_codes
from mlxquant.codes.spec import REPLICA_GROUPS, REPLICA_WIDTHS, ReplicaShape
from mlxquant.codes.width import Width
from mlxquant.layers import traffic
from mlxquant.layers.replicated import (
    ReplicaInput,
    ReplicatedLinear,
    install_group,
)

LEVELS = {Width.ONE: [-1, 1], Width.TERNARY: [-1, 0, 1], Width.TWO: [-1.5, -0.5, 0.5, 1.5],
          Width.THREE: [c - 3.5 for c in range(8)], Width.FOUR: [c - 7.5 for c in range(16)]}


def fill(layer, seed=0):
    """Random codes, scales and signs in place; returns the codes."""
    shared = layer.input
    codes = np.random.default_rng(seed).integers(0, len(LEVELS[shared.spec.bits]), layer.shape)
    layer.codes = pack_codes(mx.array(codes), shared.spec.bits)
    for module in (layer, shared):
        module.update({
            name: mx.array(draw(*array.shape, seed=seed + len(name)) / array.shape[-1] ** 0.5)
            for name, array in module.trainable_parameters().items()})
    if "rotation_signs" in shared:
        shared.rotation_signs = hadamard.pack_signs(hadamard.random_signs(shared.inputs, seed))
    return codes


def make(m=7, n=192, bias=False, **shape):
    layer = ReplicatedLinear(m, ReplicaInput(n, ReplicaShape(**shape)), bias)
    return layer, fill(layer)


def dense64(layer, codes):
    """W in float64 from its definition, replica by replica and input by input."""
    shared, spec = layer.input, layer.input.spec
    b, a = np.array(layer.replica_out, np.float64), np.array(shared.replica_in, np.float64)
    if spec.replica_group:
        a = np.stack([c * a[j // spec.replica_group]
                      for j, c in enumerate(shared.column_scale.tolist())])
    levels = np.array(LEVELS[spec.bits])[codes]
    weight = sum(np.diag(b[:, k]) @ levels @ np.diag(a[:, k]) for k in range(spec.replicas))
    if not spec.rotation_block:
        return weight
    signs = hadamard.unpack_signs(shared.rotation_signs, shared.inputs)
    return weight @ rotation_matrix(np.array(signs), spec.rotation_block)


@pytest.mark.parametrize("bits", REPLICA_WIDTHS)
@pytest.mark.parametrize("columns", [1, 4, 5, 6, 31, 33, 64, 99])
def test_codes_survive_packing(bits, columns):
    assert [bits.lowest + bits.distance * c for c in range(bits.levels)] == LEVELS[bits]
    codes = np.random.default_rng(columns).integers(0, len(LEVELS[bits]), (3, columns))
    packed, empty = pack_codes(mx.array(codes), bits), empty_codes((3, columns), bits)
    assert (packed.shape, packed.dtype) == (empty.shape, empty.dtype)
    np.testing.assert_array_equal(np.array(unpack_codes(packed, bits, columns)), codes)


def test_order_of_codes_in_words_and_bytes():
    assert pack_codes(mx.array([[2, 0, 1, 0, 2, 1]]),
                      Width.TERNARY).tolist() == [[2 + 9 + 2 * 81, 1]]
    codes = [(5 * j + 1) % 8 for j in range(12)]  # the eleventh crosses into the second word
    stream = sum(code << 3 * j for j, code in enumerate(codes))
    assert pack_codes(mx.array([codes]),
                      Width.THREE).tolist() == [[stream & 0xFFFFFFFF, stream >> 32]]


@pytest.mark.parametrize("bits", REPLICA_WIDTHS)
@pytest.mark.parametrize("replicas", [1, 4, 16])
@pytest.mark.parametrize("group", REPLICA_GROUPS)
@pytest.mark.parametrize("block", [0, 64])
def test_layer_equals_the_dense_product(bits, replicas, group, block):
    layer, codes = make(bits=bits, replicas=replicas, replica_group=group, rotation_block=block)
    weight, x = dense64(layer, codes), draw(2, 3, 192)
    close(layer(mx.array(x)), x @ weight.T, 1e-5)
    close(layer.dense(), weight, 1e-5)


@pytest.mark.parametrize("bits", REPLICA_WIDTHS)
@pytest.mark.parametrize("m,n,block", [(1, 1, 0), (5, 37, 0), (3, 36, 4), (2, 33, 1)])
def test_odd_sizes_with_a_bias(bits, m, n, block):
    layer, codes = make(m, n, True, bits=bits, replicas=3, rotation_block=block)
    x = draw(4, n)
    close(layer(mx.array(x)), x @ dense64(layer, codes).T + np.array(layer.bias), 1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("scales", [mx.float16, mx.float32])
def test_output_has_the_dtype_of_the_input_whatever_the_scales_have(dtype, scales):
    layer, codes = make(bias=True, replica_group=16, rotation_block=32)
    x, expected = draw(3, 192), dense64(layer, codes)
    for module in (layer, layer.input):
        module.set_dtype(scales)
    y = layer(mx.array(x).astype(dtype))
    assert y.dtype == dtype
    close(y, x @ expected.T + np.array(layer.bias), 3e-2)


def siblings(**shape):
    parent = nn.Module()
    parent.q, parent.k, parent.v = nn.Linear(64, 6), nn.Linear(64, 4), nn.Linear(64, 5, bias=False)
    shared = install_group(parent, "qkv", {name: parent[name] for name in "qkv"},
                           ReplicaShape(**shape))
    for seed, name in enumerate("qkv"):
        fill(parent[name], seed)
    return parent, shared


def test_siblings_rotate_their_input_once(monkeypatch):
    rotations, rotate = [], hadamard.rotate
    monkeypatch.setattr(hadamard, "rotate", lambda *a: rotations.append(0) or rotate(*a))
    parent, shared = siblings(rotation_block=32)
    inputs = [mx.array(draw(2, 64, seed=seed)) for seed in range(3)]
    weights = {name: np.array(parent[name].dense()) for name in "qkv"}
    for count, x in enumerate([*inputs, inputs[0]], 1):
        for name in "qkv":
            bias = np.array(parent[name].get("bias", 0))
            close(parent[name](x), np.array(x) @ weights[name].T + bias, 1e-5)
        assert len(rotations) == count
    x *= 2  # in place: the same array to Python
    close(parent.v(x), np.array(x) @ weights["v"].T, 1e-5)
    parent.q(inputs[1])
    close(parent.v(inputs[2]), np.array(inputs[2]) @ weights["v"].T, 1e-5)  # not what q was given
    del x
    inputs.clear()
    assert shared._rotated._made is None  # no activation outlives its array


def test_siblings_under_compile_and_grad():
    parent, _ = siblings(rotation_block=32, replica_group=8)

    def run(x):
        return parent.q(x).sum(-1) + parent.k(x).sum(-1) + parent.v(x).sum(-1)

    first, second = (mx.array(draw(2, 64, seed=seed)) for seed in range(2))
    traced = [np.array(y) for y in map(mx.compile(run), (first, second))]  # before any other call
    for x, y in zip((first, second), traced):
        close(run(x), y, 1e-5)
    gradient = mx.grad(lambda x: run(x).sum())(first)
    assert mx.allclose(gradient, mx.compile(mx.grad(lambda x: run(x).sum()))(second), rtol=1e-4)
    close(gradient[0], sum(np.array(parent[name].dense()).sum(0) for name in "qkv"), 1e-5)


@pytest.mark.parametrize("bits", [1, "ternary", 3])
@pytest.mark.parametrize("group", [0, 16])
def test_gradients_equal_finite_differences(bits, group):
    layer, _ = make(bias=True, bits=bits, replicas=3, replica_group=group, rotation_block=64)
    network = nn.Module()
    network.shared, network.layer = layer.input, layer
    x, mix = mx.array(draw(5, 192)), mx.array(draw(5, 7, seed=1))

    def loss():
        return (mix * layer(x)).sum()

    value, gradients = nn.value_and_grad(network, loss)()
    assert {name for name, _ in tree_flatten(gradients)} == {
        "layer.replica_out", "layer.bias", "shared.replica_in",
        *["shared.column_scale"] * bool(group)}
    for path, gradient in tree_flatten(gradients):
        module, name = network[path.split(".")[0]], path.split(".")[1]
        start, step = module[name], mx.array(draw(*gradient.shape, seed=2))
        module[name] = start + step  # the loss is linear in each tensor: no step is too large
        assert (loss() - value).item() == pytest.approx((gradient * step).sum().item(), rel=1e-3)
        module[name] = start


@pytest.mark.parametrize("bits,code_bits", [(1, 1), ("ternary", 1.6), (2, 2), (3, 3), (4, 4)])
@pytest.mark.parametrize("group", [0, 16])
def test_bits_per_weight_and_operations_follow_their_formulas(bits, code_bits, group):
    m, n, k = 96, 320, 4  # whole words and whole bytes per row
    layer, _ = make(m, n, bits=bits, replicas=k, replica_group=group, rotation_block=64)
    for module in (layer, layer.input):
        module.set_dtype(mx.float16)
    scales, per_weight = (k * m + k * n / group + n, 1 + k / group) if group else (k * (m + n), k)
    assert (layer.operations(), layer.input.operations()) == (per_weight * m * n, 6 * n)
    parent = nn.Module()
    parent.layer, parent.shared = layer, layer.input
    stored = code_bits + (16 * scales + n) / (m * n)
    assert traffic.body_bits_per_weight(parent) == pytest.approx(stored)


def test_siblings_claim_the_bytes_that_their_file_holds(tmp_path):
    parent, _ = siblings(rotation_block=64)
    parent.save_weights(file := str(tmp_path / "siblings.safetensors"))
    held, biases = sum(array.nbytes for array in mx.load(file).values()), 4 * (6 + 4)
    assert traffic.weight_bytes(parent) == held
    assert traffic.body_bits_per_weight(parent) == 8 * (held - biases) / (15 * 64)
    assert traffic.dense_bytes(parent) == 4 * 15 * 64 + biases


@pytest.mark.parametrize("changes,allowed", [
    ({"bits": 5}, "1, ternary, 2, 3, 4"), ({"bits": True}, "1, ternary"),
    ({"bits": 2.0}, "1, ternary"),
    ({"replicas": 0}, "1, 2"), ({"replicas": 17}, "15, 16"),
    ({"replica_group": 24}, "0, 8, 16, 32, 64"),
    ({"rotation_block": 3}, "0, 1, 2, 4"), ({"rotation_block": None}, "0, 1, 2, 4")])
def test_impossible_shapes_say_what_is_allowed(changes, allowed):
    with pytest.raises(BadValue, match=f"{next(iter(changes))} is .*allowed are .*{allowed}"):
        ReplicaShape(**changes)


@pytest.mark.parametrize("name,widths,shape,message", [
    ("x", [96], {"replica_group": 64},
     "group 64 does not divide the 96 inputs of 0; .* 0, 8, 16, 32$"),
    ("x", [96], {"rotation_block": 64},
     "rotation_block 64 does not .* of 0; allowed are 0, 1, .*, 32$"),
    ("x", [8, 16], {}, "'0': 8, '1': 16"), ("qkv", [8], {}, "qkv is taken")])
def test_layers_that_do_not_fit_are_refused(name, widths, shape, message):
    linears = {str(i): nn.Linear(width, 4) for i, width in enumerate(widths)}
    with pytest.raises(BadValue, match=message):
        install_group(siblings()[0], name, linears, ReplicaShape(**shape))
