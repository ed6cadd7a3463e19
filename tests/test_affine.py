"""Packing at every width, and scales against brute force and an independent reference."""

import json

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlxquant.base.errors import BadValue
from mlxquant.codes import affine, rtn
from mlxquant.codes.spec import Spec, Whole, parse_override
from mlxquant.codes.width import Width
from mlxquant.layers.grouped import GroupedLinear, tensors_of
from mlxquant.quantise.job import Job


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 3, 4, 5, 6, 8]), st.integers(1, 5), st.integers(1, 130),
       st.integers(0, 2**31))
def test_packing_is_a_little_endian_bit_stream(bits, rows, columns, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, (rows, columns), np.uint8)
    packed = np.array(affine.pack(mx.array(codes), bits))
    for row in range(rows):
        stream = int.from_bytes(packed[row].tobytes(), "little")
        assert [stream >> (bits * j) & (2**bits - 1) for j in range(columns)] == codes[row].tolist()
        assert stream >> (bits * columns) == 0
    assert np.array_equal(np.array(affine.unpack(mx.array(packed), bits, columns)), codes)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
def test_packed_codes_are_what_mlx_dequantises(bits):
    weight = mx.random.normal((6, 128), key=mx.random.key(bits))
    q = rtn.quantise(weight, Spec(bits=bits, group_size=32))
    stock = mx.dequantize(q.packed(), q.scales, q.biases, group_size=32, bits=bits)
    assert mx.array_equal(stock, q.dequantise())


@pytest.mark.parametrize("group", [48, 0, -1])
def test_a_layer_of_any_group_multiplies_with_what_was_found(group):
    """Rounded once to bfloat16, of whose rounding at 8 bits more would be as much again."""
    q = rtn.quantise(0.02 * mx.random.normal((6, 96), key=mx.random.key(3)),
                     Spec(bits=8, group_size=group), mx.bfloat16)
    layer = GroupedLinear(96, 6, 8, group)
    layer.update(tensors_of(q, mx.bfloat16))
    assert mx.array_equal(layer.dense(), q.dequantise().astype(mx.bfloat16))


@pytest.mark.parametrize("bits", Width)
@pytest.mark.parametrize("group", [32, 48, 0, -1])
@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_are_nearest_and_beat_min_max(bits, group, symmetric):
    spec = Spec(bits=bits, group_size=group, symmetric=symmetric, method="rtn")
    weight = np.random.default_rng(1).standard_t(4, (8, 96)).astype(np.float32)
    q = affine.fit(mx.array(weight), spec, None, mx.float32)
    w, scale, bias = (np.array(x, np.float64) for x in (
        weight, affine.expand(q.scales, q.group), affine.expand(q.biases, q.group)))
    grid = scale[..., None] * np.arange(spec.bits.levels) + bias[..., None]
    best = np.abs(grid - w[..., None]).min(-1)
    chosen = np.abs(np.array(q.dequantise()) - w)
    assert (chosen <= best + 1e-5).all()
    if symmetric or bits is Width.TERNARY:
        assert np.allclose(grid[..., 0], -grid[..., -1], atol=1e-6)
    assert (chosen**2).sum() <= min_max_error(w, spec) * (1 + 1e-6)


def min_max_error(w: np.ndarray, spec: Spec) -> float:
    group = w.size if spec.group_size is Whole.MATRIX else spec.group_for(w.shape[1])
    parts = w.reshape(-1, group)
    low, high = parts.min(1, keepdims=True), parts.max(1, keepdims=True)
    if spec.symmetric or spec.bits is Width.TERNARY:
        high = np.maximum(high, -low)
        low = -high
    scale = (high - low) / (spec.bits.levels - 1)
    q = np.clip(np.round((parts - low) / scale), 0, spec.bits.levels - 1)
    return ((parts - scale * q - low) ** 2).sum()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 48, 0])
def test_rounding_keeps_zero_and_the_largest_weight(bits, group):
    weight = np.random.default_rng(2).standard_t(4, (8, 96)).astype(np.float32)
    weight[:, ::7] = 0
    q = rtn.quantise(mx.array(weight), Spec(bits=bits, group_size=group, method="rtn"), mx.float32)
    ours = np.array(q.dequantise())
    assert np.abs(ours[:, ::7]).max() < 1e-5
    parts, kept = (x.reshape(8, -1, group or 96) for x in (weight, ours))
    edge = np.abs(parts).argmax(-1, keepdims=True)
    assert np.allclose(np.take_along_axis(kept, edge, -1), np.take_along_axis(parts, edge, -1),
                       atol=1e-5)
    if group == 32:
        stock = mx.dequantize(*mx.quantize(mx.array(weight), group, bits), group, bits)
        assert np.abs(ours - weight).mean() <= 1.001 * np.abs(np.array(stock) - weight).mean()


