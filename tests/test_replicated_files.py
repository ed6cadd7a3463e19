"""Networks of replicated layers in files: saved and loaded, dense, inspected, refused."""

from math import prod

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import CONFIG, random_network, tokenizer_texts
from mlx.utils import tree_flatten
from test_replicated import fill
from test_transformed import close

import mlxquant
from mlxquant.base.errors import BadCheckpoint
from mlxquant.layers import formats, traffic
from mlxquant.layers.blocks import held_bytes
from mlxquant.layers.dense import to_dense
from mlxquant.layers.pack import pack
from mlxquant.layers.replicated import ReplicatedLinear
from mlxquant.model.inspection import inspect_folder
from mlxquant.model.loading import open_lazily
from mlxquant.sources import checkpoint

GROUPED = {"self_attn.qkv": ["q_proj", "k_proj", "v_proj"], "self_attn.o": ["o_proj"],
           "mlp.gate_up": ["gate_proj", "up_proj"], "mlp.down": ["down_proj"]}
TOKENS = mx.array([[5, 80, 200, 7]])
SHAPE = {"bits": "ternary", "replicas": 4, "replica_group": 16, "rotation_block": 64}


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def saved(request, tmp_path_factory):
    config = CONFIG | {"tie_word_embeddings": request.param}
    replicas = {f"model.layers.{i}.{path}": {**SHAPE, "linears": names}
                for i in range(config["num_hidden_layers"]) for path, names in GROUPED.items()}
    if not request.param:
        replicas["head"] = {**SHAPE, "linears": ["lm_head"]}
    network = random_network(config)
    formats.install(network, {}, replicas)
    for seed, module in enumerate(m for m in network.modules() if isinstance(m, ReplicatedLinear)):
        fill(module, seed)
    folder = tmp_path_factory.mktemp("replicated") / "model"
    checkpoint.write(folder, formats.config_with(config, {}, replicas),
                     tree_flatten(network.parameters()), tokenizer_texts())
    return network, folder


def test_a_saved_network_has_the_same_logits_bit_for_bit_and_stock_mlx_lm_refuses_it(saved):
    network, folder = saved
    again, _ = mlx_lm.utils.load_model(folder, get_model_classes=formats.model_classes)
    np.testing.assert_array_equal(np.array(again(TOKENS)), np.array(network(TOKENS)))
    names = tree_flatten(again.parameters(), destination={}).keys()
    assert {"model.layers.0.self_attn.qkv.replica_in",
            "model.layers.1.self_attn.q_proj.codes"} <= names
    kept = mlxquant.load(str(folder), dense=False).network
    assert isinstance(kept.layers[0].mlp.down_proj, ReplicatedLinear)
    with pytest.raises(ValueError, match="^Model type mlxquant not supported.$"):
        mlx_lm.load(str(folder))


def test_dense_networks_are_plain_ones(saved):
    network, folder = saved
    dense = to_dense(mlx_lm.utils.load_model(folder, get_model_classes=formats.model_classes)[0])
    plain = random_network(CONFIG | {"tie_word_embeddings": "lm_head" not in network})
    shapes = [{name: a.shape for name, a in tree_flatten(n.parameters())} for n in (dense, plain)]
    assert shapes[0] == shapes[1]
    assert traffic.weight_bytes(dense) == traffic.weight_bytes(network, traffic.float32_bytes)
    close(dense(TOKENS), np.array(network(TOKENS)), 1e-4)


def test_inspection_counts_what_the_file_holds_and_a_gpu_reads(saved):
    network, folder = saved
    look = inspect_folder(folder)
    weights = sum(prod(m.shape) for layer in network.layers for m in layer.modules()
                  if isinstance(m, ReplicatedLinear))
    held = sum(array.nbytes for name, array in mx.load(str(folder / "model.safetensors")).items()
               if ".layers." in name and not name.endswith(("norm.weight", ".bias")))
    assert look.bits_per_weight == pytest.approx(8 * held / weights)
    assert look.untraceable is None
    assert {(layer.format, layer.bits) for layer in look.layers if "layers" in layer.path} == {
        ("replicas K4 G16 rotated", "ternary")}
    unread = 0 if "lm_head" not in network else 4 * 383 * 64  # rows of an embedding that is no head
    run = pack(open_lazily(folder)[0])  # a GPU has ternary codes in two bits each
    assert look.bytes_per_token == held_bytes(run) - unread
    assert look.bytes_per_token_cpu == traffic.weight_bytes(network, traffic.float32_bytes)


def test_a_block_takes_paths_of_its_own():
    block = random_network().layers[0]
    formats.install(block, {},
                    {path: {**SHAPE, "linears": names} for path, names in GROUPED.items()})
    assert block.self_attn.q_proj.input is block.self_attn.qkv is block.self_attn.v_proj.input
    assert block.mlp.down_proj.input is block.mlp.down


@pytest.mark.parametrize("replicas,message", [
    ({"self_attn.qkv": {"bits": 2}}, "replicas of self_attn.qkv as .*needed are bits, linears"),
    ({"self_attn.qkv": {**SHAPE, "linears": []}}, "needed are bits"),
    ({"self_attn.qkv": {**SHAPE, "linears": ["x_proj"]}}, "self_attn.x_proj, which is no linear"),
    ({f"self_attn.{name}": {**SHAPE, "linears": ["q_proj"]} for name in "ab"},
     "self_attn.q_proj, which"),
    ({"self_attn.a": {**SHAPE, "bits": 7, "linears": ["q_proj"]}},
     "self_attn.a: bits is 7, allowed are"),
    ({"self_attn.o_proj": {**SHAPE, "linears": ["q_proj"]}}, "o_proj is taken")])
def test_configurations_that_do_not_fit_are_refused(replicas, message):
    with pytest.raises(BadCheckpoint, match=message):
        formats.install(random_network().layers[0], {}, replicas)
