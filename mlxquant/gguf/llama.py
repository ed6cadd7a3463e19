"""GGUF's ``llama`` architecture (Llama, SmolLM, Mistral without a window) as mlx-lm's."""

from collections import Counter
from dataclasses import dataclass
from typing import Iterator

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Type

from mlxquant.errors import BadCheckpoint, Unsupported
from mlxquant.gguf import repack
from mlxquant.gguf.reader import GGUFFile, GGUFTensor

_MODEL = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_BLOCK = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True)
class Imported:
    """A file whose names and types are all understood; tensors are repacked as they are asked for."""

    config: dict
    sources: dict[str, GGUFTensor]

    def tensors(self) -> Iterator[tuple[str, mx.array]]:
        """Every parameter by its mlx-lm name."""
        dtype = getattr(mx, self.config["torch_dtype"])
        for name, tensor in self.sources.items():
            tensor = _unrotate(name, tensor, self.config)
            if tensor.type in repack.PLAIN:
                yield name, repack.plain(tensor, dtype)
            else:
                path, packed = name.removesuffix(".weight"), repack.affine(tensor)
                yield name, mx.array(packed.weight)
                yield f"{path}.scales", mx.array(packed.scales)
                yield f"{path}.biases", mx.array(packed.biases)


def read(file: GGUFFile) -> Imported:
    """Understand a file's configuration and tensors before anything is written."""
    architecture = file.metadata.get("general.architecture")
    if architecture != "llama":
        raise Unsupported(f"{file.path}: architecture {architecture!r}; supported: 'llama'")
    if "rope_freqs.weight" in file.tensors:
        raise Unsupported(f"{file.path}: Llama 3 rope scaling (rope_freqs.weight) is not imported")
    sources = {_name(file, name): tensor for name, tensor in file.tensors.items()}
    for tensor in sources.values():
        repack.check(tensor)
    config = _config(file, sources)
    _check_complete(file, sources, config)
    return Imported(config, sources)


def _name(file: GGUFFile, name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem in _MODEL and kind == "weight":
        return f"{_MODEL[stem]}.weight"
    prefix, _, rest = stem.partition(".")
    block, _, part = rest.partition(".")
    if prefix == "blk" and block.isdecimal() and part in _BLOCK and kind in ("weight", "bias"):
        return f"model.layers.{block}.{_BLOCK[part]}.{kind}"
    raise Unsupported(f"{file.path}: tensor {name} has no place in the llama architecture")


def _config(file: GGUFFile, sources: dict[str, GGUFTensor]) -> dict:
    def field(key: str, kinds=int, **default):
        value = file.metadata.get(f"llama.{key}", default.get("default"))
        if value is None and "default" in default:
            return None
        if isinstance(value, bool) or not isinstance(value, kinds) or value <= 0:
            raise BadCheckpoint(f"{file.path}: metadata llama.{key} is {value!r}, "
                                "a positive number is needed")
        return value

    if "model.embed_tokens.weight" not in sources:
        raise BadCheckpoint(f"{file.path} holds no token_embd.weight")
    heads, width = field("attention.head_count"), field("embedding_length")
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": width,
        "num_hidden_layers": field("block_count"),
        "intermediate_size": field("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("attention.head_count_kv", default=heads),
        "head_dim": field("attention.key_length", default=width // heads),
        "rms_norm_eps": field("attention.layer_norm_rms_epsilon", float),
        "rope_theta": field("rope.freq_base", float, default=10000.0),
        "max_position_embeddings": field("context_length"),
        "vocab_size": sources["model.embed_tokens.weight"].shape[0],
        "tie_word_embeddings": "lm_head.weight" not in sources,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in sources,
        "mlp_bias": "model.layers.0.mlp.gate_proj.bias" in sources,
        "torch_dtype": _dtype(sources),
    }
    scaling = file.metadata.get("llama.rope.scaling.type", "none")
    if scaling == "linear":
        config["rope_scaling"] = {"type": "linear", "factor": field("rope.scaling.factor", float)}
    elif scaling != "none":
        raise Unsupported(f"{file.path}: rope scaling {scaling!r}; supported: 'linear', 'none'")
    for role in ("bos", "eos"):
        token = file.metadata.get(f"tokenizer.ggml.{role}_token_id")
        if token is not None:
            config[f"{role}_token_id"] = token
    return config | _quantization(sources)


def _dtype(sources: dict[str, GGUFTensor]) -> str:
    types = {tensor.type for tensor in sources.values()}
    if types <= {Type.F32}:
        return "float32"
    return "bfloat16" if types <= {Type.F32, Type.BF16} else "float16"


def _quantization(sources: dict[str, GGUFTensor]) -> dict:
    """mlx-lm's ``quantization`` entry: the commonest width, and each layer that differs."""
    bits = {name.removesuffix(".weight"): repack.BITS[tensor.type]
            for name, tensor in sources.items() if tensor.type in repack.BITS}
    if not bits:
        return {}
    common = Counter(bits.values()).most_common(1)[0][0]
    entry: dict = {"group_size": repack.GROUP, "bits": common}
    entry |= {path: {"group_size": repack.GROUP, "bits": width}
              for path, width in bits.items() if width != common}
    return {"quantization": entry, "quantization_config": entry}


def _check_complete(file: GGUFFile, sources: dict[str, GGUFTensor], config: dict) -> None:
    """Every weight present, of the shape that the metadata promises."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    shapes = {"attn_norm": (width,), "ffn_norm": (width,), "attn_q": (query, width),
              "attn_k": (key, width), "attn_v": (key, width), "attn_output": (width, query),
              "ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
    needed = {"model.embed_tokens.weight": (config["vocab_size"], width),
              "model.norm.weight": (width,)}
    if config["num_hidden_layers"] > len(sources):
        raise BadCheckpoint(f"{file.path} promises {config['num_hidden_layers']} blocks, "
                            f"it holds {len(sources)} tensors")
    for block in range(config["num_hidden_layers"]):
        needed |= {f"model.layers.{block}.{_BLOCK[part]}.weight": shape
                   for part, shape in shapes.items()}
    for name, shape in needed.items():
        if name not in sources:
            raise BadCheckpoint(f"{file.path} lacks the tensor for {name}")
        if sources[name].shape != shape:
            raise BadCheckpoint(f"{file.path}: {sources[name].name} has shape "
                                f"{list(sources[name].shape)}, the metadata implies {list(shape)}")


def _unrotate(name: str, tensor: GGUFTensor, config: dict) -> GGUFTensor:
    """Undo llama.cpp's reordering of query and key rows (pairs for its rotary embedding)."""
    if ".q_proj." in name:
        heads = config["num_attention_heads"]
    elif ".k_proj." in name:
        heads = config["num_key_value_heads"]
    else:
        return tensor
    shape = tensor.data.shape
    rows = tensor.data.reshape(heads, -1, 2, tensor.data.size // tensor.shape[0])
    data = rows.swapaxes(1, 2).reshape(shape)
    return GGUFTensor(tensor.name, tensor.type, tensor.shape, np.ascontiguousarray(data))
