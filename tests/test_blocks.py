"""Blocks are found where they hang, in every architecture that mlx-lm has."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures import CONFIGURATIONS, TOKENS, network_of, watch

from mlxquant.base.errors import Unsupported
from mlxquant.layers.blocks import Block, find_blocks

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
