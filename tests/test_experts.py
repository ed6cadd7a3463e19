"""Replicated experts of mixtures: against dense float64 products, in files, in networks, packed."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import CONFIGURATIONS, TOKENS, network_of
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU, SwitchLinear, SwitchMLP
from test_kernels import emulation  # noqa: F401 (a fixture)
from test_packed import emulated, on_kernels, one_by_one  # noqa: F401 (a fixture)
from test_replicated import dense64, fill
from test_transformed import close, draw

from mlxquant.base.errors import BadCheckpoint, BadValue
from mlxquant.codes.packing import pack_codes
from mlxquant.codes.spec import REPLICA_WIDTHS, ReplicaShape
from mlxquant.kernels import backend, prepare_input, replicated_matvec
from mlxquant.layers import formats, packed_experts, traffic
from mlxquant.layers.blocks import find_blocks
from mlxquant.layers.dense import to_dense
from mlxquant.layers.pack import pack
from mlxquant.layers.packed_experts import PackedSwitchGLU, PackedSwitchLinear
from mlxquant.layers.replicated import (
    ReplicaInput,
    ReplicatedLinear,
    ReplicatedSwitchLinear,
    bits_per_weight,
    install_group,
    stacked,
)

E, M, N = 5, 7, 96
PAIRS = mx.array([[[0, 3], [4, 4], [1, 0]]])  # of three tokens, two experts each
SHAPE = {"bits": 2, "replicas": 4, "replica_group": 0, "rotation_block": 64}


def make(m=M, n=N, experts=E, bias=False, **shape):
    """A stack of random experts, and their matrices W (E, m, n) in float64 by definition."""
    shared = ReplicaInput(n, ReplicaShape(**shape), experts=experts)
    layer = ReplicatedSwitchLinear(m, shared, bias)
    alone = [ReplicatedLinear(m, ReplicaInput(n, shared.spec), bias) for _ in range(experts)]
    codes = [fill(one, seed=10 * e) for e, one in enumerate(alone)]
    if "rotation_signs" in shared:
        for one in alone:
            one.input.rotation_signs = alone[0].input.rotation_signs
    layer.update(stacked([dict(tree_flatten(one.parameters())) for one in alone]))
    shared.update(stacked([dict(tree_flatten(one.input.parameters())) for one in alone]))
    return layer, np.stack([dense64(one, c) for one, c in zip(alone, codes)])


def expected(weights, x, indices, bias=0.0):
    """y (…, k, 1, m) of x (…, 1 or k, 1, n) in float64."""
    return x @ weights[np.array(indices)].swapaxes(-1, -2) + bias


@pytest.mark.parametrize("bits", REPLICA_WIDTHS)
@pytest.mark.parametrize("group,block", [(0, 0), (0, 32), (16, 32), (8, 0)])
def test_each_pair_is_multiplied_by_its_experts_matrix(bits, group, block):
    layer, weights = make(bits=bits, replicas=3, replica_group=group, rotation_block=block)
    x, each = draw(1, 3, 1, 1, N), draw(1, 3, 2, 1, N, seed=1)
    close(layer(mx.array(x), PAIRS), expected(weights, x, PAIRS), 1e-5)
    close(layer(mx.array(each), PAIRS), expected(weights, each, PAIRS), 1e-5)
    close(layer.dense(), weights, 1e-5)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("pairs", [4, 40])
def test_sorted_pairs_few_and_many_with_a_bias(dtype, pairs):
    layer, weights = make(bias=True)
    indices = np.sort(np.random.default_rng(0).integers(0, E, pairs))
    x = draw(pairs, 1, N)
    y = layer(mx.array(x).astype(dtype), mx.array(indices), sorted_indices=True)
    assert y.dtype == dtype and y.shape == (pairs, 1, M)
    close(y, expected(weights, x, indices, np.array(layer.bias)[indices][:, None]),
          1e-5 if dtype == mx.float32 else 3e-2)


@pytest.mark.parametrize("kind", [SwitchGLU, SwitchMLP])
def test_the_layers_take_the_place_of_mlx_lms(kind):
    module, x = kind(N, 64, E), mx.array(draw(40, N))
    indices = mx.array(np.random.default_rng(3).integers(0, E, (40, 2)))
    first = ["gate_proj", "up_proj"] if kind is SwitchGLU else ["fc1"]
    second = "down_proj" if kind is SwitchGLU else "fc2"
    install_group(module, "first", {name: module[name] for name in first}, ReplicaShape())
    install_group(module, "second", {second: module[second]}, ReplicaShape())
    for seed, name in enumerate([*first, second]):
        fill_stack(module[name], seed)
    many, few = module(x, indices), module(x[:2], indices[:2])  # sorted from 64 pairs on
    dense = to_dense(module)
    assert all(type(dense[name]) is SwitchLinear for name in [*first, second])
    assert mx.allclose(many, dense(x, indices), rtol=1e-4, atol=1e-6)
    assert mx.allclose(few, dense(x[:2], indices[:2]), rtol=1e-4, atol=1e-6)


def fill_stack(layer, seed=0):
    """Random codes and scales of an installed stack, in place."""
    random, spec = np.random.default_rng(seed), layer.input.spec
    codes = random.integers(0, spec.bits.levels, layer.shape)
    layer.codes = pack_codes(mx.array(codes), spec.bits)
    for module in (layer, layer.input):
        module.update({name: mx.array(random.normal(size=a.shape).astype(np.float32) / 8)
                       for name, a in module.trainable_parameters().items()})


def mixture_of(name="qwen3_moe", dtype=mx.float32, **shape):
    """A tiny mixture, its experts replicated and all else as it is."""
    network = network_of(name)
    install(network, **shape)
    for seed, module in enumerate(m for _, m in sorted(network.named_modules())
                                  if isinstance(m, ReplicatedSwitchLinear)):
        fill_stack(module, seed)
    network.set_dtype(dtype)
    return network


def install(network, **shape):
    replicas = {}
    for path, module in network.named_modules():
        if isinstance(module, SwitchGLU):
            replicas[f"{path}.gate_up"] = {**SHAPE, **shape, "linears": ["gate_proj", "up_proj"]}
            replicas[f"{path}.down"] = {**SHAPE, **shape, "linears": ["down_proj"]}
    formats.install(network, {}, replicas)
    return replicas


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3", "mixtral"])
def test_a_mixture_comes_back_from_its_file(name, tmp_path):
    network = mixture_of(name, replica_group=16)
    network.save_weights(str(tmp_path / "model.safetensors"))
    config = formats.config_with(CONFIGURATIONS[name], {}, install(network_of(name),
                                                                   replica_group=16))
    build, arguments = formats.model_classes(config)
    loaded = build(arguments.from_dict(config))
    loaded.load_weights(str(tmp_path / "model.safetensors"), strict=True)
    assert mx.array_equal(loaded(TOKENS), network(TOKENS))
    logits = network(TOKENS)
    assert mx.allclose(to_dense(network)(TOKENS), logits, rtol=1e-3, atol=1e-3)


def test_bytes_and_operations_are_those_of_the_chosen_experts():
    """By hand: 4 experts of 64 × 128, of which a token takes 2, K = 4, 2 bits, scales in 16."""
    plain, ours = network_of("qwen3_moe"), mixture_of(dtype=mx.float16)
    plain.set_dtype(mx.float16)
    gate_up = 2 * 64 * 128 // 4 + 2 * 4 * (2 * 64 + 128)
    down = 64 * 128 // 4 + 2 * 4 * (128 + 64)
    signs = 128 // 8 + 64 // 8
    dense = 2 * 3 * 64 * 128
    assert traffic.weight_bytes(plain) - traffic.weight_bytes(ours) == (
        4 * (2 * (dense - gate_up - down) - signs // 2))  # half of the signs, as of all
    assert traffic.parameters(plain) == traffic.parameters(ours)
    assert traffic.active_parameters(plain) == traffic.active_parameters(ours)
    rotated = 2 * (128 * 6 + 64 * 6)
    assert traffic.operations_per_token(ours) - traffic.operations_per_token(plain) == 2 * 4 * (
        2 * 3 * 64 * 128 * (4 - 1) + rotated)
    experts = [m for m in ours.modules() if isinstance(m, ReplicatedSwitchLinear)]
    assert bits_per_weight(experts) == 8 * (4 * (gate_up + down) + signs) / (4 * 3 * 64 * 128)
    assert traffic.dense_bytes(ours) == traffic.dense_bytes(plain)


@emulated
@pytest.mark.parametrize("name,shape", [
    ("qwen3_moe", {}), ("qwen3_moe", {"replica_group": 16, "bits": "ternary"}), ("gpt_oss", {}),
    ("deepseek_v3", {"bits": 4, "replicas": 1})], ids=["plain", "grouped", "own", "shared"])
def test_a_packed_mixture_is_the_stored_one(on_kernels, name, shape):  # noqa: F811
    stored, packed = mixture_of(name, **shape), pack(mixture_of(name, **shape))
    assert not any(isinstance(m, ReplicatedSwitchLinear) for m in packed.modules())
    fused = [m for m in packed.modules() if isinstance(m, PackedSwitchGLU)]
    blocks = find_blocks(packed)
    assert bool(fused) == (name != "gpt_oss")  # whose activation is its own
    tokens = mx.concatenate([TOKENS] * 3, axis=1)
    assert backend.relative_error(one_by_one(packed, tokens), one_by_one(stored, tokens)) < 1e-5
    assert len(blocks) == 4


@emulated
@pytest.mark.parametrize("expanded", [1 << 28, 2 * 64 * 128, 1])
def test_many_pairs_multiply_matrices_expanded_some_at_a_time(on_kernels, monkeypatch, expanded):  # noqa: F811
    monkeypatch.setattr(packed_experts, "_EXPANDED", expanded)
    monkeypatch.setattr(packed_experts, "_PAIRS", 0)
    stored, packed = mixture_of(replica_group=16), pack(mixture_of(replica_group=16))
    tokens = mx.concatenate([TOKENS] * 8, axis=1)
    assert backend.relative_error(packed(tokens), stored(tokens)) < 1e-5


def test_a_packed_mixture_counts_what_the_stored_one_does():
    for shape in ({}, {"replica_group": 16}):
        stored, packed = mixture_of(**shape), pack(mixture_of(**shape))
        for count in (traffic.parameters, traffic.active_parameters, traffic.operations_per_token,
                      traffic.weight_bytes, traffic.body_bits_per_weight):
            # A kernel's buffer holds eight numbers, where the file has none.
            assert count(packed) == pytest.approx(count(stored), rel=1e-3)


def test_a_token_costs_its_experts_four_dispatches(monkeypatch):
    calls = []
    monkeypatch.setattr("mlxquant.layers.packed.trusted", lambda kernel: True)
    monkeypatch.setattr(prepare_input, "prepare", lambda x, *a: calls.append("prepare") or x)
    monkeypatch.setattr(replicated_matvec, "multiply", lambda x, matrix, pairs, dtype, experts: (
        calls.append("multiply") or mx.zeros((pairs, matrix.rows))))
    mx.eval(pack(mixture_of())(TOKENS[:, :1]))
    assert calls == ["prepare", "multiply", "prepare", "multiply"] * 4


@pytest.mark.parametrize("linears,message", [
    ({"a": nn.Linear(N, 4), "b": SwitchLinear(N, 4, E)}, "one width for all"),
    ({"a": SwitchLinear(N, 4, 3), "b": SwitchLinear(N, 4, E)}, "one width for all"),
    ({"a": SwitchLinear(100, 4, 3)}, "rotation_block 64 does not divide the 100 inputs of a")])
def test_experts_that_do_not_fit_are_refused(linears, message):
    with pytest.raises(BadValue, match=message):
        install_group(nn.Module(), "x", linears, ReplicaShape(rotation_block=64))
    with pytest.raises(BadCheckpoint, match="describes mlp.gate, which is no linear"):
        formats.install(network_of("qwen3_moe"), {}, {"mlp.x": {**SHAPE, "linears": ["gate"]}})


def test_a_packed_stack_is_called_as_mlx_lms():
    packed = pack(mixture_of())
    layer = next(m for m in packed.modules() if isinstance(m, PackedSwitchLinear))
    stored = mixture_of()
    path = next(p for p, m in packed.named_modules() if m is layer).replace(".module.", ".")
    path = path.replace(".module", "")
    twin = dict(stored.named_modules())[path]
    for x, indices in ((draw(3, 1, twin.input_dims), [0, 2, 3]),
                       (draw(1, 2, 1, 1, twin.input_dims), [[[0, 1], [2, 2]]]),
                       (draw(2, 3, twin.input_dims), [1, 3]),
                       (draw(1, 3, twin.input_dims), [1, 3])):
        x, indices = mx.array(x), mx.array(indices)
        assert layer(x, indices).shape == twin(x, indices).shape
        assert backend.relative_error(layer(x, indices), twin(x, indices)) < 1e-5
