"""Every architecture of the table: a random model, written as llama.cpp would, keeps its logits."""

import math

import mlx.core as mx
import numpy as np
import pytest
from conftest import CONFIG
from gguf import GGMLQuantizationType as Type
from gguf_files import write_gguf
from mlx.utils import tree_map
from mlx_lm.models.rope_utils import Llama3RoPE
from mlx_lm.utils import _get_classes

import mlxquant
from mlxquant.base.errors import Unsupported
from mlxquant.sources.gguf import import_file
from mlxquant.sources.gguf.architectures import ARCHITECTURES

EPSILON = {"attention.layer_norm_epsilon": 1e-5, "attention.layer_norm_rms_epsilon": None}
# mlx-lm's configuration beyond the common one, and GGUF's fields beyond the common ones.
CASES = {
    "llama": ({}, {}),
    "smollm3": ({"no_rope_layer_interval": 4, "num_hidden_layers": 4}, {}),
    "granite": ({"logits_scaling": 3.0, "attention_multiplier": 0.2, "embedding_multiplier": 2.0,
                 "residual_multiplier": 0.5, "attention_bias": False, "mlp_bias": False,
                 "head_dim": 16},
                {"attention.key_length": None, "logit_scale": 3.0, "attention.scale": 0.2,
                 "embedding_scale": 2.0,
                 "residual_scale": 0.5}),
    "qwen2": ({"head_dim": 16}, {"attention.key_length": None}),
    "qwen3": ({}, {}),
    "qwen3moe": ({"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
                  "decoder_sparse_step": 1,
                  "mlp_only_layers": [], "moe_intermediate_size": 32, "norm_topk_prob": True},
                 {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}),
    "seed_oss": ({"attention_bias": True}, {}),
    "olmo2": ({"tie_word_embeddings": False, "head_dim": 16}, {"attention.key_length": None}),
    "exaone": ({"num_layers": 2, "layer_norm_epsilon": 1e-5, "head_dim": 16},
               {"attention.key_length": None}),
    "phi3": ({"head_dim": 16, "partial_rotary_factor": 0.5, "tie_word_embeddings": False},
             {"attention.key_length": None, "rope.dimension_count": 8,
              "attention.sliding_window": 2047}),
    "gemma": ({}, {}),
    "gemma2": ({"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
                "query_pre_attn_scalar": 32},
               {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0,
                "attention.sliding_window": 4096}),
    "gemma3": ({"model_type": "gemma3_text", "query_pre_attn_scalar": 32, "sliding_window": 4,
                "sliding_window_pattern": 6, "num_hidden_layers": 7, "rope_theta": 1e6,
                "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 8.0}},
               {"attention.sliding_window": 4, "rope.scaling.type": "linear",
                "rope.scaling.factor": 8.0}),
    "starcoder2": ({"norm_epsilon": 1e-5, "head_dim": 16},
                   EPSILON | {"attention.key_length": None}),
    "stablelm": ({"layer_norm_eps": 1e-5, "head_dim": 16, "use_qkv_bias": True,
                  "partial_rotary_factor": 0.25,
                  "tie_word_embeddings": False},
                 EPSILON | {"attention.key_length": None, "rope.dimension_count": 4,
                            "use_parallel_residual": False}),
    "command-r": ({"model_type": "cohere", "layer_norm_eps": 1e-5, "head_dim": 16,
                   "logit_scale": 0.25},
                  EPSILON | {"attention.key_length": None, "logit_scale": 0.25}),
    "cohere2": ({"layer_norm_eps": 1e-5, "head_dim": 16, "logit_scale": 0.25, "sliding_window": 4,
                 "sliding_window_pattern": 4, "num_hidden_layers": 5},
                EPSILON | {"logit_scale": 0.25, "attention.sliding_window": 4}),
    "glm4": ({"partial_rotary_factor": 0.5, "attention_bias": True, "tie_word_embeddings": False},
             {"rope.dimension_count": 16}),
    "ernie4_5": ({"use_bias": False}, {}),
}


def random_model(architecture: str, changes: dict):
    """The model, with every parameter random so that a norm or bias left out shows."""
    config = CONFIG | {"model_type": architecture} | changes
    model_class, arguments = _get_classes(config)
    network = model_class(arguments.from_dict(config))
    if config["tie_word_embeddings"] and "lm_head" in network:
        network.sanitize({})
    mx.random.seed(1)
    network.update(tree_map(lambda a: mx.random.normal(a.shape) * (0.5 if a.ndim == 1 else 0.15),
                            network.parameters()))
    mx.eval(network.parameters())
    return network, config


def logits_of(network) -> np.ndarray:
    return np.array(network(mx.array([[5, 80, 200, 7, 99, 41, 300, 6]])).astype(mx.float32))


def test_every_architecture_has_a_case():
    assert CASES.keys() == ARCHITECTURES.keys()


@pytest.mark.parametrize("architecture", CASES)
def test_imported_model_gives_the_original_logits(tmp_path, architecture):
    changes, fields = CASES[architecture]
    network, config = random_model(architecture, changes)
    path = write_gguf(tmp_path / "m.gguf", network, config=config, architecture=architecture,
                      fields=fields)
    import_file(path, tmp_path / "out")
    expected, actual = logits_of(network), logits_of(mlxquant.load(str(tmp_path / "out")).network)
    assert np.abs(expected).max() > 0.01
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3moe", "phi3"])
def test_quantised_types_take_the_same_path(tmp_path, architecture):
    changes, fields = CASES[architecture]
    network, config = random_model(architecture, changes)
    path = write_gguf(tmp_path / "m.gguf", network, config=config, architecture=architecture,
                      fields=fields,
                      kind=Type.Q8_0)
    import_file(path, tmp_path / "out")
    expected, actual = logits_of(network), logits_of(mlxquant.load(str(tmp_path / "out")).network)
    assert np.abs(actual - expected).max() < 0.1 * np.abs(expected).max()


def frequency_factors(scaling: dict, head: int, base: float) -> np.ndarray:
    """What llama.cpp's converter stores of Llama 3's scaling."""
    plain = base ** (np.arange(0, head, 2) / head)
    return np.array(Llama3RoPE(head, base=base, scaling_config=scaling)._freqs) / plain


@pytest.mark.parametrize("scaling", [
    {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
    {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
    {"factor": 4.0, "low_freq_factor": 0.5, "high_freq_factor": 6.0,
     "original_max_position_embeddings": 300},
])
def test_llama3_scaling_is_found_again(tmp_path, scaling):
    config = {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", **scaling}}
    network, config = random_model("llama", config)
    factors = frequency_factors(scaling, 32, 500000.0).astype(np.float32)
    path = write_gguf(tmp_path / "m.gguf", network, config=config,
                      extra=[("rope_freqs.weight", factors)])
    import_file(path, tmp_path / "out")
    imported = mlxquant.load(str(tmp_path / "out"))
    rope = imported.network.layers[0].self_attn.rope
    assert np.allclose(rope._freqs, network.layers[0].self_attn.rope._freqs, rtol=1e-4)
    assert imported.config["rope_scaling"]["factor"] == scaling["factor"]


def test_factors_of_another_form_are_refused(tmp_path):
    factors = np.linspace(1, 3, 16).astype(np.float32) ** 2
    path = write_gguf(tmp_path / "m.gguf", random_model("llama", {})[0],
                      extra=[("rope_freqs.weight", factors)])
    with pytest.raises(Unsupported, match="no scaling of Llama 3's form"):
        import_file(path, tmp_path / "out")


@pytest.mark.parametrize("scaling,fields", [
    ({"type": "linear", "factor": 4.0}, {"rope.scaling.type": "linear",
                                         "rope.scaling.factor": 4.0}),
    ({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
     {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
      "rope.scaling.original_context_length": 128}),
])
def test_scalings_in_the_metadata(tmp_path, scaling, fields):
    network, config = random_model("llama", {"rope_scaling": scaling})
    import_file(write_gguf(tmp_path / "m.gguf", network, config=config, fields=fields),
                tmp_path / "out")
    expected, actual = logits_of(network), logits_of(mlxquant.load(str(tmp_path / "out")).network)
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()


def test_longrope_of_phi3(tmp_path):
    long, short = (np.linspace(1, last, 8).astype(np.float32) for last in (9, 2))
    scaling = {"type": "longrope", "long_factor": long.tolist(), "short_factor": short.tolist()}
    changes = {"head_dim": 16, "rope_scaling": scaling, "original_max_position_embeddings": 128,
               "tie_word_embeddings": False}
    network, config = random_model("phi3", changes)
    fields = {"attention.key_length": None, "rope.scaling.original_context_length": 128,
              "rope.scaling.attn_factor": math.sqrt(1 + math.log(4) / math.log(128))}
    path = write_gguf(tmp_path / "m.gguf", network, config=config, architecture="phi3",
                      fields=fields,
                      extra=[("rope_factors_long.weight", long),
                             ("rope_factors_short.weight", short)])
    import_file(path, tmp_path / "out")
    expected, actual = logits_of(network), logits_of(mlxquant.load(str(tmp_path / "out")).network)
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("architecture,fields,message", [
    ("llama", {"rope.scaling.type": "dynamic"},
     "rope scaling 'dynamic'; supported for llama: linear, yarn"),
    ("llama", {"expert_count": 8}, "llama.expert_count = 8 has no place in mlx-lm's llama"),
    ("llama", {"rope.dimension_count": 16}, "16 of 32 dimensions of a head are rotated"),
    ("llama", {"attention.value_length": 16}, "different widths"),
    ("qwen3", {"attention.sliding_window": 4096}, "attention.sliding_window = 4096 has no place"),
])
def test_what_mlx_lm_cannot_compute_is_refused(tmp_path, architecture, fields, message):
    network, config = random_model(architecture, CASES[architecture][0])
    path = write_gguf(tmp_path / "m.gguf", network, config=config, architecture=architecture,
                      fields=fields)
    with pytest.raises(Unsupported, match=message):
        import_file(path, tmp_path / "out")
