"""Blocks are found where they hang, in every architecture that mlx-lm has, and are observed."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import CONFIGURATIONS, TOKENS, network_of, watch

from mlxquant.base.errors import Unsupported
from mlxquant.layers.blocks import Block, find_blocks
from mlxquant.layers.hooks import after_each_block
from mlxquant.report.by_layer import hidden_states

CALLED_IN_PARTS = {"iquestloopcoder"}  # its model calls the attention and MLP of each block


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_the_blocks_found_are_those_that_run(name):
    network, calls = network_of(name), []
    blocks = find_blocks(network)
    assert len(blocks) == 4
    modules = dict(network.named_modules())
    for block in blocks:
        assert modules[block.path] is block.module
        for module in [block.module] if name not in CALLED_IN_PARTS else block.module.modules():
            watch(module, lambda *_, path=block.path: calls.append(path))
    mx.eval(network(TOKENS))
    assert list(dict.fromkeys(calls)) == [block.path for block in blocks]


def test_what_hangs_beside_the_blocks_is_none():
    network = nn.Module()
    network.vision_tower = nn.Module()
    network.vision_tower.layers = [nn.Sequential(nn.Linear(512, 512)) for _ in range(8)]
    with pytest.raises(Unsupported, match="no list of blocks"):
        find_blocks(nn.Module())
    assert len(find_blocks(network)) == 8  # there is nothing else
    network.text = nn.Module()
    network.text.h = [nn.Sequential(nn.Linear(64, 64)), None, nn.Sequential(nn.Linear(64, 64))]
    network.text.gates = [nn.Sequential(nn.Linear(1, 8)) for _ in range(3)]
    network.text.projections = [nn.Linear(64, 64) for _ in range(3)]
    assert find_blocks(network) == [Block(f"text.h.{i}", network.text.h[i]) for i in (0, 2)]


def test_the_blocks_are_restored_even_after_an_error(tiny):
    blocks = tiny.network.layers
    before, expected = [type(block) for block in blocks], np.array(tiny.network(TOKENS))

    def fail(state):
        assert [type(block) for block in blocks] != before
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), after_each_block(tiny.network, fail):
        tiny.network(TOKENS)
    assert [type(block) for block in blocks] == before
    assert np.array_equal(np.array(tiny.network(TOKENS)), expected)


def test_layers_that_are_a_copy_of_the_list_are_recorded(tiny, monkeypatch):
    """The ``layers`` of DeepSeek, GLM and others are a slice, made for splitting over machines."""
    copy = property(lambda self: self.model.layers[:])
    monkeypatch.setattr(type(tiny.network), "layers", copy)
    assert len(hidden_states(tiny.network, TOKENS)) == 2


def test_the_state_of_a_block_that_returns_more_is_its_first_output():
    """Gemma 3n and 4 hand keys and values on from block to block."""
    class Block(nn.Module):
        width = 4

        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def __call__(self, h):
            return 2 * h, "keys and values"

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = [Block(), Block()]

        def __call__(self, h):
            for layer in self.layers:
                h, _ = layer(h[..., :layer.width])
            return h

    states = hidden_states(Network(), mx.ones((1, 5)))
    assert [state.tolist() for state in states] == [[[2.0] * 4], [[4.0] * 4]]


def test_blocks_that_never_run_are_reported(tiny):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = tiny.network.layers

        def __call__(self, tokens):
            return tokens

    with pytest.raises(Unsupported, match="cannot be observed"):
        hidden_states(Network(), TOKENS)
