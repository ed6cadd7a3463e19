"""GGUF import: exact repacking, names, tokenizer, and files that lie."""

import struct
from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest
from conftest import CONFIG, TEMPLATE, alphabet, random_network
from gguf import GGMLQuantizationType as Type
from mlx.utils import tree_flatten
from mlx_lm.utils import load as stock_load

import mlxquant
from mlxquant.errors import BadCheckpoint, Unsupported
from mlxquant.gguf import import_file, repack
from mlxquant.gguf.reader import GGUFFile, GGUFTensor

GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def interleave_rows(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of query and key rows."""
    rows = weight.reshape(heads, 2, -1, weight.shape[-1])
    return rows.swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, network, *, architecture="llama", kind=Type.F32, pre="gpt-2",
               drop=(), extra=(), **fields) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in ({"block_count": 2, "context_length": 512, "embedding_length": 64,
                        "feed_forward_length": 128, "attention.head_count": 4,
                        "attention.head_count_kv": 2, "attention.key_length": 32} | fields).items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(alphabet())
    writer.add_token_types([3] * 3 + [1] * (len(alphabet()) - 3))
    writer.add_eos_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, value in [*tree_flatten(network.parameters()), *extra]:
        value = np.array(value, np.float32)
        block, _, part = name.removesuffix(".weight").removeprefix("model.layers.").partition(".")
        target = f"blk.{block}.{GGUF_NAMES[part]}" if block.isdigit() else \
            GGUF_NAMES.get(name.removesuffix(".weight"), name)
        if part in ("self_attn.q_proj", "self_attn.k_proj"):
            value = interleave_rows(value, 4 if "q_proj" in part else 2)
        if target in drop:
            continue
        type_ = kind if value.ndim == 2 else Type.F32
        writer.add_tensor(f"{target}.weight", gguf.quantize(value, type_), raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_blocks(type_: Type, rows: int, columns: int) -> GGUFTensor:
    """Blocks as ggml's quantiser makes them from random weights."""
    values = np.random.default_rng(int(type_)).normal(size=(rows, columns)).astype(np.float32)
    return GGUFTensor("w", type_, (rows, columns), gguf.quantize(values, type_))


def dequantise(packed: repack.Affine) -> np.ndarray:
    """MLX's own dequantiser, in float32."""
    return np.array(mx.dequantize(
        mx.array(packed.weight), mx.array(packed.scales).astype(mx.float32),
        mx.array(packed.biases).astype(mx.float32), group_size=32, bits=packed.bits))


@pytest.mark.parametrize("type_", [Type.Q4_0, Type.Q4_1, Type.Q8_0])
@pytest.mark.parametrize("shape", [(1, 32), (3, 96), (64, 256)])
def test_repacked_blocks_equal_ggufs_dequantiser(type_, shape):
    tensor = random_blocks(type_, *shape)
    assert np.array_equal(dequantise(repack.affine(tensor)), gguf.dequantize(tensor.data, type_))


def test_every_tensor_of_the_real_file_is_exact(smollm2):
    from mlxquant.gguf import llama

    file = GGUFFile(smollm2)
    imported = llama.read(file)
    assert len(imported.sources) == 272
    arrays = dict(imported.tensors())
    for name, tensor in imported.sources.items():
        expected = gguf.dequantize(tensor.data, tensor.type).reshape(tensor.shape)
        for part, heads in (("q_proj", 9), ("k_proj", 3)):
            if part in name:  # undo what the import undoes
                expected = expected.reshape(heads, 32, 2, -1).swapaxes(1, 2).reshape(tensor.shape)
        if tensor.type in repack.PLAIN:
            actual = np.array(arrays[name].astype(mx.float32))
        else:
            path = name.removesuffix(".weight")
            actual = dequantise(repack.Affine(
                np.array(arrays[name]), np.array(arrays[f"{path}.scales"]),
                np.array(arrays[f"{path}.biases"]), repack.BITS[tensor.type]))
        assert np.array_equal(actual, expected), name


def test_overflowing_offset_is_refused():
    tensor = random_blocks(Type.Q8_0, 1, 32)
    tensor.data[0, :2] = np.frombuffer(np.float16(1000).tobytes(), np.uint8)
    with pytest.raises(Unsupported, match="outside float16"):
        repack.affine(tensor)


@pytest.mark.parametrize("kind,tolerance", [(Type.F32, 1e-5), (Type.F16, 2e-2), (Type.BF16, 1e-1)])
def test_imported_model_gives_the_original_logits(tmp_path, kind, tolerance):
    network = random_network()
    path = write_gguf(tmp_path / "tiny.gguf", network, kind=kind)
    import_file(path, tmp_path / "out")
    model = mlxquant.load(str(tmp_path / "out"))
    tokens = mx.array([[5, 80, 200, 7, 99]])
    assert mx.abs(model.network(tokens) - network(tokens)).max().item() < tolerance
    assert model.config["tie_word_embeddings"] is True


def test_quantised_import_loads_in_stock_mlx_lm(tmp_path):
    network = random_network()
    import_file(write_gguf(tmp_path / "q.gguf", network, kind=Type.Q8_0), tmp_path / "out")
    stock, _ = stock_load(str(tmp_path / "out"))
    ours = mlxquant.load(str(tmp_path / "out"))
    tokens = mx.array([[5, 80, 200, 7, 99]])
    expected = np.array(network(tokens))
    assert np.abs(np.array(ours.network(tokens)) - expected).max() < 0.1 * np.abs(expected).max()
    gap = mx.abs(stock(tokens).astype(mx.float32) - ours.network(tokens)).max().item()
    assert gap < 0.02 * np.abs(expected).max()  # stock runs in float16 here


def test_tokenizer_comes_from_the_metadata(tmp_path):
    import_file(write_gguf(tmp_path / "t.gguf", random_network()), tmp_path / "out")
    tokenizer = mlxquant.load(str(tmp_path / "out")).tokenizer
    text = "Zoë said: 42 tests, naïve?\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert ids[0] == 1 and tokenizer.eos_token_ids == {2}


def test_real_tokenizer_splits_digits_and_knows_its_template(smollm2_model):
    tokenizer = smollm2_model.tokenizer
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("In 1984 there's"))
    assert pieces == ["In", "Ġ", "1", "9", "8", "4", "Ġthere", "'s"]
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], add_generation_prompt=True)
    assert tokenizer.decode(ids).startswith("<|im_start|>system\nYou are a helpful AI assistant")
    assert tokenizer.decode(ids).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_import_is_cached_until_the_file_changes(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLXQUANT_CACHE", str(tmp_path / "cache"))
    path = write_gguf(tmp_path / "t.gguf", random_network())
    first = mlxquant.resolve(str(path))
    assert mlxquant.resolve(str(path)) == first
    assert capsys.readouterr().err.count("Importing") == 1
    write_gguf(path, random_network(seed=1), context_length=256)
    assert mlxquant.resolve(str(path)) != first


@pytest.mark.parametrize("change,message", [
    (dict(architecture="mamba"), "architecture 'mamba'; supported: 'llama'"),
    (dict(kind=Type.Q5_0), "type Q5_0; types that can be imported: F32, F16, BF16, Q4_0, Q4_1, Q8_0"),
    (dict(pre="tekken"), "splitting rule 'tekken'"),
    (dict(extra=[("rope_freqs", mx.ones(16))]), "Llama 3 rope scaling"),
    (dict(extra=[("blk.0.attn_sinks", mx.ones(16))]), "attn_sinks.weight has no place"),
])
def test_what_is_not_supported_is_refused_by_name(tmp_path, change, message):
    path = write_gguf(tmp_path / "t.gguf", random_network(), **change)
    with pytest.raises(Unsupported, match=message):
        import_file(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change,message", [
    (dict(drop=["blk.1.ffn_up"]), "lacks the tensor for model.layers.1.mlp.up_proj"),
    (dict(embedding_length=96), "the metadata implies"),
    (dict(block_count=10**9), "promises 1000000000 blocks"),
    (dict(block_count=0), "block_count is 0, a positive number is needed"),
])
def test_a_file_that_contradicts_itself_is_refused(tmp_path, change, message):
    path = write_gguf(tmp_path / "t.gguf", random_network(), **change)
    with pytest.raises(BadCheckpoint, match=message):
        import_file(path, tmp_path / "out")


