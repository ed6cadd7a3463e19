"""Bytes per token against what files and caches hold."""

from collections import Counter

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures import CONFIGURATIONS, TOKENS, network_of, watch
from conftest import CONFIG, random_network, write_folder
from mlx_lm.models import mixtral
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.utils import _get_classes

from mlxquant.layers import outline, traffic
from mlxquant.layers.blocks import find_blocks, held_bytes
from mlxquant.model.loading import open_lazily
from mlxquant.sources import checkpoint

LAYER = 64 * (128 + 64 + 64) + 128 * 64 + 3 * 64 * 128  # weights of the matrices of one block
EMBEDDING = 384 * 64


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory):
    config = CONFIG | {"tie_word_embeddings": request.param}
    folder = tmp_path_factory.mktemp("traffic") / "model"
    return write_folder(folder, random_network(config), config), request.param


def test_a_token_reads_what_the_file_holds_but_for_the_embedding_table(folder):
    path, tied = folder
    network, _ = open_lazily(path)
    held = sum(header.bytes for header in checkpoint.validate(path).values())
    table = checkpoint.validate(path)["model.embed_tokens.weight"].bytes
    expected = held if tied else held - table + table // 384
    assert traffic.weight_bytes(network) == expected
    assert traffic.weight_bytes(network, batch=5) == expected + (0 if tied else 4 * table // 384)
    assert held_bytes(network) == held


def test_quantised_layers_count_codes_scales_and_offsets(folder):
    path, tied = folder
    network, _ = open_lazily(path)
    nn.quantize(network, 64, 4)
    network.set_dtype(mx.float16)
    norms = 5 * 64 * 2
    matrix = 4.5 / 8
    ends = EMBEDDING * matrix if tied else EMBEDDING * matrix + 64 * matrix
    assert traffic.weight_bytes(network) == norms + 2 * LAYER * matrix + ends
    assert traffic.body_bits_per_weight(network) == 4.5
    assert traffic.parameters(network) == 2 * LAYER + (1 if tied else 2) * EMBEDDING + 5 * 64


def test_operations_count_every_weight_that_multiplies(folder):
    path, _ = folder
    network, _ = open_lazily(path)
    assert traffic.operations_per_token(network) == 2 * (2 * LAYER + EMBEDDING + 5 * 64)
    assert traffic.weight_count(traffic.head_of(network)) == EMBEDDING


@pytest.mark.parametrize("batch", [1, 3])
def test_the_cache_counts_what_it_holds(batch):
    network = random_network()
    cache = make_prompt_cache(network)
    network(mx.zeros((batch, 7), mx.int32), cache=cache)
    assert traffic.kv_bytes(cache) == batch * 7 * 2 * 2 * 2 * 32 * 4
    network.set_dtype(mx.float16)
    assert outline.kv_bytes(network, 7) == 7 * 2 * 2 * 2 * 32 * 2
    assert outline.kv_bytes(network, 7, 8) == 7 * 2 * 2 * 2 * 32 * 9 / 8


@pytest.mark.parametrize("name, grows", [  # of llama4's blocks each fourth sees beyond its chunk
    ("falcon_h1", 4 * 2 * 2 * 32 * 4), ("llama4", 2 * 2 * 32 * 4)])
def test_blocks_with_several_caches_or_chunks_count_what_a_token_reads(name, grows):
    network = network_of(name)
    cache = make_prompt_cache(network)
    network(mx.zeros((1, 299), mx.int32), cache=cache)
    network(mx.zeros((1, 1), mx.int32), cache=cache)  # older chunks are dropped
    assert outline.kv_bytes(network, 301) - outline.kv_bytes(network, 300) == grows
    assert traffic.kv_bytes(cache) == pytest.approx(outline.kv_bytes(network, 300), rel=0.02)


def test_a_batch_reads_more_of_a_mixtures_experts():
    config = CONFIG | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 1,
                       "tie_word_embeddings": False}
    network = mixtral.Model(mixtral.ModelArgs.from_dict(config))
    experts = sum(held_bytes(m) for _, m in traffic.leaf_modules(network)
                  if isinstance(m, SwitchLinear))
    one, two, many = (traffic.weight_bytes(network, batch=n) for n in (1, 2, 1000))
    row = network.model.embed_tokens.weight[0].nbytes
    assert two - one - row == pytest.approx(experts * (1 - 0.75**2 - 0.25), abs=1)
    assert many - one - 999 * row == pytest.approx(experts * 0.75, abs=1)


