"""config.json from GGUF metadata: nothing assumed that the file does not say, nothing dropped."""

from typing import Any

import numpy as np

from mlxquant.base.errors import BadCheckpoint, Unsupported
from mlxquant.sources.gguf import rope, tokenizer
from mlxquant.sources.gguf.architectures import ARCHITECTURES, Architecture
from mlxquant.sources.gguf.reader import Fields, GGUFModel

# Keys that change nothing, or say what the tensors' shapes say again.
_HARMLESS = ("vocab_size", "tensor_data_layout", "attention.layer_norm_epsilon",
             "use_parallel_residual")
# Entries that depend on whether the file holds a tensor.
_PRESENT = {"attention_bias": "blk.0.attn_q.bias", "use_qkv_bias": "blk.0.attn_q.bias",
            "use_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_up.bias",
            "use_qk_norm": "blk.0.attn_q_norm.weight"}


def architecture_of(file: GGUFModel) -> Architecture:
    """Raises ``Unsupported`` for one that is not in the table."""
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise Unsupported(f"{file.path}: architecture {name!r}; "
                          f"supported: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def config_of(file: GGUFModel) -> dict[str, Any]:
    """The configuration of mlx-lm's model, without the formats of its weights. Raises
    ``BadCheckpoint`` for a value that is missing or impossible, ``Unsupported`` for a key that
    would change what the model computes and that mlx-lm's model does not have."""
    architecture, field = architecture_of(file), Fields(file)
    if "token_embd.weight" not in file.tensors:
        raise BadCheckpoint(f"{file.path} holds no token_embd.weight")
    heads, width = field("attention.head_count"), field("embedding_length")
    blocks = field("block_count")
    if blocks > len(file.tensors):
        raise BadCheckpoint(f"{file.path} promises {blocks} blocks, it holds {len(file.tensors)} "
                            "tensors")
    epsilon = field("attention.layer_norm_rms_epsilon", float, default=None)
    config = {
        "model_type": architecture.model_type,
        "hidden_size": width,
        "num_hidden_layers": blocks,
        "intermediate_size": field("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", default=heads),
        "head_dim": field("attention.key_length", default=width // heads),
        architecture.epsilon: epsilon or field("attention.layer_norm_epsilon", float),
        "rope_theta": field("rope.freq_base", (int, float), default=10000.0),
        "max_position_embeddings": field("context_length"),
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **{key: tensor in file.tensors for key, tensor in _PRESENT.items()},
        **architecture.constants,
    }
    for key, source in architecture.keys.items():
        source, *default = source if isinstance(source, tuple) else (source,)
        config[key] = field(source, (bool, int, float), **dict(zip(["default"], default)))
    _check_head(file, field, architecture, config)
    config |= architecture.derived(config) | rope.scaling(file, architecture, config, field)
    _refuse_unknown(file, field, architecture)
    return config | tokenizer.stops(file)


def _check_head(file: GGUFModel, field: Fields, architecture: Architecture,
                config: dict[str, Any]) -> None:
    head = config["head_dim"]
    if field("attention.value_length", default=head) != head:
        raise Unsupported(f"{file.path}: keys and values of different widths are not imported")
    rotated = field("rope.dimension_count", default=head)
    if rotated > head or (rotated < head and not architecture.partial_rotary):
        raise Unsupported(f"{file.path}: {rotated} of {head} dimensions of a head are rotated, "
                          f"which mlx-lm's {config['model_type']} cannot do")
    config["partial_rotary_factor"] = rotated / head


def _refuse_unknown(file: GGUFModel, field: Fields, architecture: Architecture) -> None:
    known = {*field.asked, *_HARMLESS, *architecture.ignored}
    for key, value in file.metadata.items():
        strange = key.startswith(field.prefix) and key.removeprefix(field.prefix) not in known
        if strange and (isinstance(value, np.ndarray) or value not in (0, False, None)):
            raise Unsupported(f"{file.path}: metadata {key} = {value!r} has no place in mlx-lm's "
                              f"{architecture.model_type}")
