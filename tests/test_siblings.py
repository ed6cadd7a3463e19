"""What reads one input, and what stands before it, in every architecture that mlx-lm has."""

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import CONFIGURATIONS, TOKENS, network_of
from conftest import random_network

from mlxquant.layers import outline
from mlxquant.layers.hooks import intercepted
from mlxquant.layers.siblings import find_siblings, untraceable
from mlxquant.layers.traffic import own_arrays

PACKED = {"prism_hadamard_qwen35"}  # layers of a class of their own, all zeros here
UNTRACEABLE = {"dbrx": "its experts are chosen in Python", "deepseek_v41": "rounds to 8 bits",
               "spark2_5": "MLX exports no call of contiguous"}


def run(network, modules):
    """The logits, and what each of ``modules`` read and made when it was called last."""
    seen, paths = {}, {id(module): path for path, module in modules.items()}

    def through(module, own, args, kwargs):
        output = own(*args, **kwargs)
        seen[paths[id(module)]] = args[0], output
        return output

    with intercepted(modules.values(), through):
        return network(TOKENS), seen


def scale_inputs(module, factors):
    module.weight = module.weight * factors


def scale_outputs(module, factors):
    module.weight = module.weight * factors[:, None]
    if "bias" in module:
        module.bias = module.bias * factors


@pytest.mark.parametrize("name", [n for n in CONFIGURATIONS if n not in {*UNTRACEABLE, *PACKED}])
def test_siblings_read_one_input_and_factors_may_move_to_what_stands_before(name):
    network, random = network_of(name), np.random.default_rng(0)
    for module in network.modules():  # what all have alike would hide what differs
        module.update({key: a + 0.1 * mx.array(random.normal(size=a.shape).astype(np.float32))
                       for key, a in own_arrays(module).items()
                       if mx.issubdtype(a.dtype, mx.floating) and a.min().item() == a.max().item()})
    modules = dict(network.named_modules())
    groups = find_siblings(network)
    assert untraceable(network) is None
    paths = [path for group in groups for path in group.paths]
    assert len(paths) == len(set(paths))
    logits, seen = run(network, {path: modules[path] for path in paths})
    first = {}
    for group in groups:
        inputs = [seen[path][0] for path in group.paths if path in seen]
        assert all(mx.array_equal(x.reshape(-1), inputs[0].reshape(-1)) for x in inputs)
        if inputs:
            first[group.paths] = np.array(inputs[0]).tobytes()
        if group.gate and inputs[0].size == seen[group.up][1].size:  # else the pairs are sorted
            made = nn.silu(seen[group.gate][1]) * seen[group.up][1]
            assert mx.allclose(made.reshape(-1), inputs[0].reshape(-1), rtol=1e-4, atol=1e-6)
    assert len(set(first.values())) == len(first)  # others read something else
    for group in groups:
        for before in filter(None, (group.norm, group.before)):
            shape = modules[before].weight.shape
            size = shape[0] if before == group.norm else shape[-2]
            factors = mx.array(random.uniform(0.5, 2, size).astype(np.float32))
            if before == group.norm:
                scale_inputs(modules[before], factors)
            else:
                scale_outputs(modules[before], factors)
            if group.heads and before == group.before:
                width = modules[group.paths[0]].weight.shape[-1]
                factors = mx.repeat(factors.reshape(group.heads, 1, -1), width // size, axis=1)
            for path in group.paths:
                scale_inputs(modules[path], 1 / factors.reshape(-1))
    error = mx.abs(network(TOKENS) - logits).max() / mx.abs(logits).max()
    assert error.item() < 1e-3


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_what_cannot_be_traced_stands_by_itself(name):
    network = network_of(name)
    before = {path: id(module.weight) for path, module in network.named_modules()
              if isinstance(module, nn.Linear)}
    groups = find_siblings(network)
    assert untraceable(network)
    assert {path for group in groups for path in group.paths} >= set(before)
    assert all(len(group.paths) == 1 and group.norm is None for group in groups)
    assert {path: id(module.weight) for path, module in network.named_modules()
            if isinstance(module, nn.Linear)} == before


def test_an_error_that_says_nothing_is_named(monkeypatch):
    def call(self, tokens):
        raise NotImplementedError

    network = random_network()
    monkeypatch.setattr(type(network), "__call__", call)
    assert untraceable(network) == "NotImplementedError"


def test_weights_in_a_file_are_not_read(tmp_path):
    network = random_network()
    network.save_weights(str(tmp_path / "model.safetensors"))
    network.load_weights(str(tmp_path / "model.safetensors"))
    (tmp_path / "model.safetensors").write_bytes(b"")  # to read them now would fail
    groups = find_siblings(network)
    assert [[path.rpartition(".")[2] for path in group.paths] for group in groups[:4]] == [
        ["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert [group.heads for group in groups[:4]] == [None, 2, None, None]


@pytest.mark.parametrize("name", ["qwen3-30b-a3b", "qwen3-next-80b-a3b", "gpt-oss-20b"])
def test_large_networks_are_traced_too(name):
    """MLX takes 1,024 named arrays at most; these networks hold more."""
    config = json.loads((Path(__file__).parent / f"data/configs/{name}.json").read_text())
    network = outline.network_of(config)
    groups = find_siblings(network)
    assert sum(group.norm is not None for group in groups) >= config["num_hidden_layers"]
