"""Gradients by block: those of the whole network, with one block in memory."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from architectures import network_of
from conftest import CONFIG, random_network, write_folder
from mlx.utils import tree_flatten, tree_unflatten

from mlxquant.base.trees import floats, with_floats
from mlxquant.layers import traffic
from mlxquant.layers.blocks import find_blocks
from mlxquant.layers.dense import lazily_dense
from mlxquant.model.loading import open_lazily
from mlxquant.quantise.backward import Backward

TOKENS = mx.array(np.random.default_rng(0).integers(0, 60, (2, 12)))
WHOLE = slice(0, TOKENS.size)


def judge(logits, place):
    """Each place weighs differently."""
    return (mx.arange(place.start + 1, place.stop + 1)[:, None] * mx.square(logits)).sum()


def by_block(opened):
    """The gradient by every matrix and vector in a block, by path."""
    found = {}
    for call, go_on in Backward(opened, TOKENS).calls(judge):
        module, inputs = call.block.module, floats(call.given)
        paths, arrays = zip(*tree_flatten(module.parameters()))

        def run(given, call=call, module=module, paths=paths):
            module.update(tree_unflatten(list(zip(paths, given))))
            args, kwargs = with_floats(call.given, given[len(paths):])
            return module(*args, **kwargs)

        slopes = call.vjp(run, [*arrays, *inputs])
        for path, slope in zip(map(call.block.full, paths), slopes):
            found[path] = found.get(path, 0) + slope
        mx.eval(found, slopes)
        go_on(slopes[len(paths):])
    return found


def of_all(network):
    """The same by one gradient through everything."""
    inside = tuple(block.full("") for block in find_blocks(network))
    held = {path: array for path, array in tree_flatten(network.parameters())
            if path.startswith(inside)}

    def loss(arrays):
        network.update(tree_unflatten(list(arrays.items())))
        logits = network(TOKENS)
        return judge(logits.reshape(-1, logits.shape[-1]).astype(mx.float32), WHOLE)

    return mx.grad(loss)(held)


# Llama's kind; experts; tuples, a recurrent state, blocks beside each other, several streams.
@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gpt_oss", "cohere", "phixtral", "mamba",
                                  "falcon_h1", "deepseek_v3", "minicpm3", "olmo2"])
def test_gradients_are_those_of_the_whole_network(name):
    network = network_of(name)
    network.set_dtype(mx.float32)
    expected = of_all(copy.deepcopy(network))
    found = by_block(lambda: copy.deepcopy(network))
    assert found.keys() == expected.keys()
    for path, slope in expected.items():
        error = mx.abs(found[path] - slope).max().item()
        assert error <= 1e-3 * max(mx.abs(slope).max().item(), 1e-3), path


def test_one_block_at_a_time_is_in_memory(tmp_path):
    config = CONFIG | {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12,
                       "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 64}
    network = random_network(config)
    body = sum(traffic.dense_bytes(block.module) for block in find_blocks(network))
    folder = write_folder(tmp_path / "model", network, config)
    del network
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    for call, go_on in Backward(lambda: lazily_dense(open_lazily(folder)[0]), TOKENS).calls(judge):
        slopes = call.vjp(lambda given, call=call: call.block.module(
            *with_floats(call.given, given)[0]), floats(call.given))
        mx.eval(slopes)
        go_on(slopes)
    assert body > 1.5e8 and mx.get_peak_memory() - before < body / 4