def test_of_a_wrapped_mixture_the_shared_expert_counts_whole_and_the_others_as_chosen():
    """Qwen2-MoE by hand: 128 wide, 4 experts of 64 of which 2 are chosen, one that all share."""
    network = network_of("qwen2_moe")
    attention = 128 * (128 + 64 + 64) + 128 * 128 + (128 + 64 + 64)  # with the biases of q, k, v
    expert, routers = 3 * 128 * 64, 128 * 4 + 128
    block = attention + expert + routers + 2 * 128  # and two norms
    ends = 288 * 128 + 128 + 128  # the head, the last norm, one row of the embedding
    assert traffic.weight_bytes(network) == 4 * (4 * (block + 2 * expert) + ends)
    biases = 4 * (128 + 64 + 64)
    assert traffic.operations_per_token(network) == 2 * (
        4 * (block + 2 * expert) + ends - 128 - biases)
    table = 287 * 128
    assert traffic.active_parameters(network) == 4 * (block + 2 * expert) + ends + table - biases
    assert traffic.parameters(network) == traffic.active_parameters(network) + 4 * 2 * expert


def test_an_untied_wrapper_reads_a_row_of_its_embedding():
    network, alone = network_of("mistral3"), network_of("mistral")
    assert not hasattr(network.args, "tie_word_embeddings")
    assert traffic.weight_bytes(network) == traffic.weight_bytes(alone)
    network.set_dtype(mx.float16)
    assert traffic.body_bits_per_weight(network) == 16


@pytest.mark.parametrize("name", [n for n in CONFIGURATIONS if n != "prism_hadamard_qwen35"])
def test_the_head_and_the_experts_are_those_that_a_token_uses(name):
    """Prism keeps its embedding packed in a class of its own and has no head to find."""
    network, seen, calls = network_of(name), {}, Counter()
    for path, module in network.named_modules():
        if isinstance(module, SwitchLinear):
            watch(module, lambda x, indices, *_, path=path, of=module.num_experts:
                  seen.update({path: indices.shape[-1] / of}))
        elif type(module) is nn.Linear:
            watch(module, lambda *_, path=path: calls.update([path]))
    parts = list(traffic.parts(network))
    found = {part.path: part.share() for part in parts}
    head = traffic.head_of(network)
    for key, array in traffic.own_arrays(head).items():
        if array.shape[0] == 288:
            head[key] = mx.full(array.shape, 0.01)
    logits = network(TOKENS)
    spread = (logits.max(-1) - logits.min(-1)).max().item()
    assert spread <= 1e-5 * mx.abs(logits).max().item()  # no token is likelier
    assert {path: found[path] for path in seen} == seen
    calls.clear()
    network(TOKENS[:, :1])
    called = [part for part in parts if part.path in calls and part.pool == 1]
    read, passed = (sum(times(part) * traffic.own_bytes(part.module) for part in called)
                    for times in (lambda part: calls[part.path], lambda part: part.passes))
    assert passed == pytest.approx(read, rel=0.01)  # small routers are called twice


def test_blocks_that_an_architecture_runs_again_are_read_again():
    build, arguments = _get_classes(CONFIGURATIONS["nanbeige"])
    one, two = (build(arguments.from_dict(CONFIGURATIONS["nanbeige"] | {"num_loops": loops}))
                for loops in (1, 2))
    blocks = sum(held_bytes(block.module) for block in find_blocks(one))
    assert traffic.weight_bytes(two) - traffic.weight_bytes(one) == blocks
