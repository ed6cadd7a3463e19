"""Bytes per token against what files and caches hold."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from conftest import CONFIG, random_network, write_folder
from mlx_lm.models import mixtral
from mlx_lm.models.cache import make_prompt_cache

from mlxquant.layers import outline, traffic
from mlxquant.model.loading import open_lazily
from mlxquant.sources import checkpoint

LAYER = 64 * (128 + 64 + 64) + 128 * 64 + 3 * 64 * 128  # weights of the matrices of one block
EMBEDDING = 384 * 64


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    config = CONFIG | {"tie_word_embeddings": request.param}
    return write_folder(tmp_path_factory.mktemp("traffic") / "model", random_network(config), config), request.param


def test_a_token_reads_what_the_file_holds_but_for_the_embedding_table(folder):
    path, tied = folder
    network, config = open_lazily(path)
    held = sum(header.bytes for header in checkpoint.validate(path).values())
    table = checkpoint.validate(path)["model.embed_tokens.weight"].bytes
    expected = held if tied else held - table + table // 384
    assert traffic.weight_bytes(network, config) == expected
    assert traffic.weight_bytes(network, config, batch=5) == expected + (0 if tied else 4 * table // 384)
    assert outline.held_bytes(network) == held


def test_quantised_layers_count_codes_scales_and_offsets(folder):
    path, tied = folder
    network, config = open_lazily(path)
    nn.quantize(network, 64, 4)
    network.set_dtype(mx.float16)
    norms = 5 * 64 * 2
    matrix = 4.5 / 8
    ends = EMBEDDING * matrix if tied else EMBEDDING * matrix + 64 * matrix
    assert traffic.weight_bytes(network, config) == norms + 2 * LAYER * matrix + ends
    assert traffic.body_bits_per_weight(network) == 4.5
    assert traffic.parameters(network) == 2 * LAYER + (1 if tied else 2) * EMBEDDING + 5 * 64


def test_operations_count_every_weight_that_multiplies(folder):
    path, _ = folder
    network, config = open_lazily(path)
    assert traffic.operations_per_token(network, config) == 2 * (2 * LAYER + EMBEDDING + 5 * 64)
    assert traffic.weight_count(traffic.head_of(network, config)) == EMBEDDING


@pytest.mark.parametrize("batch", [1, 3])
def test_the_cache_counts_what_it_holds(batch):
    network = random_network()
    cache = make_prompt_cache(network)
    network(mx.zeros((batch, 7), mx.int32), cache=cache)
    assert traffic.kv_bytes(cache) == batch * 7 * 2 * 2 * 2 * 32 * 4
    network.set_dtype(mx.float16)
    assert outline.kv_bytes(network, 7) == 7 * 2 * 2 * 2 * 32 * 2
    assert outline.kv_bytes(network, 7, 8) == 7 * 2 * 2 * 2 * 32 * 9 / 8


def test_a_batch_reads_more_of_a_mixtures_experts():
    config = CONFIG | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 1,
                       "tie_word_embeddings": False}
    network = mixtral.Model(mixtral.ModelArgs.from_dict(config))
    experts = sum(traffic.module_bytes(m) for path, m in traffic.leaf_modules(network) if "switch_mlp" in path)
    one, two, many = (traffic.weight_bytes(network, config, batch=n) for n in (1, 2, 1000))
    row = network.model.embed_tokens.weight[0].nbytes
    assert two - one - row == pytest.approx(experts * (1 - 0.75**2 - 0.25), abs=1)
    assert many - one - 999 * row == pytest.approx(experts * 0.75, abs=1)
