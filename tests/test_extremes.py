"""Zeros, huge weights and sources in every one of MLX's modes: no method makes numbers of them
that are none."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from architectures import network_of
from conftest import CONFIG, job, random_network, write_folder
from mlx.utils import tree_flatten

import mlxquant
from mlxquant.base.errors import BadValue
from mlxquant.codes.spec import Spec
from mlxquant.codes.statistics import Statistics
from mlxquant.layers.dense import expanded_weight
from mlxquant.layers.transformed import ActivationSpec
from mlxquant.quantise.assembly import blocks_of
from mlxquant.quantise.plans import noted, plan_blocks, plan_ends
from mlxquant.quantise.trials import weigh

TOKENS = mx.array([[5, 80, 200, 7, 99, 31]])
W8A8 = dict(method="smoothquant", bits=8, group_size=0)
METHODS = {
    "rtn": dict(method="rtn"), "gptq": dict(method="gptq"),
    "corrected": dict(method="gptq", propagation="corrected"),
    "fused": dict(method="gptq", rotation="fused"), "awq": dict(method="awq"),
    "smoothquant": W8A8 | dict(activation=ActivationSpec()),
    "static": W8A8 | dict(activation=ActivationSpec(granularity="static"), alpha=0.5),
    "replica": dict(method="replica", rotation="online", propagation="corrected"),
    "grouped": dict(method="replica", replica_group=8)}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text"
    path.write_text("All work and no play makes Jack a dull boy. " * 40)
    return path


def logits(folder) -> mx.array:
    return mlxquant.load(str(folder)).network(TOKENS).astype(mx.float32)


def distance(a: mx.array, b: mx.array) -> float:
    return (mx.square(a - b).mean() / mx.square(b).mean()).item()


@pytest.fixture(scope="module")
def dead(tmp_path_factory):
    """A gate and values that are zero, so that what is behind them sees only zeros, one input that
    is always zero, and a row of zeros."""
    network = random_network()
    first, second = network.model.layers
    first.mlp.gate_proj.weight = mx.zeros_like(first.mlp.gate_proj.weight)
    second.self_attn.v_proj.weight = mx.zeros_like(second.self_attn.v_proj.weight)
    second.post_attention_layernorm.weight[5] = 0
    second.mlp.up_proj.weight[7] = 0
    return write_folder(tmp_path_factory.mktemp("models") / "dead", network)


@pytest.mark.parametrize("name", METHODS)
def test_dead_inputs_and_dead_weights_stay_as_they_are(name, dead, text, tmp_path):
    options = dict(bits=4, samples=4, length=32) | METHODS[name]
    made = mlxquant.quantize(str(dead), tmp_path / "out", job(text, **options))
    assert 0 < made.added["mean"] < 0.02
    assert distance(logits(tmp_path / "out"), logits(dead)) < 0.02


@pytest.mark.parametrize("method", ["rtn", "gptq", "replica"])
@pytest.mark.parametrize("rotation", [None, "online"])
def test_no_width_does_damage_where_the_input_is_dead(method, rotation):
    specs = [Spec(bits=bits, method=method, rotation=rotation) for bits in (2, 4)]
    weights = [mx.random.normal((rows, 64), key=mx.random.key(rows)) for rows in (8, 24)]
    felt = [mx.ones(len(weight)) for weight in weights]
    for bits, _, damages in weigh(weights, specs, Statistics.empty(64), felt, "q", 0):
        assert damages == [0, 0] and all(bits)


@pytest.mark.parametrize("options", [dict(method="rtn"), dict(method="gptq"),
                                     dict(method="replica")], ids=lambda o: o["method"])
def test_a_weight_too_large_for_its_scale_is_refused_by_name(options, text, tmp_path):
    network = random_network()
    network.model.layers[1].mlp.up_proj.weight[3, 7] = 3e5
    source = write_folder(tmp_path / "in", network)
    with pytest.raises(BadValue, match=r"model\.layers\.1\.mlp\..*up.* exceed what float16 holds"):
        mlxquant.quantize(str(source), tmp_path / "out",
                          job(text, bits=2, samples=1, length=16, **options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [dict(rotation="fused"), dict(embedding_bits=8)],
                         ids=lambda o: next(iter(o)))
@pytest.mark.parametrize("mode,group,bits", [("affine", 32, 4), ("mxfp4", 32, 4), ("nvfp4", 16, 4)])
def test_a_source_in_any_mode_can_be_turned_and_its_embedding_rounded(
        mode, group, bits, options, text, tmp_path):
    network = random_network()
    nn.quantize(network, group, bits, mode=mode)
    weights = dict(tree_flatten(network.parameters()))
    plain = mx.dequantize(*(weights.get(f"model.embed_tokens.{part}")
                            for part in ("weight", "scales", "biases")), group, bits, mode)
    assert mx.allclose(expanded_weight(network.model.embed_tokens), plain, atol=1e-6)
    source = write_folder(tmp_path / "in", network, CONFIG | {
        "quantization": {"group_size": group, "bits": bits, "mode": mode}})
    mlxquant.quantize(str(source), tmp_path / "out",
                      job(text, bits=8, group_size=32, samples=1, length=16, **options))
    assert distance(logits(tmp_path / "out"), logits(source)) < 0.02


@pytest.mark.parametrize("hidden, rotation, note", [
    (96, None, "groups of 32, since 64 does not divide its 96 inputs"),
    (96, "fused", "groups of 32, since 64 does not divide its 96 inputs"),
    (80, None, "80 inputs divide into no group: kept as stored"),
    (80, "fused", "80 inputs divide into no group: stored dense")])
def test_what_no_group_divides_is_rounded_as_far_as_it_can_be_and_says_so(
        hidden, rotation, note, tmp_path):
    """In the embedding and in the blocks, which a fused rotation turns all the same."""
    config = CONFIG | {"hidden_size": hidden, "intermediate_size": 176}
    source = write_folder(tmp_path / "in", random_network(config), config)
    made = mlxquant.quantize(str(source), tmp_path / "out", job(
        method="rtn", bits=8, embedding_bits=8, rotation=rotation))
    for name in ("embed_tokens", "q_proj"):
        assert any(name in said and said.endswith(note) for said in made.notes)
    assert any("down_proj" in said and "176 inputs divide" in said for said in made.notes)
    held = {layer.path: layer for layer in mlxquant.inspect(str(tmp_path / "out")).layers}
    assert (held["model.embed_tokens"].format == "affine g32") == (hidden == 96)
    assert distance(logits(tmp_path / "out"), logits(source)) < 0.002


@pytest.mark.parametrize("rounded", ["embed_tokens", "lm_head", ""])
@pytest.mark.parametrize("bits", [None, 8])
def test_a_source_in_groups_of_32_can_be_turned(rounded, bits, tmp_path):
    """Of embedding and head both may be rounded there, or one."""
    config = CONFIG | {"hidden_size": 96, "tie_word_embeddings": False}
    network = random_network(config)
    nn.quantize(network, 32, 8, class_predicate=lambda path, module: path.endswith(rounded)
                and hasattr(module, "to_quantized"))
    own = {"group_size": 32, "bits": 8}
    held = {path: isinstance(m, (nn.QuantizedLinear, nn.QuantizedEmbedding)) and own
            for path, m in network.named_modules() if hasattr(m, "weight") and m.weight.ndim > 1}
    source = write_folder(tmp_path / "in", network, config | {"quantization": own | held})
    mlxquant.quantize(str(source), tmp_path / "out", job(
        method="rtn", bits=8, rotation="fused", embedding_bits=bits))
    assert distance(logits(tmp_path / "out"), logits(source)) < 0.002


@pytest.mark.parametrize("name, path", [
    ("afm7", "model.layers.*.self_attn.qkv_proj.weight, 2 layers"), ("talkie", "lm_head"),
    ("recurrent_gemma", "model.layers.*.temporal_block.rg_lru.input_gate_weight, 3 layers")])
def test_large_matrices_in_layers_of_another_class_are_noted(name, path):
    network, asked = network_of(name), job(bits=4, group_size=32, embedding_bits=4)
    blocks = blocks_of(network)
    said = noted([*plan_blocks(network, blocks, asked), plan_ends(network, blocks, asked)])
    assert f"{path}: of a kind that is not quantised: kept as stored" in said
