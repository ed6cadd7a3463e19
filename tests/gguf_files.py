"""Write a random mlx-lm model as llama.cpp's converter would: names, order of rows, norms."""

from pathlib import Path

import gguf
import numpy as np
from conftest import CONFIG, TEMPLATE, alphabet
from gguf import GGMLQuantizationType as Type
from mlx.utils import tree_flatten

NUMBERS = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
PERMUTED = ("llama", "smollm3", "granite")
KEYS = {"context_length": "max_position_embeddings", "block_count": "num_hidden_layers",
        "embedding_length": "hidden_size", "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.key_length": "head_dim", "attention.value_length": "head_dim",
        "rope.freq_base": "rope_theta",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps"}


def interleave_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of query and key rows, or of their biases."""
    rows = weight.reshape(heads, 2, -1, *weight.shape[1:])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, network, *, config=CONFIG, architecture="llama", kind=Type.F32,
               pre="gpt-2", drop=(), extra=(), fields=None, parts=1, tokens=None) -> Path:
    """``kind`` is the type of all matrices, or a function from a GGUF name to one; ``parts`` splits
    the file, and the path of the first is returned; ``tokens`` writes another tokenizer to the
    writer it is given."""
    files = [path] if parts == 1 else [path.with_name(f"{path.stem}-{n:05d}-of-{parts:05d}.gguf")
                                       for n in range(1, parts + 1)]
    tensors = [(name, value) for name, value in _tensors(network, config, architecture)
               if name not in drop]
    tensors += extra
    for number, file in enumerate(files):
        writer = gguf.GGUFWriter(file, architecture)
        if parts > 1:
            writer.add_uint16("split.no", number)
            writer.add_uint16("split.count", parts)
            writer.add_int32("split.tensors.count", len(tensors))
        if number == 0:
            _metadata(writer, architecture, config, fields or {})
            (tokens or (lambda writer: _tokenizer(writer, pre)))(writer)
        for name, value in tensors[number::parts]:
            type_ = kind(name) if callable(kind) else kind
            type_ = type_ if value.ndim >= 2 and not name.startswith("rope_f") else Type.F32
            data = value if value.dtype == np.uint8 else gguf.quantize(value, type_)
            writer.add_tensor(name, data, raw_dtype=type_)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return files[0]


def random_blocks(type_: Type, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Blocks as ggml's quantiser makes them, where the package has it; else random codes under
    plausible scales: halves between 0.001 and 0.01 in the places where the type keeps its scale."""
    random = np.random.default_rng(seed + int(type_))
    try:
        values = random.normal(size=(rows, columns)).astype(np.float32)
        return gguf.quantize(values, type_).view(np.uint8)
    except NotImplementedError:
        pass
    block, size = gguf.GGML_QUANT_SIZES[type_]
    blocks = random.integers(0, 256, (rows, columns // block, size), np.uint8)
    places = {Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q6_K: (208,), Type.Q4_K: (0, 2),
              Type.Q5_K: (0, 2)}
    if type_ == Type.IQ1_M:  # the half lies in the top bits of four words, here 0x0Cxx
        words = blocks[..., 48:56].view(np.uint16)
        words &= 0x0FFF
        words[..., 2] |= 0xC000
    else:
        for place in places.get(type_, (0,)):
            scales = random.uniform(0.001, 0.01, blocks.shape[:2]).astype(np.float16)
            blocks[..., place:place + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def _tensors(network, config: dict, architecture: str):
    names = gguf.get_tensor_name_map(NUMBERS[architecture], config["num_hidden_layers"])
    for name, value in tree_flatten(network.parameters()):
        value = np.array(value, np.float32)
        target = names.get_name(name.replace("switch_mlp", "experts"),
                                try_suffixes=(".weight", ".bias"))
        assert target, name
        for part, heads in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
            if architecture in PERMUTED and f".{part}." in name:
                value = interleave_rows(value, config[heads])
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            value = value + 1
        yield target, value


def _metadata(writer, architecture: str, config: dict, fields: dict) -> None:
    if fields.get("attention.key_length", 0) is None:
        fields = fields | {"attention.value_length": None}
    known = {key: config[source] for key, source in KEYS.items() if source in config}
    for key, value in (known | fields).items():
        if value is None:
            continue
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32,
               str: writer.add_string}[type(value)]
        add(key if key.startswith("tokenizer.") else f"{architecture}.{key}", value)


def _tokenizer(writer, pre: str) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(alphabet())
    writer.add_token_types([3] * 3 + [1] * (len(alphabet()) - 3))
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
