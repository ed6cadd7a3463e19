"""A network run block by block from the disk: its own predictions, with one block in memory."""

import copy
import gc

import mlx.core as mx
import numpy as np
import pytest
from architectures import network_of
from conftest import CONFIG, random_network, write_folder

from mlxquant.base.errors import BadCheckpoint
from mlxquant.layers import by_block, head, traffic
from mlxquant.layers.blocks import find_blocks, held_bytes
from mlxquant.layers.by_block import can_let_go, judged
from mlxquant.layers.dense import lazily_dense
from mlxquant.layers.repeated import Repeat, install
from mlxquant.model.loading import open_lazily

PARTS = "iquestloopcoder"
TOKENS = mx.array(np.random.default_rng(0).integers(0, 60, (2, 12)))


# Llama's kind; experts; tuples, a recurrent state, blocks beside each other, several streams; keys
# of earlier blocks; a block that is called several times; parts of blocks in place of blocks.
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt_oss", "cohere", "phixtral", "mamba",
                                  "falcon_h1", "deepseek_v3", "gemma3n", PARTS])
@pytest.mark.parametrize("once", [False, True])
def test_predictions_are_those_of_the_whole_network(name, once, monkeypatch):
    monkeypatch.setattr(head, "AT_ONCE", 8 * 60)
    network = network_of(name)
    network.set_dtype(mx.float32)
    expected = network(TOKENS).reshape(TOKENS.size, -1)
    given = copy.deepcopy(network)
    found = list(judged(given, TOKENS, lambda logits, _: logits, once=once))
    scale = mx.abs(expected).max().item()
    assert len(found) > 1
    assert mx.abs(mx.concatenate(found) - expected).max().item() <= 1e-4 * scale
    left = sum(held_bytes(block.module) for block in find_blocks(given))
    assert (left == 0) is (once and name != PARTS) and can_let_go(network) is (name != PARTS)


def test_blocks_are_let_go_of(tmp_path):
    config = CONFIG | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
                       "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    folder = write_folder(tmp_path / "model", random_network(config), config)
    mx.clear_cache()
    network = lazily_dense(open_lazily(folder)[0])
    body = sum(traffic.dense_bytes(block.module) for block in find_blocks(network))
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for logits in judged(network, TOKENS, lambda logits, _: logits, once=True):
        mx.eval(logits)
    assert body > 1.5e8 and mx.get_peak_memory() - before < body / 4
    assert not any(held_bytes(block.module) for block in find_blocks(network))


def test_blocks_that_run_twice_stay():
    network = random_network()
    expected = network(TOKENS)  # gates are zeros
    install(network, [Repeat(0, 1, 2)])
    found = list(judged(network, TOKENS, lambda logits, _: logits, once=True))
    assert not can_let_go(network)
    assert mx.allclose(mx.concatenate(found).reshape(expected.shape), expected, 1e-3, 1e-3)


def test_what_is_not_a_number_is_named_when_it_is_read():
    network = random_network()
    network.layers[1].mlp.down_proj.weight[3, 4] = mx.nan
    with pytest.raises(BadCheckpoint, match="layers.1.mlp.down_proj.weight: 1 of"):
        list(judged(network, TOKENS, lambda logits, _: logits, once=True))


def test_only_the_last_block_is_remembered(monkeypatch):
    network = random_network(CONFIG | {"num_hidden_layers": 24})
    tokens = mx.zeros((8, 256), mx.int32)

    def peak():
        gc.collect()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        for sums in judged(network, tokens, lambda logits, _: logits.sum()):
            mx.eval(sums)
        return mx.get_peak_memory() - before

    one = peak()
    monkeypatch.setattr(by_block, "foreseen", lambda *_: {})
    output = 4 * tokens.size * CONFIG["hidden_size"]
    assert peak() - one > 15 * output