def header(*, magic=b"GGUF", version=3, tensors=0, fields=0, body=b"") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, fields) + body


def named(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


ENTRY = named(b"w") + struct.pack("<I", 1)


@pytest.mark.parametrize("data,message", [
    (b"GG", "too short"),
    (header(magic=b"GGML"), "does not start with GGUF"),
    (header(version=1), "version 1"),
    (header(fields=2**60), "wanted"),
    (header(tensors=2**60), "wanted"),
    (header(fields=1, body=struct.pack("<Q", 2**62)), "wanted"),
    (header(fields=1, body=named(b"\xff\xfe")), "not UTF-8"),
    (header(fields=1, body=named(b"k") + struct.pack("<I", 99)), "unknown metadata type 99"),
    (header(fields=1, body=named(b"k") + struct.pack("<IIQ", 9, 4, 2**50)), "wanted"),
    (header(fields=1, body=named(b"k") + struct.pack("<IIQ", 9, 8, 2**50)), "wanted"),
    (header(fields=2, body=2 * (named(b"k") + struct.pack("<IB", 0, 1))), "duplicate metadata key k"),
    (header(tensors=1, body=named(b"w") + struct.pack("<I", 2**31)), "2147483648 dimensions"),
    (header(tensors=1, body=ENTRY + struct.pack("<QIQ", 2**40, 0, 0)), "spans bytes"),
    (header(tensors=1, body=ENTRY + struct.pack("<QIQ", 4, 0, 2**63)), "spans bytes"),
    (header(tensors=1, body=ENTRY + struct.pack("<QIQ", 33, 3, 0)), "do not divide"),
    (header(tensors=1, body=ENTRY + struct.pack("<QIQ", 0, 0, 0)), "spans bytes"),
    (header(tensors=2, body=2 * (ENTRY + struct.pack("<QIQ", 1, 0, 0)) + bytes(64)), "duplicate tensor w"),
])
def test_lying_headers_end_in_one_line(tmp_path, data, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(BadCheckpoint, match=message) as caught:
        GGUFFile(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_every_truncation_is_refused(tmp_path):
    whole = write_gguf(tmp_path / "t.gguf", random_network()).read_bytes()
    path = tmp_path / "cut.gguf"
    for length in [*range(0, 4000, 97), len(whole) // 2, len(whole) - 33]:
        path.write_bytes(whole[:length])
        with pytest.raises(BadCheckpoint):
            GGUFFile(path)