def test_one_bit_finds_the_two_means_and_never_the_extremes():
    weight = np.array([[-1.1, -0.9, 1.0, 1.2] * 8], np.float32)
    q = rtn.quantise(mx.array(weight), Spec(bits=1, group_size=32), mx.float32)
    assert np.allclose(np.unique(np.array(q.dequantise())), [-1.0, 1.1], atol=1e-3)


def test_importance_moves_the_levels_to_the_columns_that_matter():
    weight = mx.random.normal((4, 64), key=mx.random.key(3))
    importance = mx.array([100.0] * 8 + [0.01] * 56)
    spec = Spec(bits=2)
    plain, weighted = affine.fit(weight, spec), affine.fit(weight, spec, importance)

    def error(q):
        return (importance * mx.square(q.dequantise() - weight)).sum().item()

    assert error(weighted) < 0.7 * error(plain)


def test_a_constant_and_a_zero_row_are_exact():
    weight = mx.concatenate([mx.zeros((1, 64)), mx.full((1, 64), 0.5)])
    for bits in Width:
        q = rtn.quantise(weight, Spec(bits=bits))
        assert mx.allclose(q.dequantise(), weight, atol=1e-3), bits


@pytest.mark.parametrize("wrong,allowed", [
    (dict(bits=7), "1, ternary, 2, 3, 4, 5, 6, 8"), (dict(bits="two"), "1, ternary"),
    (dict(method="magic"), "rtn, gptq, awq, smoothquant"),
    (dict(rotation="sideways"), "online, fused"),
    (dict(group_size=-2), "0 \\(per channel\\) and -1"), (dict(bits=True), "1, ternary"),
])
def test_impossible_specs_say_what_is_allowed(wrong, allowed):
    with pytest.raises(BadValue, match=f"allowed are.*{allowed}"):
        Spec(**wrong)


def test_a_group_that_does_not_divide_names_those_that_do():
    with pytest.raises(BadValue,
                       match="group_size 128 does not divide the 576 inputs; .*64, 96, 192"):
        Spec(group_size=128).group_for(576)


def test_rules_apply_by_glob_first_match_first():
    rules = (parse_override("*.down_proj:bits=4,group_size=32"),
             parse_override("model.layers.0.*:bits=8"))
    chosen = Job(Spec(bits=2), rules)
    assert chosen.ruled("model.layers.0.mlp.down_proj") == Spec(bits=4, group_size=32)
    assert chosen.ruled("model.layers.0.mlp.up_proj").bits is Width.EIGHT
    assert chosen.ruled("model.layers.1.mlp.up_proj") is None
    said = [parse_override(f"*:symmetric={word}")[1] for word in ("True", "false")]
    assert said == [{"symmetric": True}, {"symmetric": False}]


@pytest.mark.parametrize("text", ["*.q_proj", "*:bits=7", "*:colour=red", "*:bits",
                                  "*:symmetric=yes", "*:symmetric=tru"])
def test_a_bad_override_is_refused(text):
    with pytest.raises(BadValue):
        parse_override(text)


def test_widths_parse():
    assert Width.of("ternary") is Width.TERNARY and Width.of("3") is Width.of(3) is Width.THREE
    with pytest.raises(BadValue, match="bits is 6, allowed are 1, 2$"):
        Width.of(Width.SIX, (Width.ONE, Width.TWO))


def test_a_spec_returns_from_json_as_it_was():
    for spec in (Spec(bits="ternary", group_size=-1), Spec(bits=Width.TWO, group_size=Whole.ROW)):
        assert Spec(**json.loads(json.dumps(spec.as_dict()))) == spec


@pytest.mark.parametrize("spec", [Spec(bits=2), Spec(bits=4), Spec(bits="ternary")],
                         ids=lambda spec: str(spec.bits))
def test_groups_that_a_round_leaves_alone_would_not_have_moved(spec, monkeypatch):
    random = np.random.default_rng(4)
    w = mx.array(random.normal(size=(24, 3, 32)).astype(np.float32))
    h = mx.array(random.exponential(size=(3, 32)).astype(np.float32))
    found = affine._search(w, h, spec, mx.float16)
    monkeypatch.setattr(affine, "_ROUNDS", 0)
    scale, bias = (x[..., None] for x in affine._search(w, h, spec, mx.float16))
    best = affine._tried(w, h, scale, bias, spec, mx.float16)
    for _ in range(8):  # over all groups
        codes = affine.nearest(w, best[0], best[1], spec.bits.levels)
        moved = affine._least_squares(w, h, codes, spec)
        best = affine._better(best, affine._tried(w, h, *moved, spec, mx.float16))
    assert not mx.array_equal(best[0], scale)
    assert all(mx.array_equal(a, b[..., 0]) for a, b in zip(found, best))
